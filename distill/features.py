"""Per-item arrays on disk, memory-mapped: what a frozen tower or a processor made of every item, computed once.

A folder holds ``<name>.npy`` for each array, ``<mask name>.offsets.npy`` for ragged ones, ``rows.npy`` and, written
last, ``manifest.json``. An array that has the (N, L) shape of one whose name ends in ``_mask`` is ragged: it is stored
without padding, one item after another.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import exclusively, staged_folder, sweep_temporaries
from distill.feature_files import MANIFEST, ArrayInfo, FeatureWriter, write_manifest
from distill.inference import batches_of, prefetched, threads_of
from distill.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distill.feature_files import Array
    from distill.protocols import Ids, Inputs

_LOG = logging.getLogger(__name__)
_SHOWN = 5


class TornFeaturesError(ValueError):
    """A feature folder whose files are not all there as its manifest says."""


class Features:
    """Features of the items of a folder, opened by ``Features.open``; itself a source: ``features(rows) -> Inputs``.

    Safe to share between threads; pickles as its path and is memory-mapped anew by a worker process.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        about = _read_manifest(folder, identity)
        self._infos = {
            name: ArrayInfo(**{**info, "tail": tuple(info["tail"])}) for name, info in about["arrays"].items()
        }
        self._arrays: dict[str, Array] = {name: self._mapped(name) for name in self._infos}
        masks = {info.mask for info in self._infos.values() if info.mask}
        self._offsets = {mask: self._mapped(f"{mask}.offsets") for mask in sorted(masks)}
        self.rows: Ids = self._mapped("rows")
        self._contiguous = bool(len(self.rows)) and int(self.rows[-1] - self.rows[0]) + 1 == len(self.rows)

    @classmethod
    def open(cls, folder: str | Path, identity: str) -> Features:
        """Open what ``write_features`` made.

        Raises:
            FileNotFoundError: nothing is there.
            TornFeaturesError: a file is missing or has another size than its manifest says.
            ValueError: the folder holds features of another identity.
        """
        return cls(Path(folder), identity)

    def __getstate__(self) -> tuple[Path, str]:
        return self.folder, self.identity

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, rows: Ids) -> Inputs:
        """As ``get`` with all fields."""
        return self.get(rows)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._infos)

    def get(self, rows: Ids, *, fields: Iterable[str] | None = None) -> Inputs:
        """Tensors of these rows, in this order; ragged ones padded to the longest of them.

        Floats kept at half precision come back in the precision they were made in.

        Raises:
            KeyError: a row that was not written, or an unknown field.
        """
        import torch

        names = self.fields if fields is None else tuple(fields)
        unknown = sorted(set(names) - set(self.fields))
        if unknown:
            raise KeyError(f"{self.folder} has no field {unknown}; it has {list(self.fields)}")
        places = self._places(rows)
        return {
            name: torch.from_numpy(self._gather(name, places)).to(getattr(torch, self._infos[name].restored))
            for name in names
        }

    def lengths(self, rows: Ids) -> Ids:
        """Length L of each row's ragged arrays before padding; zeros where all arrays are dense."""
        places = self._places(rows)
        if not self._offsets:
            return np.zeros(len(places), np.int64)
        offsets = next(iter(self._offsets.values()))
        return np.asarray(offsets[places + 1] - offsets[places], np.int64)

    def _mapped(self, name: str) -> Array:
        # A plain view: indexing a memmap costs more than the copy of a small item.
        array: Array = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return array

    def _places(self, rows: Ids) -> Ids:
        rows = np.asarray(rows, np.int64)
        if self._contiguous:
            places = rows - int(self.rows[0])
            there = (places >= 0) & (places < len(self.rows))
        else:
            places = np.searchsorted(self.rows, rows)
            there = np.zeros(len(rows), np.bool_)
            inside = places < len(self.rows)
            there[inside] = self.rows[places[inside]] == rows[inside]
        if not there.all():
            raise KeyError(
                f"{int((~there).sum())} of {len(rows)} rows were not written to {self.folder}, the first: "
                f"{rows[~there][:_SHOWN].tolist()}; it holds {len(self.rows)} rows"
            )
        return places

    def _gather(self, name: str, places: Ids) -> Array:
        info, array = self._infos[name], self._arrays[name]
        if info.mask is None:
            gathered: Array = array[places]
            return gathered
        starts, stops = self._offsets[info.mask][places].tolist(), self._offsets[info.mask][places + 1].tolist()
        longest = max((stop - start for start, stop in zip(starts, stops, strict=True)), default=0)
        padded = np.zeros((len(places), longest, *info.tail), array.dtype)  # pages that stay padding are never touched
        if info.fill:
            padded[...] = info.fill
        for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            padded[place, : stop - start] = array[start:stop]
        return padded


