"""How vectors are stored: fewer numbers each, coarser numbers, and finer ones on disk for a shortlist.

A *kind* says what is searched, which is what an index holds in memory, and what a shortlist is then rescored by:

- ``float32``, ``float16``: as they are, or rounded.
- ``int8``: FAISS's scalar quantiser (``SQ8``): a byte a number, within the range that each number has over a sample of
  the training split. The query stays float32; its inner product is with the numbers that the bytes stand for.
- ``binary``: a bit a number, set where it is above 0, on both sides, by Hamming distance (``IndexBinaryFlat``). The
  inner product of two vectors of signs is the width less twice that distance: the order is the same, ties included.
- ``... + rescore X``: the first items of the search are ordered again by the float32 query's inner product with what X
  holds of each: ``codes`` are the signs that are in memory anyway (BPR, Yamada et al., ACL 2021, arXiv 2106.00882);
  ``int8`` and ``float32`` are read from disk, for these items alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.faiss_setup import bounded_threads, faiss_module

if TYPE_CHECKING:
    from distill.exact import Vectors

Storage = Literal["float32", "float16", "int8", "binary"]
BITS: dict[Storage, int] = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}


@dataclass(frozen=True)
class Kind:
    """A way of storing items: what is searched, and what orders a shortlist again."""

    stored: Storage
    rescored: Storage | None = None

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.rescored is None:
            return self.stored
        return f"{self.stored} + rescore {'codes' if self.rescored == self.stored else self.rescored}"

    def bytes_in_memory(self, width: int) -> int:
        """Of one item of so many numbers: what a search reads of all items."""
        return -(-BITS[self.stored] * width // 8)

    def bytes_on_disk(self, width: int) -> int:
        """Of one item: what is in memory, and what a shortlist is rescored by where that is something else."""
        beside = 0 if self.rescored in (None, self.stored) else -(-BITS[self.rescored] * width // 8)
        return self.bytes_in_memory(width) + beside


KINDS = (
    Kind("float32"),
    Kind("float16"),
    Kind("int8"),
    Kind("int8", "float32"),
    Kind("binary"),
    Kind("binary", "binary"),
    Kind("binary", "int8"),
    Kind("binary", "float32"),
)


def cut(vectors: Vectors, width: int) -> Vectors:
    """The first ``width`` numbers of unit vectors (N, D), normalised again; all of them as they are."""
    if width == vectors.shape[1]:
        return vectors
    kept = vectors[:, :width].astype(np.float64)
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return np.asarray(kept / np.where(lengths > 0, lengths, 1), np.float32)


class Quantiser:
    """FAISS's scalar quantiser of eight bits over the range of each number."""

    def __init__(self, sample: Vectors) -> None:
        """``sample`` (S, width): of training items; sets the ranges, to whose ends goes what lies outside."""
        faiss = faiss_module()
        self._faiss = faiss
        self._index = faiss.IndexScalarQuantizer(
            sample.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        with bounded_threads(faiss):
            self._index.train(np.ascontiguousarray(sample, np.float32))

    def restored(self, vectors: Vectors) -> Vectors:
        """The numbers (N, width) that the bytes of these vectors stand for."""
        with bounded_threads(self._faiss):
            codes = self._index.sa_encode(np.ascontiguousarray(vectors, np.float32))
            return np.asarray(self._index.sa_decode(codes), np.float32)


def signs(vectors: Vectors) -> Vectors:
    """1 where a number is above 0, else -1."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def stored(vectors: Vectors, storage: Storage, quantiser: Quantiser | None) -> Vectors:
    """The numbers (N, width) that stored vectors stand for, and a query's are multiplied with.

    ``quantiser``: of these vectors' width and side; only ``int8`` needs one.
    """
    if storage == "float16":
        return vectors.astype(np.float16).astype(np.float32)
    if storage == "int8":
        assert quantiser is not None
        return quantiser.restored(vectors)
    return signs(vectors) if storage == "binary" else vectors
