"""What is searched: the items of an exported folder's Parquet files, and the indices over them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.export.layout import embeddings_file, index_folder
from distill.protocols import SIDES, Side

if TYPE_CHECKING:
    from distill.index import VectorIndex
    from distill.protocols import Ids


class CatalogError(ValueError):
    """An exported folder whose parts do not belong together."""


class Catalog:
    """Names, captions and indices. Ids are corpus rows."""

    def __init__(self, folder: str | Path, *, dim: int) -> None:
        """Read an exported folder that has an index.

        Raises:
            FileNotFoundError: a part is missing.
            CatalogError: an index has another width than the student, or items that the Parquet files do not name.
        """
        from distill.index import VectorIndex

        self.index: dict[Side, VectorIndex] = {
            side: VectorIndex.load(index_folder(folder, side), device="cpu") for side in SIDES
        }
        images = _table(embeddings_file(folder, "image"), ["id", "name", "sha256"])
        texts = _table(embeddings_file(folder, "text"), ["id", "text", "images"])
        self.ids: dict[Side, Ids] = {side: _ids(table) for side, table in zip(SIDES, (images, texts), strict=True)}
        self._names, self._sha256, self._texts = images["name"], images["sha256"], texts["text"]
        self._images_of = texts["images"]
        self._captions = _by_image(self.ids["text"], texts["images"])
        for side in SIDES:
            _check(folder, self.index[side], self.ids[side], dim=dim, side=side)

    def __contains__(self, image: int) -> bool:
        return _row(self.ids["image"], image) is not None

    def name(self, image: int) -> str:
        """What to call a picture: its path within the corpus, or its id there."""
        return str(self._names[self._row("image", image)].as_py())

    def sha256(self, image: int) -> str:
        """Of the picture's file, hex."""
        return str(self._sha256[self._row("image", image)].as_py())

    def text(self, text: int) -> str:
        """A caption."""
        return str(self._texts[self._row("text", text)].as_py())

    def texts(self, rows: Ids) -> list[str]:
        """Captions, in order."""
        return [self.text(int(row)) for row in rows]

    def images_of(self, text: int) -> list[int]:
        """Ids of a caption's labelled pictures."""
        return [int(one) for one in self._images_of[self._row("text", text)].as_py() or [] if one in self]

    def captions_of(self, image: int, most: int = 5) -> list[str]:
        """Labelled captions of a picture, at most so many."""
        images, texts = self._captions
        start, stop = np.searchsorted(images, [image, image + 1])
        return self.texts(texts[start:stop][:most])

    def _row(self, side: Side, item: int) -> int:
        row = _row(self.ids[side], item)
        if row is None:
            raise KeyError(f"no {side} {item}")
        return row


def has_index(folder: str | Path) -> bool:
    """Whether a folder was exported with an index."""
    return all(index_folder(folder, side).is_dir() for side in SIDES)


def _table(path: Path, columns: list[str]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, and the index beside it names only numbers: export again")
    try:
        return parquet.read_table(path, columns=columns).sort_by("id").combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise CatalogError(f"{path} cannot be read ({error}): export again") from error


def _ids(table: Any) -> Ids:
    return np.asarray(table["id"].to_numpy(), np.int64)


def _row(ids: Ids, item: int) -> int | None:
    row = int(np.searchsorted(ids, item))
    return row if row < len(ids) and ids[row] == item else None


def _by_image(text_ids: Ids, images: Any) -> tuple[Ids, Ids]:
    """(P,) image ids, ascending, and the text of each."""
    from pyarrow import compute

    flat = np.asarray(compute.list_flatten(images).to_numpy(zero_copy_only=False), np.int64)
    parents = np.asarray(compute.list_parent_indices(images).to_numpy(zero_copy_only=False), np.int64)
    order = np.argsort(flat, kind="stable")
    return flat[order], text_ids[parents[order]]


def _check(folder: str | Path, index: VectorIndex, ids: Ids, *, dim: int, side: Side) -> None:
    where = index_folder(folder, side)
    if index.dim != dim:
        raise CatalogError(f"{where} holds vectors of {index.dim} numbers, the student's have {dim}: export again")
    unnamed = np.setdiff1d(index.ids, ids)
    if len(unnamed):
        raise CatalogError(
            f"{where} holds {len(unnamed)} items that {embeddings_file(folder, side)} does not name, such as "
            f"{int(unnamed[0])}: export again"
        )
