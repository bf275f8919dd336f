"""The log of a training: one JSON line every so many steps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.durable import append_line, write_atomically

if TYPE_CHECKING:
    from distill.batches import StepBatch


class Meter:
    """Writes one line a log step: loss and its parts, the latest values, gradient norm, items a second, waiting."""

    def __init__(self, path: Path | None, log_every: int) -> None:
        """``path``: of the lines; None in a process that writes none."""
        self._path, self._log_every = path, log_every
        self._clear()

    def begin(self, step: int) -> int:
        """Lines of later steps go: these are run again. The clock starts. Returns the last step that a line went of."""
        lost = _drop_lines_from(self._path, step) if self._path is not None else 0
        self._began = time.perf_counter()
        return lost

    def _clear(self) -> None:
        self._began, self._waited, self._items, self._steps = time.perf_counter(), 0.0, 0, 0
        self._sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What has been counted since the last line, for a checkpoint; a clock has no state."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting, so that the next line is that of a training that was never stopped."""
        self._sums, self._steps = dict(state["sums"]), int(state["steps"])

    def due(self, step: int) -> bool:
        """Whether a step ends with a line."""
        return (step + 1) % self._log_every == 0

    def step(
        self,
        batch: StepBatch,
        total: Tensor,
        parts: Mapping[str, Tensor],
        *,
        values: Mapping[str, Any],
        norm: Any,
        waited: float,
    ) -> dict[str, float] | None:
        """Count a step; the line where one was due."""
        for name, value in (("loss", total), *((f"loss/{name}", part) for name, part in parts.items())):
            held = self._sums.get(name)
            self._sums[name] = value.detach() if held is None else held + value.detach()
        self._waited += waited
        self._items += len(batch.image_ids) + len(batch.text_ids)
        self._steps += 1
        if not self.due(batch.step):
            return None
        seconds = time.perf_counter() - self._began
        line = {name: float(value) / self._steps for name, value in self._sums.items()}
        line |= {
            **{name: float(value) for name, value in values.items()},
            "grad_norm": float(norm) if norm is not None else float("nan"),
            "items_per_second": self._items / seconds,
            "waiting_share": self._waited / seconds,
        }
        if self._path is not None:
            append_line(self._path, {"step": batch.step + 1, **line})
        self._clear()
        return line


def note_round(metrics: Path, *, step: int, number: int, values: Mapping[str, float]) -> None:
    """Add a line of a round that begins after ``step``, unless one of the same values is there from before a stop."""
    if not is_noted(metrics, number=number, first=next(iter(values))):
        append_line(metrics, {"step": step, "round": number, **values})


def is_noted(metrics: Path, *, number: int, first: str) -> bool:
    """Whether there is a line of a round whose first value has that name."""
    return metrics.exists() and f'"round": {number}, "{first}"' in metrics.read_text(encoding="utf-8")


def _drop_lines_from(path: Path, start: int) -> int:
    """After a resume the steps since the checkpoint are run again: their old lines go, so that none stands twice.

    Returns the last of these steps, 0 where no line went.
    """
    if not path.exists():
        return 0
    kept, lost = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:  # the line that a kill cut short
            continue
        if step <= start:
            kept.append(line)
        else:
            lost = max(lost, step)
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))
    return lost
