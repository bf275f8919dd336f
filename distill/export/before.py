"""What is refused before an export begins, so that nobody waits for what cannot be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.durable import size_of
from distill.export.layout import REPORT

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMES_WEIGHTS = {"transformers": 1.0, "onnx": 1.0, "fp16": 0.5, "int8": 0.7, "torch-export": 1.2, "openvino": 1.0}
_SPARE = 32 << 20  # tokenizer, report, what exporters write on the way
_OF_ONNX = frozenset({"onnx", "fp16", "int8", "openvino", "torch-export"})  # written, or made, beside ONNX files


class ExportError(ValueError):
    """An export that cannot begin."""


def check_libraries(artefacts: frozenset[str], student: Any) -> None:
    """Refuse what would fail after the sample was embedded.

    Raises:
        ExportError: names the library, the command that installs it, and how to do without.
    """
    import importlib.util

    needs = {
        "sentence-transformers": (("sentence_transformers",), "sentence-transformers>=6.2"),
        "onnx": (("onnx", "onnxscript", "onnxruntime"), "cross2dual[onnx]"),
        "openvino": (("openvino",), "cross2dual[openvino]"),
    }
    for name, (modules, package) in needs.items():
        if name == "sentence-transformers" and student.why_not_stock is not None:
            continue
        asking = sorted(artefacts & (_OF_ONNX if name == "onnx" else {name}))
        missing = [module for module in modules if asking and importlib.util.find_spec(module) is None]
        if missing:
            raise ExportError(
                f"{', '.join(asking)} need{'s' if len(asking) == 1 else ''} {', '.join(missing)}, which is not "
                f'installed: pip install "{package}", or do without: {" ".join(f"--without {one}" for one in asking)}'
            )


def check_target(to: Path, *, replace: bool) -> None:
    """Refuse a place that holds something else, or an exported student that is not to be replaced.

    Raises:
        ExportError: it does.
    """
    if not to.exists():
        return
    ours = (to / REPORT).is_file()
    if to.is_dir() and not any(to.iterdir()):
        return
    if not ours:
        raise ExportError(f"{to} is there already and is no exported student, so it is left alone: give another --to")
    if not replace:
        raise ExportError(
            f"{to} holds an exported student already: give another --to, or --replace, which takes its place once the "
            "new one is whole; --check looks at the one that is there"
        )


def check_room(student: Any, to: Path, artefacts: frozenset[str], *, vectors: int) -> None:
    """Refuse a device that has no room for what is written, or a folder that this user may not write to.

    ``vectors``: of items, which are written three times: as a FAISS index, as an array and as Parquet.

    Raises:
        ExportError: with the sizes.
    """
    weights = sum(tensor.numel() * 4 for tensor in student.state_dict().values())
    written = sum(int(weights * _TIMES_WEIGHTS.get(name, 0)) for name in artefacts)
    needed = _SPARE + written + 3 * 4 * student.dim * vectors
    there = next(folder for folder in to.absolute().parents if folder.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ExportError(f"{to} cannot be made: {there} is not writable; choose another --to")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ExportError(
            f"{to} needs about {size_of(needed)} and {there} has {size_of(free)} free: make room, choose another --to, "
            "or leave artefacts out with --without, vectors with --index none"
        )


def check_index(which: str, splits: Sequence[str]) -> None:
    """What would otherwise be said after all artefacts were proven.

    Raises:
        ExportError: no such split.
        MissingFaissError: FAISS is not installed.
    """
    if which == "none":
        return
    from distill.faiss_setup import faiss_module

    faiss_module()
    if which not in ("", "all", *splits):
        raise ExportError(f"there is no split {which!r} to index; --index takes {', '.join(splits)}, all or none")
