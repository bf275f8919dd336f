"""FAISS as this project uses it: imported late, with bounded threads, on a GPU where there is one."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any, Literal

from distill.cores import cores

if TYPE_CHECKING:
    from collections.abc import Iterator

Device = Literal["auto", "cpu", "gpu"]
# Items compared at a time. FAISS's 1024 makes threads wait for one another four times as often: with two threads on a
# busy machine a flat search of 20,000 x 100,000 vectors took 1.8 times as long.
_ITEMS_AT_ONCE = 4096


class MissingFaissError(ImportError):
    """FAISS is not installed."""


@contextlib.contextmanager
def bounded_threads(faiss: Any) -> Iterator[int]:
    """FAISS takes every core in each process; keep to this process's share of them, and never above what was set."""
    before = int(faiss.omp_get_max_threads())
    share = max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    faiss.omp_set_num_threads(min(before, share))
    try:
        yield min(before, share)
    finally:
        faiss.omp_set_num_threads(before)


def faiss_module() -> Any:
    """FAISS, imported when it is first needed: importing it loads its own OpenMP and takes a tenth of a second."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise MissingFaissError(
            'FAISS is not installed: pip install "cross2dual[cpu]", or pip install "cross2dual[gpu]" where there is an '
            "NVIDIA GPU; never both, they overwrite each other"
        ) from error
    faiss.cvar.distance_compute_blas_database_bs = _ITEMS_AT_ONCE
    return faiss


def wants_gpu(faiss: Any, device: Device) -> bool:
    """Whether an index goes to the GPU.

    Raises:
        ValueError: ``gpu`` is asked for, and faiss-gpu or the GPU is missing.
    """
    there = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if device == "gpu" and not there:
        raise ValueError("device is 'gpu', but FAISS finds none: install \"cross2dual[gpu]\", or use device='cpu'")
    return there and device != "cpu"


def set_nprobe(faiss: Any, index: Any, nprobe: int, *, factory: str) -> None:
    """Set how many lists an IVF index looks into, also where a transform stands before it.

    Raises:
        ValueError: The index has no lists, or not so many.
    """
    lists = faiss.try_extract_index_ivf(index)
    if lists is None:
        raise ValueError(f"nprobe is {nprobe}, but the factory {factory!r} makes no IVF index: leave nprobe out")
    if not 1 <= nprobe <= lists.nlist:
        raise ValueError(f"nprobe is {nprobe}; the factory {factory!r} has lists for 1 to {lists.nlist}")
    lists.nprobe = nprobe


def factory_advice(factory: str, shape: tuple[int, ...], error: RuntimeError) -> str:
    """What to tell a user whose factory string FAISS refused for vectors of ``shape`` (N, D)."""
    reason = str(error).rsplit(": ", 1)[-1]
    return (
        f"FAISS cannot make the index {factory!r} over {shape[0]} vectors of width {shape[1]} ({reason}): "
        "use 'Flat', or a valid factory string with fewer lists than vectors, such as 'IVF64,Flat'"
    )
