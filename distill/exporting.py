"""``distill export``: from a run to an exported folder that is proven and put in place whole, or not at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.analysis import without_nan
from distill.durable import sha256_of, staged_folder, sweep_temporaries
from distill.export.before import ExportError, check_index, check_libraries, check_room, check_target
from distill.export.layout import FORMAT, REPORT, Precision, padding_of, read_report
from distill.export.proof import GATES, Gate, Sample
from distill.export.write import BY_DEFAULT, Artefact, Origin, Proof, write_artefacts
from distill.protocols import SIDES, Deployable, Side

if TYPE_CHECKING:
    from distill.experiment import Experiment
    from distill.export.items import Known
    from distill.protocols import Ids

log = logging.getLogger(__name__)
PACKAGES = ("cross2dual", "torch", "transformers", "sentence-transformers", "onnx", "onnxruntime", "openvino", "pillow")


@dataclass(frozen=True)
class ExportSettings:
    """What is written and how strictly it is judged.

    Attributes:
        artefacts: Of ``distill.export.write.ARTEFACTS``.
        gates: By precision.
        images: Most images of the split that artefacts are judged on; their captions come with them.
        index: Split whose vectors are written; ``all`` or ``none``; the evaluated split where it is empty.
        seconds: For which each row of the speed table is timed; 0: no such table.
    """

    artefacts: frozenset[str] = BY_DEFAULT
    gates: Mapping[Precision, Gate] = field(default_factory=lambda: GATES)
    images: int = 1000
    index: str = ""
    seconds: float = 1.5


def export(x: Experiment, arm: str, to: Path, settings: ExportSettings, *, replace: bool = False) -> dict[str, Any]:
    """Write, prove and put in place; the report.

    Args:
        x: The run, whose device is the CPU.
        arm: Whose student.
        to: The folder; it must not be there, or be an exported one that may be replaced.
        settings: What and how strictly.
        replace: Whether an exported folder may be replaced.

    Raises:
        ExportError: no such arm, no trained student, a folder in the way, a library that is missing, no room.
        NothingPassedError: no artefact agrees with the student.
        NotWrittenError: the device is full; nothing is left, what was there before is whole.
    """
    to = to.resolve()  # of a link what it points to, which can be replaced
    student = _student(x, arm)
    check_target(to, replace=replace)
    check_libraries(settings.artefacts, student)
    check_index(settings.index, list(x.corpus.splits))
    if to.parent.is_dir():
        sweep_temporaries(to.parent)  # of exports that were killed
    ids = sample_ids(x, settings.images)
    indexed_split = settings.index or x.recipe.evaluate.split
    items = 0 if indexed_split == "none" else sum(map(len, _indexed_ids(x, indexed_split).values()))
    check_room(student, to, settings.artefacts, vectors=items)
    sample = Sample.of(student, x.corpus, ids)
    origin = _origin(x, student, ids)
    with staged_folder(to) as folder:
        proof = Proof(folder, sample, settings.gates)
        write_artefacts(origin, proof, settings.artefacts)
        indexed = _write_index(x, student, folder, indexed_split)
        report = _report(x, arm, student, proof, indexed=indexed, settings=settings)
        _write_pages(x, arm, folder, report)
        _open_to_readers(folder)
        report["files"] = _hashes(folder)
        told = json.dumps(without_nan(report), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / REPORT).write_text(told + "\n", encoding="utf-8")
        check_target(to, replace=replace)  # somebody may have come there meanwhile
    return report


def sample_ids(x: Experiment, most: int) -> dict[Side, Ids]:
    """The first ``most`` images of the evaluated split in an order drawn from the seed, and all their captions."""
    split = x.corpus.split(x.recipe.evaluate.split)
    images = np.sort(np.random.default_rng(x.recipe.seed).permutation(split.images)[:most])
    pairs = x.corpus.split_pairs(split.name)
    return {"image": images, "text": np.unique(pairs[np.isin(pairs[:, 0], images), 1])}


def _student(x: Experiment, arm: str) -> Any:
    folder = x.folder / "arms" / arm / "student"
    if arm not in x.recipe.arms:
        raise ExportError(f"no arm {arm!r} in this run; it has {', '.join(x.recipe.arms)}")
    if not folder.is_dir():
        raise ExportError(f"{folder} is not there: the arm is not trained yet (distill run RECIPE --resume)")
    student = x.builders.saved_student(folder)
    if not isinstance(student, Deployable):
        raise ExportError(
            f"{type(student).__name__} cannot be exported: it has no why_not_stock and no standalone(side), which "
            "gives a tower as a module (see distill.protocols.Deployable)"
        )
    return student.eval().float().cpu()  # type: ignore[attr-defined]  # an nn.Module


def _origin(x: Experiment, student: Any, ids: Mapping[Side, Ids]) -> Origin:
    drawn = np.random.default_rng(x.recipe.seed).permutation(x.corpus.split("train").images)
    return Origin(student, x.corpus, ids, drawn)


def _write_index(x: Experiment, student: Any, folder: Path, which: str) -> dict[str, Any] | None:
    if which == "none":
        return None
    from distill.export.items import write_items

    ids = _indexed_ids(x, which)
    vectors = {side: x.embed(student, side, ids[side]) for side in SIDES}
    write_items(folder, x.corpus, ids, vectors)
    return {"split": which, "images": len(ids["image"]), "texts": len(ids["text"])}


def _indexed_ids(x: Experiment, which: str) -> dict[Side, Ids]:
    names = list(x.corpus.splits) if which == "all" else [which]
    return {side: np.unique(np.concatenate([x.corpus.split(name).ids[side] for name in names])) for side in SIDES}


def _report(
    x: Experiment, arm: str, student: Any, proof: Proof, *, indexed: dict[str, Any] | None, settings: ExportSettings
) -> dict[str, Any]:
    from distill.export.speed import tower_times
    from distill.export.towers import OPSET

    sample = proof.sample
    return {
        "format": FORMAT,
        "versions": _versions(),
        "opset": OPSET,
        "student": {
            "dim": student.dim,
            "identity": student.identity,
            "class": type(getattr(student, "model", student)).__name__,
            "run": x.recipe.name,
            "arm": arm,
            "why_not_stock": student.why_not_stock,
            "padding": padding_of(proof.folder),
        },
        "corpus": {
            "name": x.corpus.name,
            "fingerprint": x.corpus.fingerprint,
            "split": x.recipe.evaluate.split,
        },
        "sample": {"images": len(sample.ids["image"]), "texts": len(sample.ids["text"]), "recalls": sample.recalls},
        "gates": {precision: asdict(gate) for precision, gate in settings.gates.items()},
        "artefacts": [one.as_dict() | {"bytes": _size(proof.folder, one)} for one in proof.judged],
        "opened_plainly": proof.opened_plainly,
        "speed": tower_times(student, proof.folder, sample, seconds=settings.seconds),
        "index": indexed,
    }


def _write_pages(x: Experiment, arm: str, folder: Path, report: Mapping[str, Any]) -> None:
    from distill.facts import run_facts
    from distill.report.export_page import model_card, to_html

    facts = run_facts(x, arm)
    (folder / "README.md").write_text(model_card(report, facts, folder), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")


def _open_to_readers(folder: Path) -> None:
    """Files get the permissions that the user's mask gives: some libraries write for their own user alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    return found


