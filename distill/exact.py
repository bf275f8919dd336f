"""Inner products whose value depends on the two vectors alone, and exact search built on them.

A float32 matrix product rounds differently with an item's place in the matrix and with the number of queries, so two
equal items may get unequal similarities and a tie may go unnoticed. Here products are summed in float64 and rounded
once to float32: equal vectors give equal similarities, in every block and in every function of the project that ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.protocols import Ids

Vectors: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

CELLS = 1 << 22  # numbers that one temporary array may hold: 32 MiB in float64
QUERY_BLOCK = 256


def similarity_matrix(queries: Vectors, items: Vectors) -> Vectors:
    """Inner products (B, N) of queries (B, D) with items (N, D)."""
    return _rounded(queries.astype(np.float64) @ items.astype(np.float64).T)


def similarity_rows(queries: Vectors, items: Vectors) -> Vectors:
    """Inner products (B, K) of each query (B, D) with its own items (B, K, D)."""
    found = np.empty(items.shape[:2], np.float32)
    rows_at_once = max(1, CELLS // max(1, items.shape[1] * items.shape[2]))
    for start in range(0, len(queries), rows_at_once):
        part = slice(start, start + rows_at_once)
        products = items[part].astype(np.float64) @ queries[part].astype(np.float64)[:, :, None]  # (b, K, 1)
        found[part] = _rounded(products[..., 0])
    return found


def search(queries: Vectors, items: Vectors, k: int, *, ids: Ids) -> tuple[Vectors, Ids]:
    """The ``k`` most similar items of each query by comparing with all of them; ties go to the lower id.

    Args:
        queries: (B, D), finite.
        items: (N, D), finite.
        k: At least 1.
        ids: (N,) ascending.

    Returns:
        similarity (B, k) float32, best first, and ids (B, k); -inf and -1 where there are fewer than ``k`` items.
    """
    similarity, found = empty_answer(len(queries), k)
    for rows in blocks(len(queries), QUERY_BLOCK):
        best, best_rows = empty_answer(len(queries[rows]), 0)
        wide = queries[rows].astype(np.float64)
        for columns in item_blocks(items):
            values = _rounded(wide @ items[columns].astype(np.float64).T)
            places = np.broadcast_to(np.arange(columns.start, columns.start + values.shape[1]), values.shape)
            best, best_rows = _keep_best(
                np.concatenate([best, values], axis=1), np.concatenate([best_rows, places], axis=1), k
            )
        order = np.lexsort((best_rows, -best), axis=1)
        width = best.shape[1]
        similarity[rows, :width] = np.take_along_axis(best, order, axis=1)
        found[rows, :width] = ids[np.take_along_axis(best_rows, order, axis=1)]
    return similarity, found


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(count)``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def item_blocks(items: Vectors) -> Iterator[slice]:
    """Blocks of items small enough to widen and to compare with a block of queries."""
    return blocks(len(items), max(1, CELLS // max(QUERY_BLOCK, items.shape[1])))


def empty_answer(rows: int, k: int) -> tuple[Vectors, Ids]:
    """Similarity -inf and id -1 everywhere, (rows, k)."""
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def _keep_best(values: Vectors, rows: Ids, k: int) -> tuple[Vectors, Ids]:
    """The k largest of each row, in the order of the columns, which ascend in id: ties keep the first columns."""
    if values.shape[1] <= k:
        return values, rows
    last = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]  # (B, 1) the k-th largest
    above, tied = values > last, values == last
    keep = above | (tied & (np.cumsum(tied, axis=1) <= k - above.sum(axis=1, keepdims=True)))
    shape = (len(values), k)
    return values[keep].reshape(shape), rows[keep].reshape(shape)


def _rounded(products: np.ndarray[Any, np.dtype[np.float64]]) -> Vectors:
    with np.errstate(over="ignore"):  # beyond float32's range is inf
        return np.asarray(products, np.float32)
