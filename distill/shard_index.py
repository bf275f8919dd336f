"""An index over more vectors than memory holds: one shard after another is searched, and what they find is merged.

Similarities depend on two vectors alone (``distill.exact``), so the best of all shards' best are the best of all, and
equal ones tie across shards as they do within one: an index of ``Flat`` shards gives what one ``Flat`` index gives.

An index that is trained (IVF, PQ) is trained once, on a sample of all shards, and each shard's vectors are added to a
copy. Lists then mean the same everywhere, as in FAISS's own index on disk (``demos/demo_ondisk_ivf.py``); training each
shard by itself would cost as much again for each, and bend the lists to whatever a stretch of the corpus is about.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.durable import exclusively, sha256_of, size_of, write_atomically
from distill.faiss_setup import bounded_threads, factory_advice, faiss_module, set_nprobe, wants_gpu
from distill.index import GPU_MAX_K, VectorIndex
from distill.protocols import fingerprint
from distill.searched import check_k, checked_queries, recall_of

if TYPE_CHECKING:
    from pathlib import Path

    from distill.exact import Mask, Vectors
    from distill.faiss_setup import Device
    from distill.protocols import Ids
    from distill.shards import Shards

_MERGED = 1 << 14  # queries whose answers are merged together
_TRAINED_ON = 256  # vectors a list: FAISS takes no more of them
_LEAST_TRAINED_ON = 1 << 16  # for codes, which are trained whatever the lists


class ShardedIndex:
    """Items in shards on disk, searched as ``VectorIndex`` is; satisfies ``Searched``.

    As many shards as fit ``memory_bytes`` are held, the longest unused first to go; one where that is None.
    """

    query_block = 1 << 15  # each of them reads every shard

    def __init__(
        self,
        shards: Shards,
        *,
        factory: str = "Flat",
        nprobe: int | None = None,
        device: Device = "auto",
        memory_bytes: int | None = None,
    ) -> None:
        """An index that is not flat is trained and kept beside the shards, unless it is there.

        Raises:
            ValueError: a shard is larger than ``memory_bytes``, or FAISS does not know or cannot train the factory.
            BadShardsError: a shard is not what was written.
            MissingFaissError: FAISS is not installed.
        """
        self.shards, self.factory, self.exact = shards, factory, factory == "Flat"
        self._nprobe, self._device = nprobe, device
        self.on_gpu = wants_gpu(faiss_module(), device)
        largest = max(shards.shards, key=lambda shard: shard.items)
        shard_bytes = 4 * shards.dim * largest.items
        if memory_bytes is not None and shard_bytes > memory_bytes:
            raise ValueError(
                f"shard {largest.number} of {shards.folder} has {largest.items} items and takes "
                f"{size_of(shard_bytes)}, more than the {size_of(memory_bytes)} allowed: write smaller shards, or "
                "allow more"
            )
        self._held = 1 if memory_bytes is None else memory_bytes // shard_bytes
        self._open: OrderedDict[int, VectorIndex] = OrderedDict()
        if not self.exact:
            self._train()

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def ids(self) -> Ids:
        """(N,) ids of the items, ascending."""
        return self.shards.ids

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self.shards.dim

    @property
    def max_k(self) -> int | None:
        """Largest k that :meth:`search` takes; None where there is no limit."""
        return GPU_MAX_K if self.on_gpu else None

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """As :meth:`VectorIndex.search`."""
        queries = checked_queries(queries, self.dim)
        check_k(k, self.max_k)
        best = exact.empty_answer(len(queries), k)
        for number in range(len(self.shards.shards)):
            self._search_shard(number, queries, best)
        return best

    def _search_shard(self, number: int, queries: Vectors, best: tuple[Vectors, Ids]) -> None:
        """A function, so that nothing refers to a shard when the next one is loaded."""
        index = self.shard(number)
        for part in exact.blocks(len(queries), _MERGED):
            merge_into(best, part, index.search(queries[part], min(best[0].shape[1], len(index))))

    def search_exactly(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """As :meth:`VectorIndex.search_exactly`."""
        queries = checked_queries(queries, self.dim)
        check_k(k, None)
        best = exact.empty_answer(len(queries), k)
        for number in range(len(self.shards.shards)):
            vectors, ids = self.shards.block(number)
            for part in exact.blocks(len(queries), _MERGED):
                merge_into(best, part, exact.search(queries[part], vectors, min(k, len(ids)), ids=ids))
        return best

    def similarity_to(self, queries: Vectors, item_ids: Ids) -> Vectors:
        """As :meth:`VectorIndex.similarity_to`; reads the chosen items alone."""
        queries, item_ids = checked_queries(queries, self.dim), np.asarray(item_ids, np.int64)
        rows = self.shards.rows_of(item_ids)
        similarity = np.empty(rows.shape, np.float32)
        for part in exact.blocks(len(rows), max(1, exact.CELLS // max(1, rows.shape[1] * self.dim))):
            similarity[part] = exact.similarity_rows(queries[part], self.shards[np.maximum(rows[part], 0)])
        similarity[rows < 0] = -np.inf
        return similarity

    def contains(self, item_ids: Ids) -> Mask:
        """Whether each id is in the index; the shape of ``item_ids``."""
        return np.asarray(self.shards.rows_of(np.asarray(item_ids, np.int64)) >= 0)

    def recall_against_exact(self, queries: Vectors, k: int, *, floor: float = 0.0) -> float:
        """As :meth:`VectorIndex.recall_against_exact`."""
        return recall_of(self, queries, k, floor=floor)

    def shard(self, number: int) -> VectorIndex:
        """The index of one shard, in memory."""
        if number not in self._open:
            while len(self._open) >= self._held:
                self._open.popitem(last=False)
            vectors, ids = self.shards.block(number)
            if self.exact:
                made = VectorIndex.build(vectors, ids, device=self._device)
            else:
                index = self._read(self._added(number, vectors))
                if self._nprobe is not None:
                    set_nprobe(faiss_module(), index, self._nprobe, factory=self.factory)
                made = VectorIndex.placed(index, ids, vectors=vectors, factory=self.factory, device=self._device)
            self._open[number] = made
        self._open.move_to_end(number)
        return self._open[number]

    # ---- of indexes that are not flat

    @property
    def _home(self) -> Path:
        return self.shards.folder / f"index-{fingerprint(self.factory, self.shards.mark)[:16]}"

    def _train(self) -> None:
        """``trained.faiss``: the index without any vector."""
        path, faiss = self._home / "trained.faiss", faiss_module()
        with exclusively(self._home):
            if path.is_file():
                return
            shape = self.shards.shape
            with bounded_threads(faiss):
                try:
                    index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
                    if not index.is_trained:
                        sample = self._sample(faiss, index)
                        shape = sample.shape
                        index.train(sample)
                except RuntimeError as error:
                    raise ValueError(factory_advice(self.factory, shape, error)) from error
            self._write(index, path)

    def _sample(self, faiss: Any, index: Any) -> Vectors:
        lists = faiss.try_extract_index_ivf(index)
        count = max(_LEAST_TRAINED_ON, _TRAINED_ON * lists.nlist if lists is not None else 0)
        if count >= len(self):
            return self.shards[:]
        # drawn, not every n-th: captions come five an image
        return self.shards[np.sort(np.random.default_rng(0).choice(len(self), count, replace=False))]

    def _added(self, number: int, vectors: Vectors) -> Path:
        """File of a shard's index; made by a copy of the trained one, once."""
        path = self._home / f"{number:05d}.faiss"
        with exclusively(path):
            if not path.is_file():
                index = self._read(self._home / "trained.faiss")
                with bounded_threads(faiss_module()):
                    for part in exact.item_blocks(vectors):
                        index.add(np.ascontiguousarray(vectors[part]))
                self._write(index, path)
        return path

    def _write(self, index: Any, path: Path) -> None:
        data = faiss_module().serialize_index(index)
        write_atomically(path, lambda file: file.write(data.data))
        write_atomically(path.with_suffix(".sha256"), lambda file: file.write(sha256_of(path).encode()))

    def _read(self, path: Path) -> Any:
        told = path.with_suffix(".sha256")
        if told.is_file() and told.read_text() != sha256_of(path):
            raise ValueError(f"{path} is not what was saved: delete {self._home}, and it is made again")
        return faiss_module().read_index(str(path))


def merge_into(best: tuple[Vectors, Ids], part: slice, found: tuple[Vectors, Ids]) -> None:
    """Keep, of the rows ``part`` of the best so far and of what another shard found, the best: ties to the lower id.

    ``best``: similarity (B, k) and ids (B, k), changed in place. ``found``: those of the part's queries, of any width.
    """
    k = best[0].shape[1]
    similarity = np.concatenate([best[0][part], found[0]], axis=1)
    ids = np.concatenate([best[1][part], found[1]], axis=1)
    last = np.where(ids < 0, np.iinfo(np.int64).max, ids)
    order = np.lexsort((last, -similarity), axis=1)[:, :k]
    best[0][part] = np.take_along_axis(similarity, order, axis=1)
    best[1][part] = np.take_along_axis(ids, order, axis=1)
