"""Who has a unit in hand: a lock on one byte of a file beside the plan, which ends with the process that holds it.

So no unit is done twice at once, not even by two drivers on one plan or by a worker that outlived its driver. It is no
record: what is done is told by the files of the units alone. Where a file system has no locks, nobody is kept waiting;
a unit may then be done twice, and either file is right.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from distill.durable import writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from distill.drivers.plan import Plan

_POLL_S = 0.2
MOST_UNITS_AT_ONCE = 8  # in one process's hands


class Job(Protocol):
    """A plan with all that is needed to do its units."""

    @property
    def plan(self) -> Plan: ...

    def there(self) -> set[str]:
        """Names of the units whose files are there; nothing is read."""

    def is_there(self, number: int) -> bool:
        """Whether the file of this unit is; without a look at all others, of which there may be a million."""

    def do(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Do these units; yields (number, items) of each once its file is there."""


def done_by(job: Job, numbers: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """Have these units done; yields (number, items, whether it was done here) of each once its file is there.

    One that is there is passed on; one that another process has in hand is waited for.
    """
    with closing(Claims(job.plan.folder)) as claims:
        left = dict.fromkeys(numbers)
        while left:
            # Some at a time: what waits here may be done by another command on the same plan meanwhile.
            own = list(islice((number for number in left if claims.take(number)), MOST_UNITS_AT_ONCE))
            to_do = []
            for number in own:
                if job.is_there(number):  # after the claim: one that is not there now is in nobody else's hands
                    del left[number]
                    claims.drop(number)
                    yield number, job.plan.size(number), False
                else:
                    to_do.append(number)
            for number, items in job.do(to_do) if to_do else ():
                del left[number]
                claims.drop(number)
                yield number, items, True
            if not own:
                time.sleep(_POLL_S)


class Claims:
    """This process's claims on units of a plan."""

    def __init__(self, plan: Path) -> None:
        """The file of the locks lies beside the plan's folder."""
        path = plan.with_name(f".claims-{plan.name}")
        with writing(path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)

    def take(self, number: int) -> bool:
        """Whether the unit is this process's now; a claim it has already stays its own."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # no locks here: nobody waits
        return True

    def drop(self, number: int) -> None:
        """Let others have it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        except OSError:
            return  # no locks here

    def close(self) -> None:
        """All claims end."""
        os.close(self._descriptor)
