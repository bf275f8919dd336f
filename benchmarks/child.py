"""Running a piece of work in a process of its own and watching its memory from outside."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_SAMPLE_S = 0.002


@dataclass(frozen=True)
class Phase:
    """What a phase returned, and the memory it needed at its peak, in bytes."""

    result: dict[str, float]
    anonymous: int
    resident: int  # with the mapped files that were in memory


def in_child(work: Callable[..., dict[str, float]], *arguments: object) -> Phase:
    """Run ``work`` in a fresh process and watch its memory meanwhile.

    Raises:
        RuntimeError: the process failed; it has printed why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, work, arguments))
    child.start()
    sender.close()
    anonymous = resident = 0
    while not receiver.poll(_SAMPLE_S):
        now = memory_of(child.pid)
        anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{work.__name__} ended with exit code {child.exitcode}") from None
    receiver.close()
    child.join()
    return Phase(result, anonymous, resident)


def _answer(sender: Connection, work: Callable[..., dict[str, float]], arguments: tuple[object, ...]) -> None:
    sender.send(work(*arguments))


def memory_of(pid: int | None) -> tuple[int, int]:
    """Anonymous resident memory now, and the peak of all that was resident, in bytes; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, peak = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
    return anonymous, peak
