"""Pairs and scores that are a formula of their ids: as many as are wanted, none of them kept to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.pairtable import Scores
    from distill.protocols import Ids

TEXTS_PER_IMAGE = 32
IMAGES_PER_UNIT = 8192


def shape(pairs: int) -> tuple[int, int]:
    """Images and texts of a corpus in which so many pairs are scored."""
    n_images = -(-pairs // TEXTS_PER_IMAGE)
    return n_images, max(n_images, TEXTS_PER_IMAGE)


def made_texts(images: Ids, columns: Ids, n_texts: int) -> Ids:
    """The text (P,) in each column (P,) of an image's list (P,): spread over the corpus, never the same one twice."""
    stride = n_texts // TEXTS_PER_IMAGE
    texts: Ids = columns * stride + (_mixed(images * TEXTS_PER_IMAGE + columns) % np.uint64(stride)).astype(np.int64)
    return texts


def made_scores(images: Ids, texts: Ids) -> Scores:
    """Score (P,) of each pair, as good as random, between -10 and 10."""
    mixed = _mixed((images << 32) + texts) >> np.uint64(40)
    return (mixed.astype(np.float32) / 2**24 * 20 - 10).astype(np.float32)


def _mixed(numbers: Ids) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Splitmix64's finishing steps, modulo 2**64."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def made_units(pairs: int) -> Iterator[tuple[Ids, Ids, Scores]]:
    """Images, texts and scores (P,) of one unit after another, ``pairs`` in all."""
    per_unit = IMAGES_PER_UNIT * TEXTS_PER_IMAGE
    for start in range(0, pairs, per_unit):
        images, columns = np.divmod(np.arange(start, min(pairs, start + per_unit)), TEXTS_PER_IMAGE)
        texts = made_texts(images, columns, shape(pairs)[1])
        yield images, texts, made_scores(images, texts)


def drawn_pairs(pairs: int, count: int) -> tuple[Ids, Ids]:
    """Pairs of those made, in random order, with replacement."""
    images, columns = np.divmod(np.random.default_rng(1).integers(0, pairs, count), TEXTS_PER_IMAGE)
    return images, made_texts(images, columns, shape(pairs)[1])


def compare(found: Scores, images: Ids, texts: Ids) -> None:
    """Every score must be what the formula says.

    Raises:
        AssertionError: a benchmark of wrong answers is worth nothing.
    """
    wrong = int((found != made_scores(images, texts)).sum())
    if wrong:
        raise AssertionError(f"{wrong} of {len(found)} scores are wrong")
