"""Vectors on disk in blocks, for sides that do not fit into memory: written as they are made, read where needed.

A folder holds ``00000.vectors.npy`` (n, D) float32 and ``00000.ids.npy`` (n,) int64 of each block, a *shard*, and,
written last, ``shards.json`` with counts and checksums. Ids ascend from shard to shard. While it is written there is
``writing.json`` in its place, and a file for each process that says how much of its work is on disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import sha256_of
from distill.protocols import fingerprint

if TYPE_CHECKING:
    from distill.exact import Vectors
    from distill.protocols import Ids

MANIFEST, PLAN = "shards.json", "writing.json"


class BadShardsError(ValueError):
    """A folder of shards that is not what was written; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One block of items."""

    number: int
    items: int
    first: int  # lowest id
    last: int  # highest id
    vectors: str  # SHA-256 of its files
    ids: str

    @property
    def files(self) -> dict[str, str]:
        """Names, and what they must hash to."""
        return {vectors_name(self.number): self.vectors, ids_name(self.number): self.ids}


class Shards:
    """A folder of shards, opened: like an array (N, D) that can be read by rows."""

    def __init__(self, folder: str | Path, *, identity: str | None = None) -> None:
        """Sizes are looked at now; contents when a shard is first read.

        Raises:
            FileNotFoundError: nothing complete is there.
            BadShardsError: a file is missing or has another size.
            ValueError: the vectors are of another ``identity``.
        """
        self.folder = Path(folder)
        about = _manifest(self.folder)
        self.identity: str = about["identity"]
        if identity is not None and self.identity != identity:
            raise ValueError(f"{self.folder} holds vectors of {self.identity}, not of {identity}; use another folder")
        self.dim: int = about["dim"]
        self.shards = tuple(Shard(**each) for each in about["shards"])
        for shard in self.shards:
            _check_sizes(self.folder, shard, self.dim)
        self.ids: Ids = np.concatenate([self._array(ids_name(shard.number)) for shard in self.shards])
        self._starts = np.cumsum([0, *(shard.items for shard in self.shards)])
        self._proven: set[int] = set()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self), self.dim

    @property
    def mark(self) -> str:
        """Fingerprint of ids and vectors."""
        return fingerprint("shards", [list(shard.files.values()) for shard in self.shards])

    def __getitem__(self, rows: slice | Ids) -> Vectors:
        """Vectors (..., D) of rows, counted from 0 over all shards, in any order; a copy.

        Raises:
            BadShardsError: a shard is not what was written.
        """
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        flat = wanted.reshape(-1)
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}, got {flat.min()} to {flat.max()}")
        found = np.empty((len(flat), self.dim), np.float32)
        of = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(of).tolist():
            here = np.flatnonzero(of == number)
            found[here] = self.block(number)[0][flat[here] - self._starts[number]]
        return found.reshape(*wanted.shape, self.dim)

    def rows_of(self, ids: Ids) -> Ids:
        """Row of each id; -1 where it is not there."""
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.asarray(np.where(self.ids[rows] == ids, rows, -1), np.int64)

    def block(self, number: int) -> tuple[Vectors, Ids]:
        """A shard's vectors (n, D), mapped from disk, and ids (n,).

        Raises:
            BadShardsError: it is not what was written; looked at once.
        """
        shard = self.shards[number]
        if number not in self._proven:
            for name, checksum in shard.files.items():
                if not (self.folder / name).is_file() or sha256_of(self.folder / name) != checksum:
                    raise BadShardsError(
                        f"{self.folder / name} is missing or is not what was written (its SHA-256 differs): delete "
                        f"{self.folder} and have it made again"
                    )
            self._proven.add(number)
        return self._array(vectors_name(number)), self.ids[self._starts[number] : self._starts[number + 1]]

    def _array(self, name: str) -> Any:
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def vectors_name(number: int) -> str:
    """File of a shard's vectors."""
    return f"{number:05d}.vectors.npy"


def ids_name(number: int) -> str:
    """File of a shard's ids."""
    return f"{number:05d}.ids.npy"


def read_small(path: Path) -> dict[str, Any]:
    """A small JSON file; empty where it is not there or not whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        begun = (
            "; writing them was begun and not ended: the command that did goes on" if (folder / PLAN).is_file() else ""
        )
        raise FileNotFoundError(f"there are no shards in {folder}: {MANIFEST} is not there{begun}")
    about = read_small(path)
    if about.get("format") != 1 or not about.get("shards"):
        raise BadShardsError(f"{path} is torn, or of another version: delete {folder} and have it made again")
    return about


def _check_sizes(folder: Path, shard: Shard, dim: int) -> None:
    expected = {vectors_name(shard.number): (shard.items, dim), ids_name(shard.number): (shard.items,)}
    for name, shape in expected.items():
        path = folder / name
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise BadShardsError(f"{path} is missing: delete {folder} and have it made again") from None
        except (ValueError, EOFError) as error:
            raise BadShardsError(f"{path} is torn ({error}): delete {folder} and have it made again") from error
        if found.shape != shape:
            raise BadShardsError(f"{path} holds {found.shape}, but {MANIFEST} says {shape}: it is another's file")
