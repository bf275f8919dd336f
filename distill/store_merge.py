"""Scores of several machines brought together in one place."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distill.durable import write_atomically
from distill.pairtable import in_order
from distill.progress import track
from distill.store import ScoreStore
from distill.store_tools import Fault, find_stores, origin_of, read_fitting
from distill.unit import BadUnitError, list_units, read_unit, unit_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO

    from distill.unit import Origin, Unit


@dataclass
class MergeReport:
    """What merging has done, in units and pairs."""

    copied: int = 0
    copied_pairs: int = 0
    already_there: int = 0
    superseded: int = 0  # the target has the same unit, with other and later scores
    differing: int = 0  # pairs that the target had with another score
    largest_difference: float = 0.0
    refused: list[Fault] = field(default_factory=list)


def merge_stores(sources: Sequence[Path], target: Path) -> MergeReport:
    """Copy the units of all stores in the sources into ``target``, each origin into its own store.

    Units are verified before they are copied and keep their time: of a pair that two units score differently the later
    one counts, as if one machine had written both. Merging again changes nothing. Bad units are left out.

    Raises:
        FileNotFoundError: a source holds no store.
        ValueError: a source is the target.
        BadUnitError: the target has bad units.
    """
    folders = [folder for source in sources for folder in find_stores(source)]
    report = MergeReport()
    for folder in folders:
        into = target.resolve() / folder.parent.name / folder.name
        if folder == into:
            raise ValueError(f"{folder} is to be merged into itself; give another folder with --into")
        origin = origin_of(folder)
        there = origin_of(into) if into.is_dir() else None
        if origin is not None and there not in (None, origin):
            report.refused.append(Fault(folder, f"is {_described(origin)}; the target is {_described(there)}"))
            continue
        store = None if origin is None else ScoreStore(target, **asdict(origin))
        for name in track(in_order(list_units(folder)), f"merging {folder.name}", unit="units"):
            path = unit_path(folder, name)
            try:
                unit = read_fitting(path, origin)
            except BadUnitError as error:
                report.refused.append(Fault(path, error.fault))
                continue
            if store is not None:
                _take(unit, name, store, report)
    return report


def _take(unit: Unit, name: str, store: ScoreStore, report: MergeReport) -> None:
    path = unit_path(store.folder, name)
    there = None
    with suppress(FileNotFoundError, BadUnitError):  # what is bad is replaced
        there = read_unit(path, store.origin)
    if there is not None and np.array_equal(there.scores, unit.scores):
        report.already_there += 1
        return
    known = store.lookup(*np.divmod(unit.keys, store.origin.n_texts))
    differences = np.abs(known - unit.scores)[~np.isnan(known) & (known != unit.scores)]
    report.differing += len(differences)
    report.largest_difference = max(report.largest_difference, float(differences.max(initial=0)))
    if there is not None and there.stamp[1] >= unit.stamp[1]:
        report.superseded += 1
        return

    def write(file: BinaryIO) -> None:
        file.write(unit.content)
        file.flush()
        os.utime(file.fileno(), ns=(unit.stamp[1], unit.stamp[1]))

    write_atomically(path, write)
    report.copied += 1
    report.copied_pairs += len(unit.keys)


def _described(origin: Origin | None) -> str:
    return "unknown" if origin is None else f"{origin.score_kind} of {origin.n_images} images x {origin.n_texts} texts"
