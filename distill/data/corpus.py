"""A corpus: images, texts, who matches whom, splits, and fingerprints of all of it.

Rows are what the rest of the program calls ids: int64, 0..n-1, images and texts counted apart. Images stay encoded
until ``Corpus.load_images``; a corpus can be pickled to worker processes without its pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.data.matches import Matches as Matches
from distill.data.matches import copies_too
from distill.data.pictures import DataError as DataError
from distill.protocols import fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distill.data.pictures import Pictures
    from distill.protocols import Ids, Image, Side

SPLITS = ("train", "val", "test")
"""The split names there are, in this order."""


@dataclass(frozen=True)
class BadItem:
    """Something in the source that could not be used.

    Attributes:
        where: File and row or entry.
        reason: What was found there.
        what: Whether an image (with its captions) or one caption is concerned.
    """

    where: str
    reason: str
    what: Literal["image", "caption"] = "image"

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Split:
    """Rows of one split, ascending."""

    name: str
    images: Ids
    texts: Ids

    @property
    def ids(self) -> dict[Side, Ids]:
        """The rows by side."""
        return {"image": self.images, "text": self.texts}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Images and texts with every true pair; made by ``build_corpus``, which checks what is promised here.

    Attributes:
        name: For messages; no part of the fingerprint.
        fingerprint: Changes with any image, text, match, pair or split.
        pictures: The encoded images.
        texts: The captions.
        text_fingerprints: SHA-256 of each caption, hex.
        matches: Every true pair, labelled or known otherwise.
        pairs: (P, 2) labelled (image, text) pairs as given, a subset of the matches: what an epoch runs over.
        splits: The splits that have images. A text is in each split that one of its labelled images is in.
        skipped: What the source had and could not be used.
        truth: Every pair that holds, where that is known exactly, as of made pictures; a superset of the matches. What
            it has beyond them are false negatives. No part of the fingerprint: nothing but a report may read it.
    """

    name: str
    fingerprint: str
    pictures: Pictures
    texts: Sequence[str]
    text_fingerprints: Sequence[str]
    matches: Matches
    pairs: Ids
    splits: Mapping[str, Split]
    skipped: tuple[BadItem, ...] = ()
    truth: Matches | None = None

    @property
    def n_images(self) -> int:
        """Number of images."""
        return len(self.pictures)

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self.texts)

    @property
    def image_names(self) -> Sequence[str]:
        """What to call each image in messages."""
        return self.pictures.names

    @property
    def image_fingerprints(self) -> Sequence[str]:
        """SHA-256 of each image file's bytes, hex."""
        return self.pictures.fingerprints

    def load_images(self, rows: Ids) -> list[Image]:
        """RGB images of these rows, decoded now; safe in forked and spawned workers."""
        return self.pictures.load(rows)

    def split(self, name: str) -> Split:
        """The rows of one split.

        Raises:
            DataError: There is no such split.
        """
        if name not in self.splits:
            raise DataError(f"corpus {self.name!r} has no split {name!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def split_pairs(self, name: str) -> Ids:
        """(P, 2) labelled pairs whose image is in the split, in corpus order."""
        inside = np.zeros(self.n_images, np.bool_)
        inside[self.split(name).images] = True
        return self.pairs[inside[self.pairs[:, 0]]]


def build_corpus(
    name: str,
    pictures: Pictures,
    *,
    texts: Sequence[str],
    pairs: Ids,
    image_splits: Sequence[str],
    extra_matches: Ids | None = None,
    copies_match: bool = True,
) -> Corpus:
    """The one way to a ``Corpus``: checks, fills in matches, splits and fingerprints.

    Args:
        name: For messages.
        pictures: The images.
        texts: The captions.
        pairs: (P, 2) labelled (image, text) rows.
        image_splits: Split of each image.
        extra_matches: (Q, 2) further true pairs.
        copies_match: Exact copies of a caption (or an image) match whatever the other copies match.

    Raises:
        DataError: An empty or non-text caption, a pair outside the corpus or given twice, an item without a pair, an
            unknown split.
    """
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    _check_items(name, pictures, texts, image_splits)
    _check_pairs(name, pairs, pictures, texts)
    text_fingerprints = tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)
    true = pairs if extra_matches is None else np.concatenate([pairs, np.asarray(extra_matches, np.int64)])
    if copies_match:
        true = copies_too(true, pictures.fingerprints, text_fingerprints)
    matches = Matches(true[:, 0], true[:, 1], n_images=len(pictures), n_texts=len(texts))
    splits = _splits(image_splits, pairs)
    identity = fingerprint(
        list(pictures.fingerprints),
        list(text_fingerprints),
        matches.keys,
        pairs,
        *(part for split in splits.values() for part in (split.name, split.images, split.texts)),
    )
    return Corpus(name, identity, pictures, tuple(texts), text_fingerprints, matches, pairs, splits)


def _splits(image_splits: Sequence[str], pairs: Ids) -> dict[str, Split]:
    of_image = np.asarray(image_splits, dtype=np.str_)
    splits = {}
    for name in SPLITS:
        images = np.flatnonzero(of_image == name)
        if len(images):
            splits[name] = Split(name, images, np.unique(pairs[of_image[pairs[:, 0]] == name, 1]))
    return splits


def _check_items(name: str, pictures: Pictures, texts: Sequence[str], image_splits: Sequence[str]) -> None:
    if not len(pictures) or not len(texts):
        raise DataError(f"corpus {name!r} is empty: {len(pictures)} images, {len(texts)} captions")
    if len(image_splits) != len(pictures):
        raise DataError(f"corpus {name!r}: {len(image_splits)} split names for {len(pictures)} images")
    for row, split in enumerate(image_splits):
        if split not in SPLITS:
            raise DataError(
                f"corpus {name!r}: image {pictures.names[row]!r} is in unknown split {split!r}; "
                f"known: {', '.join(SPLITS)}"
            )
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"corpus {name!r}: caption {row} is empty or no text: {text!r}")


def _check_pairs(name: str, pairs: Ids, pictures: Pictures, texts: Sequence[str]) -> None:
    for column, what, count in ((0, "image", len(pictures)), (1, "caption", len(texts))):
        rows = pairs[:, column]
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            raise DataError(
                f"corpus {name!r}: a pair names {what} {rows.min()}..{rows.max()}, there are 0..{count - 1}"
            )
        alone = np.flatnonzero(np.bincount(rows, minlength=count) == 0)
        if len(alone):
            shown = ", ".join(repr((pictures.names if column == 0 else texts)[row]) for row in alone[:3])
            lacks = "no caption" if column == 0 else "no image"
            raise DataError(f"corpus {name!r}: {len(alone)} {what}(s) with {lacks}, such as {shown}; leave them out")
    if len(np.unique(pairs, axis=0)) != len(pairs):
        raise DataError(f"corpus {name!r}: {len(pairs) - len(np.unique(pairs, axis=0))} pair(s) are given twice")
