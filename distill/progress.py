"""Progress of long phases: a bar on a terminal, a plain line now and then elsewhere, nothing on ranks other than 0."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import TextIO

T = TypeVar("T")
_QUICK_S = 1.0  # a phase that ends sooner says nothing where lines are plain
_hushed = 0  # blocks of ``hushed`` that are open


def is_main_process() -> bool:
    """Whether this process is rank 0, or the only one, by the environment that launchers set."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextmanager
def hushed() -> Iterator[None]:
    """Phases in here say nothing unless they are told to: those of a measurement, of which there are dozens."""
    global _hushed  # noqa: PLW0603  (as a flag for all that is called in here)
    _hushed += 1
    try:
        yield
    finally:
        _hushed -= 1


def track(
    iterable: Iterable[T], description: str, *, total: int | None = None, unit: str = "items", show: bool | None = None
) -> Iterator[T]:
    """Yield what ``iterable`` yields and show how far it is. ``total`` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, description, unit=unit, show=show) as progress:
        for item in iterable:
            yield item
            progress.advance()


class Progress:
    """Counts ``unit`` up to ``total`` (None: unknown); a context manager whose end writes the closing line.

    ``show`` None means rank 0 only. When ``stream`` is no terminal, plain lines appear at most every ``every_s``
    seconds, and a closing line when the phase took longer than a second.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "items",
        show: bool | None = None,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._total, self._description, self._unit = total, description, unit
        self._stream = stream if stream is not None else sys.stderr
        self._every_s, self._clock = every_s, clock
        self._show = (is_main_process() and not _hushed) if show is None else show
        self._started = self._last_line = clock()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        if self._show and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, desc=self._description, unit=f" {self._unit}", file=self._stream, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._clock() - self._started >= _QUICK_S:
            self._write("stopped" if kind else "done")

    def advance(self, n: int = 1) -> None:
        """``n`` more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._clock() - self._last_line >= self._every_s:
            self._write("")

    def _write(self, end: str) -> None:
        if not self._show:
            return
        now = self._clock()
        self._last_line = now
        seconds = max(now - self._started, 1e-9)
        rate = self.done / seconds
        total = "" if self._total is None else f"/{self._total} ({100 * self.done / max(self._total, 1):.0f} %)"
        parts = [f"{self._description}: {self.done}{total} {self._unit}", f"{_short(rate)} {self._unit}/s"]
        if end:
            parts.append(f"{end} after {clock_time(seconds)}")
        elif self._total is not None and rate > 0:
            parts.append(f"{clock_time(max(self._total - self.done, 0) / rate)} left")
        self._stream.write(", ".join(parts) + "\n")
        self._stream.flush()


def clock_time(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
