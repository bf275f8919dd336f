"""Sorted (pair key, score) arrays: the form in which scores are looked up.

A key is ``image * n_texts + text``. A table lives in memory or in two memory-mapped ``.npy`` files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.durable import staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from distill.protocols import Ids

Scores: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Part: TypeAlias = "tuple[Ids, Scores]"
"""Keys (P,) ascending and their scores (P,)."""
Stamp: TypeAlias = "tuple[int, int]"
"""Size in bytes and modification time in ns of a file that pairs came from."""
_BINS = 1 << 16
_COPY_PAIRS = 1 << 20


@dataclass(frozen=True)
class PairTable:
    """Distinct keys (P,) in ascending order and their scores (P,)."""

    keys: Ids
    scores: Scores

    def find(self, keys: Ids) -> Scores:
        """Scores (Q,) of the keys (Q,), NaN where a key is not there; fastest when ``keys`` are sorted."""
        found = np.full(keys.shape, np.nan, np.float32)
        if len(self.keys):
            position = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            hit = self.keys[position] == keys
            found[hit] = self.scores[position[hit]]
        return found

    def parts(self) -> Iterator[Part]:
        """The table in pieces, in order."""
        for start in range(0, len(self.keys), _COPY_PAIRS):
            yield self.keys[start : start + _COPY_PAIRS], self.scores[start : start + _COPY_PAIRS]


@dataclass(frozen=True)
class Compacted:
    """A table and the stamps of the units whose scores it holds, by unit id."""

    table: PairTable
    stamps: dict[str, Stamp]


def empty_table() -> PairTable:
    """A table of no pairs."""
    return PairTable(np.empty(0, np.int64), np.empty(0, np.float32))


def table_of(parts: Iterable[Part]) -> PairTable:
    """A table in memory; where parts share a key the last one counts."""
    listed = list(parts)
    if not listed:
        return empty_table()
    return PairTable(*_latest(np.concatenate([keys for keys, _ in listed]), np.concatenate([s for _, s in listed])))


def write_compacted(
    path: Path,
    parts: Callable[[], Iterable[Part]],
    *,
    key_end: int,
    origin: Mapping[str, object],
    stamps: Mapping[str, Stamp],
) -> None:
    """Merge ``parts`` into the folder ``path``, which is complete or not there. ``stamps`` is read after the parts."""
    with staged_folder(path) as staging:
        n_pairs = write_table(staging, parts, key_end=key_end)
        sizes = {name: (staging / name).stat().st_size for name in ("keys.npy", "scores.npy")}
        about = {"origin": dict(origin), "pairs": n_pairs, "sizes": sizes, "units": dict(stamps)}
        (staging / "manifest.json").write_text(json.dumps(about))


def open_compacted(path: Path, origin: Mapping[str, object]) -> Compacted | None:
    """The table in ``path``, memory-mapped; None where it is missing, torn or of another origin: it is a cache."""
    try:
        about = json.loads((path / "manifest.json").read_text())
        if about["origin"] != origin or any((path / name).stat().st_size != n for name, n in about["sizes"].items()):
            return None
        keys, scores = (np.load(path / name, mmap_mode="r", allow_pickle=False) for name in ("keys.npy", "scores.npy"))
        table = PairTable(np.asarray(keys)[: about["pairs"]], np.asarray(scores)[: about["pairs"]])
        return Compacted(table, {name: (size, time) for name, (size, time) in about["units"].items()})
    except (OSError, ValueError, KeyError):
        return None


def write_table(folder: Path, parts: Callable[[], Iterable[Part]], *, key_end: int, block_pairs: int = 1 << 22) -> int:
    """Merge ``parts`` into ``keys.npy`` and ``scores.npy``; where parts share a key the last one counts.

    Every part is read twice: once to count keys, once to put its pairs in the bucket of their key range; then bucket
    after bucket is sorted. Memory is that of one part and one bucket of about ``block_pairs`` pairs, whatever their
    number.

    Returns:
        How many distinct pairs were written; the files may be longer.
    """
    width = max(1, -(-key_end // _BINS))
    counts = np.zeros(_BINS, np.int64)
    for keys, _ in parts():
        counts += np.bincount(keys // width, minlength=_BINS)
    total = int(counts.sum())
    bucket_of_bin = (np.cumsum(counts) - counts) // block_pairs  # ascending
    ends = np.cumsum(np.bincount(bucket_of_bin, weights=counts).astype(np.int64))
    out_keys = np.lib.format.open_memmap(folder / "keys.npy", mode="w+", dtype=np.int64, shape=(total,))
    out_scores = np.lib.format.open_memmap(folder / "scores.npy", mode="w+", dtype=np.float32, shape=(total,))
    cursor = np.concatenate([[0], ends[:-1]])
    for keys, scores in parts():
        buckets = bucket_of_bin[keys // width]  # ascending, as keys are
        edges = np.concatenate([[0], np.flatnonzero(np.diff(buckets)) + 1, [len(keys)]])
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            if stop > start:
                at = cursor[buckets[start]]
                out_keys[at : at + stop - start] = keys[start:stop]
                out_scores[at : at + stop - start] = scores[start:stop]
                cursor[buckets[start]] += stop - start
    kept = start = 0
    for end in ends.tolist():
        # In place: what is kept of the buckets so far never reaches the next one.
        keys, scores = _latest(np.array(out_keys[start:end]), np.array(out_scores[start:end]))
        out_keys[kept : kept + len(keys)], out_scores[kept : kept + len(keys)] = keys, scores
        kept, start = kept + len(keys), end
    out_keys.flush()
    out_scores.flush()
    return kept


def _latest(keys: Ids, scores: Scores) -> Part:
    """Sorted by key; of equal keys the one that came last."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = keys[1:] != keys[:-1]
    return keys[last], scores[order[last]]
