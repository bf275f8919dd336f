"""Which image and which text are true of each other, for every pair of a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.protocols import Direction, Ids


class Matches:
    """The true (image, text) pairs: sorted keys for look-up, compressed rows both ways for listing.

    Args:
        image_ids: (P,) image row of each pair, in any order; repeated pairs count once.
        text_ids: (P,) text row of each pair.
        n_images: Images of the corpus.
        n_texts: Texts of the corpus.

    Raises:
        ValueError: The two arrays differ in length, or a row is outside the corpus.
    """

    def __init__(self, image_ids: Ids, text_ids: Ids, *, n_images: int, n_texts: int) -> None:
        images, texts = np.asarray(image_ids, np.int64), np.asarray(text_ids, np.int64)
        if images.ndim != 1 or images.shape != texts.shape:
            raise ValueError(f"image_ids and text_ids must both be (P,), got {images.shape} and {texts.shape}")
        _check_rows("image", images, n_images)
        _check_rows("text", texts, n_texts)
        self.n_images, self.n_texts = n_images, n_texts
        self.keys: Ids = np.unique(images * n_texts + texts)  # (P,) image * n_texts + text, ascending
        rows, columns = np.divmod(self.keys, max(n_texts, 1))
        self._texts, self._text_starts = columns, _starts(rows, n_images)
        order = np.argsort(columns, kind="stable")
        self._images, self._image_starts = rows[order], _starts(columns, n_texts)

    def __len__(self) -> int:
        return len(self.keys)

    def pairs(self) -> Ids:
        """(P, 2) every true (image, text) pair, by image, then text."""
        return np.stack(np.divmod(self.keys, max(self.n_texts, 1)), axis=1)

    def is_match(self, image_ids: Ids, text_ids: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each pair is true; the two arrays broadcast, and an id below 0 matches nothing.

        Raises:
            ValueError: An id is beyond the last row of the corpus.
        """
        images, texts = np.broadcast_arrays(np.asarray(image_ids, np.int64), np.asarray(text_ids, np.int64))
        for what, ids, count in (("image", images, self.n_images), ("text", texts, self.n_texts)):
            if ids.size and int(ids.max()) >= count:
                raise ValueError(f"{what} id {int(ids.max())} is outside the corpus, which has {count} {what}s")
        if not len(self.keys):
            return np.zeros(images.shape, np.bool_)
        wanted = images * self.n_texts + texts
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.asarray((self.keys[place] == wanted) & (images >= 0) & (texts >= 0))

    def texts_of(self, image_id: int) -> Ids:
        """Rows of the texts that are true of one image, ascending."""
        _check_rows("image", np.asarray([image_id]), self.n_images)
        return self._texts[self._text_starts[image_id] : self._text_starts[image_id + 1]]

    def images_of(self, text_id: int) -> Ids:
        """Rows of the images that one text is true of, ascending."""
        _check_rows("text", np.asarray([text_id]), self.n_texts)
        return self._images[self._image_starts[text_id] : self._image_starts[text_id + 1]]

    def of(self, direction: Direction, query_ids: Ids) -> tuple[Ids, Ids]:
        """Items that match each query: ``items[offsets[b]:offsets[b + 1]]`` belongs to ``query_ids[b]``.

        Returns:
            offsets (B+1,) and the matching item ids, flat, ascending within a query.

        Raises:
            ValueError: A query id is outside the corpus.
        """
        by_image = direction == "i2t"
        starts, items = (self._text_starts, self._texts) if by_image else (self._image_starts, self._images)
        queries = np.asarray(query_ids, np.int64)
        _check_rows("image" if by_image else "text", queries, len(starts) - 1)
        offsets, places = ragged_ranges(starts[queries], starts[queries + 1])
        return offsets, items[places]


def ragged_ranges(starts: Ids, stops: Ids) -> tuple[Ids, Ids]:
    """The ranges [starts[b], stops[b]) one after the other: offsets (B+1,) and the numbers, flat."""
    counts = stops - starts
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], counts)


def copies_too(pairs: Ids, image_contents: Sequence[str], text_contents: Sequence[str]) -> Ids:
    """All pairs that hold once exact copies count as one another: (P, 2) -> (Q, 2), Q >= P.

    A caption that two images carry word for word is true of both, whichever row it was written for; likewise for one
    picture that is there twice.

    Args:
        pairs: (P, 2) known true pairs.
        image_contents: Content fingerprint of every image.
        text_contents: Content fingerprint of every text.
    """
    images, texts = _Groups(image_contents), _Groups(text_contents)
    if not images.copies and not texts.copies:
        return pairs
    together = np.unique(np.stack([images.group[pairs[:, 0]], texts.group[pairs[:, 1]]], axis=1), axis=0)
    # every image of the one group with every text of the other: first the images, then the texts of each
    offsets, places = ragged_ranges(images.starts[together[:, 0]], images.starts[together[:, 0] + 1])
    image_rows = images.members[places]
    text_groups = np.repeat(together[:, 1], np.diff(offsets))
    offsets, places = ragged_ranges(texts.starts[text_groups], texts.starts[text_groups + 1])
    return np.stack([np.repeat(image_rows, np.diff(offsets)), texts.members[places]], axis=1)


class _Groups:
    """Items of equal content: group of each item, and the members of each group as compressed rows."""

    def __init__(self, contents: Sequence[str]) -> None:
        _, group = np.unique(np.asarray(contents, dtype=np.str_), return_inverse=True)
        self.group = group.astype(np.int64)
        n_groups = int(self.group.max()) + 1 if len(self.group) else 0
        self.members = np.argsort(self.group, kind="stable").astype(np.int64)
        self.starts = _starts(self.group, n_groups)
        self.copies = n_groups < len(self.group)


def _starts(rows: Ids, count: int) -> Ids:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)


def _check_rows(what: str, rows: Ids, count: int) -> None:
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= count):
        raise ValueError(
            f"{what} ids must lie in 0..{count - 1}, got {int(rows.min())}..{int(rows.max())}; "
            "take -1 (no item) out before asking"
        )
