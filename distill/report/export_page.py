"""An exported folder for people: the page that shows its proof, the table of a command, the model card."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.durable import size_of
from distill.export.layout import PRECISIONS, onnx_file, padding_of
from distill.protocols import SIDES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

_HERE = Path(__file__).parent
HEADS = (
    "artefact",
    "side",
    "size",
    "least cosine",
    "largest difference",
    "same best",
    "same ten",
    "largest drop",
    "largest rise",
    "verdict",
)
SPEED_HEADS = ("side", "batch", "tower", "ms an item", "95 %", "times torch", "interval")


def proof_rows(artefacts: Sequence[Mapping[str, Any]], *, failed: str = "left out") -> list[list[str]]:
    """A row an artefact under ``HEADS``: shares in percent, changes of recall in points."""
    return [[*_proof_row(one), "passes" if one["passed"] else failed] for one in artefacts]


def _proof_row(one: Mapping[str, Any]) -> list[str]:
    changes = list(one["recall_change"].values()) or [float("nan")]
    way = f" ({one['way']})" if one["way"] else ""
    return [
        f"{one['name']}{way}",
        one["side"],
        size_of(one["bytes"]) if one.get("bytes") else "–",
        _told(one["least_cosine"], ".6f"),
        _told(one["largest_difference"], ".1e"),
        _told(100 * one["top1"], ".2f"),
        _told(100 * one["top10"], ".2f"),
        _told(min(changes[0], 0.0, *changes), ".2f"),
        _told(max(changes[0], 0.0, *changes), ".2f"),
    ]


def _told(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def speed_rows(speed: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a tower and batch under ``SPEED_HEADS``."""
    return [
        [
            one["side"],
            str(one["batch"]),
            one["name"],
            f"{one['ms']:.3g}",
            f"{one['p95']:.3g}",
            f"{one['times_torch']:.2f}",
            "–" if one["interval"] is None else "{:.2f} to {:.2f}".format(*one["interval"]),
        ]
        for one in speed
    ]


def show_proof(
    artefacts: Sequence[Mapping[str, Any]], *, title: str, failed: str = "left out", console: Console | None = None
) -> None:
    """Print the proof, and below it why each artefact that failed did; ``failed`` is the word for those."""
    from rich.console import Console

    from distill.report.table import show_table

    rows = [[f"{row[0]}, {row[1]}", *row[3:]] for row in proof_rows(artefacts, failed=failed)]
    show_table(["artefact", *HEADS[3:]], rows, title=title, console=console)
    console = console or Console(soft_wrap=True)
    for one in artefacts:
        if one["faults"]:
            console.print(f"{one['name']}, {one['side']}: {'; '.join(one['faults'])}", markup=False, highlight=False)


def to_html(report: Mapping[str, Any]) -> str:
    """The page: self-contained, no script."""
    page: str = _environment(escaped=True).get_template("export.html.j2").render(**_values(report))
    return page


def model_card(report: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> str:
    """``README.md`` of the exported folder, with the metadata that a model hub reads."""
    from distill.data import upright

    source = inspect.getsource(upright.upright_rgb)
    values = _values(report) | {"facts": facts, "metadata": _metadata(report, facts), "upright_source": source}
    values["by_hand"] = _is_plain(folder)
    card: str = _environment(escaped=False).get_template("card.md.j2").render(**values)
    return card


def _is_plain(folder: Path) -> bool:
    """Whether a few lines prepare as the folder's files say: one resize to a fixed size, texts padded as they come."""
    told = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    steps = all(told.get(name) for name in ("do_resize", "do_rescale", "do_normalize"))
    tokens = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    fixed = set(told.get("size", ())) == {"height", "width"} and not told.get("do_center_crop")
    return bool(steps and fixed and tokens.get("pad_token")) and padding_of(folder) == "longest"


def _metadata(report: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    figures, corpus = facts["figures"], report["corpus"]
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type=corpus["name"],
            dataset_name=corpus["name"],
            dataset_split=corpus["split"],
            metric_type=name.replace("i2t_r", "image_to_text_recall@").replace("t2i_r", "text_to_image_recall@"),
            metric_value=round(found["value"], 2),
        )
        for name, found in (figures["recalls"] if figures else {}).items()
    ]
    names = _usable(report["artefacts"])
    libraries = [one for one in ("sentence-transformers", "transformers") if one in names]
    towers = ["onnx"] if any(name.startswith("onnx ") for name in names) else []
    card = ModelCardData(
        library_name=[*libraries, *towers, None][0],
        pipeline_tag="feature-extraction",
        tags=[
            "image-text-retrieval",
            "dual-encoder",
            *(["knowledge-distillation"] if facts["distils"] else []),
            *towers,
        ],
        model_name=f"{facts['name']}-{facts['arm']}" if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _values(report: Mapping[str, Any]) -> dict[str, Any]:
    names = _usable(report["artefacts"])
    index = report["index"]
    return {
        "report": report,
        "heads": HEADS,
        "rows": proof_rows(report["artefacts"]),
        "failed": [one for one in report["artefacts"] if not one["passed"]],
        "speed_heads": SPEED_HEADS,
        "speed_rows": speed_rows(report["speed"]),
        "odd": _odd(report["artefacts"]),
        "plainly": {kind: value for kind, value in report["opened_plainly"].items() if not value >= 0.9999},
        "names": names,
        "others": _reduced_files(report["artefacts"]),
        "padding": '"max_length"' if report["student"].get("padding") == "max_length" else "True",
        "batchwise": any(one["passed"] and one["way"] == "dynamic" for one in report["artefacts"]),
        "index": index,
        "style": (_HERE / "compare.css").read_text(encoding="utf-8"),
    }


def _usable(artefacts: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of what can be used for pictures and texts: each side passes by one way or another."""
    sides: dict[str, set[str]] = {}
    for one in artefacts:
        if one["passed"]:
            sides.setdefault(one["name"], set()).add(one["side"])
    return {name for name, found in sides.items() if found >= set(SIDES)}


def _reduced_files(artefacts: Sequence[Mapping[str, Any]]) -> list[str]:
    """ONNX files of other precisions than float32 that passed; one side may be alone."""
    return [
        onnx_file("", side, precision).as_posix()
        for precision in PRECISIONS[1:]
        for side in SIDES
        if any(one["passed"] and one["name"] == f"onnx {precision}" and one["side"] == side for one in artefacts)
    ]


def _odd(artefacts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(side, kinds, rows of cosines) for pictures and texts."""
    found = []
    for side in ("image", "text"):
        some = [one for one in artefacts if one["side"] == side and one["odd"]]
        if some:
            kinds = list(some[0]["odd"])
            rows = [[one["name"], *(f"{one['odd'][kind]:.5f}" for kind in kinds)] for one in some]
            found.append((side, kinds, rows))
    return found


def _environment(*, escaped: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
