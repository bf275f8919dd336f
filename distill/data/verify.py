"""Every image is decoded once, in full, before anything is built on it; what was found is kept on disk.

Training must not die after hours on one broken file. The verdicts of files are keyed by path, size, time of change and
``max_pixels``, those of bytes by their SHA-256, so that a second load only looks at file sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from distill.data.pictures import MAX_ASPECT, DataError, UnreadableImageError, decode_image
from distill.durable import sweep_temporaries, write_atomically
from distill.protocols import fingerprint

Progress = Callable[[int, int], None]
"""Called with (images checked so far, images in all)."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Verdict:
    """What a look at one image gave: the SHA-256 of its bytes (hex), and why it cannot be used, or None if it can."""

    sha256: str
    reason: str | None


class VerdictFile:
    """Verdicts kept in one JSON file of a cache folder; without a folder nothing is kept.

    A file that does not parse, or was written with another Pillow or limit, is ignored and replaced.
    """

    def __init__(self, folder: Path | None, about: str, *, max_pixels: int) -> None:
        import PIL

        self._head = {"about": about, "max_pixels": max_pixels, "max_aspect": MAX_ASPECT, "pillow": PIL.__version__}
        self._path = None if folder is None else Path(folder) / f"images-{fingerprint(about, max_pixels)[:16]}.json"
        self._known: dict[str, list[Any]] = self._read()
        self._changed = False

    def get(self, key: str, *state: int) -> Verdict | None:
        """The verdict of a key, if one was kept for exactly this state (size and time of change)."""
        kept = self._known.get(key)
        return Verdict(kept[0], kept[1]) if kept is not None and kept[2:] == list(state) else None

    def put(self, key: str, verdict: Verdict, *state: int) -> None:
        """Remembers a verdict; ``save`` writes it."""
        self._known[key] = [verdict.sha256, verdict.reason, *state]
        self._changed = True

    def save(self) -> None:
        """Writes what is new, whole or not at all."""
        if self._path is None or not self._changed:
            return
        content = json.dumps({**self._head, "verdicts": self._known}).encode()
        write_atomically(self._path, lambda file: file.write(content))
        sweep_temporaries(self._path.parent)
        self._changed = False

    def _read(self) -> dict[str, list[Any]]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            known = content.pop("verdicts")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # only a cache: what cannot be read is worked out again
        usable = content == self._head and isinstance(known, dict)
        return known if usable and all(_well_formed(entry) for entry in known.values()) else {}


def _well_formed(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) >= 2
        and isinstance(entry[0], str)
        and (entry[1] is None or isinstance(entry[1], str))
    )


def verdicts_of_files(
    paths: list[Path], verdicts: VerdictFile, *, max_pixels: int, workers: int | None = None
) -> Generator[Verdict, None, None]:
    """The verdict of each file, in order. Closing the iterator early keeps what was found so far."""

    def look(path: Path) -> Verdict:
        try:
            state = path.stat()
            known = verdicts.get(str(path), state.st_size, state.st_mtime_ns)
            if known is not None:
                return known
            found = _judge(path.read_bytes(), max_pixels)
        except FileNotFoundError:
            return Verdict("", "the file does not exist")
        except OSError as error:
            return Verdict("", f"cannot be read: {error.strerror or error}")
        verdicts.put(str(path), found, state.st_size, state.st_mtime_ns)
        return found

    return _looked(look, paths, verdicts, workers)


def verdicts_of_bytes(
    contents: Iterable[bytes], verdicts: VerdictFile, *, max_pixels: int, workers: int | None = None
) -> Generator[Verdict, None, None]:
    """The verdict of each image held as bytes, in order."""

    def look(content: bytes) -> Verdict:
        sha256 = hashlib.sha256(content).hexdigest()
        known = verdicts.get(sha256)
        if known is None:
            known = _judge(content, max_pixels)
            verdicts.put(sha256, known)
        return known

    return _looked(look, contents, verdicts, workers)


def _judge(content: bytes, max_pixels: int) -> Verdict:
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        decode_image(content, max_pixels=max_pixels)
    except UnreadableImageError as error:
        return Verdict(sha256, str(error))
    return Verdict(sha256, None)


def _looked(
    look: Callable[[_Item], Verdict], items: Iterable[_Item], verdicts: VerdictFile, workers: int | None
) -> Generator[Verdict, None, None]:
    """``look`` over the items in threads (decoding and hashing release the interpreter), a bounded number ahead."""
    waiting = iter(items)
    with _strict_pillow(), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            while block := list(islice(waiting, 256)):
                yield from pool.map(look, block)
        finally:
            verdicts.save()


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow's warning of a decompression bomb is an error, its other remarks are not shown, half files are refused."""
    from PIL import Image, ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which turns half-written files into grey pictures; "
            "set it to False before images are read"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