def write_features(
    folder: str | Path,
    identity: str,
    rows: Ids | int,
    produce: Callable[[Ids], Inputs],
    *,
    batch_size: int = 256,
    dtype: str | None = None,
    after: Callable[[Inputs], Inputs] | None = None,
) -> Features:
    """Write what ``after(produce(rows))`` gives for every row, batch by batch; a complete folder is opened as it is.

    Args:
        folder: Complete or not there at any moment; another process that wants the same waits and then opens it.
        identity: Fingerprint of all that the arrays depend on, except ``rows``.
        rows: Rows to cover, ascending; a number means the first so many.
        produce: Rows to named tensors whose first dimension counts them; called ahead in a thread, in several if
            its attribute ``threads`` says so.
        batch_size: Rows a call.
        dtype: "float16" stores floats at half precision; None keeps theirs.
        after: Applied to what ``produce`` gives, in this thread; for a model.

    Raises:
        ValueError: arrays that change name, dtype or shape between batches, floats that are not finite (names rows), or
            a folder that holds something else.
        OSError: the disk has no room for all of it; said after the first batch.
    """
    folder = Path(folder)
    rows = np.arange(rows, dtype=np.int64) if isinstance(rows, int) else np.asarray(rows, np.int64)
    if not len(rows) or rows[0] < 0 or (np.diff(rows) <= 0).any():
        raise ValueError("rows must be distinct, ascending, not negative, and at least one")
    if dtype not in (None, "float16"):
        raise ValueError(f"dtype is 'float16' or None, got {dtype!r}")
    found = covering(folder, identity, rows)
    if found is not None:
        return found
    batches = batches_of(rows, batch_size)
    with exclusively(folder):
        found = covering(folder, identity, rows)
        if found is not None:
            return found
        sweep_temporaries(folder.parent)
        with (
            staged_folder(folder) as staging,
            closing(FeatureWriter(staging, rows, dtype)) as writer,
            Progress(len(rows), f"writing {folder.name[:24]}") as progress,
        ):
            for batch, inputs in prefetched(produce, batches, threads=threads_of(produce)):
                writer.add(batch, inputs if after is None else after(inputs))
                progress.advance(len(batch))
            writer.finish(identity)
    return Features(folder, identity)


def write_rows(folder: Path, identity: str, rows: Ids, parts: Iterable[tuple[Ids, Array]], *, name: str) -> Features:
    """Write one array, whose rows come in parts and in any order; one part at a time is in memory.

    Args:
        folder: Complete or not there at any moment; what is there is replaced.
        identity: Fingerprint of all that the array depends on, except ``rows``.
        rows: Rows to cover, ascending.
        parts: Rows (n,) and their values (n, ...), of one dtype; together all rows, each once.
        name: Of the array.

    Raises:
        ValueError: rows are missing or come twice.
    """
    with staged_folder(folder) as staging:
        whole: Array | None = None
        written = np.zeros(len(rows), np.bool_)
        for some, values in parts:
            if whole is None:
                shape = (len(rows), *values.shape[1:])
                whole = np.lib.format.open_memmap(staging / f"{name}.npy", "w+", values.dtype, shape)
            places = np.searchsorted(rows, some)
            if written[places].any() or not np.array_equal(rows[places], some):
                raise ValueError(f"rows for {folder} come twice, or are none of those wanted")
            whole[places], written[places] = values, True
        if whole is None or not written.all():
            raise ValueError(f"{int((~written).sum())} of {len(rows)} rows for {folder} are missing")
        whole.flush()  # type: ignore[attr-defined]
        write_manifest(staging, identity, rows, {name: ArrayInfo(whole.dtype.str, whole.dtype.name, whole.shape[1:])})
        del whole
    return Features(folder, identity)


def covering(folder: Path, identity: str, rows: Ids) -> Features | None:
    """The features of a folder where they are whole and cover all of these rows; None where they must be made.

    Raises:
        ValueError: the folder holds something else, which is not to be written over.
    """
    try:
        found = Features(folder, identity)
    except FileNotFoundError:
        strange = [path.name for path in folder.glob("*") if path.suffix != ".npy"]
        if MANIFEST in strange:  # another process has finished it just now
            return covering(folder, identity, rows)
        if strange:
            raise ValueError(
                f"{folder} holds {strange[:_SHOWN]} and is no feature folder; nothing is written there"
            ) from None
        return None
    except TornFeaturesError as error:
        _LOG.warning("%s; it is made again", error)
        return None
    if np.isin(rows, found.rows).all():
        return found
    _LOG.info("%s covers %d rows but not all of those wanted; it is made again", folder, len(found))
    return None


def _read_manifest(folder: Path, identity: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there are no features at {folder}: it has no {MANIFEST}")
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        sizes = about["sizes"]
        found = about["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise TornFeaturesError(f"{path} is torn") from error
    if found != identity:
        raise ValueError(f"{folder} holds features of {found}, not of {identity}; use another folder, or delete it")
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise TornFeaturesError(f"{folder / name} should have {size} bytes but has {there or 'none'}")
    return about
