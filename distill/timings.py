"""Where a run's time went: wall clock by stage over all its sessions, what was counted meanwhile, and peak memory.

A *session* is one command at work in a run's folder. It adds lines to ``timings.jsonl``: when it begins, when an
outermost stage ends, about once a minute within one, and when the session ends, however it does. A line holds what came
since the one before, so the sum of all lines is the whole; what ``kill -9`` costs is what came after the last line.

A stage within a stage is a path, as ``mine/embed``. Seconds of a path are its own, without those of paths below it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill import stopping
from distill.durable import append_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)
LINES = "timings.jsonl"
OTHER = "other"  # whatever is in no stage
DONE, UNFINISHED = "done", "no end noted"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss
_EVERY_S = 60.0


class Timings:
    """The clock of one session. Stages are opened in the main thread; what they cost is two looks at the clock each."""

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu_clock, self._session = clock, cpu_clock, uuid.uuid4().hex[:12]
        self._path: Path | None = None  # of the lines; None where none are kept
        self._open: list[str] = []  # paths of the stages in hand, the outermost first
        self._until = self._written = clock()  # all before it is given to a stage; the last line
        self._seconds: dict[str, float] = {}
        self._cpu_until = cpu_clock()
        self._cpu: dict[str, float] = {}  # of all the process's threads; a busy machine changes it less than the clock
        self._counts: dict[str, dict[str, int]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens in here is time of that stage, within the one in hand."""
        self._charge()
        self._open.append(self._below(name))
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._write_if_due(ends_a_stage=not self._open)

    def spent(self, name: str, seconds: float) -> None:
        """So many seconds of the stage in hand, measured elsewhere, were those of a stage within it."""
        for path, more in ((self._here, -seconds), (self._below(name), seconds)):
            self._seconds[path] = self._seconds.get(path, 0.0) + more
        self._write_if_due()

    def count(self, **numbers: int) -> None:
        """So much more was done in the stage in hand: ``items``, ``steps``, ``asked`` and ``served`` pairs."""
        counts = self._counts.setdefault(self._here, {})
        for name, number in numbers.items():
            counts[name] = counts.get(name, 0) + number
        self._write_if_due()

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """The session in here leaves its lines in ``folder``. A line that cannot be written stops no work."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LINES
        self._write()
        ended = DONE
        try:
            yield
        except BaseException as error:
            ended = str(error) if isinstance(error, stopping.Stopped) else type(error).__name__
            raise
        finally:
            self._write(ended=ended)
            self._path = None

    def so_far(self, name: str, *, cpu: bool = False) -> float:
        """Own seconds, by now, of all stages whose last name is that, whatever they are within; ``cpu``: of processors.

        Only those that no line has been written of yet.
        """
        self._charge()
        held = self._cpu if cpu else self._seconds
        return sum(value for path, value in held.items() if path.rsplit("/", 1)[-1] == name)

    @property
    def _here(self) -> str:
        return self._open[-1] if self._open else OTHER

    def _below(self, name: str) -> str:
        return f"{self._open[-1]}/{name}" if self._open else name

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._here] = self._seconds.get(self._here, 0.0) + now - self._until
        self._until = now
        now = self._cpu_clock()
        self._cpu[self._here] = self._cpu.get(self._here, 0.0) + now - self._cpu_until
        self._cpu_until = now

    def _write_if_due(self, *, ends_a_stage: bool = False) -> None:
        if self._path is not None and (ends_a_stage or self._clock() - self._written >= _EVERY_S):
            self._write()

    def _write(self, **more: str) -> None:
        assert self._path is not None
        self._charge()
        self._written = self._until
        seconds = {path: round(value, 6) for path, value in self._seconds.items()}
        cpu = {path: round(value, 6) for path, value in self._cpu.items()}
        line = {"session": self._session, "at": round(time.time(), 3), "seconds": seconds, "cpu": cpu}
        line["counts"] = self._counts
        try:
            append_line(self._path, {**line, "peak": peak_memory(), **more})
        except OSError as error:  # kept for the next line
            log.warning("%s: %s; where the time goes is not noted", self._path, os.strerror(error.errno or errno.EIO))
        else:
            self._seconds, self._cpu, self._counts = {}, {}, {}


def peak_memory() -> dict[str, int]:
    """Most bytes so far: ``host`` of this process, ``children`` of the largest that ended, ``device`` of tensors.

    The host's are resident pages, which a forked loader worker shares in part with its parent.
    """
    own, others = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    torch: Any = sys.modules.get("torch")
    on_device = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_initialized() else 0
    return {"host": own * RSS_UNIT, "children": others * RSS_UNIT, "device": int(on_device)}


@dataclass(frozen=True)
class Summary:
    """All sessions of a run together.

    Attributes:
        seconds: Own wall clock of each stage by its path, in order of appearance, what is in no stage last.
        counts: What was counted in a stage, by its path.
        peak: Most bytes of any session, as ``peak_memory`` has them.
        sessions: How each ended, in order: ``done``, ``stopped by SIGTERM``, an error's name, or ``no end noted``,
            which is one that was killed or is at work still.
        cpu: Own seconds of the main process's processors by stage; of lines that have them. What a stage ``spent``
            within another by its own clock is counted with the outer one.
    """

    seconds: Mapping[str, float]
    counts: Mapping[str, Mapping[str, int]]
    peak: Mapping[str, int]
    sessions: tuple[str, ...]
    cpu: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, *folders: Path) -> Summary:
        """From the lines in runs' folders, those that are whole; of nothing where there is none."""
        seconds, counts, peak = dict[str, float](), dict[str, dict[str, int]](), dict[str, int]()
        cpu = dict[str, float]()
        sessions = dict[str, str]()
        for line in (line for folder in folders for line in _whole_lines(folder / LINES)):
            sessions[line["session"]] = line.get("ended", UNFINISHED)
            for path, value in line["seconds"].items():
                seconds[path] = seconds.get(path, 0.0) + value
            for path, value in line.get("cpu", {}).items():
                cpu[path] = cpu.get(path, 0.0) + value
            for path, numbers in line["counts"].items():
                held = counts.setdefault(path, {})
                for name, number in numbers.items():
                    held[name] = held.get(name, 0) + number
            peak = {name: max(peak.get(name, 0), value) for name, value in line["peak"].items()}
        order = _as_a_tree([path for path in seconds if path != OTHER])
        by_stage = {path: seconds.get(path, 0.0) for path in (*order, OTHER)}
        return cls(by_stage, counts, peak, tuple(sessions.values()), cpu)

    @property
    def total(self) -> float:
        """Seconds of all sessions."""
        return sum(self.seconds.values())

    def whole(self, path: str) -> float:
        """Seconds of a stage with all stages within it."""
        return sum(value for name, value in self.seconds.items() if name == path or name.startswith(f"{path}/"))

    def counted(self, name: str) -> int:
        """In all stages together."""
        return sum(numbers.get(name, 0) for numbers in self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        """In plain containers: seconds ``total`` and ``own`` by stage, counts, peak bytes, how the sessions ended."""
        return {
            "total": self.total,
            "own": dict(self.seconds),
            "counts": {path: dict(numbers) for path, numbers in self.counts.items()},
            "peak_bytes": dict(self.peak),
            "sessions": list(self.sessions),
            "resumed": max(0, len(self.sessions) - 1),
        }


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # a crash cut it short
            continue
        if isinstance(found, dict) and {"session", "seconds", "counts", "peak"} <= found.keys():
            yield found


def _as_a_tree(paths: list[str]) -> list[str]:
    """Each path before those below it, siblings in order of appearance."""
    place = {path: number for number, path in reversed(list(enumerate(paths)))}

    def key(path: str) -> list[int]:
        parts = path.split("/")
        above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
        return [place.get(name, -1) for name in above]

    return sorted(paths, key=key)
