"""The score store: what the teacher said, kept so that it is never asked the same pair twice.

``<folder>/<teacher identity>/<corpus fingerprint>/unit-<id>.parquet`` are immutable units (see ``unit``). Beside them
lie ``table-<id>`` folders: the same scores as sorted arrays, memory-mapped for look-up; they can be deleted at any
time.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import exclusively, sweep_temporaries, writing
from distill.pairtable import (
    empty_table,
    find_first,
    in_order,
    no_table,
    open_compacted,
    remove_table,
    table_folders,
    table_of,
    write_compacted,
)
from distill.unit import BadUnitError, Origin, list_units, read_unit, unit_path, write_unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

    from distill.pairtable import Compacted, Part, Scores, Stamp
    from distill.protocols import Ids, ScoreKind

_LOG = logging.getLogger(__name__)
_SHOWN = 5  # ids or files listed in an error
_LOOKUP_PAIRS = 1 << 22  # looked up in one go


class MissingScoresError(ValueError):
    """Scores were asked for that the store does not hold."""


class NonFiniteScoresError(ValueError):
    """A teacher gave NaN or infinity."""


class _OlderUnitError(Exception):
    """A unit cannot be laid over the table at hand: it is older than one that it disagrees with."""


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    units: int
    pairs: int  # distinct
    bytes: int  # of the units


class ScoreStore:
    """Scores of one teacher on one corpus. Any number of processes may write and read; instances can be pickled.

    Where two units hold the same pair, the later one counts (by modification time, then by name). Opening reads the
    units that no table holds, at most ``overlay_pairs`` pairs of them into memory.

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
        self._about = asdict(self.origin)
        self._root, self._overlay_pairs = Path(folder), overlay_pairs
        self.folder = self._root / teacher_identity / corpus_fingerprint
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._base = no_table()
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
        """Scores float32 of the pairs, in the shape both ids broadcast to; NaN where there is none or an id is -1.

        Memory beyond ids and scores does not grow with their number or with the store.
        """
        images, texts = np.broadcast_arrays(np.asarray(image_ids, np.int64), np.asarray(text_ids, np.int64))
        with self._lock:
            if self._stale:
                self.refresh()
            tables = self._overlay, self._base.table
        found = np.empty(images.size, np.float32)
        images, texts, shape = images.reshape(-1), texts.reshape(-1), images.shape
        for start in range(0, len(found), _LOOKUP_PAIRS):
            piece = slice(start, start + _LOOKUP_PAIRS)
            found[piece] = find_first(self._keys(images[piece], texts[piece]), *tables)
        return found.reshape(shape)

    def missing(self, image_ids: ArrayLike, text_ids: ArrayLike) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the pair has no score yet; False where an id is -1, as there is nothing to ask."""
        return _absent(self.lookup(image_ids, text_ids), image_ids, text_ids)

    def require(self, image_ids: ArrayLike, text_ids: ArrayLike) -> Scores:
        """As ``lookup``, but every pair must have a score; NaN only where an id is -1.

        Raises:
            MissingScoresError: with the count and the first pairs.
        """
        found = self.lookup(image_ids, text_ids)
        absent = _absent(found, image_ids, text_ids)
        if absent.any():
            self.refresh()  # another process may have written them
            found = self.lookup(image_ids, text_ids)
            absent = _absent(found, image_ids, text_ids)
        if absent.any():
            pairs = np.stack([np.broadcast_to(ids, absent.shape)[absent] for ids in (image_ids, text_ids)], axis=-1)
            raise MissingScoresError(
                f"{len(pairs)} of {absent.size} pairs have no score in {self.folder}, the first (image, text): "
                f"{_listed(pairs)}. Score them first; what is there already is not asked again."
            )
        return found

    def pairs(self) -> Iterator[tuple[Ids, Ids, Scores]]:
        """Every distinct pair, by image, then text, in pieces of image ids, text ids, scores (P,); compacts first."""
        with self._lock:
            self.compact()
            table = self._base.table
        for keys, scores in table.parts():
            yield *np.divmod(keys, self.origin.n_texts), scores

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
            stamps = list_units(self.folder)
            if not self._base.stamps or not self._base.stamps.keys() <= stamps.keys():
                base = self._best_table(stamps)
                if base.path != self._base.path:
                    self._base, self._fresh = base, {}
            new = dict.fromkeys(self._base.lacks(stamps))
            self._fresh = {name: kept for name, kept in self._fresh.items() if name in new and stamps[name] == kept[0]}
            if self._read_fresh([name for name in new if name not in self._fresh]):
                held = {name: stamp for name, (stamp, _) in self._fresh.items()}
                self._overlay = table_of(self._fresh[name][1] for name in in_order(held))
            else:
                self.compact()

    def compact(self) -> None:
        """Merge all units into one memory-mapped table on disk, with bounded memory; older tables are removed.

        Raises:
            BadUnitError: naming the files.
        """
        with self._lock:
            with exclusively(self.folder / "table"):
                stamps = list_units(self.folder)  # now: another process may have merged more while this one waited
                made = self._best_table(stamps)
                if made.stamps != stamps:
                    made = self._merged(made, stamps)
                for path in table_folders(self.folder):
                    if path != made.path:
                        remove_table(path)
            self._base, self._fresh, self._overlay = made, {}, empty_table()

    def stats(self) -> StoreStats:
        """Counts of units, distinct pairs and bytes."""
        with self._lock:
            self.refresh()
            stamps = {**self._base.stamps, **{name: stamp for name, (stamp, _) in self._fresh.items()}}
            overlaid = int(np.isnan(self._base.table.find(self._overlay.keys)).sum())
            pairs = len(self._base.table.keys) + overlaid
            return StoreStats(len(stamps), pairs, sum(size for size, _ in stamps.values()))

    def _keys(self, image_ids: ArrayLike, text_ids: ArrayLike) -> Ids:
        """Keys image * n_texts + text, -1 where either id is negative."""
        images, texts = np.broadcast_arrays(np.asarray(image_ids, np.int64), np.asarray(text_ids, np.int64))
        for name, ids, end in (("image", images, self.origin.n_images), ("text", texts, self.origin.n_texts)):
            if ids.size and ids.max() >= end:
                raise ValueError(f"{name} id {ids.max()} is outside the corpus, which has {end} {name}s")
        keys: Ids = np.where((images < 0) | (texts < 0), -1, images * self.origin.n_texts + texts)
        return keys

    def _read_fresh(self, names: list[str]) -> bool:
        """Verify and hold the units; False when they cannot be held beside the table: too many pairs, or too old."""
        held = sum(len(part[0]) for _, part in self._fresh.values())
        for name, stamp, part in self._verified(names):
            held += len(part[0])
            if held > self._overlay_pairs or self._base.outlasts(name, stamp, part):
                return False
            self._fresh[name] = (stamp, part)
        return True

    def _verified(self, names: list[str]) -> Iterator[tuple[str, Stamp, Part]]:
        """Name, stamp and content of the units; at the end, an error that names all that were bad."""
        faults: list[str] = []
        for name in names:
            try:
                unit = read_unit(unit_path(self.folder, name), self.origin)
            except BadUnitError as error:
                faults.append(str(error))
                continue
            yield name, unit.stamp, (unit.keys, unit.scores)
        if faults:
            self._stale = True
            more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise BadUnitError("\n".join(faults[:_SHOWN]) + more)

    def _best_table(self, stamps: dict[str, Stamp]) -> Compacted:
        """The largest table on disk all of whose units are still there."""
        found = [open_compacted(path, self._about) for path in table_folders(self.folder)]
        usable = [base for base in found if base is not None and base.stamps.keys() <= stamps.keys()]
        return max(usable, key=lambda base: len(base.table.keys), default=no_table())

    def _merged(self, base: Compacted, stamps: dict[str, Stamp]) -> Compacted:
        """A new table on disk of exactly these units; those that the base lacks are read."""

        def parts() -> Iterator[Part]:
            for name, stamp, part in self._verified(base.lacks(stamps)):
                if base.outlasts(name, stamp, part):
                    raise _OlderUnitError
                yield part

        _LOG.info("compacting %d new score units of %s", len(base.lacks(stamps)), self.folder)
        try:
            path = write_compacted(self.folder, base.table, parts(), origin=self._about, stamps=stamps)
        except _OlderUnitError:
            return self._merged(no_table(), stamps)
        made = open_compacted(path, self._about)
        if made is None:
            raise OSError(f"the table {path} vanished while it was made; open the store again")
        return made


def _absent(found: Scores, image_ids: ArrayLike, text_ids: ArrayLike) -> np.ndarray[Any, np.dtype[np.bool_]]:
    absent: np.ndarray[Any, np.dtype[np.bool_]] = np.isnan(found)
    absent &= (np.asarray(image_ids) >= 0) & (np.asarray(text_ids) >= 0)
    return absent


def _listed(pairs: Ids) -> str:
    shown = ", ".join(f"({image}, {text})" for image, text in pairs[:_SHOWN].tolist())
    return shown + (", ..." if len(pairs) > _SHOWN else "")
