"""The queries that are timed: a fixed draw of the split's texts and pictures, as they come in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.pictures import decode_image
from distill.protocols import SIDES, Ids, Side

if TYPE_CHECKING:
    from distill.data.corpus import Corpus, Split


@dataclass(frozen=True)
class Queries:
    """Drawn queries of one side.

    Attributes:
        side: What they are.
        ids: (Q,) corpus rows in the order drawn.
        raw: Q texts, or Q encoded pictures (bytes).
        max_pixels: Largest picture that is decoded.
    """

    side: Side
    ids: Ids
    raw: Sequence[Any]
    max_pixels: int

    def places(self, number: int, batch: int) -> list[int]:
        """Which of them are the batch of round ``number``: the next ones, from the first again after the last."""
        return [(number * batch + place) % len(self.ids) for place in range(batch)]

    def items(self, number: int, batch: int) -> list[Any]:
        """Texts, or pictures decoded now."""
        raw = [self.raw[place] for place in self.places(number, batch)]
        return raw if self.side == "text" else [decode_image(data, max_pixels=self.max_pixels) for data in raw]


def drawn_queries(corpus: Corpus, split: Split, *, most: int, seed: int) -> dict[Side, Queries]:
    """At most ``most`` of each side, the same for the same split and seed."""
    found: dict[Side, Queries] = {}
    for side in SIDES:
        rows = split.ids[side]
        ids = np.random.default_rng([seed, len(rows)]).permutation(rows)[:most]
        raw = [corpus.texts[row] for row in ids.tolist()] if side == "text" else _encoded(corpus, ids)
        found[side] = Queries(side, ids, raw, corpus.pictures.max_pixels)
    return found


def _encoded(corpus: Corpus, ids: Ids) -> list[bytes]:
    cells = corpus.pictures.dataset[ids.tolist()]["image"]
    return [cell["bytes"] if isinstance(cell["bytes"], bytes) else Path(cell["path"]).read_bytes() for cell in cells]
