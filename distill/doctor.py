"""``distill doctor``: versions, devices, and what is missing, with the command that mends it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
from dataclasses import dataclass

# Version floors that are more than taste: older ones load weights or configurations unsafely.
FLOORS = {
    "torch": (2, 10),
    "transformers": (5, 5),
    "accelerate": (1, 10),
    "datasets": (4, 0),
    "numpy": (2, 0),
    "pyarrow": (18,),
    "pydantic": (2, 9),
}


@dataclass(frozen=True)
class Report:
    """What was found."""

    text: str
    healthy: bool


def diagnose() -> Report:
    """Look at the installation."""
    lines, faults = [f"python            {platform.python_version()} on {platform.system()} {platform.machine()}"], []
    for name, floor in FLOORS.items():
        found = _version(name)
        wanted = ".".join(map(str, floor))
        lines.append(f"{name:<18}{found or 'missing'}  (>= {wanted})")
        if found is None or _numbers(found) < floor:
            faults.append(f'{name}: have {found or "none"}, need >= {wanted}: pip install "{name}>={wanted}"')
    lines += _faiss(faults) + _devices()
    lines += [f"FAULT  {fault}" for fault in faults] or ["all well"]
    return Report("\n".join(lines), not faults)


def _faiss(faults: list[str]) -> list[str]:
    found = {name: _version(name) for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")}
    there = {name: version for name, version in found.items() if version}
    if not there:
        faults.append(
            'faiss: none is installed: pip install "cross2dual[cpu]", or "cross2dual[gpu]" where there is a GPU'
        )
    elif len(there) > 1:
        faults.append(f"faiss: {' and '.join(there)} share one import name; pip uninstall all but one of them")
    for name, version in there.items():
        if _numbers(version) < (1, 15):
            faults.append(
                f"{name}: have {version}, need >= 1.15 (index files are parsed unsafely before): pip install -U {name}"
            )
    return [f"{name:<18}{version}  (>= 1.15)" for name, version in there.items()]


def _devices() -> list[str]:
    lines = [f"{'cores':<18}{os.cpu_count()}", f"{'disk free':<18}{shutil.disk_usage('.').free / 2**30:.0f} GiB here"]
    if _version("torch"):
        import torch

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        lines.append(f"{'GPUs':<18}{', '.join(gpus) or 'none'}")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
