"""How well each way of answering ranks: on the same drawn queries, against every item of the split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill.evaluate import Evaluation, reranked_ranks, scores_of, shortlist
from distill.metrics import ranks_from_embeddings, summarise
from distill.protocols import DIRECTIONS, Candidates, Direction, Ids, sides_of

if TYPE_CHECKING:
    from distill.bench.sample import Queries
    from distill.bench.ways import Way
    from distill.exact import Vectors
    from distill.experiment import Experiment
    from distill.index import VectorIndex
    from distill.protocols import Side

_AT_ONCE = 32  # queries encoded at a time


@dataclass(frozen=True)
class Point:
    """Quality of one way of answering.

    Attributes:
        name: A student's runtime, or how the teacher is used.
        kind: Which of the three.
        depth: K of a re-ranking.
        metrics: Recalls in percent and RSUM, as ``Retrieval.as_dict`` has them.
    """

    name: str
    kind: str  # "student" | "re-ranked" | "teacher"
    depth: int | None
    metrics: Mapping[str, float]


class Ranker:
    """Ranks of drawn queries against the items of a split, by a student and by the teacher."""

    def __init__(self, x: Experiment, queries: Mapping[Side, Queries], indexes: Mapping[Side, VectorIndex]) -> None:
        """``indexes``: exact, of the student's vectors of all items."""
        self._x, self._queries, self._indexes = x, queries, indexes

    def student(self, ways: Sequence[Way]) -> list[Point]:
        """A point a runtime that encodes both sides; items are those of the index, whatever encodes the query."""
        names = [way.name for way in ways if way.side == "text"]
        both = [name for name in names if any(way.side == "image" and way.name == name for way in ways)]
        of_name = {name: {way.side: way for way in ways if way.name == name} for name in both}
        return [_point(name, "student", None, self._ranks(self._vectors(found))) for name, found in of_name.items()]

    def _vectors(self, ways: Mapping[Side, Way]) -> dict[Side, Vectors]:
        return {side: query_vectors(self._queries[side], way) for side, way in ways.items()}

    def reranked(self, vectors: Mapping[Side, Vectors], depths: Sequence[int], *, alone: bool) -> list[Point]:
        """The teacher over the student's ``k`` best for each depth and, where asked for, over every item.

        Pairs that the store of scores lacks are asked of the teacher, and kept.
        """
        ranks = self._ranks(vectors)
        most = {d: len(self._items(d)) if alone else min(max(depths), len(self._items(d))) for d in DIRECTIONS}
        lists = {d: self._shortlist(d, vectors[sides_of(d)[0]], most[d]) for d in DIRECTIONS}
        images, texts = (np.concatenate(ids) for ids in zip(*(found.pairs() for found in lists.values()), strict=True))
        self._x.ask(images, texts)
        scores = {d: scores_of(lists[d], self._x.scorer.lookup) for d in DIRECTIONS}

        def over(k: int) -> dict[Direction, Ids]:
            return {
                d: reranked_ranks(lists[d].first(k), scores=scores[d][:, :k], first_ranks=ranks[d]) for d in DIRECTIONS
            }

        found = [_point(f"re-ranked {k}", "re-ranked", k, over(k)) for k in depths]
        return [*found, _point("teacher alone", "teacher", None, over(max(most.values())))] if alone else found

    def _items(self, direction: Direction) -> VectorIndex:
        return self._indexes[sides_of(direction)[1]]

    def _ranks(self, vectors: Mapping[Side, Vectors]) -> dict[Direction, Ids]:
        found: dict[Direction, Ids] = {}
        for direction in DIRECTIONS:
            side, index = sides_of(direction)[0], self._items(direction)
            found[direction] = ranks_from_embeddings(
                vectors[side],
                index.vectors(),
                query_ids=self._queries[side].ids,
                item_ids=index.ids,
                matches=self._x.corpus.matches,
                direction=direction,
            )
        return found

    def _shortlist(self, direction: Direction, vectors: Vectors, k: int) -> Candidates:
        return shortlist(
            self._items(direction),
            vectors,
            query_ids=self._queries[sides_of(direction)[0]].ids,
            matches=self._x.corpus.matches,
            direction=direction,
            k=k,
        )


def query_vectors(queries: Queries, way: Way) -> Vectors:
    """Unit vectors (Q, D) of the drawn queries."""
    numbers = range(-(-len(queries.ids) // _AT_ONCE))
    parts = [way.tower(way.prepare(queries.items(number, _AT_ONCE))) for number in numbers]
    return np.concatenate(parts)[: len(queries.ids)]


def evaluated_teacher(x: Experiment, queries: Mapping[Side, Queries]) -> list[Point]:
    """The teacher over its own shortlist, as the run's evaluation has it, for these queries; none without one."""
    from distill.results import TEACHER

    try:
        found = Evaluation.load(x.folder / "evaluation" / TEACHER)
    except FileNotFoundError:
        return []
    ranks: dict[Direction, Ids] = {}
    for direction in DIRECTIONS:
        ids, all_ranks = found.queries(direction)
        order = np.argsort(ids)
        wanted = queries[sides_of(direction)[0]].ids
        rows = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
        if not np.array_equal(ids[rows], wanted):  # of another split
            return []
        ranks[direction] = all_ranks[rows]
    return [_point(f"teacher over its own {x.recipe.evaluate.rerank}", "teacher", None, ranks)]


def _point(name: str, kind: str, depth: int | None, ranks: Mapping[Direction, Ids]) -> Point:
    return Point(name, kind, depth, summarise(ranks["i2t"], ranks["t2i"]).as_dict())
