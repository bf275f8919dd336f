"""Tables of images and captions: which column holds what, and how one row of any table is understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from distill.data.corpus import BadItem, DataError
from distill.data.reading import Caption, Row


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; only ``image`` and ``caption`` must be there.

    Attributes:
        image: The image, or its path.
        caption: A caption, or a list of captions.
        split: Split name.
        image_id: Rows with one id are one image; without it, rows with one path are.
        caption_id: Rows with one id share one caption (several images to a caption); a list where ``caption`` is one.
    """

    image: str = "image"
    caption: str = "caption"
    split: str = "split"
    image_id: str = "image_id"
    caption_id: str = "caption_id"

    def check(self, source: str, found: list[str]) -> None:
        """Sees that the needed columns are there.

        Raises:
            DataError: One is not; the message lists those that are.
        """
        missing = [name for name in (self.image, self.caption) if name not in found]
        if missing:
            raise DataError(
                f"{source}: no column {' and '.join(map(repr, missing))}; "
                f"found {', '.join(map(repr, found)) or 'none'}. "
                "Rename them, or name the columns that hold image and caption"
            )

    def names(self) -> list[str]:
        """All names, needed ones first."""
        return [str(getattr(self, entry.name)) for entry in fields(self)]


def row_of(where: str, cells: Mapping[str, object], columns: Columns, *, image: object, split: object) -> Row | BadItem:
    """One row of a table, its image and split already taken out, with its captions.

    Args:
        where: File and row, for messages.
        cells: The row, by column.
        columns: Which column holds what.
        image: What the image source is to locate.
        split: Split of the row.
    """
    texts, ids = cells.get(columns.caption), cells.get(columns.caption_id)
    if ids == "":
        ids = None
    if not isinstance(texts, list):
        texts, ids = [texts], None if ids is None else [ids]
    if ids is not None and (not isinstance(ids, list) or len(ids) != len(texts)):
        return BadItem(where, f"{columns.caption_id!r} must hold one id for each of the {len(texts)} captions")
    captions = [
        Caption(
            where if len(texts) == 1 else f"{where}, caption {number + 1}",
            text,
            None if ids is None or ids[number] is None else str(ids[number]),
        )
        for number, text in enumerate(texts)
    ]
    image_id = cells.get(columns.image_id)
    return Row(where, image, split, captions, None if image_id in (None, "") else str(image_id))
