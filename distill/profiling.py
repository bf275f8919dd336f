"""A look into a training's steps: a trace of some of them, and tables of where their time went.

``--profile START:COUNT`` leaves out the first START steps of every training of a command, the last of which warm the
profiler up, and records the next COUNT. It changes nothing of what a step computes.
"""

from __future__ import annotations

import logging
import re
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import _profiler_enabled  # 30 times as quick as a range that nobody records
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from distill.durable import staged_folder
from distill.report.table import plain_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)
MOST_STEPS = 100  # a small model's step is thousands of events of some hundred bytes
_WARM_UP = 3
_MARK = "step: "  # what a phase's range is called, before its name
_STEP = "ProfilerStep"  # what the profiler calls a whole step, before its number
_SHOWN = 25
_VIEWERS = "https://ui.perfetto.dev or chrome://tracing"
_NOTHING = nullcontext()


def traced(name: str) -> AbstractContextManager[Any]:
    """A range of a step by that name in the trace; nothing at all while nobody records."""
    return record_function(_MARK + name) if _profiler_enabled() else _NOTHING


@dataclass(frozen=True)
class Window:
    """Which steps of a training are recorded: ``count`` of them after the first ``start``."""

    start: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Of ``START:COUNT``.

        Raises:
            ValueError: it is something else, or out of bounds.
        """
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
        if found is None:
            raise ValueError(f"--profile is START:COUNT, two whole numbers such as 20:5, got {text!r}")
        window = cls(*map(int, found.groups()))
        if window.start < 1:
            raise ValueError(
                f"--profile {text}: START must be at least 1, since the steps before the window warm the profiler up"
            )
        if not 1 <= window.count <= MOST_STEPS:
            raise ValueError(
                f"--profile {text}: COUNT must be 1 to {MOST_STEPS}: each step is megabytes of events held in memory"
            )
        return window

    def __str__(self) -> str:
        return f"{self.start}:{self.count}"


class Profiler:
    """Records the window of every training that is run ``over`` it."""

    def __init__(self, window: Window | None) -> None:
        """``window``: None records nothing."""
        self.window = window
        self.trainings = 0

    @contextmanager
    def over(self, folder: Path, start: int, *, writes: bool = True) -> Iterator[Callable[[], None]]:
        """A training of ``folder`` that begins or goes on at step ``start``; yields what to call after every step.

        Leaves ``folder/profile/steps-A-B`` with ``trace.json.gz`` and ``operators.txt``, steps numbered from 1. Says
        where, or that the training ended before the window began. A training that is stopped within the window leaves
        what was recorded by then.

        Args:
            folder: of the training.
            start: its first step here.
            writes: False in all processes but one: these record nothing.
        """
        if self.window is None or not writes:
            yield _nothing
            return
        self.trainings += 1
        recording = _Recording(self.window, folder, start)
        with recording.profiler:
            yield recording.step
        if not recording.written:
            log.warning(
                "--profile %s: %s ended after %d steps, before the window: nothing is recorded; lower START",
                self.window,
                folder.name,
                recording.steps,
            )


UNPROFILED = Profiler(None)


def _nothing() -> None:
    pass


class _Recording:
    """Of one training."""

    def __init__(self, window: Window, folder: Path, start: int) -> None:
        self.steps, self.written = 0, False
        self._window, self._folder, self._start = window, folder, start
        warm_up = min(_WARM_UP, window.start)
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=window.start - warm_up, warmup=warm_up, active=window.count, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )

    def step(self) -> None:
        """One more is done."""
        self.steps += 1
        self.profiler.step()

    def _write(self, recorded: Any) -> None:
        count = self.steps - self._window.start
        if count < 1:  # ended within the first one
            return
        first = self._start + self._window.start + 1
        folder = self._folder / "profile" / f"steps-{first}-{first + count - 1}"
        title = f"{self._folder.name}, " + (f"step {first}" if count == 1 else f"steps {first} to {first + count - 1}")
        text = "\n".join(_page(recorded, title, count))
        try:
            with staged_folder(folder) as staged:
                recorded.export_chrome_trace(str(staged / "trace.json.gz"))
                (staged / "operators.txt").write_text(text + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # a look into a training must not end it
            log.warning("--profile: %s could not be written: %s", folder, error)
            return
        self.written = True
        log.info("%s", text[: text.index("\n\n")])
        log.info(
            "trace of %d of %d steps asked for: %s, to be opened at %s; operators: %s",
            count,
            self._window.count,
            folder / "trace.json.gz",
            _VIEWERS,
            folder / "operators.txt",
        )


# --- tables -------------------------------------------------------------------------------------------------------


def _page(recorded: Any, title: str, steps: int) -> Iterator[str]:
    """Phases, then the costliest operators, both a step."""
    averages = recorded.key_averages()
    on_device = any(row.self_device_time_total for row in averages)
    whole = _microseconds(recorded.events(), lambda name: name.startswith(_STEP))
    yield f"{title}: milliseconds a step by phase, wall clock of the training's own thread"
    phases = _own_time(recorded.events())
    phases["the rest of the step"] = whole - sum(phases.values())
    yield from plain_lines([["", "ms", "share"], *([name, *_cells(us, steps, whole)] for name, us in phases.items())])
    yield ""
    rows = [row for row in averages if not row.is_user_annotation and not row.key.startswith((_MARK, _STEP))]
    rows = [row for row in rows if row.self_cpu_time_total or row.self_device_time_total]
    cost = "self_device_time_total" if on_device else "self_cpu_time_total"
    rows.sort(key=lambda row: -getattr(row, cost))
    heads = ["", "calls a step", *(["device ms", "share"] if on_device else []), "CPU ms", "share"]
    devices, cpus = (sum(getattr(row, f"self_{kind}_time_total") for row in rows) for kind in ("device", "cpu"))
    place, spent = ("device", devices) if on_device else ("CPU", cpus)
    shown = f"{_SHOWN} costliest of {len(rows)}" if len(rows) > _SHOWN else f"all {len(rows)}"
    yield f"operators, self time a step on the {place}: {shown}; all together {spent / steps / 1000:.1f} ms"
    body = []
    for row in rows[:_SHOWN]:
        cells = _cells(row.self_device_time_total, steps, devices) if on_device else []
        body.append(
            [_short(row.key), f"{row.count / steps:.4g}", *cells, *_cells(row.self_cpu_time_total, steps, cpus)]
        )
    yield from plain_lines([heads, *body])


def _microseconds(events: Sequence[Any], wanted: Callable[[str], bool]) -> float:
    return sum(_length(event) for event in _on_cpu(events) if wanted(event.name))


def _on_cpu(events: Sequence[Any]) -> Iterator[Any]:
    """Ranges come twice where there is a device: as the host saw them and as the device did."""
    return (event for event in events if event.device_type.name == "CPU")


def _length(event: Any) -> float:
    return float(event.time_range.end - event.time_range.start)


def _own_time(events: Sequence[Any]) -> dict[str, float]:
    """Microseconds of every phase without those of phases within it, in order of appearance."""
    own: dict[str, float] = {}
    above: list[Any] = []
    phases = [event for event in _on_cpu(events) if event.name.startswith(_MARK)]
    for event in sorted(phases, key=lambda event: (event.time_range.start, -event.time_range.end)):
        while above and above[-1].time_range.end <= event.time_range.start:
            above.pop()
        if above:
            own[above[-1].name] -= _length(event)
        own[event.name] = own.get(event.name, 0.0) + _length(event)
        above.append(event)
    return {name.removeprefix(_MARK): us for name, us in own.items()}


def _cells(microseconds: float, steps: int, whole: float) -> list[str]:
    return [f"{microseconds / steps / 1000:.3f}", f"{100 * microseconds / whole if whole else 0:.1f} %"]


def _short(name: str, most: int = 70) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."
