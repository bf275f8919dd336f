"""What mining asks of an index, and what every index checks alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from distill.exact import Mask, Vectors
    from distill.protocols import Ids


class Rows(Protocol):
    """Vectors (N, D) that are read in parts: an array, or shards on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Vectors: ...


class Searched(Protocol):
    """An index as mining reads it: in one piece (``VectorIndex``) or in shards (``ShardedIndex``)."""

    factory: str
    exact: bool
    query_block: int  # queries that are better searched together than one part after another

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int:
        """Width D of the vectors."""

    @property
    def max_k(self) -> int | None:
        """Largest k that ``search`` takes; None where there is no limit."""

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """The ``k`` most similar items of each query (B, D): similarity and ids (B, k), ties to the lower id."""

    def search_exactly(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """The same by comparing with every item, for any factory string."""

    def similarity_to(self, queries: Vectors, item_ids: Ids) -> Vectors:
        """Inner products (B, K) with chosen items (B, K); -inf where an id is not in the index."""

    def contains(self, item_ids: Ids) -> Mask:
        """Whether each id is in the index."""

    def recall_against_exact(self, queries: Vectors, k: int, *, floor: float = 0.0) -> float:
        """Share of the true ``k`` most similar items that ``search`` finds."""


def recall_of(index: Searched, queries: Vectors, k: int, *, floor: float) -> float:
    """As ``VectorIndex.recall_against_exact``, of any index."""
    if not len(queries):
        raise ValueError("recall needs at least one sample query, got none")
    wanted = min(k, len(index))
    found, truth = index.search(queries, wanted)[0], index.search_exactly(queries, wanted)[0]
    recall = float(np.mean(found >= truth[:, -1:]))
    if recall < floor:
        raise ValueError(
            f"the index {index.factory!r} finds {recall:.1%} of the true {wanted} nearest items over {len(queries)} "
            f"queries, less than the required {floor:.1%}: raise nprobe, or use factory 'Flat', which is exact"
        )
    return recall


def checked_queries(queries: Vectors, dim: int) -> Vectors:
    """Queries (B, D) as FAISS reads them.

    Raises:
        ValueError: Another width, or a query that is not finite (named by row).
    """
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries must be (B, {dim}) like the indexed items, got {queries.shape}")
    queries = np.ascontiguousarray(queries, np.float32)
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise ValueError(f"{len(bad)} queries are not finite; rows {some(bad)}")
    return queries


def check_k(k: int, max_k: int | None) -> None:
    """Refuse a ``k`` that cannot be searched for."""
    if k < 1 or (max_k is not None and k > max_k):
        limit = "" if max_k is None else f" and at most {max_k} (FAISS's limit on a GPU; device='cpu' has none)"
        raise ValueError(f"k is {k}; it must be at least 1{limit}")


def some(ids: Ids, most: int = 5) -> str:
    """The first of them, for a message."""
    shown = ", ".join(str(int(one)) for one in ids[:most])
    return f"{shown}, ..." if len(ids) > most else shown
