"""A plan beside a real run: what was predicted for each stage, and what the run's own clock says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.planning.estimate import EMBED, MINE, PREPARE, START
from distill.planning.ranges import NOTHING, Range, total

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from distill.planning.estimate import Stage

# What belongs to a run's beginning, or lies between its stages.
_START = {"start", "read data", "check", "other"}
_LEAST_S = 0.05


@dataclass(frozen=True)
class Beside:
    """One stage, or all; ``measured`` is None where the run has none of it."""

    name: str
    predicted: Range
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted.mid if self.predicted.mid > 0 else None


@dataclass(frozen=True)
class Against:
    """All stages, and the pairs that the teacher was asked."""

    stages: tuple[Beside, ...]
    whole: Beside
    asked: tuple[Range, int]  # predicted, counted
    sessions: int

    @classmethod
    def of(cls, stages: Sequence[Stage], run: Path, *, by_processor: bool = False) -> Against:
        """Compare with the run in that folder, by the clock or by what its processors took.

        Raises:
            FileNotFoundError: it has no timings.
        """
        from distill.timings import LINES, Summary

        if not (run / LINES).is_file():
            raise FileNotFoundError(
                f"{run} has no {LINES}: give the folder of a run that has ended, e.g. runs/flickr8k"
            )
        found = Summary.read(run)
        held = found.cpu if by_processor else found.seconds
        measured, planned = seconds_by_stage(held), {stage.name: stage.wall for stage in stages}
        names = [*planned, *(name for name in measured if name not in planned)]
        rows = [Beside(name, planned.get(name, NOTHING), measured.get(name, 0.0)) for name in names]
        rows = [row for row in rows if row.measured >= _LEAST_S or row.predicted.high > 0]
        return cls(
            tuple(rows),
            Beside("all", total(planned.values()), sum(held.values())),
            (total(stage.calls for stage in stages), found.counted("asked")),
            len(found.sessions),
        )


def seconds_by_stage(held: Mapping[str, float]) -> Mapping[str, float]:
    """A run's seconds under the names that a plan has: inputs made ready count as such wherever they are made."""
    by_stage: dict[str, float] = {}
    for path, seconds in held.items():
        name = stage_of(path)
        by_stage[name] = by_stage.get(name, 0.0) + seconds
    return by_stage


def stage_of(path: str) -> str:
    """The plan's name of a run's stage, given by its path."""
    first, *inner = path.split("/")
    if "prepare" in (first, *inner):
        return PREPARE
    if first in _START:
        return START
    if first == MINE and EMBED in inner:
        return EMBED
    return first
