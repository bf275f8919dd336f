"""The pictures of what is found: where they come from, and small copies of them for a page."""

from __future__ import annotations

import hashlib
import logging
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from distill.data.pictures import DataError, UnreadableImageError, decode_image
from distill.serving.cache import ByteCache

if TYPE_CHECKING:
    from distill.protocols import Ids, Image
    from distill.serving.catalog import Catalog

log = logging.getLogger(__name__)
SIZES = (128, 256, 512, 1024)
"""Longest edge of a small copy, pixels."""
FORMATS: dict[str, Literal["WEBP", "JPEG"]] = {"webp": "WEBP", "jpeg": "JPEG"}
_LOOKED_AT = 50  # files of a folder that are looked for at the start
_KEPT_BYTES = 32 << 20


class NoPicturesError(ValueError):
    """A folder without the pictures that were indexed."""


class PictureSource(Protocol):
    """Pixels of corpus rows; those of a corpus are one, whether files or not."""

    def load(self, rows: Ids) -> list[Image]:
        """Upright RGB pictures, in order.

        Raises:
            DataError: One cannot be read, or is another one than was indexed.
        """


class FolderPictures:
    """Pictures in the files of a folder, under the names that the catalog has; nothing outside it is opened."""

    def __init__(self, folder: str | Path, catalog: Catalog) -> None:
        """Look whether the pictures are there.

        Raises:
            NoPicturesError: no such folder, or none of the first pictures is in it.
        """
        self._root, self._catalog = Path(folder).resolve(), catalog
        if not self._root.is_dir():
            raise NoPicturesError(f"{folder} is no folder")
        some = catalog.ids["image"][:_LOOKED_AT].tolist()
        lacking = [image for image in some if self._file(image) is None]
        if some and len(lacking) == len(some):
            raise NoPicturesError(
                f"{folder} holds none of the first {len(some)} pictures of the index, such as "
                f"{catalog.name(some[0])!r}: names are paths within the folder; give the folder that they start from"
            )
        if lacking:
            log.warning("%s: %d of the first %d pictures are not there", folder, len(lacking), len(some))

    def load(self, rows: Ids) -> list[Image]:
        return [self._one(int(row)) for row in rows]

    def _one(self, image: int) -> Image:
        name, path = self._catalog.name(image), self._file(image)
        if path is None:
            raise DataError(f"picture {name!r} (row {image}) is not in {self._root}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"picture {name!r} (row {image}) cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self._catalog.sha256(image):
            raise DataError(f"picture {name!r} (row {image}) in {self._root} is another one than was indexed")
        try:
            return decode_image(content)
        except UnreadableImageError as error:
            raise DataError(f"picture {name!r} (row {image}) in {self._root}: {error}") from error

    def _file(self, image: int) -> Path | None:
        """The file, links followed; None where there is none inside the folder."""
        try:
            path = (self._root / self._catalog.name(image)).resolve()
            return path if path.is_relative_to(self._root) and path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None


class Thumbnails:
    """Small copies of pictures, the latest ones kept. Threads may share one."""

    def __init__(self, source: PictureSource) -> None:
        """``source``: of the pictures."""
        self._source = source
        self._kept: ByteCache[tuple[int, int, str], bytes] = ByteCache(_KEPT_BYTES)

    def get(self, image: int, size: int, kind: str) -> bytes:
        """An encoded picture, of ``FORMATS[kind]``, with no edge longer than ``size``.

        Raises:
            DataError: It cannot be read.
        """
        key = (image, size, kind)
        found = self._kept.get(key)
        if found is None:
            found = shrunk(self._source.load(np.array([image], np.int64))[0], size, kind)
            self._kept.put(key, found, size=len(found))
        return found


def shrunk(image: Image, size: int, kind: str) -> bytes:
    """An encoded copy with no edge longer than ``size`` pixels; a smaller picture keeps its size."""
    import PIL.Image

    copy = image.copy()
    copy.thumbnail((size, size), PIL.Image.Resampling.LANCZOS)
    out = BytesIO()
    copy.save(out, FORMATS[kind], quality=82)
    return out.getvalue()
