"""What ``distill bench`` is asked, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from distill.bench.rounds import Cost, Ratio, Task, Timed, costs, ratio_of

if TYPE_CHECKING:
    from pathlib import Path

    from distill.bench.indexes import IndexRow
    from distill.bench.quality import Point
    from distill.protocols import Side


@dataclass(frozen=True)
class Options:
    """What is measured, and how long.

    Attributes:
        threads: Of torch, ONNX Runtime, OpenVINO, FAISS and BLAS alike.
        seconds: Of timing for each row, about.
        queries: Drawn of each side, at most: for the times in turn, and for quality.
        export: An exported folder, or None.
        teacher: Whether the teacher's rows are wanted.
    """

    threads: int
    seconds: float = 2.0
    queries: int = 200
    export: Path | None = None
    teacher: bool = True


@dataclass(frozen=True)
class Row:
    """Cost of one way to answer queries of one side.

    Attributes:
        query: The side that asks.
        batch: Queries at once.
        name: A student's runtime, or how the teacher is used.
        calls: Counted calls.
        total: Milliseconds a query.
        parts: The same of each part.
        ratio: To the student in torch, from the rounds that both took part in.
        multiplied: By how much the work on a sample of the items was multiplied; 1 where all was timed.
    """

    query: Side
    batch: int
    name: str
    calls: int
    total: Cost
    parts: Mapping[str, Cost]
    ratio: Ratio
    multiplied: float = 1.0

    @classmethod
    def of(cls, query: Side, task: Task, timed: Timed, base: Timed) -> Row:
        """From a task's times and those of the student in torch."""
        total, parts = costs(timed)
        multiplied = max(stage.scale for stage in task.stages)
        return cls(query, task.queries, task.name, len(timed.rounds), total, parts, ratio_of(timed, base), multiplied)


@dataclass(frozen=True)
class Bench:
    """All that was found.

    Attributes:
        facts: Run, arm, split, sizes, machine, versions, threads, seconds, peak memory.
        rows: Costs of queries.
        indexes: Costs of indexes.
        points: Quality.
        kept_bytes: Of an item that the teacher keeps encoded, by side; empty without a teacher.
        notes: What is missing and why, and what to know of the figures.
    """

    facts: Mapping[str, Any]
    rows: Sequence[Row]
    indexes: Sequence[IndexRow]
    points: Sequence[Point]
    kept_bytes: Mapping[Side, int]
    notes: Sequence[str] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """In plain containers."""
        return {"format": 1, **asdict(self)}

    def row(self, query: Side, name: str, *, batch: int = 1) -> Row | None:
        """The one of this name."""
        return next((one for one in self.rows if (one.query, one.name, one.batch) == (query, name, batch)), None)
