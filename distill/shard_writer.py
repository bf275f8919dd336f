"""Writing shards: vectors go to their places in any order, and a killed process goes on where it was."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.durable import exclusively, sha256_of, size_of, write_atomically, writing
from distill.protocols import fingerprint
from distill.shards import MANIFEST, PLAN, Shard, Shards, ids_name, read_small, vectors_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from distill.exact import Vectors
    from distill.protocols import Ids

_HEADER = 128  # bytes of a .npy header, for any of these shapes
_SHOWN = 5
_COUNT = re.compile(r"done-\d+-of-\d+")
_SHARD = re.compile(r"\d{5,}\.(?:vectors|ids)\.npy")


class ShardWriter:
    """Writes vectors to their places in the shards of a folder, in any order; goes on where it was killed.

    Several processes may write to one folder, each its own places and by a ``part`` of its own. Each counts the calls
    of ``put`` that are on disk: ``done``. A process that starts again leaves out so many.
    """

    def __init__(
        self, folder: str | Path, identity: str, ids: Ids, dim: int, *, shard_items: int, part: str = "0-of-1"
    ) -> None:
        """Begin, or go on; what was written for something else before it was complete is thrown away.

        Args:
            folder: complete only once ``finish`` has returned.
            identity: fingerprint of all that the vectors depend on, except ``ids``.
            ids: (N,) ascending, distinct, not negative.
            dim: width D.
            shard_items: most items of a shard.
            part: whose count of calls, as "0-of-1".

        Raises:
            ValueError: ids that are not as said, or no items.
            OSError: the disk has no room for them.
        """
        self.folder, self._ids, self._dim = Path(folder), _checked_ids(ids), dim
        self._items, self._part = shard_items, self.folder / f"done-{part}"
        if shard_items < 1 or dim < 1:
            raise ValueError(f"shard_items and dim must be at least 1, got {shard_items} and {dim}")
        checksum = fingerprint(self._ids.tobytes())
        plan = {"format": 1, "identity": identity, "dim": dim, "shard_items": shard_items, "ids": checksum}
        self._identity = identity
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusively(self.folder):
            if read_small(self.folder / PLAN) != plan or not self._is_whole():
                self._begin(plan)
        self.done = int(read_small(self._part).get("done", 0))
        self._touched: set[Path] = set()

    def put(self, rows: Ids, vectors: Vectors) -> None:
        """Write the vectors (n, D) of rows (n,), counted from 0 over all ids.

        Raises:
            ValueError: another width, or a vector that is not finite (named by id).
        """
        if vectors.shape != (len(rows), self._dim):
            raise ValueError(f"vectors must be ({len(rows)}, {self._dim}), got {vectors.shape}")
        faulty = ~np.isfinite(vectors).all(axis=1)
        if faulty.any():
            raise ValueError(
                f"{int(faulty.sum())} vectors are not finite; the first ids: "
                f"{self._ids[rows[faulty]][:_SHOWN].tolist()}"
            )
        order = np.argsort(rows, kind="stable")
        rows, vectors = np.asarray(rows)[order], np.ascontiguousarray(vectors[order], "<f4")
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(rows // self._items) != 0)) + 1
        borders = [0, *cuts.tolist(), len(rows)] if len(rows) else []
        for start, stop in itertools.pairwise(borders):
            number, at = divmod(int(rows[start]), self._items)
            path = self.folder / vectors_name(number)
            with writing(path), open(path, "r+b", buffering=0) as file:
                file.seek(_HEADER + at * self._dim * 4)
                left = memoryview(vectors[start:stop].tobytes())
                while left:
                    left = left[file.write(left) :]
            self._touched.add(path)
        self.done += 1

    def keep(self) -> None:
        """Have all that was put on disk, so that a kill no longer loses it."""
        for path in self._touched:
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())
        self._touched.clear()
        told = json.dumps({"done": self.done}).encode()
        write_atomically(self._part, lambda file: file.write(told))

    def finish(self) -> Shards:
        """All vectors were put: checksums, then the manifest. By one process, once the others have ended."""
        shards = []
        for number, part in enumerate(exact.blocks(len(self._ids), self._items)):
            ids = self._ids[part]
            write_atomically(self.folder / ids_name(number), partial(_save, ids))
            path = self.folder / vectors_name(number)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sums = sha256_of(path), sha256_of(self.folder / ids_name(number))
            shards.append(Shard(number, len(ids), int(ids[0]), int(ids[-1]), *sums))
        about = {
            "format": 1,
            "identity": self._identity,
            "dim": self._dim,
            "items": len(self._ids),
            "shards": [asdict(shard) for shard in shards],
        }
        text = json.dumps(about, indent=1).encode()
        write_atomically(self.folder / MANIFEST, lambda file: file.write(text))
        for path in (*self._own(_COUNT), self.folder / PLAN):
            path.unlink(missing_ok=True)
        return Shards(self.folder)

    def _own(self, name: re.Pattern[str]) -> list[Path]:
        """Files that a writer has made; the folder may hold others."""
        return [path for path in self.folder.iterdir() if name.fullmatch(path.name)]

    def _files(self) -> Iterator[tuple[Path, int]]:
        """Each shard's file of vectors, and how many it holds."""
        for number, part in enumerate(exact.blocks(len(self._ids), self._items)):
            yield self.folder / vectors_name(number), part.stop - part.start

    def _is_whole(self) -> bool:
        return all(
            path.is_file() and path.stat().st_size == _HEADER + items * self._dim * 4 for path, items in self._files()
        )

    def _begin(self, plan: dict[str, Any]) -> None:
        for path in (*self._own(_COUNT), *self._own(_SHARD), self.folder / MANIFEST):
            path.unlink(missing_ok=True)
        needed, system = 4 * self._dim * len(self._ids), os.statvfs(self.folder)
        if needed > system.f_bavail * system.f_frsize:
            raise OSError(
                f"{len(self._ids)} vectors of {self._dim} numbers need {size_of(needed)} at {self.folder}, which has "
                f"{size_of(system.f_bavail * system.f_frsize)} free: make room, or put the run elsewhere "
                "(--set runs=...)"
            )
        for path, items in self._files():
            with writing(path), path.open("wb") as file:
                file.write(_header((items, self._dim)))
                file.truncate(_HEADER + items * self._dim * 4)
        text = json.dumps(plan).encode()
        write_atomically(self.folder / PLAN, lambda file: file.write(text))


