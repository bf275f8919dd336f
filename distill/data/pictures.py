"""Images at rest (encoded, in a Hugging Face ``datasets`` table) and how they become RGB pixels."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import datasets
    import pyarrow as pa

    from distill.protocols import Ids, Image

MAX_PIXELS = 50_000_000
"""Largest width * height that is decoded unless an option says otherwise."""
MAX_ASPECT = 256
"""Longest side over shortest: models scale the shortest to hundreds of pixels, and the longest with it."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The decoders that image files may reach; fewer decoders, less to attack."""


class DataError(ValueError):
    """The data is not what it should be; the message says where, what was found and what to do."""


class UnreadableImageError(DataError):
    """One image that cannot be decoded, with the reason."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """One encoded image as upright RGB pixels.

    The size is checked in the header before any pixel is decoded; the EXIF orientation is applied; what is transparent
    shows white; 16-bit grey keeps its upper 8 bits; of an animation the first frame counts.

    Args:
        data: The content of an image file.
        max_pixels: Largest width * height that is decoded.

    Raises:
        UnreadableImageError: Empty, truncated, too large, too narrow, or none of ``FORMATS``.
    """
    from distill.data.upright import upright_rgb

    with _opened(data, max_pixels) as opened:
        opened.load()
        if opened.mode == "F":
            raise UnreadableImageError("pixels are floating-point numbers without a stated range; save it with 8 bits")
        return upright_rgb(opened)


def count_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Width * height of an encoded image, from its header.

    Raises:
        UnreadableImageError: as ``decode_image``, as far as the header shows it.
    """
    with _opened(data, max_pixels) as opened:
        return opened.width * opened.height


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image]:
    """An image of a size that may be decoded; whatever goes wrong while it is open means that it is unreadable."""
    import PIL
    import PIL.Image

    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    try:
        with PIL.Image.open(BytesIO(data), formats=FORMATS) as opened:
            _check_size(*opened.size, max_pixels)
            yield opened
    except UnreadableImageError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(_too_large(str(error), max_pixels)) from error
    except PIL.UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a decoder fed with broken bytes may raise anything; all of it means "unreadable"
        raise UnreadableImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableImageError(_too_large(f"{width} x {height} = {width * height:,} pixels", max_pixels))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImageError(
            f"too narrow: {width} x {height} pixels, where one side may be {MAX_ASPECT} times the other"
        )


def _too_large(found: str, max_pixels: int) -> str:
    return f"too large to decode safely: {found}, the limit max_pixels is {max_pixels:,}"


