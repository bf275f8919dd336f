"""What a student loses when the teacher is asked about a part of the candidate pairs only.

``python -m benchmarks.subset [RECIPE] [--set KEY=VALUE] [--loss LABEL=LOSS] [--seeds N] [--quick] [--json FILE]``

The undistilled student, then for each loss and each way of taking a part a student from the same shared steps, all on
one taught teacher and one store of scores. Fewer candidates a query (``mine.k``), all of them asked about, are the
plain way to ask less: they stand beside at a quarter. Figures are RSUM of the first stage on the test split, and the
distinct pairs that a round asks for, labelled ones included. What is done is in the JSON file at any moment; the same
command goes on with it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.sidebyside import JsonFile, Quick, show, write_json

if TYPE_CHECKING:
    from distill.recipe.experiment import TrainRecipe

LOSSES = ("cprd=cprd:accept=top,top=2,weight=0.5", "kl=kl:teacher_temperature=2,weight=0.5")
SHARES = (0.5, 0.25, 0.1)
TINY = (
    "data.train=160", "data.val=20", "data.test=24", "teach.steps=4", "teach.batch_size=16", "train.steps=8",
    "train.batch_size=16", "mine.k=8", "teacher.vision.layers=1", "teacher.text.layers=1", "student.vision.layers=1",
    "student.text.layers=1",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way of asking about a part."""

    name: str
    keys: tuple[str, ...]


def ways(k: int, train: TrainRecipe) -> Iterator[Way]:
    """All pairs first, then parts, those that matter most first; last the same by fewer candidates."""
    yield Way("all", ())
    for share in sorted(SHARES, key=lambda share: share != 0.25):
        for unit in ("pair", "query"):
            for by in ("uniform", "hardness"):
                yield Way(f"{share:.0%} by {unit}, {by}", (f"mine.subset={{share: {share}, by: {by}, unit: {unit}}}",))
    if train.candidates == "in_batch":
        group = max(2, train.group // 2)
        yield Way(f"group = {group}, groupings = 1", (f"train.group={group}", "train.groupings=1"))
    else:
        fewer = max(1, k // 4)
        yield Way(f"k = {fewer}", (f"mine.k={fewer}", f"train.candidates_per_query={fewer}"))


def main(
    recipe: Annotated[str, typer.Argument(help="a recipe's name or file")] = "quickstart",
    overrides: Annotated[list[str], typer.Option("--set", help="as of distill run")] = [],  # noqa: B006
    losses: Annotated[list[str], typer.Option("--loss", help="as of distill compare")] = list(LOSSES),  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    only: Annotated[list[str], typer.Option(help="students whose name holds this, beside plain; all when absent")] = [],  # noqa: B006
    work: Annotated[Path | None, typer.Option(help="folder that keeps teacher, scores and students")] = None,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Train and evaluate every student, print a table."""
    with tempfile.TemporaryDirectory(prefix="cross2dual-subset-") as folder:
        own = [*(TINY if quick else ()), *overrides]
        figures = measure(recipe, own, losses, seeds=seeds, only=only, folder=work or Path(folder), json_file=json_file)
    cells = {name.rsplit("/", 1)[0] for name in figures if name.endswith("/rsum")}
    by_name: dict[str, list[dict[str, float]]] = {}
    for cell in sorted(cells):
        found = {what: figures[f"{cell}/{what}"] for what in ("rsum", "asked")}
        by_name.setdefault(cell.split("/", 1)[1], []).append(found)
    rows = [
        (
            name,
            statistics.mean(each["rsum"] for each in found),
            statistics.stdev(each["rsum"] for each in found) if len(found) > 1 else "",
            statistics.mean(each["asked"] for each in found),
            str(len(found)),
        )
        for name, found in by_name.items()
    ]
    show(f"{recipe}: RSUM against what is asked", ("student", "RSUM", "deviation", "pairs asked", "seeds"), rows)


def measure(
    recipe: str,
    overrides: list[str],
    losses: list[str],
    *,
    seeds: int,
    folder: Path,
    json_file: Path | None,
    only: Sequence[str] = (),
) -> dict[str, float]:
    """``<seed>/<loss>/<way>/rsum`` and ``/asked``; the undistilled student is ``<seed>/plain/rsum``."""
    figures: dict[str, float] = {}
    if json_file is not None and json_file.is_file():
        figures = json.loads(json_file.read_text(encoding="utf-8"))
    for seed in range(seeds):
        for name, arm, keys in students(recipe, overrides, losses):
            cell = f"{seed}/{name}"
            if only and name != "plain" and not any(part in name for part in only):
                continue
            if f"{cell}/rsum" not in figures:
                figures |= {f"{cell}/{what}": value for what, value in train(recipe, arm, keys, seed, folder).items()}
                write_json(json_file, figures)
                print(f"{cell}: RSUM {figures[f'{cell}/rsum']:.1f}, {figures[f'{cell}/asked']:,.0f} pairs", flush=True)  # noqa: T201
    return figures


def students(recipe: str, overrides: list[str], losses: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, arm in the short form of ``distill compare``, and keys of each student of a seed."""
    from distill.recipe.load import load_recipe

    own = load_recipe(recipe, overrides)
    yield "plain", "", list(overrides)
    for way in ways(own.mine.k, own.train):
        for loss in losses:
            yield f"{loss.split('=', 1)[0]}/{way.name}", loss, [*overrides, *way.keys]


def train(recipe: str, loss: str, keys: list[str], seed: int, folder: Path) -> dict[str, float]:
    """RSUM of a student, and how many distinct pairs its rounds ask about."""
    from distill.data.corpus import Split
    from distill.experiment import Experiment
    from distill.pipeline import taught_teacher, trained_arm
    from distill.protocols import fingerprint
    from distill.recipe.build import builders
    from distill.recipe.comparison import comparison_recipe
    from distill.recipe.load import load_recipe
    from distill.results import evaluate, student_vectors

    places = [f"cache={folder / 'cache'}", f"runs={folder}"]
    first: Any = load_recipe(recipe, [*keys, *places, "name=teacher-run", "mine.subset=null"])
    if first.teach is not None:
        teaching = Experiment(first, builders(first), taught=taught_teacher)
        places += [f"teacher.checkpoint={taught_teacher(teaching)}", "teach=null"]
    own = load_recipe(recipe, [*keys, *places, f"seed={seed}", f"name=student-{fingerprint(seed, loss, keys)[:12]}"])
    arms, plain = comparison_recipe(own, [loss] if loss else [])
    name = next(arm for arm in arms.arms if arm != plain) if loss else plain
    arms = arms.model_copy(update={"arms": {name: arms.arms[name]}})
    x = Experiment(arms, builders(arms), taught=taught_teacher)
    split: Split = x.corpus.split(arms.evaluate.split)
    trained = trained_arm(x, name)
    rsum = evaluate(x, student_vectors(x, trained, split), split).retrieval.rsum
    metrics = trained.parent / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    asked = sum(
        line.get(f"teacher/{what}", 0) for line in map(json.loads, lines) for what in ("asked", "served_from_store")
    )
    return {"rsum": rsum, "asked": asked}


if __name__ == "__main__":
    typer.run(main)
