"""Sorted (pair key, score) arrays: the form in which scores are looked up.

A key is ``image * n_texts + text``. A table lives in memory, or as two memory-mapped ``.npy`` files in a folder
``table-<id>`` whose manifest says which units it was merged from. Such a folder never changes once it has its name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from distill.durable import TEMPORARY_PREFIX, staged_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from distill.protocols import Ids

Scores: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Part: TypeAlias = "tuple[Ids, Scores]"
"""Keys (P,) ascending and their scores (P,)."""
Stamp: TypeAlias = "tuple[int, int]"
"""Size in bytes and modification time in ns of a file that pairs came from."""
TABLE_PREFIX = "table-"
_ARRAYS = ("keys.npy", "scores.npy")
_COPY_PAIRS = 1 << 20
_FIND_PAIRS = 1 << 16
_RUN_PAIRS = 1 << 22


@dataclass(frozen=True)
class PairTable:
    """Distinct keys (P,) in ascending order and their scores (P,)."""

    keys: Ids
    scores: Scores

    def locate(self, keys: Ids) -> Ids:
        """Positions (Q,) of the ascending keys (Q,), -1 where a key is not there."""
        positions = np.full(keys.shape, -1, np.int64)
        for start in range(0, len(keys), _FIND_PAIRS):
            wanted = keys[start : start + _FIND_PAIRS]
            # Neighbours lie near one another: what is searched for them all is short and stays in the cache.
            low = int(np.searchsorted(self.keys, wanted[0]))
            stretch = self.keys[low : int(np.searchsorted(self.keys, wanted[-1], side="right"))]
            if len(stretch):
                at = np.minimum(np.searchsorted(stretch, wanted), len(stretch) - 1)
                positions[start : start + _FIND_PAIRS] = np.where(stretch[at] == wanted, low + at, -1)
        return positions

    def find(self, keys: Ids) -> Scores:
        """Scores (Q,) of the ascending keys (Q,), NaN where a key is not there."""
        positions = self.locate(keys)
        hit = positions >= 0
        found = np.full(keys.shape, np.nan, np.float32)
        found[hit] = self.scores[positions[hit]]
        return found

    def parts(self) -> Iterator[Part]:
        """The table in pieces, in order."""
        for start in range(0, len(self.keys), _COPY_PAIRS):
            yield self.keys[start : start + _COPY_PAIRS], self.scores[start : start + _COPY_PAIRS]


def empty_table() -> PairTable:
    """A table of no pairs."""
    return PairTable(np.empty(0, np.int64), np.empty(0, np.float32))


def table_of(parts: Iterable[Part]) -> PairTable:
    """A table in memory; where parts share a key the last one counts."""
    listed = list(parts)
    if not listed:
        return empty_table()
    keys, scores = (np.concatenate(arrays) for arrays in zip(*listed, strict=True))
    order = np.argsort(keys, kind="stable")  # of sorted pieces in little more than linear time
    keys = keys[order]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = keys[1:] != keys[:-1]
    return PairTable(keys[last], scores[order[last]])


def find_first(keys: Ids, *tables: PairTable) -> Scores:
    """Scores (Q,) of the keys (Q,), in any order, from the first table that has them; NaN where none has."""
    order = None if bool((keys[1:] >= keys[:-1]).all()) else np.argsort(keys)
    wanted = keys if order is None else keys[order]
    scores = np.full(keys.shape, np.nan, np.float32)
    for table in tables:
        rest = np.isnan(scores)
        scores[rest] = table.find(wanted[rest])
    if order is None:
        return scores
    found = np.empty_like(scores)
    found[order] = scores
    return found


@dataclass(frozen=True)
class Compacted:
    """A table and the stamps of the units whose scores it holds, by unit id."""

    table: PairTable
    stamps: dict[str, Stamp]
    path: Path | None = None  # None: holds nothing

    @cached_property
    def _last(self) -> tuple[int, str]:
        """Time and name of the latest unit."""
        return max(((time, name) for name, (_, time) in self.stamps.items()), default=(-1, ""))

    def lacks(self, stamps: Mapping[str, Stamp]) -> list[str]:
        """Those of the units that are not in the table as they are now, oldest first."""
        return in_order({name: stamp for name, stamp in stamps.items() if self.stamps.get(name) != stamp})

    def outlasts(self, name: str, stamp: Stamp, part: Part) -> bool:
        """Whether the unit may be older than one that the table prefers it to: it cannot be laid over the table.

        Of two units that share a pair the later one counts. A unit may come late but be old: copied from elsewhere, or
        renamed while another process compacted. That matters only where its scores are not those of the table.
        """
        if (stamp[1], name) > self._last:
            return False
        found = self.table.find(part[0])
        return name in self.stamps or bool((~np.isnan(found) & (found != part[1])).any())


def in_order(stamps: Mapping[str, Stamp]) -> list[str]:
    """Names of units from the oldest to the latest; of units that share a pair the last one counts."""
    return sorted(stamps, key=lambda name: (stamps[name][1], name))


def no_table() -> Compacted:
    """What there is before anything was compacted."""
    return Compacted(empty_table(), {})


def write_compacted(
    folder: Path, base: PairTable, parts: Iterable[Part], *, origin: Mapping[str, object], stamps: Mapping[str, Stamp]
) -> Path:
    """Merge ``base`` and ``parts`` into a new table in ``folder``, which is complete or not there; returns its path."""
    path = folder / f"{TABLE_PREFIX}{uuid.uuid4().hex}"
    with staged_folder(path) as staging:
        n_pairs = write_table(staging, base, parts)
        files = {name: file_stamp(staging / name) for name in _ARRAYS}
        about = {"origin": dict(origin), "pairs": n_pairs, "files": files, "units": dict(stamps)}
        (staging / "manifest.json").write_text(json.dumps(about))
    return path


def open_compacted(path: Path, origin: Mapping[str, object]) -> Compacted | None:
    """The table in ``path``, memory-mapped; None where it is missing, torn, altered or of another origin.

    It is a cache. Opening reads the manifest alone: the arrays are as they were written if size and time are.
    """
    try:
        about = json.loads((path / "manifest.json").read_text())
        if about["origin"] != origin or any(list(file_stamp(path / name)) != about["files"][name] for name in _ARRAYS):
            return None
        keys, scores = (np.load(path / name, mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
        if len(keys) != about["pairs"] or len(scores) != about["pairs"]:
            return None
        stamps = {name: (size, time) for name, (size, time) in about["units"].items()}
        return Compacted(PairTable(np.asarray(keys), np.asarray(scores)), stamps, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def table_folders(folder: Path) -> list[Path]:
    """The folders of compacted tables in a store's folder, usable or not."""
    return sorted(path for path in folder.glob(f"{TABLE_PREFIX}*") if path.is_dir())


