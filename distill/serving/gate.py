"""One piece of work at a time, and a bounded number that waits: a burst must not become a heap of threads."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class BusyError(Exception):
    """As many wait as may."""


class Gate:
    """Runs blocking work for an event loop."""

    def __init__(self, name: str, *, workers: int = 1, waiting: int = 16) -> None:
        """``workers`` run at a time, at most ``waiting`` more wait for them."""
        self.name, self.places = name, workers + waiting
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._taken = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, made in one of the gate's threads.

        Raises:
            BusyError: at once, where too many wait.
        """
        with self._lock:
            if self._taken >= self.places:
                raise BusyError(f"{self.name}: {self._taken} requests are being worked on or wait")
            self._taken += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._leave)  # not when the caller leaves: a thread cannot be interrupted
        return await asyncio.wrap_future(future)

    @property
    def taken(self) -> int:
        """How many are worked on or wait."""
        return self._taken

    def close(self) -> None:
        """Let what runs end; what waits is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _leave(self, _: Future[Result]) -> None:
        with self._lock:
            self._taken -= 1
