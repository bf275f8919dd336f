"""``distill bench``: all of it for one trained student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.bench.found import Bench, Options, Row
from distill.bench.indexes import BATCHES, IndexRow, index_rows
from distill.bench.quality import Point, Ranker, evaluated_teacher, query_vectors
from distill.bench.rounds import Task, time_rounds
from distill.bench.sample import drawn_queries
from distill.bench.surroundings import business, limited_threads, machine
from distill.bench.tasks import query_tasks
from distill.bench.teacher_costs import ITEMS, Setting, TeacherTasks, name_of
from distill.bench.ways import TORCH, exported_ways, torch_ways
from distill.index import VectorIndex
from distill.inference import evaluating
from distill.protocols import SIDES, Side
from distill.timings import peak_memory

if TYPE_CHECKING:
    from pathlib import Path

    from distill.data.corpus import Split
    from distill.exact import Vectors
    from distill.experiment import Experiment

DEPTHS = (8, 16, 32, 64)
"""K of the re-rankings."""
_INDEX_SHARE = 0.25  # of a row's seconds: indexes are many and quick
_ALONE_S = 120.0  # that scoring every item may take, for the quality of the teacher alone
_SAME = 1e-3  # that a kept vector may differ by from what the student gives now


def bench(x: Experiment, arm: str, options: Options, *, notes: Sequence[str] = ()) -> Bench:
    """Measure an arm's trained student on the evaluation split; ``notes`` are kept with what is found.

    Raises:
        OtherStudentError: the exported folder is of another student.
        ValueError, OSError: the student or the folder cannot be read, or more threads than cores.
    """
    busy = business()
    with limited_threads(options.threads):
        student = x.saved_student(x.folder / "arms" / arm / "student")
        with evaluating(student):
            return _Bench(x, arm, options, student, [*notes, *([busy] if busy else [])]).all()


class _Bench:
    """One measurement, step by step."""

    def __init__(self, x: Experiment, arm: str, options: Options, student: Any, notes: list[str]) -> None:
        self._x, self._arm, self._options, self._notes = x, arm, options, notes
        self._split: Split = x.corpus.split(x.recipe.evaluate.split)
        self._ways = torch_ways(student, x.accelerator.device)
        if options.export is not None:
            self._ways += exported_ways(options.export, identity=student.identity, threads=options.threads)
        self._queries = drawn_queries(x.corpus, self._split, most=options.queries, seed=x.recipe.seed)
        own = [way for way in self._ways if way.name == TORCH]
        self._vectors: dict[Side, Vectors] = {way.side: query_vectors(self._queries[way.side], way) for way in own}
        self._indexes = self._exact_indexes(x.folder / "arms" / arm)
        self._ranker = Ranker(x, self._queries, self._indexes)
        most = max(map(len, self._indexes.values()))
        self._depths = [k for k in DEPTHS if k < most] or [most]

    def all(self) -> Bench:
        setting = self._teacher() if self._options.teacher else None
        rows, kept = list[Row](), dict[Side, int]()
        for side in SIDES[::-1]:  # texts ask more often than pictures
            found, size = self._query_rows(side, setting)
            rows += found
            if size is not None:
                kept[_other(side)] = size
        indexes = [row for side in SIDES for row in self._index_rows(side)]
        points = self._ranker.student(self._ways)
        if setting is not None:
            points += self._teacher_points(rows)
        return Bench(self._facts(), rows, indexes, points, kept, tuple(self._notes))

    def _exact_indexes(self, folder: Path) -> dict[Side, VectorIndex]:
        """Of every item by the student: those of the evaluation, where they are what the student gives now."""
        from distill.results import student_vectors

        kept = {side: _loaded(folder / "index" / side) for side in SIDES}
        if all(self._is_current(side, index) for side, index in kept.items()):
            return {side: index for side, index in kept.items() if index is not None}
        vectors = student_vectors(self._x, folder / "student", self._split)
        rows = self._split.ids
        return {side: VectorIndex.build(vectors[side], rows[side]) for side in SIDES}

    def _is_current(self, side: Side, index: VectorIndex | None) -> bool:
        if index is None or not index.exact or not np.array_equal(index.ids, self._split.ids[side]):
            return False
        own = self._vectors[side]
        rows = np.searchsorted(index.ids, self._queries[side].ids)
        return index.dim == own.shape[1] and bool(np.abs(index.vectors()[rows] - own).max() <= _SAME)

    def _teacher(self) -> Setting | None:
        """The teacher, or None and a note that says why there is none."""
        from distill.pipeline import DONE
        from distill.score import ScoreOptions

        x = self._x
        if x.builders.ensemble is not None:
            self._notes.append(
                "no rows of the teacher: it is an ensemble, whose members are never in memory together; a run with one "
                "member as its teacher has them"
            )
            return None
        if x.recipe.teach is not None and not (x.folder / "teacher" / DONE).is_file():
            self._notes.append(
                f"no rows of the teacher: {x.folder} has no taught teacher yet (distill teach makes one)"
            )
            return None
        try:
            options = ScoreOptions(**x.recipe.score.model_dump())
            return Setting(x.teacher, x.accelerator.device, x.corpus, options)
        except (ValueError, OSError, ImportError) as error:
            self._notes.append(f"no rows of the teacher: it cannot be loaded ({error})")
            return None

    def _query_rows(self, side: Side, setting: Setting | None) -> tuple[list[Row], int | None]:
        """Rows of both batch sizes, and the bytes of an item that the teacher keeps encoded."""
        index, size, rows = self._indexes[_other(side)], None, list[Row]()
        ways = [way for way in self._ways if way.side == side]
        for batch in BATCHES:
            tasks = query_tasks(self._queries[side], ways, index, batch=batch)
            rows += self._timed(side, tasks)
            if setting is None or batch > 1:
                continue
            with evaluating(setting.teacher):
                made = TeacherTasks(
                    setting, self._queries[side], ways[0], index=index, depths=self._depths, seed=self._x.recipe.seed
                )
                rows += self._timed(side, [tasks[0], *_of_teacher(made)], what=" by the teacher")[1:]
            size = made.bytes_each
        return rows, size

    def _timed(self, side: Side, tasks: Sequence[Task], *, what: str = "") -> list[Row]:
        """Rounds of their own: what the teacher leaves in the caches would slow the student's other runtimes."""
        label = f"timing {side} queries{what}, {tasks[0].queries} at a time"
        found = time_rounds(
            tasks,
            base=TORCH,
            seconds=self._options.seconds,
            seed=self._x.recipe.seed,
            settle=_settle(self._x.accelerator.device),
            label=label,
        )
        return [Row.of(side, task, found[task.name], found[TORCH]) for task in tasks]

    def _index_rows(self, side: Side) -> list[IndexRow]:
        index = self._indexes[side]
        return index_rows(
            index.vectors(),
            index.ids,
            self._vectors[_other(side)],
            items=side,
            seconds=_INDEX_SHARE * self._options.seconds,
            seed=self._x.recipe.seed,
        )

    def _teacher_points(self, rows: Sequence[Row]) -> list[Point]:
        """Re-ranking by depth, and the teacher alone where scoring every item is a matter of minutes."""
        alone = [row for row in rows if row.name == name_of(None, "beforehand")]
        seconds = sum(row.total.median / 1000 * len(self._queries[row.query].ids) for row in alone)
        points = self._ranker.reranked(self._vectors, self._depths, alone=seconds <= _ALONE_S)
        if seconds <= _ALONE_S:
            return points
        self._notes.append(
            f"the teacher was not asked for every item, which would take about {seconds / 60:.0f} minutes for these "
            "queries"
        )
        return points + evaluated_teacher(self._x, self._queries)

    def _facts(self) -> dict[str, Any]:
        x = self._x
        return {
            "run": x.recipe.name,
            "arm": self._arm,
            "corpus": x.corpus.name,
            "split": self._split.name,
            "images": len(self._split.images),
            "texts": len(self._split.texts),
            "queries": {side: len(queries.ids) for side, queries in self._queries.items()},
            "dim": self._indexes["image"].dim,
            "device": str(x.accelerator.device),
            "threads": self._options.threads,
            "seconds": self._options.seconds,
            "export": None if self._options.export is None else str(self._options.export),
            "machine": machine(),
            "peak_bytes": peak_memory(),
        }


def _of_teacher(made: TeacherTasks) -> list[Task]:
    reranking = [made.reranking(k, items) for items in ITEMS for k in made.depths]
    return [*reranking, *(made.alone(items) for items in ITEMS)]


def _other(side: Side) -> Side:
    return "image" if side == "text" else "text"


def _loaded(folder: Path) -> VectorIndex | None:
    try:
        return VectorIndex.load(folder)
    except FileNotFoundError:  # the run was not evaluated
        return None


def _settle(device: Any) -> Any:
    """What waits for a device that works by itself."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
