"""The interface of drivers: each has the units of a plan done, in its own way, with the same files in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from distill.drivers.claims import MOST_UNITS_AT_ONCE
from distill.drivers.worker import unit_of
from distill.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.drivers.plan import Plan

log = logging.getLogger(__name__)
DriverName = Literal["ranks", "local", "slurm", "ray"]


class DriverError(RuntimeError):
    """Units could not be done; the message says why and what is kept."""


class HandedOver(Exception):  # noqa: N818  (no error: the work goes on elsewhere)
    """Nothing is left to do here: ``lines`` say how the work is begun elsewhere."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass(frozen=True)
class Task:
    """Units to have done."""

    plan: Plan
    numbers: list[int]  # of units that are not there
    there: Callable[[], set[str]]  # names of the units that are

    def left(self) -> list[int]:
        """Numbers of the units that are not there now."""
        there = self.there()
        return [number for number in self.numbers if self.plan.names[number] not in there]

    def parts(self, workers: int) -> list[list[int]]:
        """The units in goes for so many workers: some for each of several goes, so that all end at about one time."""
        size = max(1, min(MOST_UNITS_AT_ONCE, len(self.numbers) // (4 * workers)))
        return [self.numbers[start : start + size] for start in range(0, len(self.numbers), size)]

    def items(self) -> int:
        """Pairs or rows of all the units."""
        return sum(self.plan.size(number) for number in self.numbers)


class Driver(Protocol):
    """Has units done."""

    @property
    def name(self) -> DriverName: ...

    def run(self, task: Task, done: Callable[[int], object]) -> None:
        """Return when every unit is there; ``done`` is told the number of each.

        Raises:
            HandedOver: they are done later, elsewhere.
            DriverError: some could not be done.
            Stopped: told to; units in hand are finished or dropped.
        """


def drive(driver: Driver, task: Task, counted: Callable[[int], object] = lambda items: None) -> None:
    """Run a driver with progress shown; ``counted`` is told the items of each unit.

    Raises:
        HandedOver, Stopped: as the driver.
        DriverError: a unit is not there in the end.
    """
    plan, unit = task.plan, unit_of(task.plan)
    log.info(
        "%s: %d of %d units are there, %d with %d %s to go; plan: %s",
        driver.name,
        len(plan.names) - len(task.numbers),
        len(plan.names),
        len(task.numbers),
        task.items(),
        unit,
        plan.folder,
    )
    with _counting(task, f"{plan.kind} by {driver.name}", counted) as done:
        driver.run(task, done)
    if left := task.left():
        raise DriverError(
            f"{len(left)} of {len(task.numbers)} units are not there after all were done, the first: "
            f"{plan.names[left[0]]}. Has somebody removed files? The same command does them again"
        )


@contextmanager
def _counting(task: Task, label: str, counted: Callable[[int], object]) -> Iterator[Callable[[int], None]]:
    seen: set[int] = set()
    began = time.monotonic()
    with Progress(task.items(), label, unit=unit_of(task.plan)) as progress:

        def done(number: int) -> None:
            if number not in seen:  # one may be told again by a worker that took it over
                seen.add(number)
                progress.advance(task.plan.size(number))
                counted(task.plan.size(number))

        yield done
    took = time.monotonic() - began
    if seen:
        log.info("%d %s in %.1f s: %.1f a second", progress.done, unit_of(task.plan), took, progress.done / took)
