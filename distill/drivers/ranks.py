"""This process alone, or the ranks of ``accelerate launch``: unit i to rank i mod world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.drivers.claims import done_by
from distill.drivers.worker import open_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.drivers.claims import Job
    from distill.drivers.driver import DriverName, Task
    from distill.ranks import Ranks


class RanksDriver:
    """Does its own share in this process; returns when all ranks have done theirs."""

    name: DriverName = "ranks"

    def __init__(self, ranks: Ranks, job: Callable[[Task], Job] = lambda task: open_job(task.plan.folder)) -> None:
        """``job`` opens a task's job where it should not be opened anew from the plan."""
        self._ranks, self._job = ranks, job

    def run(self, task: Task, done: Callable[[int], object]) -> None:
        """Until every unit is there."""
        self._ranks.wait()  # nobody begins while another still counts what is there
        own = task.numbers[self._ranks.index :: self._ranks.count]
        for number, _, _ in done_by(self._job(task), own) if own else ():
            done(number)
        self._ranks.wait()
