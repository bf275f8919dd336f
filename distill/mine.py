"""Hard negatives: for each query the most similar items that do not match it, and optionally some that do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from distill import exact
from distill.filters import TeacherMargin, empty, filter_by_teacher, take_first
from distill.protocols import Candidates

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.data.matches import Matches
    from distill.exact import Mask, Vectors
    from distill.protocols import Direction, Ids
    from distill.searched import Rows, Searched

__all__ = ["Drop", "MineSettings", "TeacherMargin", "check_k", "filter_by_teacher", "mine"]

_BLOCK = 4096  # queries mined together, at least
_CELLS = 1 << 21  # candidates looked at together, however deep the search


class Drop(Protocol):
    """Says which candidates not to take."""

    def __call__(self, query_ids: Ids, item_ids: Ids) -> Mask:
        """(P,) True = leave this pair out; pairs are (query_ids[p], item_ids[p]) and none of them is a match."""


@dataclass(frozen=True)
class MineSettings:
    """What to take for each query.

    Attributes:
        k: Negatives a query.
        skip_top: Leave out the n most similar non-matches, which are the likeliest false negatives.
        with_positives: Up to this many matches a query, the most similar first, in columns before the negatives.
    """

    k: int
    skip_top: int = 0
    with_positives: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.skip_top < 0 or self.with_positives < 0:
            raise ValueError(
                f"k must be at least 1, skip_top and with_positives at least 0, got {self.k}, {self.skip_top} and "
                f"{self.with_positives}"
            )


def mine(
    index: Searched,
    query_vectors: Rows,
    *,
    query_ids: Ids,
    matches: Matches,
    direction: Direction,
    settings: MineSettings,
    drop: Drop | None = None,
) -> Candidates:
    """The most similar items of the index for each query, matches apart.

    Filters compose in this order: matches never count as negatives; of the others the ``skip_top`` most similar are
    left out; then those that ``drop`` names; of what remains the ``k`` most similar are taken, ties to the lower id.
    The search goes deeper for the queries that end with fewer. Where an approximate index finds no more for a query, an
    exact search does.

    Args:
        index: The items that may become candidates: those of one split.
        query_vectors: (B, D), in memory or on disk.
        query_ids: (B,) corpus rows of the queries.
        matches: Every true pair of the corpus, other captions of the same image included.
        direction: ``i2t``: queries are images and items texts; ``t2i``: the other way round.
        settings: How many, and which.
        drop: Further candidates to leave out, for example a :class:`~distill.filters.TeacherMargin`.

    Returns:
        Candidates of width ``with_positives + k``: first the matches, then the negatives, each hardest (most similar)
        first and filled up with -1. Matches that the index does not hold are not there.

    Raises:
        ValueError: ``k`` negatives cannot be had from this corpus, or the arrays do not fit one another.
    """
    query_ids = np.asarray(query_ids, np.int64)
    if query_ids.shape != (len(query_vectors),):
        raise ValueError(f"query_ids must be ({len(query_vectors)},) like the query vectors, got {query_ids.shape}")
    known = _Known(index, matches, direction, query_ids)
    check_k(settings.k, len(index), int(known.counts.max(initial=0)), skip_top=settings.skip_top)
    ids, similarity = empty(len(query_ids), settings.with_positives + settings.k)
    negatives = slice(settings.with_positives, None)
    for part in exact.blocks(len(query_ids), max(_BLOCK, index.query_block)):
        queries = _Queries(query_ids[part], query_vectors[part], int(known.counts[part].max(initial=0)))
        search = _Search(index, known.is_match, settings, drop)
        ids[part, negatives], similarity[part, negatives] = search.negatives(queries)
        if settings.with_positives:
            best = known.most_similar(part, query_vectors[part], settings.with_positives)
            ids[part, : settings.with_positives], similarity[part, : settings.with_positives] = best
    positive = (np.arange(ids.shape[1]) < settings.with_positives) & (ids >= 0)
    return Candidates(direction, query_ids, ids, similarity, positive)


def check_k(k: int, n_items: int, max_positives: int, *, skip_top: int = 0) -> None:
    """Refuse a ``k`` that some query cannot get; cheap, for use before any work.

    Args:
        k: Negatives wanted a query.
        n_items: Items there are to choose from.
        max_positives: Most matches that one query has among them.
        skip_top: Most similar non-matches that are left out.

    Raises:
        ValueError: Fewer than ``k`` are left.
    """
    left = n_items - max_positives - skip_top
    if k > left:
        raise ValueError(
            f"k is {k}, but of {n_items} items a query with {max_positives} matches and skip_top {skip_top} leaves "
            f"only {max(0, left)} negatives: set k to {max(1, left)} or less, lower skip_top, or use a larger corpus"
        )


@dataclass(frozen=True)
class _Queries:
    """A block of queries and the most matches one of them has."""

    ids: Ids
    vectors: Vectors
    most_matches: int


@dataclass(frozen=True)
class _Search:
    """Searches deeper and deeper until every query of a block has its negatives."""

    index: Searched
    is_match: Callable[[Ids, Ids], Mask]
    settings: MineSettings
    drop: Drop | None

    def negatives(self, queries: _Queries) -> tuple[Ids, Vectors]:
        k, n_items = self.settings.k, len(self.index)
        ids, similarity = empty(len(queries.ids), k)
        pending = np.arange(len(queries.ids))
        depth = min(n_items, k + self.settings.skip_top + queries.most_matches)
        while len(pending):
            short = []
            for part in exact.blocks(len(pending), max(1, _CELLS // depth)):
                rows = pending[part]
                found, values = self._found(queries.vectors[rows], depth)
                wanted = self._wanted(queries.ids[rows], found)
                ids[rows], similarity[rows] = take_first(found, values, wanted, k)
                short.append(rows[wanted.sum(axis=1) < k])
            pending = np.concatenate(short) if depth < n_items else np.empty(0, np.int64)
            depth = min(n_items, 2 * depth)
        return ids, similarity

    def _found(self, vectors: Vectors, depth: int) -> tuple[Ids, Vectors]:
        if self.index.max_k is not None and depth > self.index.max_k:
            similarity, ids = self.index.search_exactly(vectors, depth)
            return ids, similarity
        similarity, ids = self.index.search(vectors, depth)
        unfilled = ids[:, -1] < 0  # an approximate index that has looked at all it will look at
        if unfilled.any():
            similarity[unfilled], ids[unfilled] = self.index.search_exactly(vectors[unfilled], depth)
        return ids, similarity

    def _wanted(self, query_ids: Ids, found: Ids) -> Mask:
        wanted = (found >= 0) & ~self.is_match(query_ids[:, None], found)
        wanted &= np.cumsum(wanted, axis=1) > self.settings.skip_top
        if self.drop is not None:
            rows, columns = np.nonzero(wanted)
            wanted[rows, columns] = ~self.drop(query_ids[rows], found[rows, columns])
        return np.asarray(wanted)


class _Known:
    """The matches of a set of queries among the items of an index."""

    def __init__(self, index: Searched, matches: Matches, direction: Direction, query_ids: Ids) -> None:
        offsets, items = matches.of(direction, query_ids)
        inside = index.contains(items)
        self._offsets = np.concatenate([[0], np.cumsum(inside)])[offsets]
        self._items = items[inside]
        self.counts = np.diff(self._offsets)  # (B,)
        self._index, self._matches, self._direction = index, matches, direction

    def is_match(self, queries: Ids, items: Ids) -> Mask:
        if self._direction == "i2t":
            return self._matches.is_match(queries, items)
        return self._matches.is_match(items, queries)

    def most_similar(self, part: slice, vectors: Vectors, count: int) -> tuple[Ids, Vectors]:
        counts, first = self.counts[part], self._offsets[part.start]
        ids = np.full((len(counts), max(1, int(counts.max(initial=0)))), -1, np.int64)
        there = np.arange(ids.shape[1]) < counts[:, None]
        ids[there] = self._items[first : first + int(counts.sum())]
        similarity = self._index.similarity_to(vectors, ids)
        order = np.lexsort((ids, -similarity), axis=1)
        ids, similarity = np.take_along_axis(ids, order, axis=1), np.take_along_axis(similarity, order, axis=1)
        return take_first(ids, similarity, ids >= 0, count)
