"""Unit vectors of the training items by the teacher's own contrastive towers, for losses that read them.

A cross-encoder with a contrastive head has one such pair of towers; an ensemble has one for each member with a head.
The vectors are computed once, kept on disk in float32 and memory-mapped: no model is in memory while they are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.protocols import SIDES, fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from distill.data.corpus import Corpus
    from distill.features import Features
    from distill.protocols import Ids, Side
    from distill.scorer import Scorer, TowerSource

log = logging.getLogger(__name__)
_FIELD = "vectors"


@dataclass(frozen=True)
class TowerVectors:
    """What one dual-encoder among the teacher says of the training items. Pickles as two paths."""

    member: int  # place in teacher.members; 0 where the teacher is one model
    identity: str  # the model's
    images: Features
    texts: Features

    def __call__(self, image_ids: Ids, text_ids: Ids) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, D) of the images and (M, D) of the texts, float32."""
        return self.images.get(image_ids)[_FIELD], self.texts.get(text_ids)[_FIELD]


def write_towers(folder: Path, scorer: Scorer, rows: Mapping[Side, Ids], corpus: Corpus) -> tuple[TowerVectors, ...]:
    """The vectors of these rows by every dual-encoder of the scorer; what is on disk is opened, the rest computed.

    Members of an ensemble without a contrastive head are left out.

    Args:
        folder: of the caches that runs share.
        scorer: one teacher or an ensemble; its members are loaded one at a time, and only where vectors are missing.
        rows: ascending ids of each side.
        corpus: where the rows belong.

    Raises:
        NoContrastiveHeadError: there is no head at all.
    """
    from distill.embed import NoContrastiveHeadError

    found = [_written(folder, source, rows, corpus) for source in scorer.towers()]
    there = tuple(vectors for vectors in found if vectors is not None)
    if not there:
        raise NoContrastiveHeadError(f"none of the {len(found)} teachers has a contrastive head, so none has vectors")
    return there


def _written(folder: Path, source: TowerSource, rows: Mapping[Side, Ids], corpus: Corpus) -> TowerVectors | None:
    from distill.features import covering

    marks = {side: fingerprint("vectors", source.identity, corpus.fingerprint, side) for side in SIDES}
    homes = {side: folder / f"{side}s-{mark}" for side, mark in marks.items()}
    kept = {side: covering(homes[side], marks[side], rows[side]) for side in SIDES}
    if any(features is None for features in kept.values()):
        scorer = source.open()
        if width_of(scorer.teacher, corpus, rows) is None:
            log.info("teacher %d has no contrastive head: losses on vectors go without it", source.member)
            return None
        kept = {side: scorer.write_vectors(homes[side], marks[side], side, rows[side]) for side in SIDES}
    images, texts = kept["image"], kept["text"]
    assert images is not None
    assert texts is not None
    return TowerVectors(source.member, source.identity, images, texts)


def width_of(teacher: Any, corpus: Corpus, rows: Mapping[Side, Ids]) -> int | None:
    """Width of the teacher's vectors, by those of one item a side; None where it has no contrastive head.

    Nothing is kept and no frozen tower is run over the corpus: this is quick enough to be asked before any work.

    Raises:
        ValueError: images and texts have vectors of different widths.
    """
    from distill.embed import NoContrastiveHeadError, embed_with_teacher, live_source

    try:
        widths: dict[Side, int] = {
            side: embed_with_teacher(teacher, live_source(corpus, side, teacher), rows[side][:1], side).shape[1]
            for side in SIDES
        }
    except NoContrastiveHeadError:
        return None
    if len(set(widths.values())) > 1:
        raise ValueError(f"{type(teacher).__name__} gives images and texts vectors of different widths: {widths}")
    return widths["image"]
