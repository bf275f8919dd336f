"""What one training step is made of: distinct items, their inputs, who matches whom, and what the teacher said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.protocols import DIRECTIONS, Direction, Ids, Inputs
from distill.sampler import BatchSampler, CandidateSampler

if TYPE_CHECKING:
    from torch import Tensor

    from distill.data.corpus import Matches

Source = Callable[[Ids], Inputs]


@dataclass(frozen=True)
class PairScores:
    """The teacher's scores of one round's pairs and of no others, so that a step never depends on older runs."""

    keys: Ids  # (P,) image id * n_texts + text id, sorted
    scores: np.ndarray[Any, np.dtype[np.float32]]  # (P,)
    n_texts: int

    @classmethod
    def of(
        cls, image_ids: Ids, text_ids: Ids, scores: np.ndarray[Any, np.dtype[np.float32]], n_texts: int
    ) -> PairScores:
        """From pairs in any order; a pair given twice counts once."""
        keys, first = np.unique(image_ids * n_texts + text_ids, return_index=True)
        return cls(keys, scores[first].astype(np.float32), n_texts)

    def lookup(self, image_ids: Ids, text_ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores in the shape both ids broadcast to; NaN where the teacher was not asked or an id is -1."""
        wanted = np.where((image_ids < 0) | (text_ids < 0), -1, image_ids * self.n_texts + text_ids)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.scores[at], np.float32(np.nan))

    def grid(self, image_ids: Ids, text_ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores (images, texts); NaN where the teacher was not asked."""
        return self.lookup(image_ids[:, None], text_ids[None, :])


@dataclass(frozen=True)
class Grid:
    """One direction of a step: its queries against every item of the step. Q queries, C items."""

    rows: Tensor  # (Q,) rows of the queries among the step's items of their side
    teacher: Tensor  # (Q, C) NaN = not asked
    positive: Tensor  # (Q, C) bool
    in_batch: Tensor  # (Q, C) bool: the item is one of the batch's own


@dataclass(frozen=True)
class StepBatch:
    """Everything a step needs, on the CPU."""

    step: int
    image_ids: Ids  # (N,) distinct
    text_ids: Ids  # (M,) distinct
    images: Inputs
    texts: Inputs
    grids: dict[Direction, Grid]
    pairs: tuple[Tensor, Tensor]  # image rows (P,), text rows (P,) of the batch's labelled pairs
    maps: tuple[Tensor, Tensor] | None = None  # teacher's log-probabilities (P, L, G), real tokens (P, L)


@dataclass(frozen=True)
class Batches:
    """Makes the batch of any step: a map-style data set over steps, picklable for loader workers."""

    sampler: BatchSampler
    images: Source
    texts: Source
    matches: Matches
    scores: PairScores | None = None
    candidates: tuple[CandidateSampler, ...] = ()
    maps: Callable[[Ids, Ids], tuple[Tensor, Tensor]] | None = None  # image ids (P,), text ids (P,) -> maps, tokens

    def __getitem__(self, step: int) -> StepBatch:
        """The batch of a global step."""
        import torch

        pairs = self.sampler.batch(step)
        own: dict[Direction, Ids] = {
            "i2t": np.unique(pairs[:, 0]),
            "t2i": np.unique(pairs[:, 1]),
        }  # queries of each direction
        mined: dict[Direction, Ids] = {"i2t": own["i2t"][:0], "t2i": own["i2t"][:0]}
        for sampler in self.candidates:
            direction = sampler.candidates.direction
            drawn = sampler.draw(step, own[direction])
            mined[direction] = np.unique(drawn[drawn >= 0])
        image_ids = np.union1d(own["i2t"], mined["t2i"])
        text_ids = np.union1d(own["t2i"], mined["i2t"])
        positive = self.matches.is_match(image_ids[:, None], text_ids[None, :])  # (N, M)
        teacher = (
            np.full(positive.shape, np.nan, dtype=np.float32)
            if self.scores is None
            else self.scores.grid(image_ids, text_ids)
        )
        grids = {direction: _grid(direction, own, image_ids, text_ids, teacher, positive) for direction in DIRECTIONS}
        return StepBatch(
            step,
            image_ids,
            text_ids,
            self.images(image_ids),
            self.texts(text_ids),
            grids,
            (
                torch.from_numpy(np.searchsorted(image_ids, pairs[:, 0])),
                torch.from_numpy(np.searchsorted(text_ids, pairs[:, 1])),
            ),
            None if self.maps is None else self.maps(pairs[:, 0], pairs[:, 1]),
        )


def _grid(
    direction: Direction,
    own: dict[Direction, Ids],
    image_ids: Ids,
    text_ids: Ids,
    teacher: np.ndarray[Any, np.dtype[np.float32]],
    positive: np.ndarray[Any, np.dtype[np.bool_]],
) -> Grid:
    import torch

    if direction == "i2t":
        queries, items, own_items = image_ids, text_ids, own["t2i"]
    else:
        queries, items, own_items = text_ids, image_ids, own["i2t"]
        teacher, positive = teacher.T, positive.T
    rows = np.searchsorted(queries, own[direction])
    in_batch = np.broadcast_to(np.isin(items, own_items), (len(rows), len(items)))
    return Grid(
        torch.from_numpy(rows),
        torch.from_numpy(np.ascontiguousarray(teacher[rows])),
        torch.from_numpy(np.ascontiguousarray(positive[rows])),
        torch.from_numpy(in_batch.copy()),
    )