def write_shards(
    folder: str | Path, identity: str, ids: Ids, blocks: Iterable[Vectors], *, dim: int, shard_items: int
) -> Shards:
    """Write blocks of vectors, which together are those of ``ids`` in their order; what is complete is opened as it is.

    After a kill, the blocks that are on disk are passed over: ``blocks`` must be cut as it was.

    Raises:
        ValueError: as ``ShardWriter``, more or fewer vectors than ids, or the folder is complete with other vectors,
            other ids or shards of another size.
    """
    ids = _checked_ids(ids)
    try:
        found = Shards(folder, identity=identity)
    except FileNotFoundError:
        pass
    else:
        sizes = [part.stop - part.start for part in exact.blocks(len(ids), shard_items)]
        if np.array_equal(found.ids, ids) and found.dim == dim and [each.items for each in found.shards] == sizes:
            return found
        raise ValueError(
            f"{found.folder} holds these vectors under other ids or in shards of another size, the first of "
            f"{found.shards[0].items} items: use another folder, or delete this one"
        )
    writer = ShardWriter(folder, identity, ids, dim, shard_items=shard_items)
    start, skipped = 0, writer.done
    for number, block in enumerate(blocks):
        rows = np.arange(start, start + len(block))
        start += len(block)
        if start > len(ids):
            raise ValueError(f"more vectors than the {len(ids)} ids")
        if number >= skipped:
            writer.put(rows, block)
            writer.keep()
    if start != len(ids):
        raise ValueError(f"there are {len(ids)} ids, but {start} vectors")
    return writer.finish()


def blocks_of(vectors: Vectors, items: int = 1 << 16) -> Iterator[Vectors]:
    """An array (N, D), for example one that is mapped from disk, in blocks."""
    return (np.asarray(vectors[part], np.float32) for part in exact.blocks(len(vectors), items))


def _save(array: Ids, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def _header(shape: tuple[int, int]) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.encode().ljust(_HEADER - 11) + b"\n"


def _checked_ids(ids: Ids) -> Ids:
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or not len(ids) or ids[0] < 0 or (np.diff(ids) <= 0).any():
        raise ValueError(
            "ids must be distinct, ascending, not negative, and at least one: a shard without items is none"
        )
    return ids
