"""The index over embeddings: FAISS proposes items, exact inner products (``distill.exact``) decide their order.

Similarities therefore depend on the two vectors alone, whatever the index, the device and the size of the batch; equal
items tie, and ties go to the lower id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.durable import sha256_of, staged_folder
from distill.faiss_setup import bounded_threads, factory_advice, faiss_module, set_nprobe, wants_gpu
from distill.searched import check_k, checked_queries, recall_of, some

if TYPE_CHECKING:
    from distill.exact import Mask, Vectors
    from distill.faiss_setup import Device
    from distill.protocols import Ids

GPU_MAX_K = 2048  # FAISS's own limit on k on a GPU (DeviceDefs.cuh)
_GPU_SCRATCH = 64 << 20  # bytes; the default reserves up to 1.5 GiB a GPU, which brute force does not need
_OVERSAMPLING = 4  # short codes order badly but collect well: find more than asked, then order exactly
_MANIFEST = "manifest.json"


class VectorIndex:
    """Most similar items of a query by inner product; made by :meth:`build` or :meth:`load`.

    ``Flat`` is exact. Any other factory string proposes items approximately; their similarities are exact all the same.
    """

    query_block = 1

    def __init__(self, index: Any, ids: Ids, *, vectors: Vectors, factory: str) -> None:
        """For :meth:`build` and :meth:`load`: ``ids`` ascend and ``vectors`` (N, D) are in their order."""
        self._index, self._ids, self._vectors, self.factory = index, ids, vectors, factory
        self.exact = factory == "Flat"
        self.on_gpu = type(index).__name__.startswith("GpuIndex")
        self._longest = max(
            (float(np.max(_lengths(vectors[part]))) for part in exact.item_blocks(vectors)), default=0.0
        )

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Ids:
        """(N,) ids of the items, ascending."""
        return self._ids

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return int(self._vectors.shape[1])

    def vectors(self) -> Vectors:
        """A copy (N, D) of the items' vectors, in the order of ``ids``: the memory of a flat index is FAISS's own."""
        return np.array(self._vectors)

    @property
    def max_k(self) -> int | None:
        """Largest k that :meth:`search` takes; None where there is no limit."""
        return GPU_MAX_K if self.on_gpu else None

    @classmethod
    def build(
        cls, vectors: Vectors, ids: Ids, *, factory: str = "Flat", nprobe: int | None = None, device: Device = "auto"
    ) -> VectorIndex:
        """Index ``vectors`` (N, D) under ``ids`` (N,).

        Args:
            vectors: Finite; of unit length where a cosine is meant. An index that is not ``Flat`` refers to them.
            ids: Distinct and not negative, in any order.
            factory: FAISS factory string, for example ``Flat``, ``IVF64,Flat`` or ``HNSW32``; trained on ``vectors``.
            nprobe: Lists that an IVF index looks into; FAISS's default is 1.
            device: ``auto`` takes a GPU where faiss-gpu is installed and finds one.

        Raises:
            ValueError: Wrong shapes, repeated or negative ids, non-finite vectors (named by id), or a factory string
                that FAISS does not know or cannot train on so few vectors.
            MissingFaissError: FAISS is not installed.
        """
        vectors, ids = _checked_items(vectors, ids)
        faiss = faiss_module()
        with bounded_threads(faiss):
            try:
                index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
                if not index.is_trained:
                    index.train(vectors)
                index.add(vectors)
            except RuntimeError as error:
                raise ValueError(factory_advice(factory, vectors.shape, error)) from error
        if nprobe is not None:
            set_nprobe(faiss, index, nprobe, factory=factory)
        return cls.placed(index, ids, vectors=vectors, factory=factory, device=device)

    @classmethod
    def placed(cls, index: Any, ids: Ids, *, vectors: Vectors | None, factory: str, device: Device) -> VectorIndex:
        """Of an index of FAISS over items whose ids ascend; where ``vectors`` is None it holds them itself, flat."""
        faiss = faiss_module()
        gpu = wants_gpu(faiss, device)
        if factory == "Flat":  # share the memory of the index instead of keeping a second copy
            inside = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
            vectors = (np.array(inside) if vectors is None else vectors) if gpu else inside
        if vectors is None:
            raise AssertionError("an index that is not flat needs its vectors")
        if gpu:
            resources = faiss.StandardGpuResources()
            resources.setTempMemory(_GPU_SCRATCH)
            index = faiss.index_cpu_to_gpu(resources, 0, index)
        return cls(index, ids, vectors=vectors, factory=factory)

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """The ``k`` most similar items of each query (B, D), best first, ties to the lower id.

        Returns:
            similarity (B, k) float32 and ids (B, k) int64; -inf and -1 where fewer than ``k`` were found.

        Raises:
            ValueError: Another width than the index has, a non-finite query (named by row), or k out of range.
        """
        queries = checked_queries(queries, self.dim)
        check_k(k, self.max_k)
        depth = min(2 * k + 16 if self.exact else _OVERSAMPLING * k, len(self), self.max_k or len(self))
        similarity, ids = exact.empty_answer(len(queries), k)
        for part in exact.blocks(len(queries), max(1, exact.CELLS // depth)):  # FAISS is slow on few
            similarity[part], ids[part] = self._search_block(queries[part], k, depth)
        return similarity, ids

    def search_exactly(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Like :meth:`search`, by comparing every query with every item: exact for any factory string, any k."""
        check_k(k, None)
        return exact.search(checked_queries(queries, self.dim), self._vectors, k, ids=self._ids)

    def similarity_to(self, queries: Vectors, item_ids: Ids) -> Vectors:
        """Inner products (B, K) of queries (B, D) with chosen items (B, K); -inf where an id is not in the index."""
        queries, item_ids = checked_queries(queries, self.dim), np.asarray(item_ids, np.int64)
        return self._similarity_to_rows(queries, self._rows_of(item_ids))

    def contains(self, item_ids: Ids) -> Mask:
        """Whether each id is in the index; the shape of ``item_ids``."""
        return np.asarray(self._rows_of(np.asarray(item_ids, np.int64)) >= 0)

    def recall_against_exact(self, queries: Vectors, k: int, *, floor: float = 0.0) -> float:
        """Share of the exact ``k`` most similar items that :meth:`search` finds, over sample queries (B, D).

        An item as similar as the last true one counts as found.

        Raises:
            ValueError: The share is below ``floor``, or there is no query.
        """
        return recall_of(self, queries, k, floor=floor)

    def save(self, folder: str | Path) -> None:
        """Write the index with checksums; the folder is replaced as a whole, or stays as it was."""
        faiss = faiss_module()
        on_cpu = faiss.index_gpu_to_cpu(self._index) if self.on_gpu else self._index
        arrays: dict[str, Any] = (
            {"ids.npy": self._ids} if self.exact else {"ids.npy": self._ids, "vectors.npy": self._vectors}
        )
        with staged_folder(folder) as staging:
            faiss.write_index(on_cpu, str(staging / "index.faiss"))
            for name, array in arrays.items():
                np.save(staging / name, array, allow_pickle=False)
            files = {name: sha256_of(staging / name) for name in ("index.faiss", *arrays)}
            manifest = {"format": 1, "factory": self.factory, "items": len(self), "dim": self.dim, "files": files}
            (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, device: Device = "auto") -> VectorIndex:
        """Read what :meth:`save` wrote, once its checksums proved right.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: A file is missing, or was changed or cut short since it was saved.
        """
        folder = Path(folder)
        factory = _checked_manifest(folder)["factory"]
        index = faiss_module().read_index(str(folder / "index.faiss"))
        ids = np.load(folder / "ids.npy", allow_pickle=False)
        stored = None if factory == "Flat" else np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        return cls.placed(index, ids, vectors=stored, factory=factory, device=device)

    def _search_block(self, queries: Vectors, k: int, depth: int) -> tuple[Vectors, Ids]:
        with bounded_threads(faiss_module()):
            rough, rows = self._index.search(queries, depth)  # (b, depth), float32 with FAISS's rounding
        unsure = np.zeros(len(queries), np.bool_)
        if self.exact and depth > k:
            # Rounding may have moved an item across the k-th place: look at all that come within its error of it.
            error = 8 * np.finfo(np.float32).eps * np.sqrt(self.dim) * self._longest * _lengths(queries)
            near = rough >= (rough[:, k - 1] - error)[:, None]
            unsure = near[:, -1] & (depth < len(self))
            rows = rows[:, : max(k, int(near.sum(axis=1).max()))]
        similarity = self._similarity_to_rows(queries, rows)
        order = np.lexsort((rows, -similarity), axis=1)[:, :k]  # -1 comes with -inf and so goes last
        rows = np.take_along_axis(rows, order, axis=1)
        found, ids = exact.empty_answer(len(queries), k)
        found[:, : rows.shape[1]] = np.take_along_axis(similarity, order, axis=1)
        ids[:, : rows.shape[1]] = np.where(rows >= 0, self._ids[rows], -1)
        if unsure.any():
            found[unsure], ids[unsure] = self.search_exactly(queries[unsure], k)
        return found, ids

    def _similarity_to_rows(self, queries: Vectors, rows: Ids) -> Vectors:
        similarity = np.empty(rows.shape, np.float32)
        for part in exact.blocks(len(rows), max(1, exact.CELLS // max(1, rows.shape[1] * self.dim))):
            similarity[part] = exact.similarity_rows(queries[part], self._vectors[np.maximum(rows[part], 0)])
        similarity[rows < 0] = -np.inf
        return similarity

    def _rows_of(self, item_ids: Ids) -> Ids:
        rows = np.minimum(np.searchsorted(self._ids, item_ids), len(self) - 1)
        return np.asarray(np.where(self._ids[rows] == item_ids, rows, -1), np.int64)


def _checked_items(vectors: Vectors, ids: Ids) -> tuple[Vectors, Ids]:
    ids = np.asarray(ids)
    if vectors.ndim != 2 or not vectors.size or ids.shape != vectors.shape[:1]:
        raise ValueError(f"vectors must be (N, D) with N, D > 0 and ids (N,), got {vectors.shape} and {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(order, np.arange(len(ids))):
        vectors, ids = vectors[order], ids[order]
    vectors, ids = np.ascontiguousarray(vectors, np.float32), np.array(ids, np.int64)
    if ids[0] < 0:
        raise ValueError(f"ids must not be negative, -1 means no item; the lowest is {ids[0]}")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"ids must be distinct; given more than once: {some(np.unique(twice))}")
    finite = np.concatenate([np.isfinite(vectors[part]).all(axis=1) for part in exact.item_blocks(vectors)])
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} vectors are not finite; ids {some(ids[~finite])}")
    return vectors, ids


def _checked_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no index in {folder}: {_MANIFEST} is not there; build and save one first")
    manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if manifest.get("format") != 1:
        raise ValueError(f"{path}: format is {manifest.get('format')!r}, expected 1; build the index again")
    for name, checksum in manifest["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != checksum:
            raise ValueError(f"{folder / name} is missing or is not what was saved; build the index again")
    return manifest


def _lengths(vectors: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(vectors, axis=1), np.float32)
