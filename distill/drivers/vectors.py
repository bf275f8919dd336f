"""Unit files of vectors, and the feature folders they are joined into.

A unit is one Parquet file with ``row`` int64 and ``vector`` list<float32>, which proves its content (see ``sealed``)
and says in its footer whose vectors of what they are.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import exclusively, write_atomically
from distill.features import Features, covering, write_rows
from distill.protocols import Side, fingerprint
from distill.sealed import SealError, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from distill.protocols import Ids

VERSION = 1
FIELD = "vectors"  # of the feature folders
_UNIT = re.compile(r"(?:image|text)-([0-9a-f]{32})\.parquet")
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class BadVectorsError(ValueError):
    """A unit of vectors that is torn, altered, or of something else."""


@dataclass(frozen=True)
class VectorUnits:
    """The folder of the units of one model on one corpus."""

    folder: Path
    identity: Mapping[str, str | int]  # in every footer

    def name(self, side: Side, rows: Ids) -> str:
        """Of the unit of these rows in this order."""
        return fingerprint("vectors", VERSION, dict(self.identity), side, rows)

    def there(self) -> set[str]:
        """Names of the units whose files are there; nothing is read."""
        found = set()
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if named := _UNIT.fullmatch(entry.name):
                    found.add(named[1])
        return found

    def write(self, side: Side, rows: Ids, vectors: Vectors) -> None:
        """Keep the vectors (N, D) of the rows (N,)."""
        import pyarrow

        rows = np.ascontiguousarray(rows, np.int64)
        offsets = pyarrow.array(np.arange(len(rows) + 1, dtype=np.int32) * vectors.shape[1])
        flat = pyarrow.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        table = pyarrow.table({"row": rows, "vector": pyarrow.ListArray.from_arrays(offsets, flat)})
        footer = {**self._footer(side, self.name(side, rows)), "width": str(vectors.shape[1])}
        content = seal(table, footer, compression="none")  # vectors do not shrink
        write_atomically(self.path(side, self.name(side, rows)), lambda file: file.write(content))

    def read(self, side: Side, rows: Ids) -> Vectors:
        """The vectors (N, D) of the unit of these rows.

        Raises:
            BadVectorsError: torn, altered, or of something else.
        """
        name = self.name(side, rows)
        path = self.path(side, name)
        try:
            footer, (found, vectors) = unseal(path.read_bytes(), ("row", "vector"))
            expected = self._footer(side, name)
            if {key: footer.get(key) for key in expected} != expected or not np.array_equal(found.to_numpy(), rows):
                raise SealError("holds other rows, or is of another model or corpus")
        except SealError as error:
            raise BadVectorsError(
                f"{path} {error}. Nothing of it is used: delete it, and the same command makes it again"
            ) from error
        array: Vectors = vectors.values.to_numpy().reshape(len(rows), int(footer["width"]))
        return array

    def path(self, side: Side, name: str) -> Path:
        """File of the unit of this name."""
        return self.folder / f"{side}-{name}.parquet"

    def _footer(self, side: Side, name: str) -> dict[str, str]:
        about = {key: str(value) for key, value in self.identity.items()}
        return {"schema_version": str(VERSION), **about, "side": side, "unit": name}


def joined_mark(identity: Mapping[str, str | int], side: Side) -> str:
    """Identity of the feature folder of a side."""
    return fingerprint("embedded", VERSION, dict(identity), side)


def join(units: VectorUnits, folder: Path, side: Side, parts: Sequence[Ids]) -> Features:
    """One feature folder of all these units, with the array ``vectors`` (N, D); one unit at a time is in memory.

    Raises:
        BadVectorsError: a unit is torn or altered.
        ValueError: the folder holds something else.
    """
    mark = joined_mark(units.identity, side)
    rows = np.sort(np.concatenate(parts))

    def read() -> Iterator[tuple[Ids, Vectors]]:
        for part in parts:
            yield part, units.read(side, part)

    with exclusively(folder):
        found = covering(folder, mark, rows)
        return found if found is not None else write_rows(folder, mark, rows, read(), name=FIELD)
