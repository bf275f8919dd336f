"""``distill score``, ``distill embed`` and ``distill work``: scoring and embedding, here or by a driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distill.drivers.driver import Driver
    from distill.drivers.embedding import Wanted
    from distill.experiment import Experiment
    from distill.protocols import Ids, Side
    from distill.score import ScoreReport
    from distill.scorer import TeacherScorer

DriverChoice = Literal["ranks", "local", "slurm", "ray"]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value, e.g. --set train.lr=1e-4")
]
DriverOption = Annotated[
    DriverChoice, typer.Option("--driver", help="ranks: this process, or those of accelerate launch")
]
Workers = Annotated[
    str,
    typer.Option(
        "--workers", metavar="N", help="processes, array tasks or actors, 2 when absent; ray takes LEAST:MOST too"
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", min=0, help="ray and local: may be part of one; local shares out what there is"),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="cores of each worker; when absent this machine's are shared out, on a cluster each has 1",
    ),
]
Address = Annotated[str, typer.Option("--address", help="of a Ray cluster; one on this machine when absent")]
RowsPerUnit = Annotated[  # a unit's file counts its numbers in 32 bits
    int, typer.Option("--rows-per-unit", min=1, max=1 << 18, help="what a kill can lose")
]
Side_ = Literal["both", "image", "text"]


@dataclass(frozen=True)
class Opening:
    """How the commands come to an experiment; handed in by the command line."""

    begin: Callable[..., Experiment]
    open: Callable[..., Experiment]
    timed: Callable[[Experiment], AbstractContextManager[None]]


def score_command(opening: Opening) -> Callable[..., None]:
    """The command ``score``."""

    def score(
        recipe: RecipeName,
        driver: DriverOption = "ranks",
        workers: Workers = "",
        gpus: Gpus = None,
        threads: Threads = None,
        address: Address = "",
        overrides: Overrides = [],  # noqa: B006  (typer copies it)
    ) -> None:
        """Ask the teacher for the scores of the first round's candidates; what the store has is not asked again."""
        from distill.drivers.driver import HandedOver
        from distill.pipeline import first_scores

        made = driver_of(driver, workers, gpus=gpus, threads=threads, address=address)
        x = opening.begin(recipe, overrides, resume=True, arms=[])
        if made is not None:
            x.elsewhere = Asking(x, made)
        with opening.timed(x):
            try:
                known = first_scores(x)
            except HandedOver as handed:
                typer.echo("\n".join(handed.lines))
                return
            typer.echo(f"{len(known.keys)} pairs scored by {x.scorer.score_kind}; store: {x.scorer.where}")

    return score


@dataclass(frozen=True)
class Asking:
    """Has what a store lacks computed by a driver."""

    x: Experiment
    driver: Driver

    def __call__(self, scorer: TeacherScorer, image_ids: Ids, text_ids: Ids) -> ScoreReport:
        """Plan the missing units, and have them done."""
        import time

        from distill.drivers.driver import Task, drive
        from distill.drivers.scoring import plan_scores
        from distill.score import ScoreReport
        from distill.unit import list_units

        began = time.monotonic()
        plan, numbers, served = plan_scores(self.x, scorer, image_ids, text_ids)
        if plan is None:
            return ScoreReport(0, served, time.monotonic() - began)
        task = Task(plan, numbers, lambda: set(list_units(scorer.store.folder)))
        drive(self.driver, task, lambda pairs: self.x.timings.count(asked=pairs))
        return ScoreReport(task.items(), served, time.monotonic() - began)


def embed_command(opening: Opening) -> Callable[..., None]:
    """The command ``embed``."""

    def embed(
        recipe: RecipeName,
        to: Annotated[Path, typer.Option("--to", help="folder for the vectors")],
        arm: Annotated[str, typer.Option("--arm", help="whose student; the last arm when absent")] = "",
        teacher: Annotated[bool, typer.Option("--teacher", help="the teacher's own contrastive head")] = False,
        split: Annotated[str, typer.Option("--split", help="of the data; all of it when absent")] = "",
        side: Annotated[Side_, typer.Option("--side", help="of what")] = "both",
        rows_per_unit: RowsPerUnit = 8192,
        index: Annotated[str, typer.Option("--index", metavar="FACTORY", help="FAISS indexes too: Flat, ...")] = "",
        driver: DriverOption = "ranks",
        workers: Workers = "",
        gpus: Gpus = None,
        threads: Threads = None,
        address: Address = "",
        overrides: Overrides = [],  # noqa: B006
    ) -> None:
        """Unit vectors of pictures and texts, as feature folders; what is there is not computed again."""
        from distill.drivers.driver import HandedOver
        from distill.drivers.embedding import Wanted
        from distill.preflight import check_data

        if teacher and arm:
            raise typer.BadParameter("a student's vectors or the teacher's: give one of both", param_hint="--teacher")
        made = driver_of(driver, workers, gpus=gpus, threads=threads, address=address)
        x = opening.open(recipe, overrides)
        check_data(x)
        sides: tuple[Side, ...] = ("image", "text") if side == "both" else (side,)
        wanted = Wanted(to, "" if teacher else x.arm_named(arm), split, sides, rows_per_unit)
        try:
            embedded(x, wanted, made, index=index)
        except HandedOver as handed:
            typer.echo("\n".join(handed.lines))

    return embed