@dataclass(frozen=True, eq=False)
class Pictures:
    """Encoded images and what identifies them; pixels come into being only in ``load``.

    The table is memory-mapped or holds paths only, so that a pickled copy for a worker process stays small.

    Attributes:
        dataset: A ``datasets.Dataset`` with one column ``image`` of type ``Image(decode=False)``: bytes or a path.
        names: What to call each image in messages.
        fingerprints: SHA-256 of each image file's bytes, hex.
        max_pixels: Largest width * height that is decoded.
    """

    dataset: datasets.Dataset
    names: Sequence[str]
    fingerprints: Sequence[str]
    max_pixels: int = MAX_PIXELS
    _folder: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        lengths = len(self.dataset), len(self.names), len(self.fingerprints)
        if len(set(lengths)) != 1:
            raise ValueError(f"dataset, names and fingerprints must be equally long, got {lengths}")

    def __len__(self) -> int:
        return len(self.names)

    def load(self, rows: Ids) -> list[Image]:
        """Decoded RGB images of these rows, in order.

        Raises:
            IndexError: A row is outside the table.
            DataError: A file is gone, no longer readable, or holds something else than when the corpus was loaded.
        """
        wanted = [int(row) for row in rows]
        if wanted and (min(wanted) < 0 or max(wanted) >= len(self)):
            raise IndexError(f"image rows must lie in 0..{len(self) - 1}, got {min(wanted)}..{max(wanted)}")
        if not wanted:
            return []
        cells = self.dataset[wanted]["image"]
        return [self._decode(row, cell) for row, cell in zip(wanted, cells, strict=True)]

    def encoded(self, rows: Ids) -> list[bytes]:
        """The image files' bytes of these rows, in order.

        Raises:
            DataError: A file is gone, or holds something else than when the corpus was loaded.
        """
        wanted = [int(row) for row in rows]
        cells = self.dataset[wanted]["image"] if wanted else []
        contents = [self._content(row, cell) for row, cell in zip(wanted, cells, strict=True)]
        for row, cell, content in zip(wanted, cells, contents, strict=True):
            self._check(row, cell, content)
        return contents

    def _decode(self, row: int, cell: dict[str, bytes | str | None]) -> Image:
        content = self._content(row, cell)
        try:
            image = decode_image(content, max_pixels=self.max_pixels)
        except UnreadableImageError as error:  # says more than that it is another one
            raise self._changed(row, cell, error) from error
        self._check(row, cell, content)
        return image

    def _content(self, row: int, cell: dict[str, bytes | str | None]) -> bytes:
        data, path = cell["bytes"], cell["path"]
        try:
            return data if isinstance(data, bytes) else Path(str(path)).read_bytes()
        except OSError as error:
            raise self._changed(row, cell, error.strerror) from error

    def _check(self, row: int, cell: dict[str, bytes | str | None], content: bytes) -> None:
        """A file may be another one than when it was fingerprinted; what the table holds may not."""
        if not isinstance(cell["bytes"], bytes) and hashlib.sha256(content).hexdigest() != self.fingerprints[row]:
            raise self._changed(row, cell, "it is another picture")

    def _changed(self, row: int, cell: dict[str, bytes | str | None], said: object) -> DataError:
        where = "" if isinstance(cell["bytes"], bytes) else f", {cell['path']!s}"
        return DataError(
            f"image {self.names[row]!r} (row {row}{where}) is not what it was when the corpus was loaded: {said}. "
            "Put the file back as it was and go on (run and train: with --resume); a corpus without it, or with "
            "what it is now, is another one: give that run another name with --set name=..."
        )


def pictures_of_paths(
    paths: Sequence[Path], *, names: Sequence[str], fingerprints: Sequence[str], max_pixels: int = MAX_PIXELS
) -> Pictures:
    """Images that stay in their files."""
    import pyarrow as pa

    located = pa.array([str(path) for path in paths], type=pa.string())
    empty = pa.nulls(len(paths), type=pa.binary())
    return Pictures(_dataset(_table(empty, located)), tuple(names), tuple(fingerprints), max_pixels)


def pictures_of_bytes(
    contents: Iterable[bytes], *, names: Sequence[str], fingerprints: Sequence[str], max_pixels: int = MAX_PIXELS
) -> Pictures:
    """Images held as bytes, written to a memory-mapped Arrow file that lives as long as the returned object."""
    import datasets
    import pyarrow as pa

    folder = _TemporaryFolder()
    place = folder.path / "images.arrow"
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as writer:
        for block in _blocks(contents, 1024):
            writer.write_table(_table(pa.array(block, type=pa.binary()), pa.nulls(len(block), type=pa.string())))
    dataset = datasets.Dataset.from_file(str(place))
    return Pictures(dataset, tuple(names), tuple(fingerprints), max_pixels, folder)


class _TemporaryFolder:
    """A folder that goes when this object does, but only in the process that made it.

    Forked workers leave it alone, and a pickled copy carries no finaliser.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="cross2dual-"))
        weakref.finalize(self, _remove, str(self.path), os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _blocks(items: Iterable[bytes], size: int) -> Iterable[list[bytes]]:
    block: list[bytes] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _schema() -> pa.Schema:
    import datasets

    return datasets.Features({"image": datasets.Image(decode=False)}).arrow_schema


def _table(contents: pa.Array, paths: pa.Array) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_arrays([pa.StructArray.from_arrays([contents, paths], ["bytes", "path"])], schema=_schema())


def _dataset(table: pa.Table) -> datasets.Dataset:
    import datasets
    from datasets.table import InMemoryTable

    return datasets.Dataset(InMemoryTable(table))