def remove_table(path: Path) -> None:
    """Remove a table's folder; a kill leaves it whole or as a temporary. Who has it memory-mapped keeps it."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    with suppress(FileNotFoundError):  # another process removes it too
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def file_stamp(path: Path) -> Stamp:
    """Size in bytes and modification time in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def write_table(folder: Path, base: PairTable, parts: Iterable[Part], *, run_pairs: int = _RUN_PAIRS) -> int:
    """Merge ``base`` and ``parts``, in this order, into ``keys.npy`` and ``scores.npy``; of equal keys the last counts.

    Parts are read once. They are gathered to sorted runs of about ``run_pairs`` pairs that wait on disk; then all runs
    are merged, stretch by stretch of keys. Memory is that of a few times ``run_pairs`` pairs, whatever their number.

    Returns:
        How many distinct pairs were written.
    """
    runs = [base, *_sorted_runs(folder, parts, run_pairs)]
    kept = 0
    with open(folder / _ARRAYS[0], "wb") as keys_file, open(folder / _ARRAYS[1], "wb") as scores_file:
        _write_header(keys_file, np.int64, 0)
        _write_header(scores_file, np.float32, 0)
        for keys, scores in _merged(runs, run_pairs):
            keys_file.write(keys.data)
            scores_file.write(scores.data)
            kept += len(keys)
        for file, dtype in ((keys_file, np.int64), (scores_file, np.float32)):
            file.seek(0)
            _write_header(file, dtype, kept)
    return kept


def _write_header(file: BinaryIO, dtype: type[np.generic], length: int) -> None:
    """The same number of bytes for any length: NumPy leaves room in the header for arrays that grow."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _sorted_runs(folder: Path, parts: Iterable[Part], run_pairs: int) -> Iterator[PairTable]:
    held: list[Part] = []
    n_held = 0
    for part in parts:
        held.append(part)
        n_held += len(part[0])
        if n_held >= run_pairs:
            yield _on_disk(folder, table_of(held))
            held, n_held = [], 0
    yield table_of(held)


def _on_disk(folder: Path, table: PairTable) -> PairTable:
    """The same table in an unnamed file, which goes with the last use of its arrays."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(table.keys.data)
        file.write(table.scores.data)
        file.flush()
        keys = np.memmap(file, np.int64, "r", shape=table.keys.shape)
        scores = np.memmap(file, np.float32, "r", offset=table.keys.nbytes, shape=table.scores.shape)
    return PairTable(np.asarray(keys), np.asarray(scores))


def _merged(runs: Sequence[PairTable], stretch_pairs: int) -> Iterator[Part]:
    """All pairs in stretches of ascending keys; of equal keys that of the last run counts."""
    borders = _borders(runs, stretch_pairs)
    edges = [[0, *np.searchsorted(run.keys, borders).tolist(), len(run.keys)] for run in runs]
    for n in range(len(borders) + 1):
        stretch = [
            (run.keys[at[n] : at[n + 1]], run.scores[at[n] : at[n + 1]]) for run, at in zip(runs, edges, strict=True)
        ]
        merged = table_of(part for part in stretch if len(part[0]))
        yield merged.keys, merged.scores


def _borders(runs: Sequence[PairTable], stretch_pairs: int) -> Ids:
    """Ascending keys that cut the runs into stretches of at most about ``stretch_pairs`` pairs of all runs together."""
    step = max(1, stretch_pairs // (2 * len(runs)))
    sample = np.sort(np.concatenate([run.keys[step - 1 :: step] for run in runs]))  # each stands for ``step`` pairs
    every = max(1, stretch_pairs // (2 * step))
    return np.unique(sample[every - 1 :: every])
