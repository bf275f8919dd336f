"""The exported folder: artefacts are written, proven one by one, and what fails is taken out again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.export import routes, towers
from distill.export.layout import STEMS, Precision, onnx_file, padding_of
from distill.export.proof import GATES, NOTHING, Agreement, Gate, Sample, faults, opened_plainly
from distill.export.runtime import ImagePreparation
from distill.inference import batches_of
from distill.protocols import SIDES

if TYPE_CHECKING:
    from distill.data.corpus import Corpus
    from distill.exact import Vectors
    from distill.export.routes import Route
    from distill.protocols import Ids, Side

log = logging.getLogger(__name__)
ARTEFACTS = ("transformers", "sentence-transformers", "onnx", "fp16", "int8", "torch-export", "openvino")
"""What can be asked for; ``onnx`` is what fp16, int8 and OpenVINO are made of."""
BY_DEFAULT = frozenset(ARTEFACTS[:5])
_CALIBRATION = 128  # training pictures that int8 ranges are read off
_CALIBRATED_AT_ONCE = 16
# Where something was loaded from, and how; and the classes of another task that a tower was trained for once.
_LOCAL_KEYS = frozenset({"_name_or_path", "is_local", "local_files_only", "id2label", "label2id"})


class NothingPassedError(ValueError):
    """No artefact agreed with the student, so that there is nothing to export."""


@dataclass(frozen=True)
class Origin:
    """What is exported.

    Attributes:
        student: In eval mode, float32, on the CPU.
        corpus: Where the real queries come from.
        ids: Rows of the split that artefacts are judged on, by side.
        calibration: Rows of training images, in a drawn order.
    """

    student: Any
    corpus: Corpus
    ids: Mapping[Side, Ids]
    calibration: Ids


@dataclass
class Artefact:
    """One artefact of one side (of both, where ``side`` is None) and what the proof found."""

    name: str
    side: Side | None
    precision: Precision
    agreement: Agreement
    faults: Sequence[str]
    files: Sequence[str] = ()
    way: str | None = None  # of int8

    @property
    def label(self) -> str:
        """For messages."""
        way = f" ({self.way})" if self.way else ""
        return f"{self.name}{way}, {'both sides' if self.side is None else self.side + 's'}"

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        found = {"name": self.name, "side": self.side or "both", "precision": self.precision, "way": self.way}
        return {**found, "passed": not self.faults, "faults": list(self.faults), **self.agreement.as_dict()}


@dataclass
class Proof:
    """The artefacts of a folder, as they are judged one after another."""

    folder: Path
    sample: Sample
    gates: Mapping[Precision, Gate] = field(default_factory=lambda: GATES)
    judged: list[Artefact] = field(default_factory=list)
    vectors: dict[tuple[str, Side], Vectors] = field(default_factory=dict)
    opened_plainly: dict[str, float] = field(default_factory=dict)  # see the function of that name

    def judge(self, route: Route, *, way: str | None = None) -> Artefact:
        """Measure a route; nothing is removed."""
        vectors = self.sample.embed(route)
        found = self.sample.measure(route, vectors)
        said = faults(found, self.gates[route.precision], precision=route.precision)
        one = Artefact(route.name, route.side, route.precision, found, said, route.files, way)
        self.judged.append(one)
        self.vectors[route.name, route.side] = vectors
        log.info("%s: %s", one.label, "; ".join(said) if said else f"passes, least cosine {found.least_cosine:.6f}")
        return one

    def keep(self, route: Route, *, way: str | None = None) -> bool:
        """Measure a route and remove its files where it fails."""
        one = self.judge(route, way=way)
        if one.faults:
            remove(self.folder, one.files)
        return not one.faults

    def keep_together(self, made: Sequence[Route]) -> bool:
        """Measure routes that are made of the same files: all stay, or all go."""
        judged = [self.judge(route) for route in made]
        failed = [one.label for one in judged if one.faults]
        for one in judged if failed else ():
            one.faults = one.faults or [f"passes, but is made of the same files as {', '.join(failed)}"]
            remove(self.folder, one.files)
        return not failed

    def judge_pair(self, name: str, precision: Precision) -> Artefact | None:
        """Both towers of a reduced precision together, where both are there."""
        if any((name, side) not in self.vectors for side in SIDES):
            return None
        found = self.sample.agreement({side: self.vectors[name, side] for side in SIDES})
        one = Artefact(name, None, precision, found, faults(found, self.gates[precision], precision=precision))
        self.judged.append(one)
        log.info("%s: %s", one.label, "; ".join(one.faults) if one.faults else "passes")
        return one


def write_artefacts(origin: Origin, proof: Proof, wanted: frozenset[str]) -> None:
    """Fill the proof's folder with what was asked for and passes.

    Raises:
        NothingPassedError: nothing does.
        ValueError: a tower cannot be traced.
    """
    _write_repository(origin.student, proof, wanted)
    if wanted - {"transformers", "sentence-transformers"}:
        _write_towers(origin, proof, wanted)
    if all(one.faults for one in proof.judged):
        told = "\n".join(f"  {one.label}: {'; '.join(one.faults)}" for one in proof.judged)
        raise NothingPassedError(f"no artefact agrees with the student, so nothing is exported:\n{told}")


def remove(folder: Path, files: Sequence[str]) -> None:
    """Take files and folders out of an exported folder."""
    for name in files:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_repository(student: Any, proof: Proof, wanted: frozenset[str]) -> None:
    """Config, tokenizer and image processor in any case: every route prepares by them. Weights where a class fits."""
    folder = proof.folder
    student.save_pretrained(folder)
    for own in ("student.json", "student_heads.safetensors"):  # of ours; nobody else reads them
        (folder / own).unlink(missing_ok=True)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        kept = _without_local(json.loads(path.read_text("utf-8")))
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    stock = student.why_not_stock is None
    passed = False
    if stock and "transformers" in wanted:
        made = routes.transformers_routes(folder)
        passed = proof.keep_together(made)
        proof.opened_plainly = opened_plainly(made[1], proof.sample) if passed else {}
    if passed and "sentence-transformers" in wanted:
        write_sentence_transformers(folder)
        proof.keep_together(routes.sentence_transformers_routes(folder))
    if not passed:
        (folder / "model.safetensors").unlink(missing_ok=True)


def _without_local(value: Any) -> Any:
    """JSON without ``_LOCAL_KEYS``, which transformers writes and no embedding depends on."""
    if isinstance(value, dict):
        return {key: _without_local(one) for key, one in value.items() if key not in _LOCAL_KEYS}
    return value


def write_sentence_transformers(folder: Path) -> None:
    """The files that make a transformers repository one of sentence-transformers too, with a Normalize module."""
    import warnings

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    beside = folder / "of-sentence-transformers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = SentenceTransformer(str(folder), device="cpu")
        model.append(Normalize())
        if padding_of(folder) == "max_length":  # it pads to the longest text unless told so
            model[0].processing_kwargs = {"text": {"padding": "max_length"}}
        model.save_pretrained(str(beside), create_model_card=False)
    listed = json.loads((beside / "modules.json").read_text("utf-8"))
    listed[1]["type"] = "sentence_transformers.models.Normalize"  # which versions from 5.4 on know, not 6.0 on alone
    (beside / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    for name in routes.SENTENCE_TRANSFORMERS_FILES:
        shutil.move(beside / name, folder / name)
    shutil.rmtree(beside)


def _write_towers(origin: Origin, proof: Proof, wanted: frozenset[str]) -> None:
    folder, examples = proof.folder, _examples(origin)
    for side in SIDES:
        _write_tower(origin, folder, side, examples[side], wanted=wanted)
    for route in [
        *routes.program_routes(folder),
        *routes.openvino_routes(folder),
        *routes.onnx_routes(folder, "fp32"),
    ]:
        proof.keep(route)
    for precision, write in _REDUCED.items():
        if precision in wanted:
            for side in SIDES:
                if onnx_file(folder, side, "fp32").is_file():
                    write(origin, proof, side)
            _keep_pair(proof, precision)
    if "onnx" not in wanted:  # what the others were made of: neither here nor in the report
        for one in [one for one in proof.judged if one.name == "onnx fp32"]:
            remove(folder, one.files)
            proof.judged.remove(one)


def _write_tower(origin: Origin, folder: Path, side: Side, example: Any, *, wanted: frozenset[str]) -> None:
    """In float32, by every runtime that was asked for."""
    names = list(origin.student.standalone(side).input_names)
    program = towers.traced(origin.student, side, example)
    towers.write_onnx(program, onnx_file(folder, side, "fp32"), side=side, input_names=names)
    if "torch-export" in wanted:
        towers.write_program(program, folder / "torch_export" / f"{STEMS[side]}.pt2", input_names=names)
    if "openvino" in wanted:
        towers.write_openvino(onnx_file(folder, side, "fp32"), folder / "openvino" / f"{STEMS[side]}.xml")


def _write_fp16(_: Origin, proof: Proof, side: Side) -> None:
    target = onnx_file(proof.folder, side, "fp16")
    if _made(proof, side, target, lambda: towers.write_fp16(onnx_file(proof.folder, side, "fp32"), target)):
        proof.keep(_route(proof.folder, "fp16", side))


def _write_int8(origin: Origin, proof: Proof, side: Side) -> None:
    """By the ways that suit the tower, until one passes."""
    source = onnx_file(proof.folder, side, "fp32")
    for way in towers.INT8_WAYS[towers.has_convolutions(source)]:
        calibration = _calibration(origin, proof.folder) if way == "static" else ()
        target = onnx_file(proof.folder, side, "int8")
        write = partial(towers.write_int8, source, target, way=way, calibration=calibration)
        if _made(proof, side, target, write, way=way) and proof.keep(_route(proof.folder, "int8", side), way=way):
            return


def _made(proof: Proof, side: Side, target: Path, write: Callable[[], None], *, way: str | None = None) -> bool:
    """Whether a reduced tower could be written; its library's refusal is a fault of this artefact alone."""
    try:
        write()
    except OSError:
        raise
    except Exception as error:  # of many kinds: an operator that is not known, a file that is too large
        target.unlink(missing_ok=True)
        precision: Precision = "fp16" if way is None else "int8"
        said = [f"cannot be made: {type(error).__name__}: {error}"]
        proof.judged.append(Artefact(f"onnx {precision}", side, precision, NOTHING, said, way=way))
        log.info("%s: %s", proof.judged[-1].label, said[0])
        return False
    return True


