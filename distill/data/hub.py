"""Captions in a Hugging Face ``datasets`` data set: a hub id, a ``save_to_disk`` folder, or a folder of files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.columns import Columns, row_of
from distill.data.corpus import BadItem, Corpus, DataError
from distill.data.folder import FolderImages
from distill.data.pictures import Pictures, pictures_of_paths
from distill.data.reading import ReadOptions, Row, read_corpus
from distill.data.verify import VerdictFile, verdicts_of_bytes, verdicts_of_files

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import datasets

    from distill.data.verify import Progress, Verdict

_BLOCK = 256  # rows whose encoded images are in memory at once
USUAL_SPLIT_NAMES = {"validation": "val"}
"""What the hub calls our splits."""


def load_hub(
    name_or_folder: str | Path,
    *,
    columns: Columns | None = None,
    image_root: str | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    options: ReadOptions | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of a ``datasets`` data set.

    Splits come from the split column where there is one, else from the names of the data set's own splits. Images are
    those inside the data set; where it holds only paths, they must lie below ``image_root``.

    Args:
        name_or_folder: Hub id; or a folder made by ``save_to_disk``; or any other folder ``load_dataset`` can read.
        columns: Which column holds what.
        image_root: Folder of images that are not inside the data set.
        config: Configuration of a hub data set.
        revision: Commit or tag of a hub data set.
        options: What to do about bad items and splits. ``validation`` counts as ``val`` unless ``split_names`` differs.
        progress: Told how many images are checked.

    Raises:
        DataError: It cannot be loaded, lacks a column, or holds bad items.
    """
    options, columns = options or ReadOptions(), columns or Columns()
    options = replace(options, split_names={**USUAL_SPLIT_NAMES, **options.split_names})
    parts, root = _load(name_or_folder, config, revision)
    name = Path(name_or_folder).name
    for part, dataset in parts.items():
        columns.check(f"{name}[{part}]" if part else name, list(dataset.column_names))
    images = _TableImages(name, parts, columns.image, options, image_root or root)
    return read_corpus(name, _rows(name, parts, columns, images), images=images, options=options, progress=progress)


