"""What data a run was begun with, noted so that going on with other data is refused and told what differs."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.pictures import DataError
from distill.durable import write_atomically

if TYPE_CHECKING:
    from distill.data.corpus import Corpus

log = logging.getLogger(__name__)
_SHOWN = 3
Marks = np.ndarray[Any, np.dtype[np.uint64]]


class ChangedDataError(DataError):
    """The data is not that of the run it is to be used for."""


def note_or_compare(corpus: Corpus, path: Path) -> None:
    """Note the corpus in ``path`` (.npz) where nothing is noted; else it must be the one that was.

    Raises:
        ChangedDataError: it is another one; names what changed, came or went.
    """
    now = _Noted.of(corpus)
    then = _Noted.load(path)
    if then is None:
        write_atomically(path, now.save)
    elif then.fingerprint != now.fingerprint:
        raise ChangedDataError(
            f"the data is not what {path.parent} was begun with: {_differences(then, now, corpus.texts)}; nothing of "
            "two corpora is ever mixed: put the data back and go on, or give this run another name with --set name=..."
        )


@dataclass(frozen=True)
class _Noted:
    """64 bits of the hash of each item's content, and what the images are called."""

    fingerprint: str
    images: Marks  # (N,)
    texts: Marks  # (M,)
    names: tuple[str, ...]  # (N,)

    @classmethod
    def of(cls, corpus: Corpus) -> _Noted:
        return cls(
            corpus.fingerprint,
            _marks(corpus.image_fingerprints),
            _marks(corpus.text_fingerprints),
            tuple(corpus.image_names),
        )

    @classmethod
    def load(cls, path: Path) -> _Noted | None:
        try:
            with np.load(path, allow_pickle=False) as held:
                names = held["names"].tobytes().decode().split("\0")
                return cls(held["fingerprint"].tobytes().decode(), held["images"], held["texts"], tuple(names))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read (%s): whether the data changed since is not known", path, error)
            return None

    def save(self, file: Any) -> None:
        names, mark = ("\0".join(self.names).encode(), self.fingerprint.encode())
        np.savez_compressed(
            file,
            fingerprint=np.frombuffer(mark, np.uint8),
            images=self.images,
            texts=self.texts,
            names=np.frombuffer(names, np.uint8),
        )


def _marks(hexes: Sequence[str]) -> Marks:
    return np.fromiter((int(mark[:16], 16) for mark in hexes), np.uint64, len(hexes))


def _differences(then: _Noted, now: _Noted, texts: Sequence[str]) -> str:
    before, after = (dict(zip(noted.names, noted.images.tolist(), strict=True)) for noted in (then, now))
    kept = before.keys() & after.keys()
    fresh = np.flatnonzero(~np.isin(now.texts, then.texts))
    gone = int((~np.isin(then.texts, now.texts)).sum())
    found = [
        _told("picture(s) changed", [name for name in after if name in kept and before[name] != after[name]]),
        _told("picture(s) are gone", [name for name in before if name not in kept]),
        _told("picture(s) are new", [name for name in after if name not in kept]),
        _told("caption(s) are new", [texts[row] for row in fresh.tolist()]),
        f"{gone} caption(s) are gone" if gone else "",
    ]
    told = [one for one in found if one]
    return ", ".join(told) or "the same pictures and captions in another order, in other pairs or in other splits"


def _told(what: str, items: Sequence[str]) -> str:
    shown = ", ".join(repr(item) for item in items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
    return f"{len(items)} {what} ({shown})" if items else ""
