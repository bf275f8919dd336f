"""Ending when told to, with nothing lost: what SIGTERM and SIGINT do to a command.

A signal ends a command where it stands, which loses nothing that is written atomically. Work that would lose much asks
to be let finish what is in hand (``finishing``) and then says ``heed``. The same signal again, after a second or more,
ends it at once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

log = logging.getLogger(__name__)
Result = TypeVar("Result")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PAUSE_S = 1.0  # a signal that comes again within it is the same request


class Stopped(BaseException):  # noqa: N818  (no error: like KeyboardInterrupt, nothing that handles errors may catch it)
    """The process was told to stop."""

    def __init__(self, number: int) -> None:
        """``number``: of the signal."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.number


class _Ear:
    """What this process was told; one a process, since signals are."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.told: int | None = None
        self.at = 0.0  # when
        self.finishing = 0  # depth of ``finishing`` blocks

    def hear(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a loader's worker: its parent ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.told is not None and (number != self.told or now - self.at < PAUSE_S):
            return  # one request: a terminal or launcher signals the whole group, and a parent passes it on
        again, self.told, self.at = self.told is not None, number, now
        if again or not self.finishing:
            raise Stopped(number)
        log.warning("%s: ends after what is in hand is kept; once more to end at once", signal.Signals(number).name)


_ear = _Ear()


@contextmanager
def heard_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """``handler`` gets the signals in here; those that are ignored stay so."""
    # what was started in the background by a script ignores SIGINT, and goes on doing so
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def listening() -> Iterator[None]:
    """Signals raise ``Stopped`` in here. For the main thread of a command."""
    global _ear
    _ear = _Ear()
    try:
        with heard_by(_ear.hear):
            yield
    finally:
        _ear = _Ear()


@contextmanager
def finishing() -> Iterator[None]:
    """A signal waits in here until ``heed`` is called; at the latest it counts when the block ends."""
    ear = _ear
    ear.finishing += 1
    try:
        yield
    finally:
        ear.finishing -= 1
    heed()


def told() -> int:
    """The signal that waits to be heeded; 0 where there is none."""
    return _ear.told or 0


def heed(number: int = 0) -> None:
    """Raise ``Stopped`` if a signal waits, here or as ``number`` elsewhere: what was in hand is kept by now."""
    if _ear.told or number:
        raise Stopped(_ear.told or number)


def in_thread_of_its_own(work: Callable[[], Result]) -> Result:
    """What ``work`` gives, made in a thread that ends; what ends the caller meanwhile ends the work, too."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  (the caller raises it)
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="own-work", daemon=True)
    try:
        with finishing():  # begun or not, but never in between
            thread.start()
        return outcome.result()
    except BaseException:
        while thread.is_alive():  # again and again: what it calls may take an exception for its own
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            thread.join(1.0)
        raise
