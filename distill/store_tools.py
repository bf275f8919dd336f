"""Stores of scores as folders, without any model: where they are, what they hold, whether it is sound."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from distill.durable import TEMPORARY_PREFIX
from distill.pairtable import TABLE_PREFIX, empty_table, in_order, open_compacted, table_folders
from distill.progress import track
from distill.store import ScoreStore
from distill.unit import BadUnitError, Origin, list_units, read_origin, read_unit, unit_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from distill.unit import Unit

BAD_FOLDER = "bad"
_ASKED = 32  # units whose footers say of what origin a store is


@dataclass(frozen=True)
class StoreFacts:
    """What a store holds; ``origin`` is None where no unit can be read, ``pairs`` where one is bad."""

    folder: Path
    origin: Origin | None
    units: int
    pairs: int | None  # distinct
    bytes: int  # of the units
    tables: int
    table_bytes: int


@dataclass(frozen=True)
class Fault:
    """Something in a store that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Verification:
    """What reading all of a store has shown."""

    folder: Path
    units: int  # sound ones
    pairs: int  # of them, a pair that two units hold counted twice
    tables: int  # that agree with the units
    outdated: int  # tables with a unit that is gone: never read
    leftovers: int  # temporaries of writers that are at work or were killed
    faults: tuple[Fault, ...]


def find_stores(path: Path) -> list[Path]:
    """The stores' own folders, ``<root>/<teacher identity>/<corpus fingerprint>``, at ``path`` or at most two below.

    Raises:
        FileNotFoundError: nothing there, or no store.
    """
    path = path.resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give the folder of a store, or the one that holds stores")
    found = [folder for folder in (path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))) if _is_store(folder)]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no scores; a store is a folder <teacher identity>/<corpus fingerprint> with files "
            f"unit-*.parquet, in a run's cache under scores/"
        )
    return found


def origin_of(folder: Path) -> Origin | None:
    """What most of the units say of their origin, of those that belong in a folder of this name; None without any."""
    counted: Counter[Origin] = Counter()
    for name in sorted(list_units(folder)):
        try:
            origin = read_origin(unit_path(folder, name))
        except BadUnitError:
            continue
        if (origin.teacher_identity, origin.corpus_fingerprint) == (folder.parent.name, folder.name):
            counted[origin] += 1
        if counted.total() == _ASKED:
            break
    return counted.most_common(1)[0][0] if counted else None


def open_folder(folder: Path) -> ScoreStore:
    """The store in its own folder ``<root>/<teacher identity>/<corpus fingerprint>``, opened for reading and writing.

    Raises:
        ValueError: no unit can be read.
        BadUnitError: some cannot.
    """
    origin = origin_of(folder)
    if origin is None:
        raise ValueError(
            f"{folder} holds no unit that can be read and belongs there; see: distill store verify {folder}"
        )
    return ScoreStore(folder.parent.parent, **asdict(origin))


def store_facts(folder: Path) -> StoreFacts:
    """What the store in ``folder`` holds. Counting distinct pairs may bring its look-up table up to date."""
    pairs, origin = None, origin_of(folder)
    if origin is not None:
        with suppress(BadUnitError):
            pairs = ScoreStore(folder.parent.parent, **asdict(origin)).stats().pairs
    stamps, tables = list_units(folder), table_folders(folder)
    table_bytes = sum(file.stat().st_size for table in tables for file in table.iterdir())
    return StoreFacts(
        folder, origin, len(stamps), pairs, sum(size for size, _ in stamps.values()), len(tables), table_bytes
    )


