"""Retrieval metrics, all from one number a query: the rank of its first true item.

The rank is pessimistic: 1 + the number of other items that score at least as high as the best true one, so a tie counts
against the model, and a NaN counts as wrong on either side. A model that gives every pair the same score gets nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill import exact

if TYPE_CHECKING:
    from distill.data.matches import Matches
    from distill.exact import Mask, Vectors
    from distill.protocols import Direction, Ids


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 both ways in percent, their sum, and mean reciprocal ranks (0 to 1)."""

    i2t_r1: float
    i2t_r5: float
    i2t_r10: float
    t2i_r1: float
    t2i_r5: float
    t2i_r10: float
    rsum: float
    i2t_mrr: float
    t2i_mrr: float

    def as_dict(self) -> dict[str, float]:
        """The metrics by name."""
        return asdict(self)


def summarise(i2t_ranks: Ids, t2i_ranks: Ids) -> Retrieval:
    """All metrics from the rank of the first true item of each image (N,) and of each text (M,)."""
    ranks = {"i2t": i2t_ranks, "t2i": t2i_ranks}
    recalls = {f"{way}_r{k}": recall_at(ranks[way], k) for way in ranks for k in (1, 5, 10)}
    mrr = {f"{way}_mrr": mean_reciprocal_rank(ranks[way]) for way in ranks}
    return Retrieval(**recalls, **mrr, rsum=sum(recalls.values()))


def recall_at(ranks: Ids, k: int) -> float:
    """Percent of queries whose first true item is among the first ``k``."""
    return 100.0 * float(np.mean(_some_ranks(ranks) <= k))


def mean_reciprocal_rank(ranks: Ids) -> float:
    """Mean over queries of 1 / rank of the first true item."""
    return float(np.mean(1.0 / _some_ranks(ranks)))


def first_positive_ranks(similarity: Vectors, positive: Mask) -> Ids:
    """Pessimistic rank (B,) of each query's first true item, from similarities (B, N) and a mask (B, N).

    True items whose similarity is not finite are passed over; a query left with none gets the last rank, N.

    Raises:
        ValueError: A query has no true item.
    """
    if similarity.shape != positive.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity and positive must share one (B, N) shape, got {similarity.shape}, {positive.shape}"
        )
    rows = np.arange(len(similarity))
    _refuse_hopeless(rows[~positive.any(axis=1)], "rows")
    usable = positive & np.isfinite(similarity)
    best = np.max(similarity, axis=1, where=usable, initial=-np.inf)  # (B,)
    above = np.sum(~positive & ~(similarity < best[:, None]), axis=1)  # "not below": a NaN counts as above
    return np.asarray(np.where(usable.any(axis=1), 1 + above, similarity.shape[1]), np.int64)


def ranks_from_embeddings(
    queries: Vectors,
    items: Vectors,
    *,
    query_ids: Ids,
    item_ids: Ids,
    matches: Matches,
    direction: Direction,
    block: int = exact.QUERY_BLOCK,
) -> Ids:
    """Pessimistic rank (B,) of the first match of each query (B, D) among the items (N, D), in bounded memory.

    Args:
        queries: (B, D) images where ``direction`` is ``i2t``, texts where it is ``t2i``.
        items: (N, D).
        query_ids: (B,) corpus rows.
        item_ids: (N,) corpus rows, distinct.
        matches: Every true pair of the corpus.
        direction: Which side asks.
        block: Queries compared at once.

    Raises:
        ValueError: Shapes that do not fit, repeated items, or queries without any match among the items (named).
    """
    _check_shapes(queries, items, query_ids, item_ids)
    order = np.argsort(item_ids, kind="stable")
    ascending = item_ids[order]
    if np.any(ascending[1:] == ascending[:-1]):
        raise ValueError("item_ids must be distinct: an item that is there twice would compete with itself")
    ranks = np.empty(len(queries), np.int64)
    for part in exact.blocks(len(queries), block):
        offsets, found = matches.of(direction, query_ids[part])
        place = np.minimum(np.searchsorted(ascending, found), len(order) - 1)
        inside = ascending[place] == found
        rows, columns = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[inside], order[place[inside]]
        _refuse_hopeless(query_ids[part][np.bincount(rows, minlength=len(offsets) - 1) == 0], "query ids")
        ranks[part] = _block_ranks(queries[part], items, rows, columns)
    return ranks


def _block_ranks(queries: Vectors, items: Vectors, rows: Ids, columns: Ids) -> Ids:
    """Ranks (b,) where (rows, columns) lists the true cells of the (b, N) matrix that is never built."""
    values = exact.similarity_rows(queries[rows], items[columns][:, None, :])[:, 0]  # (P,)
    usable = np.isfinite(values)
    best = np.full(len(queries), -np.inf, np.float32)
    np.maximum.at(best, rows[usable], values[usable])
    above = np.zeros(len(queries), np.int64)
    for part in exact.item_blocks(items):
        counted = ~(exact.similarity_matrix(queries, items[part]) < best[:, None])
        here = (columns >= part.start) & (columns < part.stop)
        counted[rows[here], columns[here] - part.start] = False
        above += counted.sum(axis=1)
    hopeless = np.bincount(rows[usable], minlength=len(queries)) == 0
    return np.asarray(np.where(hopeless, len(items), 1 + above), np.int64)


def _some_ranks(ranks: Ids) -> Ids:
    if not len(ranks):
        raise ValueError("there is no query to average over")
    return ranks


def _check_shapes(queries: Vectors, items: Vectors, query_ids: Ids, item_ids: Ids) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(
            f"queries and items must be (B, D) and (N, D) of one width, got {queries.shape}, {items.shape}"
        )
    if query_ids.shape != queries.shape[:1] or item_ids.shape != items.shape[:1]:
        raise ValueError(
            f"one id a vector is needed: {queries.shape[0]} queries with ids {query_ids.shape}, {items.shape[0]} items "
            f"with ids {item_ids.shape}"
        )


def _refuse_hopeless(ids: Ids, what: str) -> None:
    if len(ids):
        shown = ", ".join(str(int(one)) for one in ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"{len(ids)} queries have no true item here ({what} {shown}): their rank is undefined; leave them out or "
            "evaluate on a split that holds their matches"
        )