_REDUCED: Mapping[Precision, Callable[[Origin, Proof, Side], None]] = {"fp16": _write_fp16, "int8": _write_int8}


def _route(folder: Path, precision: Precision, side: Side) -> Route:
    return next(route for route in routes.onnx_routes(folder, precision) if route.side == side)


def _keep_pair(proof: Proof, precision: Precision) -> None:
    """Of towers that pass alone and fail together, the one that loses more goes."""
    files = {side: onnx_file(proof.folder, side, precision) for side in SIDES}
    if not all(path.is_file() for path in files.values()):
        return
    pair = proof.judge_pair(f"onnx {precision}", precision)
    if pair is not None and pair.faults:
        alone = [one for one in proof.judged if one.name == pair.name and one.side is not None and not one.faults]
        worse = min(alone, key=lambda one: min(one.agreement.recall_change.values()))
        worse.faults = [f"passes alone, but not together with the other tower: {'; '.join(pair.faults)}"]
        remove(proof.folder, worse.files)


def _examples(origin: Origin) -> dict[Side, Any]:
    """Three items of each side: sizes of 0 and 1 would become constants of the program."""
    texts = [origin.corpus.texts[row] for row in origin.ids["text"][:3].tolist()]
    texts += ["one more"] * (3 - len(texts))
    images = origin.corpus.load_images(np.resize(origin.ids["image"][:3], 3))
    given: dict[str, Any] = dict(origin.student.prepare_texts(texts))
    if "attention_mask" not in given:  # where a length is fixed, training derives it
        given["attention_mask"] = given["input_ids"].new_ones(given["input_ids"].shape)
    return {"text": given, "image": origin.student.prepare_images(images)}


def _calibration(origin: Origin, folder: Path) -> list[dict[str, Any]]:
    prepare = ImagePreparation(folder)
    rows = batches_of(origin.calibration[:_CALIBRATION], _CALIBRATED_AT_ONCE)
    rows = [part for part in rows if len(part) == len(rows[0])]  # the calibrator wants batches of one size
    return [prepare(origin.corpus.load_images(part)) for part in rows]