def embedded(x: Experiment, wanted: Wanted, driver: Driver | None, *, index: str = "") -> None:
    """Have vectors computed and joined; says where they are."""
    from distill.drivers.driver import Task, drive
    from distill.drivers.embedding import Embedder, EmbedJob, join_all, plan_vectors, rows_of, units_of
    from distill.drivers.plan import Plan
    from distill.drivers.ranks import RanksDriver

    embedder = Embedder(x, wanted.arm)
    plan = plan_vectors(x, embedder, wanted) if x.ranks.first else None
    there = set() if plan is None else units_of(plan).there()
    # what the first one has seen, for all: another command may add units meanwhile, and ranks must share out the same
    folder, there = x.ranks.told_by_all((plan.folder if plan is not None else None, there))[0]
    assert folder is not None
    plan = plan or Plan.open(folder)
    task = Task(plan, [n for n, name in enumerate(plan.names) if name not in there], units_of(plan).there)
    if driver is None:
        driver = RanksDriver(x.ranks, lambda task: EmbedJob(task.plan, x, embedder))
    if task.numbers:
        drive(driver, task)
    if not x.ranks.first:
        return
    for side, features in join_all(plan).items():
        typer.echo(f"{side}s: {len(features)} vectors in {features.folder}")
        if index:
            _write_index(features, rows_of(plan, side), wanted.to / f"index-{side}s", index)


def _write_index(features: Any, rows: Ids, folder: Path, factory: str) -> None:
    """Of these rows: the folder of the vectors may hold more."""
    from distill.index import VectorIndex

    made = VectorIndex.build(features.get(rows)["vectors"].numpy(), rows, factory=factory)
    made.save(folder)
    typer.echo(f"index {factory} of {len(rows)} vectors: {folder}")


def driver_of(name: str, workers: str, *, gpus: float | None, threads: int | None, address: str) -> Driver | None:
    """The driver of these options; None = this process, or its ranks. Refuses what does not go together."""
    least, most = _range(workers or "2")
    if address and name != "ray":
        raise typer.BadParameter(f"only --driver ray has an address; this is {name}", param_hint="--address")
    if name == "ranks":
        given = {"--workers": bool(workers), "--gpus-per-worker": gpus is not None, "--threads": threads is not None}
        if ignored := [option for option, was in given.items() if was]:
            raise typer.BadParameter(
                "without --driver the work is done by this process, or by those of accelerate launch: give --driver "
                "local for others",
                param_hint=", ".join(ignored),
            )
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter(
            f"{name} starts its own processes, but a launcher started this one: leave one of both out",
            param_hint="--driver",
        )
    if name == "ray":
        from distill.drivers.on_ray import RayDriver

        return RayDriver(least, most, threads=threads, gpus=gpus, address=address)
    if least != most:
        raise typer.BadParameter(f"{name} has so many workers, not from {least} to {most}", param_hint="--workers")
    if name == "slurm":
        from distill.drivers.slurm import SlurmDriver

        return SlurmDriver(most, threads=threads or 1, gpus=gpus)
    from distill.drivers.local import LocalDriver

    return LocalDriver(most, threads=threads, gpus=gpus)


def _range(workers: str) -> tuple[int, int]:
    least, colon, most = workers.partition(":")
    numbers = [least, most if colon else least]
    if not all(number.isdigit() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise typer.BadParameter(f"expected a number, or LEAST:MOST, from 1; got {workers!r}", param_hint="--workers")
    return int(numbers[0]), int(numbers[1])


def work(
    plan: Annotated[Path, typer.Argument(help="folder of a plan, which a command with --driver names")],
    share: Annotated[
        str, typer.Option("--share", metavar="INDEX/COUNT", help="every COUNT-th unit, from INDEX")
    ] = "0/1",
    serve: Annotated[bool, typer.Option("--serve", hidden=True)] = False,
) -> None:
    """Do units of a plan: what the tasks of a job array run. Units that are there are passed over."""
    from distill.drivers import worker

    if serve:
        worker.serve(plan)
        return
    units, others, items = worker.work_share(plan, share)
    typer.echo(f"share {share}: {units} units with {items} items done here, {others} were there or done by others")
