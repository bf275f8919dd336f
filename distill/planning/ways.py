"""Ways to run a recipe: what each can share among workers, how long it then takes, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.planning.estimate import SCORE, Spread, Stage
from distill.planning.measured import Measured
from distill.planning.ranges import NOTHING, Range, total
from distill.recipe.experiment import Recipe

_RAY_START_S = Range(5, 15, 60)  # of a cluster and its actors; stated
HOUR = 3600.0


@dataclass(frozen=True)
class Way:
    """How a recipe is run.

    Attributes:
        name: For people.
        shares: Kinds of stages that its workers share.
        starts: Whether each worker is a process that loads the models anew.
        overhead: Seconds of the way itself, once.
    """

    name: str
    shares: frozenset[Spread]
    starts: bool = False
    overhead: Range = NOTHING


ONE = Way("one process", frozenset())
WAYS = (
    ONE,
    Way("local processes", frozenset({"any"}), starts=True),
    Way("ranks", frozenset({"any", "items", "ranks", "searches"}), starts=True),
    Way("Slurm array", frozenset({"any"}), starts=True),
    Way("Ray", frozenset({"any"}), starts=True, overhead=_RAY_START_S),
)
"""Ranks are processes of one ``accelerate launch``, on one machine or, by Slurm, on several."""


@dataclass(frozen=True)
class Run:
    """A recipe run in some way.

    Attributes:
        way: How.
        workers: Processes, each with a GPU or a share of the processors.
        seconds: On the clock, by stage.
        wall: All together.
        held: Hours that workers are held, idle or not: what is paid.
        money: At the rate; None where none was given.
    """

    way: Way
    workers: int
    seconds: dict[str, Range]
    wall: Range
    held: Range
    money: Range | None


def runs(
    recipe: Recipe, measured: Measured, stages: Sequence[Stage], *, workers: int, on_gpu: bool, rate: float | None
) -> list[Run]:
    """Every way, with so many workers where it has more than one."""
    return [_run(way, recipe, measured, stages, 1 if way == ONE else workers, on_gpu=on_gpu, rate=rate) for way in WAYS]


def _run(
    way: Way,
    recipe: Recipe,
    measured: Measured,
    stages: Sequence[Stage],
    workers: int,
    *,
    on_gpu: bool,
    rate: float | None,
) -> Run:
    # more processes than processors gain nothing where there is no GPU for each; machines of a cluster have their own
    together = way.name in ("local processes", "ranks") and not on_gpu
    gain = min(workers, max(1, measured.machine.cores // measured.machine.threads)) if together else workers
    seconds = {stage.name: _shared(stage, way, recipe, measured, gain) for stage in stages}
    wall = total(seconds.values()) + (way.overhead if workers > 1 else NOTHING)
    held = wall * (workers / HOUR)
    return Run(way, workers, seconds, wall, held, None if rate is None else held * rate)


def _shared(stage: Stage, way: Way, recipe: Recipe, measured: Measured, gain: int) -> Range:
    """Seconds of a stage; workers end at most a unit apart, and each begins by loading what it needs."""
    if stage.spread not in way.shares or gain == 1:
        return stage.wall
    if stage.spread == "ranks":  # encoding is shared out, the loss is computed by each over all
        shared = stage.wall.less(stage.host) * (1 / gain) + stage.host
    else:
        shared = stage.wall * (1 / gain)
    if stage.spread != "any":
        return shared
    if stage.name == SCORE:
        unit = stage.wall * (min(1.0, recipe.score.pairs_per_unit / max(1.0, stage.calls.mid)) / 2)
        shared = shared + unit
    if way.starts:
        shared = shared + measured.once.start + measured.once.load_teacher
    return shared
