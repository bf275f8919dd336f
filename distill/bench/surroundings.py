"""What times depend on beside the code: threads, machine, versions."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cores import cores

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUSY = 0.5  # of the cores at work before anything here is


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """As many threads for torch, for every OpenMP library (FAISS's among them) and for BLAS.

    ONNX Runtime and OpenVINO have pools of their own, whose size is given as they are opened.

    Raises:
        ValueError: more than this process has cores.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from distill.faiss_setup import faiss_module

    if not 1 <= count <= cores():
        raise ValueError(
            f"--threads is {count}, but this process may use {cores()} core(s): more threads than cores wait for one "
            "another, and would be timed doing it; give at most that many"
        )
    faiss_module()  # loaded first, so that its OpenMP is found
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    """Processor, cores, system, and versions of what is timed."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version for name in _TIMED if (version := _version(name)) is not None},
    }


_TIMED = ("torch", "onnxruntime", "openvino", "faiss-cpu", "faiss-gpu", "transformers")


def business() -> str | None:
    """Words on who else is at work on this machine, where somebody is."""
    try:
        load = os.getloadavg()[0]
    except OSError:  # not every system can tell
        return None
    if load <= _BUSY * cores():
        return None
    return (
        f"the machine was busy as this began (load {load:.1f} on {cores()} cores): times are longer than on a quiet "
        "one, ratios less so"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
