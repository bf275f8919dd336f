"""Times of several ways to do the same, taken in rounds: whatever else the machine does hits all of them alike.

In each round every task that takes part runs once, in an order drawn anew. A slow task takes part in some rounds only,
spread over all of them; the one that the others are compared with takes part in every round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distill.progress import Progress

State: TypeAlias = dict[str, Any]
"""What the stages of one call hand on; begins as {"number": of the round}."""
Seconds = np.ndarray[Any, np.dtype[np.float64]]
_WARM_UPS = 3
_MOST = 400  # calls of a task
_LEAST = 3  # however slow it is


@dataclass(frozen=True)
class Stage:
    """A piece of a call. Its times count ``scale``-fold: of work that was done for a sample only."""

    part: str
    work: Callable[[State], object]
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """A call, as its stages in order; it answers ``queries`` queries at once."""

    name: str
    stages: tuple[Stage, ...]
    queries: int = 1


@dataclass(frozen=True, eq=False)
class Timed:
    """Times of a task.

    Attributes:
        queries: Answered by one call.
        rounds: (C,) numbers of the rounds it took part in, ascending.
        wall: Seconds (C,) of each call by part, on the clock.
        cpu: Seconds (C,) of each call by part, of all the process's threads.
    """

    queries: int
    rounds: np.ndarray[Any, np.dtype[np.int64]]
    wall: Mapping[str, Seconds]
    cpu: Mapping[str, Seconds]

    @property
    def total(self) -> Seconds:
        """Seconds (C,) of whole calls, on the clock."""
        return np.asarray(np.sum(list(self.wall.values()), axis=0))


@dataclass(frozen=True)
class Cost:
    """Milliseconds a query: median, 90th and 95th percentile over calls on the clock, median of processor time."""

    median: float
    p90: float
    p95: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds that both took part in of one's time over the other's, with its 95 % interval.

    The interval is that of a quantile from order statistics; None where there are too few rounds for one.
    """

    median: float
    low: float | None
    high: float | None
    rounds: int


def cost_of(wall: Seconds, cpu: Seconds, *, queries: int = 1) -> Cost:
    """Of the seconds (C,) of calls that answer ``queries`` queries each.

    Raises:
        ValueError: there is no call.
    """
    if not len(wall):
        raise ValueError("there is no call to take a median over")
    median, p90, p95 = (1000 / queries * float(value) for value in np.percentile(wall, [50, 90, 95]))
    return Cost(median, p90, p95, 1000 / queries * float(np.median(cpu)))


def costs(timed: Timed) -> tuple[Cost, dict[str, Cost]]:
    """Of whole calls, and of each part by itself; medians of parts do not add up to that of the whole."""
    parts = {name: cost_of(timed.wall[name], timed.cpu[name], queries=timed.queries) for name in timed.wall}
    return cost_of(timed.total, np.sum(list(timed.cpu.values()), axis=0), queries=timed.queries), parts


def ratio_of(timed: Timed, base: Timed) -> Ratio:
    """One's time a query over the other's, round by round.

    Raises:
        ValueError: they never took part in the same round.
    """
    from scipy.stats import quantile_test

    _, own, others = np.intersect1d(timed.rounds, base.rounds, return_indices=True)
    if not len(own):
        raise ValueError("a ratio needs rounds that both took part in, and there is none")
    found = timed.total[own] / timed.queries / (base.total[others] / base.queries)
    middle = float(np.median(found))
    ends = quantile_test(found, q=middle, p=0.5).confidence_interval(0.95)
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return Ratio(middle, low, high, len(found))


def time_rounds(
    tasks: Sequence[Task],
    *,
    base: str | None = None,
    seconds: float,
    seed: int = 0,
    settle: Callable[[], object] = lambda: None,
    label: str = "timing",
) -> dict[str, Timed]:
    """Run every task for about ``seconds`` after its warm-up, at least 3 and at most 400 times.

    Args:
        tasks: Each with a name of its own.
        base: Name of the task that takes part in every round; none does where it is None.
        seconds: For each task.
        seed: Of the order within each round.
        settle: Called before the clock is read, for a device that works by itself.
        label: Of the line that shows how far it is.

    Returns:
        Times by name.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"tasks need names of their own, got {', '.join(names)}")
    calls = {task.name: calls_within(seconds, _warmed_up(task, seconds, settle)) for task in tasks}
    rounds = max(calls.values())
    if base is not None:
        calls[base] = rounds
    taken: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {name: [] for name in names}
    order = np.random.default_rng(seed)
    with _uncollected(), Progress(rounds, label, unit="rounds") as progress:
        for number in range(rounds):
            for place in order.permutation(len(tasks)).tolist():
                task = tasks[place]
                if takes_part(number, calls[task.name], rounds):
                    taken[task.name].append((number, _called(task, number, settle)))
            progress.advance()
    return {task.name: _timed(task, taken[task.name]) for task in tasks}


def calls_within(seconds: float, one: float) -> int:
    """How often a task that takes ``one`` second a call runs in ``seconds``: at least 3 times, at most 400."""
    return int(min(_MOST, max(_LEAST, seconds / max(one, 1e-9))))


def takes_part(number: int, calls: int, rounds: int) -> bool:
    """Whether a task with ``calls`` calls runs in round ``number``: they are spread evenly, the first in round 0."""
    return number * calls // rounds != (number - 1) * calls // rounds


def _warmed_up(task: Task, seconds: float, settle: Callable[[], object]) -> float:
    """Seconds of its quickest call; a task whose first call takes long is not called again."""
    took: list[float] = []
    while len(took) < _WARM_UPS and sum(took) <= seconds:
        began = time.perf_counter()
        _called(task, len(took), settle)
        took.append(time.perf_counter() - began)
    return min(took)


def _called(task: Task, number: int, settle: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds (on the clock, of the processor) of each stage."""
    state: State = {"number": number}
    found = []
    for stage in task.stages:
        wall, cpu = time.perf_counter(), time.process_time()
        stage.work(state)
        settle()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def _timed(task: Task, taken: Sequence[tuple[int, list[tuple[float, float]]]]) -> Timed:
    seconds = np.array([each for _, each in taken])  # (C, stages, 2)
    seconds = seconds * np.array([stage.scale for stage in task.stages])[:, None]
    parts = list(dict.fromkeys(stage.part for stage in task.stages))
    of_part = {part: [stage.part == part for stage in task.stages] for part in parts}
    wall, cpu = ({part: seconds[:, of_part[part], kind].sum(axis=1) for part in parts} for kind in (0, 1))
    return Timed(task.queries, np.array([number for number, _ in taken], np.int64), wall, cpu)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector would stop some calls and not others, as ``timeit`` has it."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
