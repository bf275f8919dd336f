"""What a driver costs: the same pairs scored by this process, by local workers and by actors of Ray Data.

``python -m benchmarks.drivers [--quick] [--json FILE]``

A BLIP of the quickstart's size scores made pictures with drawn texts; each way has a store of its own and starts from
nothing, and nothing prepared is kept. Two figures are told apart: the seconds until the first unit is there, paid once
(processes, libraries, the model, the cluster); and the rate from the first unit to the last. A worker has one thread.
The stores of all ways are compared, file by file.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from benchmarks.sidebyside import JsonFile, Quick, show, write_json

if TYPE_CHECKING:
    from distill.drivers.driver import Driver
    from distill.experiment import Experiment

WAYS = ("ranks", "local", "ray")  # ``ranks``: this process alone


@dataclass(frozen=True)
class Sizes:
    """Pictures, drawn texts of each, pairs of a unit, workers, and how often each way is measured."""

    images: int = 600
    texts: int = 32
    pairs_per_unit: int = 512
    workers: int = 2
    rounds: int = 2


@dataclass(frozen=True)
class Run:
    """One run of one way."""

    first_s: float  # until the first unit was there
    whole_s: float
    pairs_per_s: float  # from the first unit to the last
    files: dict[str, bytes]


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    workers: Annotated[int, typer.Option(min=1, help="processes and actors")] = 2,
    folder: Annotated[Path | None, typer.Option(help="where the stores are made for a while")] = None,
) -> None:
    """Measure every way in turn, print a table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = Sizes(120, 8, 64, workers, 1) if quick else Sizes(workers=workers)
    with tempfile.TemporaryDirectory(dir=folder, prefix="cross2dual-drivers-") as place:
        figures = measure(Path(place), sizes)
    pairs = sizes.images * sizes.texts
    rows = [
        (
            way,
            figures[f"{way}_first_s"],
            figures[f"{way}_pairs_per_s"],
            figures[f"{way}_whole_s"],
            figures[f"ratio_{way}"],
        )
        for way in WAYS
    ]
    title = f"{pairs:,} pairs, {sizes.pairs_per_unit} a unit; local and ray with {workers} workers of one thread"
    show(title, ("way", "s to the first unit", "pairs/s after it", "s in all", "rate over local's"), rows)
    write_json(json_file, figures)


def measure(place: Path, sizes: Sizes) -> dict[str, float]:
    """Of each way the least seconds and the best rate over all rounds; ``ratio_<way>``: its rate over local's.

    Raises:
        RuntimeError: two ways gave other scores.
    """
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for number in range(sizes.rounds):
        for way in WAYS:
            runs[way].append(run(place / f"{way}-{number}", way, sizes))
    every = [one for way in WAYS for one in runs[way]]
    if any(one.files != every[0].files for one in every):
        raise RuntimeError("the ways ended with different stores")
    figures: dict[str, float] = {"pairs": sizes.images * sizes.texts, "workers": sizes.workers}
    for way, done in runs.items():
        figures[f"{way}_first_s"] = min(one.first_s for one in done)
        figures[f"{way}_whole_s"] = min(one.whole_s for one in done)
        figures[f"{way}_pairs_per_s"] = max(one.pairs_per_s for one in done)
    for way in WAYS:
        figures[f"ratio_{way}"] = figures[f"{way}_pairs_per_s"] / figures["local_pairs_per_s"]
    figures["ray_start_s"] = figures["ray_first_s"] - figures["local_first_s"]
    return figures


def run(folder: Path, way: str, sizes: Sizes) -> Run:
    """Score all pairs once, into a store of its own."""
    from distill.drivers.driver import Task, drive
    from distill.drivers.scoring import plan_scores
    from distill.unit import list_units

    x = experiment(folder, sizes)
    plan, numbers, _ = plan_scores(x, x.scorer_named(""), *drawn_pairs(x, sizes))
    if plan is None:
        raise RuntimeError(f"{folder} is not empty")
    task = Task(plan, numbers, lambda: set(list_units(x.store.folder)))
    driver = _driver(way, x, sizes.workers)
    at: list[tuple[float, int]] = []
    began = time.perf_counter()
    drive(driver, task, lambda pairs: at.append((time.perf_counter() - began, pairs)))
    whole = time.perf_counter() - began
    after = sum(pairs for moment, pairs in at if moment > at[0][0])
    rate = after / (at[-1][0] - at[0][0]) if after else float("nan")
    return Run(at[0][0], whole, rate, {path.name: path.read_bytes() for path in x.store.folder.glob("unit-*")})


def experiment(folder: Path, sizes: Sizes) -> Experiment:
    """Of the quickstart's data and untaught teacher."""
    from distill.experiment import Experiment
    from distill.pipeline import taught_teacher
    from distill.recipe.build import builders
    from distill.recipe.load import load_recipe

    settings = [
        f"data.train={sizes.images}",
        "data.val=50",
        "data.test=50",
        "teach.steps=1",  # it costs what a taught one does
        "teach.batch_size=16",
        "train.batch_size=16",
        "device=cpu",
        "prepared_gib=0",
        f"score.pairs_per_unit={sizes.pairs_per_unit}",
        f"runs={folder / 'runs'}",
        f"cache={folder / 'cache'}",
    ]
    recipe = load_recipe("quickstart", settings)
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def drawn_pairs(x: Experiment, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Image ids and text ids (P,): each training picture with so many drawn texts."""
    split = x.corpus.split("train")
    draw = np.random.default_rng(0)
    texts = np.stack([draw.choice(split.texts, sizes.texts, replace=False) for _ in split.images])
    return np.repeat(split.images, sizes.texts), texts.reshape(-1)


def _driver(way: str, x: Experiment, workers: int) -> Driver:
    from distill.drivers.local import LocalDriver
    from distill.drivers.ranks import RanksDriver

    if way == "ranks":
        return RanksDriver(x.ranks)
    if way == "local":
        return LocalDriver(workers, threads=1)
    from distill.drivers.on_ray import RayDriver

    return RayDriver(workers, workers, threads=1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    typer.run(main)
