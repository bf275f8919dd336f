"""Searching shards on several machines: one shard and one block of queries is a unit, and what it finds is a file.

A unit is done when its file is there; which items, queries, k and index it is of is in its name. Any process may do any
unit, in any order and more than once: a Slurm array, Ray, a shell loop. ``merge`` then gives, block by block, what one
index over all items would have found.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.durable import write_atomically
from distill.protocols import fingerprint
from distill.shard_index import ShardedIndex, merge_into
from distill.shards import Shards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.exact import Vectors
    from distill.faiss_setup import Device
    from distill.protocols import Ids

_SHOWN = 5


class MissingUnitsError(FileNotFoundError):
    """Not every unit of a search is done."""


@dataclass(frozen=True)
class Unit:
    """One shard of the items, searched for one shard of the queries."""

    shard: int
    block: int


@dataclass(frozen=True)
class ShardSearch:
    """The ``k`` most similar items of every query, both in shards, by units in ``out``. Pickles as its paths."""

    items: Path
    queries: Path
    k: int
    out: Path
    factory: str = "Flat"
    nprobe: int | None = None

    @cached_property
    def opened(self) -> tuple[Shards, Shards]:
        """Items and queries.

        Raises:
            ValueError: they differ in width, or k is below 1.
        """
        items, queries = Shards(self.items), Shards(self.queries)
        if items.dim != queries.dim:
            raise ValueError(f"{self.items} is {items.dim} wide, but {self.queries} {queries.dim}: not of one student")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1")
        return items, queries

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("opened", "mark")}

    @cached_property
    def mark(self) -> str:
        """Fingerprint of all that an answer depends on."""
        items, queries = self.opened
        return fingerprint(items.mark, queries.mark, self.k, self.factory, self.nprobe)

    @property
    def units(self) -> tuple[Unit, ...]:
        """All of them, the blocks of one shard after another: a shard is loaded once."""
        items, queries = self.opened
        return tuple(Unit(n, m) for n in range(len(items.shards)) for m in range(len(queries.shards)))

    def path(self, unit: Unit) -> Path:
        """File of what a unit finds."""
        return self.out / f"found-{self.mark[:16]}-{unit.shard:05d}-{unit.block:05d}.npz"

    @property
    def missing(self) -> tuple[Unit, ...]:
        """Units that are not done."""
        return tuple(unit for unit in self.units if not self.path(unit).is_file())


def search_shard(search: ShardSearch, units: tuple[Unit, ...], *, device: Device = "auto") -> Iterator[Path]:
    """Do these units, those that are not done; the file of each when it is there.

    Raises:
        BadShardsError: a shard is not what was written.
    """
    items, queries = search.opened
    index: ShardedIndex | None = None
    for unit in sorted(units, key=lambda unit: (unit.shard, unit.block)):
        path = search.path(unit)
        if not path.is_file():
            index = index or ShardedIndex(items, factory=search.factory, nprobe=search.nprobe, device=device)
            _do(index, unit, np.array(queries.block(unit.block)[0]), search.k, path)
        yield path


def _do(index: ShardedIndex, unit: Unit, queries: Vectors, k: int, path: Path) -> None:
    shard = index.shard(unit.shard)
    similarity, ids = shard.search(queries, min(k, len(shard)))
    write_atomically(path, partial(np.savez, similarity=similarity, ids=ids))


def merge(search: ShardSearch) -> Iterator[tuple[Ids, Vectors, Ids]]:
    """What one index over all items would have found, for one block of queries after another.

    Yields query ids (b,), similarity (b, k) and item ids (b, k), best first, ties to the lower id.

    Raises:
        MissingUnitsError: units are not done; says which.
        ValueError: a file is not what was written.
    """
    items, queries = search.opened
    if missing := search.missing:
        shown = ", ".join(f"shard {unit.shard} x block {unit.block}" for unit in missing[:_SHOWN])
        raise MissingUnitsError(
            f"{len(missing)} of {len(search.units)} units are not in {search.out}: {shown}"
            f"{', ...' if len(missing) > _SHOWN else ''}; do them first"
        )
    for block in range(len(queries.shards)):
        ids = queries.block(block)[1]
        best = exact.empty_answer(len(ids), search.k)
        for shard in range(len(items.shards)):
            merge_into(best, slice(0, len(ids)), _read(search, Unit(shard, block), len(ids)))
        yield np.array(ids), *best


def _read(search: ShardSearch, unit: Unit, rows: int) -> tuple[Vectors, Ids]:
    path = search.path(unit)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = arrays["similarity"], arrays["ids"]
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not what was written ({error}): delete it and do its unit again") from error
    if any(array.shape[:1] != (rows,) for array in found):
        raise ValueError(f"{path} is of {found[0].shape[0]} queries, not of {rows}: delete it and do its unit again")
    return found
