"""The score store: what the teacher said, kept so that it is never asked the same pair twice.

``<folder>/<teacher identity>/<corpus fingerprint>/unit-<id>.parquet`` are immutable units (see ``unit``). Beside them
lie ``table-<id>`` folders: the same scores as sorted arrays, memory-mapped for look-up; they can be deleted at any
time.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import exclusively, sweep_temporaries
from distill.pairtable import Compacted, empty_table, open_compacted, table_of, write_compacted
from distill.protocols import fingerprint
from distill.unit import BadUnitError, Origin, read_unit, write_unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

    from distill.pairtable import Part, Scores, Stamp
    from distill.protocols import Ids, ScoreKind

_LOG = logging.getLogger(__name__)
_UNIT_NAME = re.compile(r"unit-([0-9a-f]{32})\.parquet")
_SHOWN = 5  # ids or files listed in an error


class MissingScoresError(ValueError):
    """Scores were asked for that the store does not hold."""


class NonFiniteScoresError(ValueError):
    """A teacher gave NaN or infinity."""


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    units: int
    pairs: int  # distinct
    bytes: int  # of the units


class ScoreStore:
    """Scores of one teacher on one corpus. Any number of processes may write and read; instances can be pickled.

    Where two units hold the same pair, the one renamed last counts (by modification time, then by name).

    Raises:
        BadUnitError: on opening, when a unit is torn, altered or of another origin.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher_identity: str,
        corpus_fingerprint: str,
        score_kind: ScoreKind,
        n_images: int,
        n_texts: int,
        overlay_pairs: int = 1 << 20,
    ) -> None:
        """``overlay_pairs``: how many pairs are held in memory before they are compacted on disk."""
        self.origin = Origin(teacher_identity, corpus_fingerprint, score_kind, int(n_images), int(n_texts))
        _check_origin(self.origin)
        self._about = asdict(self.origin)
        self._root, self._overlay_pairs = Path(folder), overlay_pairs
        self.folder = self._root / teacher_identity / corpus_fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._base = Compacted(empty_table(), {})
        self._fresh: dict[str, tuple[Stamp, Part]] = {}  # units that the base lacks
        self._overlay = empty_table()
        self._stale = False
        sweep_temporaries(self.folder)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._root, **self._about, "overlay_pairs": self._overlay_pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def lookup(self, image_ids: ArrayLike, text_ids: ArrayLike) -> Scores:
        """Scores float32 of the pairs, in the shape both ids broadcast to; NaN where there is none or an id is -1."""
        keys = self._keys(image_ids, text_ids)
        with self._lock:
            if self._stale:
                self.refresh()
            base, overlay = self._base.table, self._overlay
        flat = keys.reshape(-1)
        ascending = len(flat) < 2 or bool((flat[1:] >= flat[:-1]).all())
        order = None if ascending else np.argsort(flat)
        wanted = flat if order is None else flat[order]
        found = overlay.find(wanted)
        rest = np.isnan(found)
        found[rest] = base.find(wanted[rest])
        if order is not None:
            unsorted = np.empty_like(found)
            unsorted[order] = found
            found = unsorted
        return found.reshape(keys.shape)

    def missing(self, image_ids: ArrayLike, text_ids: ArrayLike) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the pair has no score yet; False where an id is -1, as there is nothing to ask."""
        return np.isnan(self.lookup(image_ids, text_ids)) & (self._keys(image_ids, text_ids) >= 0)

    def require(self, image_ids: ArrayLike, text_ids: ArrayLike) -> Scores:
        """As ``lookup``, but every pair must have a score; NaN only where an id is -1.

        Raises:
            MissingScoresError: with the count and the first pairs.
        """
        absent = self.missing(image_ids, text_ids)
        if absent.any():
            self.refresh()  # another process may have written them
            absent = self.missing(image_ids, text_ids)
        if absent.any():
            pairs = np.stack(np.divmod(self._keys(image_ids, text_ids)[absent], self.origin.n_texts), axis=-1)
            raise MissingScoresError(
                f"{len(pairs)} of {absent.size} pairs have no score in {self.folder}, the first (image, text): "
                f"{_listed(pairs)}. Score them first; what is there already is not asked again."
            )
        return self.lookup(image_ids, text_ids)

    def write_unit(self, image_ids: ArrayLike, text_ids: ArrayLike, scores: ArrayLike) -> Path:
        """Keep the scores (P,) of the pairs (P,), in any order, as one unit; returns its file.

        Raises:
            NonFiniteScoresError: with count and first pairs; nothing is written.
            ValueError: no pairs, unequal lengths, ids outside the corpus, or a pair given twice.
        """
        keys, values = self._keys(image_ids, text_ids).reshape(-1), np.asarray(scores, np.float32).reshape(-1)
        if not len(keys) or keys.shape != values.shape or keys.min() < 0:
            raise ValueError(
                f"a unit needs at least one pair, as many scores as pairs and no id of -1; got {len(keys)} pairs, "
                f"{len(values)} scores"
            )
        finite = np.isfinite(values)
        if not finite.all():
            pairs = np.stack(np.divmod(keys[~finite], self.origin.n_texts), axis=-1)
            raise NonFiniteScoresError(
                f"the teacher gave {len(pairs)} of {len(keys)} scores that are not finite, the first (image, text): "
                f"{_listed(pairs)}. Nothing of this unit is kept. Look at these items, or at the teacher's precision."
            )
        order = np.argsort(keys)
        keys = keys[order]
        if (keys[1:] == keys[:-1]).any():
            raise ValueError(f"a unit holds a pair once; got {int((keys[1:] == keys[:-1]).sum())} pairs again")
        path = write_unit(self.folder, self.origin, keys, values[order])
        self._stale = True
        return path

    def refresh(self) -> None:
        """See what this and other processes have written since; verifies every unit not seen before.

        Raises:
            BadUnitError: naming the files.
        """
        with self._lock:
            self._stale = False
            stamps = self._listed_units()
            if not set(self._base.stamps) <= set(stamps) or not self._base.stamps:
                self._base = self._best_table(stamps)
            self._fresh = {name: kept for name, kept in self._fresh.items() if stamps.get(name) == kept[0]}
            new = [name for name, stamp in stamps.items() if self._base.stamps.get(name) != stamp]
            if self._read_fresh([name for name in new if name not in self._fresh], keep=set(new)):
                order = sorted(self._fresh.items(), key=lambda kept: (kept[1][0][1], kept[0]))
                self._overlay = table_of(part for _, (_, part) in order)
            else:
                self.compact()

    def compact(self) -> None:
        """Merge all units into one memory-mapped table on disk, with bounded memory; older tables are removed."""
        with self._lock:
            stamps = self._listed_units()
            if not stamps:
                return
            path = self.folder / f"table-{fingerprint(sorted(stamps))}"
            with exclusively(self.folder / "table"):
                made = open_compacted(path, self._about)
                if made is None or made.stamps != stamps:
                    self._write_table(path, stamps)
                    made = open_compacted(path, self._about)
                if made is None:
                    raise OSError(f"the table {path} vanished while it was made; open the store again")
                self._prune_tables(keep=path)
            self._base, self._fresh, self._overlay = made, {}, empty_table()

    def stats(self) -> StoreStats:
        """Counts of units, distinct pairs and bytes."""
        with self._lock:
            self.refresh()
            stamps = {**self._base.stamps, **{name: stamp for name, (stamp, _) in self._fresh.items()}}
            overlaid = int(np.isnan(self._base.table.find(self._overlay.keys)).sum())
            return StoreStats(
                len(stamps), len(self._base.table.keys) + overlaid, sum(size for size, _ in stamps.values())
            )

    def _keys(self, image_ids: ArrayLike, text_ids: ArrayLike) -> Ids:
        """Keys image * n_texts + text, -1 where either id is negative."""
        images, texts = np.broadcast_arrays(np.asarray(image_ids, np.int64), np.asarray(text_ids, np.int64))
        for name, ids, end in (("image", images, self.origin.n_images), ("text", texts, self.origin.n_texts)):
            if ids.size and ids.max() >= end:
                raise ValueError(f"{name} id {ids.max()} is outside the corpus, which has {end} {name}s")
        keys: Ids = np.where((images < 0) | (texts < 0), -1, images * self.origin.n_texts + texts)
        return keys

    def _listed_units(self) -> dict[str, Stamp]:
        stamps = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                named = _UNIT_NAME.fullmatch(entry.name)
                if named:
                    status = entry.stat()
                    stamps[named[1]] = (status.st_size, status.st_mtime_ns)
        return stamps

    def _read_fresh(self, names: list[str], *, keep: set[str]) -> bool:
        """Verify the units; False when those to keep are too many for memory (then none of the new ones is held)."""
        self._fresh = {name: kept for name, kept in self._fresh.items() if name in keep}
        held = sum(len(part[0]) for _, part in self._fresh.values())
        faults: list[str] = []
        for name in names:
            try:
                unit = read_unit(self._unit_path(name), self.origin)
            except BadUnitError as error:
                faults.append(str(error))
                continue
            held += len(unit.keys)
            if held <= self._overlay_pairs:
                self._fresh[name] = (unit.stamp, (unit.keys, unit.scores))
        if faults:
            self._stale = True
            more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise BadUnitError("\n".join(faults[:_SHOWN]) + more)
        return held <= self._overlay_pairs

    def _unit_path(self, name: str) -> Path:
        return self.folder / f"unit-{name}.parquet"

    def _best_table(self, stamps: dict[str, Stamp]) -> Compacted:
        """The largest table on disk all of whose units are still there."""
        found = [open_compacted(path, self._about) for path in sorted(self.folder.glob("table-*"))]
        usable = [base for base in found if base is not None and set(base.stamps) <= set(stamps)]
        return max(usable, key=lambda base: len(base.table.keys), default=Compacted(empty_table(), {}))

    def _write_table(self, path: Path, stamps: dict[str, Stamp]) -> None:
        base = self._best_table(stamps)
        new = sorted((stamp[1], name) for name, stamp in stamps.items() if base.stamps.get(name) != stamp)
        read = dict(base.stamps)

        def parts() -> Iterator[Part]:
            yield from base.table.parts()
            for _, name in new:
                unit = read_unit(self._unit_path(name), self.origin)
                read[name] = unit.stamp
                yield unit.keys, unit.scores

        _LOG.info("compacting %d new score units into %s", len(new), path)
        write_compacted(
            path, parts, key_end=self.origin.n_images * self.origin.n_texts, origin=self._about, stamps=read
        )

    def _prune_tables(self, *, keep: Path) -> None:
        for path in self.folder.glob("table-*"):
            if path != keep:  # who has it memory-mapped keeps the data; its next opening finds the new one
                shutil.rmtree(path, ignore_errors=True)


def _check_origin(origin: Origin) -> None:
    for name in (origin.teacher_identity, origin.corpus_fingerprint):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(f"an identity names a folder: letters, digits, '.', '_', '-' only; got {name!r}")
    if min(origin.n_images, origin.n_texts) < 1 or origin.n_images * origin.n_texts >= 2**63:
        raise ValueError(
            f"n_images and n_texts must be at least 1 and their product below 2**63; got {origin.n_images}, "
            f"{origin.n_texts}"
        )


def _listed(pairs: Ids) -> str:
    shown = ", ".join(f"({image}, {text})" for image, text in pairs[:_SHOWN].tolist())
    return shown + (", ..." if len(pairs) > _SHOWN else "")