def verify_store(folder: Path) -> Verification:
    """Read every unit in full, and compare every table with its units; nothing is changed."""
    stamps, origin = list_units(folder), origin_of(folder)
    checks = [_TableCheck(path, origin) for path in table_folders(folder)]
    faults, pairs = [], 0
    # The latest first: of the units that hold a pair it is the one that a table must agree with.
    for name in track(in_order(stamps)[::-1], f"verifying {folder.name}", unit="units"):
        path = unit_path(folder, name)
        try:
            unit = read_fitting(path, origin)
        except BadUnitError as error:
            faults.append(Fault(path, error.fault))
            continue
        pairs += len(unit.keys)
        for check in checks:
            check.compare(name, unit)
    used = [check for check in checks if check.stamps.keys() <= stamps.keys()]
    bad_tables = [Fault(check.path, check.fault()) for check in used if check.fault()]
    return Verification(
        folder,
        units=len(stamps) - len(faults),
        pairs=pairs,
        tables=len(used) - len(bad_tables),
        outdated=len(checks) - len(used),
        leftovers=len(list(folder.glob(f"{TEMPORARY_PREFIX}*"))),
        faults=(*faults, *bad_tables),
    )


def read_fitting(path: Path, origin: Origin | None) -> Unit:
    """The verified unit, if it is of this origin; None asks only that it belongs in the folder it lies in.

    Raises:
        BadUnitError: torn, altered, misnamed, or not of this origin.
    """
    if origin is None:
        origin = read_origin(path)
        try:
            origin = replace(origin, teacher_identity=path.parent.parent.name, corpus_fingerprint=path.parent.name)
        except ValueError:  # the folder's name is no identity: then no unit belongs here
            origin = replace(origin, teacher_identity="unknown", corpus_fingerprint="unknown")
    return read_unit(path, origin)


def quarantine(faults: Iterable[Fault]) -> list[Path]:
    """Move what is bad into a folder ``bad`` beside it, where nothing looks; returns the new paths."""
    moved = []
    for fault in faults:
        aside = fault.path.parent / BAD_FOLDER
        aside.mkdir(exist_ok=True)
        target, again = aside / fault.path.name, 0
        while target.exists():
            again += 1
            target = aside / f"{fault.path.name}.{again}"
        with suppress(FileNotFoundError):  # a table that was replaced meanwhile
            os.rename(fault.path, target)
            moved.append(target)
    return moved


class _TableCheck:
    """Compares a table with the units of its store, given from the latest to the oldest."""

    def __init__(self, path: Path, origin: Origin | None) -> None:
        self.path = path
        self._made = None if origin is None else open_compacted(path, asdict(origin))
        self._table = empty_table() if self._made is None else self._made.table
        self.stamps = {} if self._made is None else self._made.stamps
        self._seen = np.zeros(len(self._table.keys), np.bool_)  # whether the unit that counts for the pair has been
        self._units = self._absent = self._other = 0

    def compare(self, name: str, unit: Unit) -> None:
        if name not in self.stamps:  # newer than the table
            return
        self._units += 1
        positions = self._table.locate(unit.keys)
        there = positions >= 0
        self._absent += int((~there).sum())
        if self.stamps[name] == unit.stamp:  # else it was written anew since, and its scores go before the table's
            counts = there.copy()
            counts[there] = ~self._seen[positions[there]]
            self._other += int((self._table.scores[positions[counts]] != unit.scores[counts]).sum())
        self._seen[positions[there]] = True

    def fault(self) -> str:
        """What is wrong with the table; empty where it agrees with its units."""
        if self._made is None:
            return "is torn, altered or of another origin: it is never read"
        stray = int((~self._seen).sum()) if self._units == len(self.stamps) else 0  # else some unit could not be read
        if not self._absent + self._other + stray:
            return ""
        return (
            f"does not agree with its units: {self._absent} of their pairs are not in it, {self._other} have another "
            f"score, and {stray} pairs are of no unit"
        )


def _is_store(folder: Path) -> bool:
    named = folder.name == BAD_FOLDER or folder.name.startswith((TABLE_PREFIX, "."))
    if named or not folder.is_dir():
        return False
    return bool(list_units(folder)) or bool(table_folders(folder)) or (folder / BAD_FOLDER).is_dir()