def _load(
    name_or_folder: str | Path, config: str | None, revision: str | None
) -> tuple[dict[str, datasets.Dataset], Path | None]:
    """The data set by split name ("" where it has none), and the folder that its image files may lie in."""
    import datasets

    folder = Path(name_or_folder)
    saved = any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        loaded: Any = (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(name_or_folder), config, revision=revision)
        )
    except Exception as error:  # the library raises whatever its readers, its cache or the network raise
        raise DataError(
            f"{str(name_or_folder)!r} is neither a save_to_disk folder nor a data set that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    parts = {"": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    return parts, folder if folder.is_dir() and not saved else None


def _rows(
    name: str, parts: dict[str, datasets.Dataset], columns: Columns, images: _TableImages
) -> Iterator[Row | BadItem]:
    first_of: dict[str, tuple[int, str, str]] = {}  # image_id -> row over all splits, content, where
    number = 0
    for part, dataset in parts.items():
        wanted = [column for column in columns.names() if column in dataset.column_names and column != columns.image]
        texts = dataset.select_columns(wanted)
        for start in range(0, len(texts), _BLOCK):
            block = texts[start : start + _BLOCK]
            count = len(block[columns.caption])
            contents = images.contents(number, number + count) if columns.image_id in wanted else []
            for row in range(count):
                cells = {column: values[row] for column, values in block.items()}
                where = f"{name}[{part}] row {start + row}" if part else f"{name} row {start + row}"
                image, image_id = number + row, cells.get(columns.image_id)
                if image_id is not None:
                    image, content, before = first_of.setdefault(str(image_id), (image, contents[row], where))
                    if content != contents[row]:
                        yield BadItem(where, f"duplicate id: image_id {image_id!r} is another image than at {before}")
                        continue
                split = _split_name(dataset, columns.split, cells.get(columns.split, part))
                yield row_of(where, cells, columns, image=image, split=split)
            number += count


def _split_name(dataset: datasets.Dataset, column: str, split: object) -> object:
    """A split stored as a class number, by its name."""
    feature = dataset.features.get(column)
    return feature.int2str(split) if isinstance(split, int) and hasattr(feature, "int2str") else split


class _TableImages:
    """The image column of a data set; the key of an image is its row over all splits."""

    def __init__(
        self,
        name: str,
        parts: dict[str, datasets.Dataset],
        column: str,
        options: ReadOptions,
        root: str | Path | None,
    ) -> None:
        import datasets

        tables = [part.select_columns([column]) for part in parts.values()]
        if column != "image":
            tables = [table.rename_column(column, "image") for table in tables]
        try:
            encoded = [table.cast_column("image", datasets.Image(decode=False)) for table in tables]
        except (TypeError, ValueError, NotImplementedError) as error:  # Arrow raises all three
            raise DataError(f"{name}: column {column!r} holds no images: {error}") from error
        self._table = datasets.concatenate_datasets(encoded)
        self._name, self._options = name, options
        self._folder = None if root is None else FolderImages(root, options)
        self._root = None if root is None else Path(os.path.realpath(root))
        self._inside, self._listed = _where_images_are(self._table)
        self._paths: dict[str, Path] = {}

    def locate(self, image: object) -> str:
        """The row, once it is clear that there is an image in it.

        Raises:
            DataError: No image, or one that lies where it may not.
        """
        row = int(str(image))
        if not self._inside[row]:
            listed = self._listed[row]
            if not listed:
                raise DataError("caption for no image: the image column is empty")
            self._paths[str(row)] = self._file(listed)
        return str(row)

    def contents(self, start: int, stop: int) -> list[str]:
        """What tells the images of these rows apart: their SHA-256, or their path."""
        cells = self._table[start:stop]["image"]
        return [
            hashlib.sha256(cell["bytes"]).hexdigest() if inside else str(cell and cell["path"])
            for cell, inside in zip(cells, self._inside[start:stop], strict=True)
        ]

    def verdicts(self, keys: Sequence[str]) -> Generator[Verdict, None, None]:
        """Whether each image can be decoded, in order."""
        limit, workers = self._options.max_pixels, self._options.workers
        if self._paths:
            if set(self._paths) != set(keys):
                raise DataError(f"{self._name}: some images are inside the data set, some are paths; make them all one")
            known = VerdictFile(self._options.cache, f"files below {self._root}", max_pixels=limit)
            yield from verdicts_of_files([self._paths[key] for key in keys], known, max_pixels=limit, workers=workers)
            return
        known = VerdictFile(self._options.cache, f"images in {self._name}", max_pixels=limit)
        yield from verdicts_of_bytes(self._bytes(keys), known, max_pixels=limit, workers=workers)

    def pictures(self, keys: Sequence[str], names: Sequence[str], fingerprints: Sequence[str]) -> Pictures:
        """The rows to keep, still where they were."""
        limit = self._options.max_pixels
        names = [f"row {key}" if name == key else name for key, name in zip(keys, names, strict=True)]
        if self._paths:
            paths = [self._paths[key] for key in keys]
            return pictures_of_paths(paths, names=names, fingerprints=fingerprints, max_pixels=limit)
        rows = [int(key) for key in keys]
        table = self._table if rows == list(range(len(self._table))) else self._table.select(rows)
        return Pictures(table, tuple(names), tuple(fingerprints), limit)

    def _bytes(self, keys: Sequence[str]) -> Iterator[bytes]:
        for start in range(0, len(keys), _BLOCK):
            for cell in self._table[[int(key) for key in keys[start : start + _BLOCK]]]["image"]:
                yield cell["bytes"]

    def _file(self, path: str) -> Path:
        if self._folder is None or self._root is None:
            raise DataError(
                f"the image is not inside the data set but at {path!r}; say with image_root which folder may be read"
            )
        real = Path(os.path.realpath(path))
        if Path(path).is_absolute() and real.is_relative_to(self._root):  # the library writes absolute paths itself
            path = str(real.relative_to(self._root))
        return self._root / self._folder.locate(path)


def _where_images_are(table: datasets.Dataset) -> tuple[list[bool], list[str | None]]:
    """For each row: whether the image is inside the table, and the path where it is not."""
    arrow, inside, listed = table.with_format("arrow"), list[bool](), list[str | None]()
    for start in range(0, len(table), _BLOCK):
        for chunk in arrow[start : start + _BLOCK]["image"].chunks:
            content, path = chunk.flatten()  # fields in the order of the type: bytes, path; null where the row is
            inside += content.is_valid().to_pylist()
            listed += [
                None if held else name for held, name in zip(inside[len(listed) :], path.to_pylist(), strict=True)
            ]
    return inside, listed
