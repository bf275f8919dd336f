"""How per-item arrays come onto disk: batch after batch, dense or without padding. ``features`` reads them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import size_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

    from torch import Tensor

    from distill.protocols import Ids, Inputs

MANIFEST = "manifest.json"
_HEADER_BYTES = 256  # room for any shape, so that the header can be written once the length is known
_SHOWN = 5
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ArrayInfo:
    """How one array is stored."""

    stored: str  # numpy dtype on disk
    restored: str  # torch dtype of what ``get`` gives
    tail: tuple[int, ...]  # shape of one item, or of one token of a ragged array
    mask: str | None = None  # the mask that says how long items are; None = dense
    fill: int = 0  # value of the padding


class _Column:
    """One ``.npy`` file written from front to back, its header last."""

    def __init__(self, path: Path, dtype: np.dtype[Any], tail: tuple[int, ...]) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by finish or with the writer
        self._file.write(b"\0" * _HEADER_BYTES)
        self.dtype, self.tail, self.length = dtype, tail, 0

    def append(self, array: Array) -> None:
        self._file.write(np.ascontiguousarray(array, self.dtype).data)  # ``tofile`` does not say why it failed
        self.length += len(array)

    def finish(self) -> None:
        head = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {(self.length, *self.tail)!r}, }}"
        magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + head.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n")
        self.close()

    def close(self) -> None:
        self._file.close()


class FeatureWriter:
    """Streams batches into a staging folder. The first batch decides names, dtypes and what is ragged."""

    def __init__(self, folder: Path, rows: Ids, dtype: str | None) -> None:
        self._folder, self._rows, self._half = folder, rows, dtype is not None
        self._infos: dict[str, ArrayInfo] = {}
        self._columns: dict[str, _Column] = {}
        self._lengths: dict[str, list[Ids]] = {}
        self._fills: dict[str, set[int]] = {}

    def add(self, rows: Ids, inputs: Inputs) -> None:
        """Append a batch: named tensors of these rows."""
        first = not self._infos
        if first:
            self._begin(inputs)
        if inputs.keys() != self._infos.keys():
            raise ValueError(f"batches must hold the same arrays: first {sorted(self._infos)}, now {sorted(inputs)}")
        arrays = {name: _numpy(tensor) for name, tensor in inputs.items()}
        lengths = {mask: _lengths(arrays[mask]) for mask in self._lengths}
        for mask, found in lengths.items():
            self._lengths[mask].append(found)
        for name, array in arrays.items():
            self._check(name, inputs, rows)
            self._append(name, array, lengths, rows)
        if first:
            self._check_room(len(rows))

    def finish(self, identity: str) -> None:
        """All rows are there: headers, offsets, rows, and last the manifest."""
        for mask, lengths in self._lengths.items():
            self._save(f"{mask}.offsets", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))
        for column in self._columns.values():
            column.finish()
        infos = {name: replace(info, fill=self._fill(name)) for name, info in self._infos.items()}
        write_manifest(self._folder, identity, self._rows, infos)

    def close(self) -> None:
        """Close the files, finished or not."""
        for column in self._columns.values():
            column.close()

    def _begin(self, inputs: Inputs) -> None:
        masks = [name for name, tensor in inputs.items() if name.endswith("_mask") and tensor.ndim == 2]
        for name, tensor in inputs.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"an array's name becomes a file's: letters, digits and '_' only, got {name!r}")
            mask = name if name in masks else next((m for m in masks if tensor.shape[:2] == inputs[m].shape), None)
            stored = _numpy(tensor[:0]).dtype
            if self._half and tensor.is_floating_point():
                stored = np.dtype(np.float16)
            tail = tuple(tensor.shape[1 if mask is None else 2 :])
            self._infos[name] = ArrayInfo(stored.str, str(tensor.dtype).removeprefix("torch."), tail, mask)
            self._columns[name] = _Column(self._folder / f"{name}.npy", stored, tail)
        self._lengths = {mask: [] for mask in masks}

    def _check(self, name: str, inputs: Inputs, rows: Ids) -> None:
        info, tensor = self._infos[name], inputs[name]
        if info.mask is not None and tensor.shape[:2] != inputs[info.mask].shape:
            raise ValueError(
                f"'{name}' had the shape of '{info.mask}' in the first batch but is {tuple(tensor.shape)} for rows "
                f"from {rows[0]}; an array that is no sequence must not have the mask's shape: try another batch_size"
            )
        tail = tuple(tensor.shape[1 if info.mask is None else 2 :])
        restored = str(tensor.dtype).removeprefix("torch.")
        if len(tensor) != len(rows) or tail != info.tail or restored != info.restored:
            raise ValueError(
                f"'{name}' must be {info.restored} with {len(rows)} items of shape {info.tail}, got {restored} "
                f"{tuple(tensor.shape)} for rows from {rows[0]}"
            )

    def _append(self, name: str, array: Array, lengths: dict[str, Ids], rows: Ids) -> None:
        info, column = self._infos[name], self._columns[name]
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = array.astype(column.dtype)
        if info.mask is None:
            _check_finite(name, array, rows)
            column.append(array)
            return
        length = lengths[info.mask]
        inside = np.arange(array.shape[1]) < length[:, None]
        _check_finite(name, array[inside], np.repeat(rows, length))
        column.append(array[inside])
        if array.dtype.kind in "iu" and not info.tail:
            self._fills.setdefault(name, set()).update(np.unique(array[~inside]).tolist())

    def _fill(self, name: str) -> int:
        """The one value that padding had everywhere, as processors pad with a token's id; else zero."""
        found = self._fills.get(name, set())
        return next(iter(found)) if len(found) == 1 else 0

    def _check_room(self, n_rows: int) -> None:
        used = sum(
            column.length * column.dtype.itemsize * int(np.prod(column.tail)) for column in self._columns.values()
        )
        needed, free = used / n_rows * (len(self._rows) - n_rows), shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(
                f"{len(self._rows)} items need about {size_of(needed)} more at {self._folder.parent}, which has "
                f"{size_of(free)} free; make room, choose another cache folder (--set cache=...), or store float16"
            )

    def _save(self, name: str, array: Array) -> None:
        np.save(self._folder / f"{name}.npy", array, allow_pickle=False)


def write_manifest(folder: Path, identity: str, rows: Ids, infos: Mapping[str, ArrayInfo]) -> None:
    """Of a folder whose other arrays are all there: ``rows.npy``, and last the manifest."""
    np.save(folder / "rows.npy", rows, allow_pickle=False)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}
    arrays = {name: asdict(info) for name, info in infos.items()}
    about = {"version": 1, "identity": identity, "rows": len(rows), "arrays": arrays, "sizes": sizes}
    (folder / MANIFEST).write_text(json.dumps(about, indent=1))


def _numpy(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return array


def _lengths(mask: Array) -> Ids:
    """Position after the last cell that is not padding, for each row of a mask (N, L)."""
    if not mask.shape[1]:
        return np.zeros(len(mask), np.int64)
    there = mask[:, ::-1] != 0
    return np.where(there.any(axis=1), mask.shape[1] - there.argmax(axis=1), 0).astype(np.int64)


def _check_finite(name: str, array: Array, rows: Ids) -> None:
    if array.dtype.kind != "f" or not array.size:
        return
    faulty = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if faulty.any():
        named = np.unique(rows[faulty])
        raise ValueError(
            f"'{name}' is not finite (or too large for {array.dtype}) for {len(named)} rows, the first: "
            f"{named[:_SHOWN].tolist()}"
        )
