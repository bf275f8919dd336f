"""What re-ranking by the teacher would add to a student, and what each query would cost."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.compare import GapPoint
from distill.evaluate import Evaluation, reranked_ranks, scores_of, shortlist
from distill.index import VectorIndex
from distill.metrics import summarise
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, Ids, Side, sides_of
from distill.search import answer, embed_query

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from distill.data.corpus import Split
    from distill.experiment import Experiment

Vectors = np.ndarray[Any, np.dtype[np.float32]]
TIMED = 8
"""Queries of each direction that are timed, one at a time; the first is not counted."""


def gap_report(
    x: Experiment,
    folder: Path,
    vectors: Mapping[Side, Vectors],
    split: Split,
    *,
    own: Evaluation,
    teacher: Evaluation,
    depths: Sequence[int],
    queries: int,
) -> list[GapPoint]:
    """The student alone, the teacher over the student's ``k`` best for each depth, and the teacher over its own list.

    All are evaluated on the same queries, drawn with the recipe's seed, against every item of the split.

    Args:
        x: The experiment; pairs that the store lacks are asked of its teacher.
        folder: Of the trained student, whose encoding is timed.
        vectors: Of the split's items, by this student.
        split: What is searched.
        own: The student's evaluation on the split.
        teacher: The teacher's.
        depths: K of each re-ranking; those beyond the number of items count as all.
        queries: Drawn in each direction, at most.
    """
    sides = _Sides(x, vectors, split)
    chosen = {d: _drawn(len(own.queries(d)[0]), queries, x.recipe.seed) for d in DIRECTIONS}
    most = {d: min(max(depths), len(sides.items(d))) for d in DIRECTIONS}
    lists = {d: sides.shortlist(d, chosen[d], most[d]) for d in DIRECTIONS}
    images, texts = (np.concatenate(ids) for ids in zip(*(found.pairs() for found in lists.values()), strict=True))
    x.ask(images, texts)
    scores = {d: scores_of(lists[d], x.scorer.lookup) for d in DIRECTIONS}
    ranks = {d: own.queries(d)[1][chosen[d]] for d in DIRECTIONS}
    timing = _Timing(x, folder, sides, lists)
    points = [_point("student", None, ranks, timing.student())]
    for k in sorted({min(depth, max(most.values())) for depth in depths}):
        reranked = {
            d: reranked_ranks(lists[d].first(k), scores=scores[d][:, :k], first_ranks=ranks[d]) for d in DIRECTIONS
        }
        points.append(_point(f"teacher over K = {k}", k, reranked, timing.teacher_over(k)))
    theirs = {d: teacher.queries(d)[1][chosen[d]] for d in DIRECTIONS}
    return [*points, _point("teacher", None, theirs, timing.teacher_over(x.recipe.evaluate.rerank))]


def _drawn(count: int, most: int, seed: int) -> Ids:
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:most])


def _point(label: str, k: int | None, ranks: Mapping[Direction, Ids], ms: Mapping[Direction, float]) -> GapPoint:
    return GapPoint(label, k, summarise(ranks["i2t"], ranks["t2i"]).as_dict(), ms)


class _Sides:
    """Query side and item side of each direction."""

    def __init__(self, x: Experiment, vectors: Mapping[Side, Vectors], split: Split) -> None:
        self._x, self._vectors = x, vectors
        self._rows = split.ids
        self.index = {side: VectorIndex.build(vectors[side], self._rows[side]) for side in SIDES}

    def items(self, direction: Direction) -> Ids:
        return self._rows[sides_of(direction)[1]]

    def shortlist(self, direction: Direction, chosen: Ids, k: int) -> Candidates:
        query, item = sides_of(direction)
        return shortlist(
            self.index[item],
            self._vectors[query][chosen],
            query_ids=self._rows[query][chosen],
            matches=self._x.corpus.matches,
            direction=direction,
            k=k,
        )


class _Timing:
    """Milliseconds a query, one query at a time: the median of a few."""

    def __init__(self, x: Experiment, folder: Path, sides: _Sides, lists: Mapping[Direction, Candidates]) -> None:
        self._x, self._sides, self._lists = x, sides, lists
        self._student = x.saved_student(folder)
        self._alone = {direction: self._of_student(direction) for direction in DIRECTIONS}

    def student(self) -> dict[Direction, float]:
        """Preparing the sentence or the decoded picture, the tower, and the exact search."""
        return self._alone

    def teacher_over(self, k: int) -> dict[Direction, float]:
        """The student's, and the teacher's encoding and scoring of ``k`` pairs from prepared inputs."""
        found: dict[Direction, float] = {}
        for direction in DIRECTIONS:
            listed = self._lists[direction]
            pairs = []
            for query, items in zip(listed.query_ids[:TIMED], listed.item_ids[:TIMED, :k], strict=True):
                queries = np.full(len(items), query)
                pairs.append((queries, items) if direction == "i2t" else (items, queries))
            found[direction] = self._alone[direction] + 1000 * _usual(self._x.scorer.seconds(pairs))
        return found

    def _of_student(self, direction: Direction) -> float:
        query, item = sides_of(direction)
        ids, corpus = self._lists[direction].query_ids[:TIMED], self._x.corpus
        raw: list[Any] = corpus.load_images(ids) if query == "image" else [corpus.texts[int(row)] for row in ids]
        return 1000 * _usual([_timed(partial(self._answer, item, one)) for one in raw])

    def _answer(self, item: Side, raw: Any) -> None:
        vector = embed_query(self._student, raw, device=self._x.accelerator.device)
        answer(self._sides.index[item], vector, 10)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _usual(took: Sequence[float]) -> float:
    """Median without the first, which warms up."""
    return float(np.median(took[1:] or took))