def judged_by(folder: Path) -> tuple[Mapping[Precision, Gate], int]:
    """Gates that an exported folder was judged by, and how many pictures.

    Raises:
        NotAnExportError: not an exported folder.
    """
    report = read_report(folder)
    gates = {name: Gate(**gate) for name, gate in report.get("gates", {}).items()}
    return {**GATES, **gates}, report.get("sample", {}).get("images", ExportSettings.images)


def check_export(x: Experiment, arm: str, folder: Path, settings: ExportSettings) -> list[Artefact]:
    """Prove a folder anew, as it is now, against the run's student; nothing in it is changed.

    Changed files are logged; files that are gone, and what a loader refuses outright, are faults too.

    Raises:
        NotAnExportError: not an exported folder.
        ExportError: it was made of another student, or one whose files are not readable.
    """
    from distill.export.check import judge_folder

    report = read_report(folder)
    if missing := [name for name in ("files", "index") if name not in report]:
        raise ExportError(f"{folder / REPORT} has no {', '.join(missing)}: export again")
    student = _student(x, arm)
    if report["student"]["identity"] != student.identity:
        raise ExportError(
            f"{folder} was made of another student than {x.recipe.name}'s arm {arm}: of run "
            f"{report['student']['run']}, arm {report['student']['arm']}; name that one"
        )
    now = _hashes(folder)
    gone = [name for name in report["files"] if name not in now]
    for name, known in report["files"].items():
        if name in now and now[name] != known:
            log.warning("%s is changed since it was exported", folder / name)
    sample = Sample.of(student, x.corpus, sample_ids(x, settings.images))
    items = _known_items(x, student, report["index"], most=settings.images)
    return judge_folder(Proof(folder, sample, settings.gates), gone=gone, items=items)


def _known_items(x: Experiment, student: Any, index: Mapping[str, Any] | None, *, most: int) -> dict[Side, Known]:
    """What an index of that split has to hold, with the student's own vectors of some."""
    from distill.export.items import Known

    found = {}
    for side, ids in (_indexed_ids(x, index["split"]) if index else {}).items():
        some = np.sort(np.random.default_rng(x.recipe.seed).permutation(ids)[:most])
        found[side] = Known(ids, some, x.embed(student, side, some))
    return found


def _size(folder: Path, one: Artefact) -> int:
    """Of what is left of it, in bytes; 0 where it was taken out."""
    paths = [folder / name for name in one.files]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
