"""What is to be scored, cut into work units: the same pairs make the same units, whoever computes them.

One process, several ranks and every driver take their units from here. So they write the same files, and as a score's
last digits depend on what it is computed beside, they give the same scores too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.protocols import fingerprint
from distill.unit import unit_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from distill.protocols import Ids
    from distill.store import ScoreStore
    from distill.unit import Origin


@dataclass(frozen=True)
class Work:
    """Pairs that a store lacks, in units. Arrays may be memory-mapped."""

    images: Ids  # (P,) of the distinct pairs to ask, by image, then text
    texts: Ids  # (P,)
    units: Sequence[slice]  # of these pairs, in order, covering all of them
    every_text: Ids  # distinct texts of all pairs that were wanted, ascending: how texts are batched follows from them
    served: int  # distinct pairs that the store had
    wanted: str  # fingerprint of all pairs that were wanted and of how they were cut


def work_of(store: ScoreStore, image_ids: ArrayLike, text_ids: ArrayLike, pairs_per_unit: int) -> Work:
    """The units of the pairs (image_ids[p], text_ids[p]) that the store lacks; pairs with an id of -1 are passed over.

    Raises:
        ValueError: unequal lengths, or an id outside the corpus.
    """
    store.refresh()
    images, texts = _distinct(store.origin, image_ids, text_ids)
    missing = store.missing(images, texts)
    # Cut before leaving out what is there: a score's last digits depend on what it is computed beside, and so a run
    # that was killed computes its unfinished units as it would have.
    units = _missing_units(unit_cuts(images, pairs_per_unit), missing)
    wanted = fingerprint("work", images, texts, pairs_per_unit)
    return Work(images[missing], texts[missing], units, np.unique(texts), int((~missing).sum()), wanted)


def unit_names(work: Work, origin: Origin) -> list[str]:
    """Name of each unit's file in the store of this origin."""
    keys = work.images * origin.n_texts + work.texts
    return [unit_id(origin, keys[unit]) for unit in work.units]


def _distinct(origin: Origin, image_ids: ArrayLike, text_ids: ArrayLike) -> tuple[Ids, Ids]:
    """Distinct pairs, by image, then text."""
    images, texts = (np.asarray(ids, np.int64).reshape(-1) for ids in (image_ids, text_ids))
    if len(images) != len(texts):
        raise ValueError(f"a pair is one image and one text; got {len(images)} images and {len(texts)} texts")
    n_images, n_texts = origin.n_images, origin.n_texts
    for name, ids, end in (("image", images, n_images), ("text", texts, n_texts)):
        if len(ids) and ids.max() >= end:
            raise ValueError(f"{name} id {ids.max()} is outside the corpus, which has {end} {name}s")
    there = (images >= 0) & (texts >= 0)
    first, second = np.divmod(np.unique(images[there] * n_texts + texts[there]), n_texts)
    return first, second


def unit_cuts(images: Ids, pairs_per_unit: int) -> list[tuple[int, int]]:
    """Even slices of pairs sorted by image, moved to where an image ends if that is near."""
    n_units = -(-len(images) // pairs_per_unit)
    ideal = np.linspace(0, len(images), n_units + 1).round().astype(np.int64)
    borders = np.concatenate([[0], np.flatnonzero(np.diff(images)) + 1, [len(images)]])
    after = np.minimum(np.searchsorted(borders, ideal), len(borders) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(borders[after] - ideal <= ideal - borders[before], borders[after], borders[before])
    cuts = np.unique(np.where(np.abs(nearest - ideal) <= pairs_per_unit // 4, nearest, ideal)).tolist()
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _missing_units(cuts: list[tuple[int, int]], missing: np.ndarray[Any, np.dtype[np.bool_]]) -> list[slice]:
    """The units as slices of the missing pairs alone; those with none are left out."""
    before = np.concatenate([[0], np.cumsum(missing)])
    units = [slice(int(before[start]), int(before[stop])) for start, stop in cuts]
    return [unit for unit in units if unit.start < unit.stop]
