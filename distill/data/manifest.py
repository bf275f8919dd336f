"""Captions in a manifest: a CSV, TSV or JSONL file with one image path and its caption (JSONL: or captions) a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from distill.data.columns import Columns, row_of
from distill.data.corpus import BadItem, Corpus, DataError
from distill.data.folder import FolderImages
from distill.data.reading import ReadOptions, Row, read_corpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.data.verify import Progress

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")


def load_manifest(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    columns: Columns | None = None,
    options: ReadOptions | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of a manifest.

    Args:
        path: ``.jsonl``, ``.ndjson``, ``.csv`` or ``.tsv`` in UTF-8; CSV and TSV begin with a header.
        image_root: Folder that image paths are relative to; None is the manifest's own.
        columns: Which column holds what.
        options: What to do about bad items and splits.
        progress: Told how many images are checked.

    Raises:
        DataError: Anything wrong with the file, its rows or the images.
    """
    options, columns, path = options or ReadOptions(), columns or Columns(), Path(path)
    if path.suffix.lower() not in (*_DELIMITERS, *_JSON_LINES):
        known = ", ".join([*_DELIMITERS, *_JSON_LINES])
        raise DataError(f"manifest {str(path)!r}: unknown kind {path.suffix!r}; known: {known}")
    if not path.is_file():
        raise DataError(f"manifest {str(path)!r} does not exist; check the path")
    images = FolderImages(path.parent if image_root is None else image_root, options)
    return read_corpus(path.stem, _rows(path, columns), images=images, options=options, progress=progress)


def _rows(path: Path, columns: Columns) -> Iterator[Row | BadItem]:
    try:
        yield from _json_rows(path, columns) if path.suffix.lower() in _JSON_LINES else _csv_rows(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except csv.Error as error:
        raise DataError(f"{path.name} cannot be read as CSV: {error}; look for a quote that is not closed") from error


def _csv_rows(path: Path, columns: Columns) -> Iterator[Row | BadItem]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, delimiter=_DELIMITERS[path.suffix.lower()], strict=True)
        columns.check(path.name, list(table.fieldnames or []))
        width = len(table.fieldnames or [])
        for cells in table:
            where = f"{path.name}:{table.line_num}"
            if None in cells or None in cells.values():
                found = sum(value is not None for name, value in cells.items() if name is not None)
                found += len(cells.get(None) or [])  # surplus cells lie under None
                yield BadItem(
                    where, f"{found} cells where the header has {width}; quote captions that hold a delimiter"
                )
                continue
            yield row_of(where, cells, columns, image=cells[columns.image], split=cells.get(columns.split))


def _json_rows(path: Path, columns: Columns) -> Iterator[Row | BadItem]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                cells = json.loads(line)
            except ValueError as error:
                yield BadItem(where, f"not valid JSON: {error}")
                continue
            if not isinstance(cells, dict):
                yield BadItem(where, f"a row must be an object, found {type(cells).__name__}")
                continue
            missing = [name for name in (columns.image, columns.caption) if name not in cells]
            if missing:
                yield BadItem(where, f"no {' and '.join(map(repr, missing))}; found {', '.join(map(repr, cells))}")
                continue
            yield row_of(where, cells, columns, image=cells[columns.image], split=cells.get(columns.split))
