"""The items of requests: who is who, and how a teacher's inputs are made of them.

A picture or text is known by the SHA-256 of its content, whether it came as a row of the mounted corpus or as it is.
What is in the corpus counts as its row, however it came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distill.data.pictures import UnreadableImageError, count_pixels, decode_image
from distill.wire import Limits, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distill.data.corpus import Corpus
    from distill.protocols import Ids, Image, Inputs, Side, Teacher


@dataclass(frozen=True, slots=True)
class Item:
    """A picture or a text."""

    key: str  # SHA-256 of the content, hex
    row: int  # of the corpus; -1 where it is not in it
    content: bytes | str | None = None  # None: the corpus has it


class RequestedItems(Protocol):
    """The two ways a request can name one side's items."""

    @property
    def ids(self) -> Ids | None: ...

    @property
    def contents(self) -> Sequence[bytes] | Sequence[str] | None: ...


class Items:
    """One side's items for one teacher. Threads may share one."""

    def __init__(
        self,
        side: Side,
        teacher: Teacher,
        *,
        corpus: Corpus | None = None,
        source: Callable[[Ids], Inputs] | None = None,
        max_pixels: int,
        max_pixels_together: int = Limits.pixels,
    ) -> None:
        """A side.

        Args:
            side: "image" or "text".
            teacher: whose inputs are made.
            corpus: that rows belong to.
            source: inputs of rows of the corpus.
            max_pixels: of a picture that is sent.
            max_pixels_together: of all pictures that are sent in a request.
        """
        self.side, self._teacher, self._source = side, teacher, source
        self._max_pixels, self._together = max_pixels, max_pixels_together
        self._corpus = corpus
        self._fingerprints: Sequence[str] = ()
        if corpus is not None:
            self._fingerprints = corpus.image_fingerprints if side == "image" else corpus.text_fingerprints

    def of_rows(self, rows: Ids) -> list[Item]:
        """Items of the corpus.

        Raises:
            RefusedError: a row is outside it.
        """
        count = len(self._fingerprints)
        if len(rows) and int(rows.max()) >= count:
            raise RefusedError(422, f"{self.side} id {int(rows.max())} is outside the corpus, which has {count}")
        return [Item(self._fingerprints[row], row) for row in rows.tolist()]

    def of_contents(self, contents: Iterable[bytes | str]) -> list[Item]:
        """Items as they are; those of the corpus are its rows.

        Raises:
            RefusedError: a picture is none, or is too large, or all of them are too large together.
        """
        found = []
        for content in contents:
            key = hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
            row = self._row_of.get(key, -1)
            found.append(Item(key, row, content if row < 0 else None))
        self._check_pixels({item.key: item.content for item in found if isinstance(item.content, bytes)}.values())
        return found

    def _check_pixels(self, contents: Iterable[bytes]) -> None:
        """From headers, before anything waits: a thousand files that are each within the limit can fit into a body."""
        total = 0
        for content in contents:
            try:
                total += count_pixels(content, max_pixels=self._max_pixels)
            except UnreadableImageError as error:
                raise _unusable(error) from None
            if total > self._together:
                raise RefusedError(
                    413, f"pictures of more than {self._together:,} pixels together: send fewer at a time"
                )

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """Copies count as the first of them."""
        found: dict[str, int] = {}
        for row, key in enumerate(self._fingerprints):
            found.setdefault(key, row)
        return found

    def inputs_of_rows(self, items: Sequence[Item]) -> Inputs:
        """Of items of the corpus.

        Raises:
            DataError: a picture of the corpus is not what it was.
        """
        assert self._source is not None
        return self._source(np.array([item.row for item in items], np.int64))

    def inputs_of_contents(self, items: Sequence[Item]) -> Inputs:
        """Of items that were sent.

        Raises:
            RefusedError: a picture cannot be read, or is too large.
        """
        contents: list[Any] = [item.content for item in items]
        if self.side == "image":
            return self._teacher.prepare_images([self._decoded(one) for one in contents])
        return self._teacher.prepare_texts(contents)

    def _decoded(self, content: bytes) -> Image:
        try:
            return decode_image(content, max_pixels=self._max_pixels)
        except UnreadableImageError as error:
            raise _unusable(error) from None


def _unusable(error: UnreadableImageError) -> RefusedError:
    return RefusedError(422, f"a picture cannot be used: {error}")
