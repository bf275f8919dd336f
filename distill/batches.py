"""What one training step is made of: distinct items, their inputs, who matches whom, and what the teacher said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.augment import AugmentedSource
from distill.data.matches import ragged_ranges
from distill.protocols import DIRECTIONS, Direction, Ids, Inputs, Side
from distill.sampler import CandidateSampler, PairSampler, share_of

if TYPE_CHECKING:
    from torch import Tensor

    from distill.data.corpus import Matches
    from distill.false_negatives import Revision

Source = Callable[[Ids], Inputs]
Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Asked:
    """Pairs in the order of their query ids, then of their item ids."""

    queries: Ids  # (P,)
    items: Ids  # (P,)
    scores: Scores  # (P,)


@dataclass(frozen=True)
class PairScores:
    """The teacher's scores of one round's pairs and of no others, so that a step never depends on older runs."""

    keys: Ids  # (P,) image id * n_texts + text id, sorted
    scores: Scores  # (P,)
    n_texts: int
    by_query: Mapping[Direction, Asked]  # the same pairs, sorted by query; read at every step

    @classmethod
    def of(cls, image_ids: Ids, text_ids: Ids, scores: Scores, n_texts: int) -> PairScores:
        """From pairs in any order; a pair given twice counts once."""
        keys, first = np.unique(image_ids * n_texts + text_ids, return_index=True)
        scores = scores[first].astype(np.float32)
        images, texts = np.divmod(keys, n_texts)
        by_text = np.argsort(texts, kind="stable")
        by_query: dict[Direction, Asked] = {
            "i2t": Asked(images, texts, scores),
            "t2i": Asked(texts[by_text], images[by_text], scores[by_text]),
        }
        return cls(keys, scores, n_texts, by_query)

    def lookup(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores in the shape both ids broadcast to; NaN where the teacher was not asked or an id is -1."""
        wanted = np.where((image_ids < 0) | (text_ids < 0), -1, image_ids * self.n_texts + text_ids)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.scores[at], np.float32(np.nan))

    def of_queries(self, direction: Direction, query_ids: Ids) -> tuple[Ids, Ids, Scores]:
        """What was asked about each query (Q,): offsets (Q + 1,), then flat item ids and scores."""
        asked = self.by_query[direction]
        starts = np.searchsorted(asked.queries, query_ids)
        offsets, chosen = ragged_ranges(starts, np.searchsorted(asked.queries, query_ids, side="right"))
        return offsets, asked.items[chosen], asked.scores[chosen]


@dataclass(frozen=True)
class Grid:
    """One direction of a step: its queries against every item of the step. Q queries, C items."""

    rows: Tensor  # (Q,) rows of the queries among the step's items of their side
    teacher: Tensor  # (Q, C) NaN = not asked
    positive: Tensor  # (Q, C) bool
    in_batch: Tensor  # (Q, C) bool: the item is one of the batch's own
    valid: Tensor | None = None  # (Q, C) bool, False = left out as a suspected false negative; None = nothing is


@dataclass(frozen=True)
class Remembered:
    """Vectors that stand in for items of a step, as the student that mined saw them."""

    rows: Tensor  # (R,) rows of the items among the step's of their side
    vectors: Tensor  # (R, D) unit


@dataclass(frozen=True)
class StepBatch:
    """Everything a step needs, on the CPU: all of it but for the inputs, which are those of one process's share."""

    step: int
    image_ids: Ids  # (N,) distinct
    text_ids: Ids  # (M,) distinct
    images: Inputs  # of the share of the encoded images
    texts: Inputs  # of the share of the encoded texts
    grids: dict[Direction, Grid]
    pairs: tuple[Tensor, Tensor]  # of the batch's labelled pairs: rows (P,) among the encoded images, the encoded texts
    maps: tuple[Tensor, Tensor] | None = None  # teacher's log-probabilities (P, L, G), real tokens (P, L)
    vectors: tuple[tuple[Tensor, Tensor], ...] = ()  # of each dual-encoder among the teacher: (N, D), (M, D), unit
    remembered: Mapping[Side, Remembered] = field(default_factory=dict)  # of sides whose mined items are not encoded

    def ids(self, side: Side) -> Ids:
        """Of all items of a side."""
        return self.image_ids if side == "image" else self.text_ids

    def encoded_rows(self, side: Side) -> Ids:
        """Rows, among the side's items, of those that are encoded: all but the remembered ones."""
        rows, kept = np.arange(len(self.ids(side))), self.remembered.get(side)
        return rows if kept is None else np.delete(rows, kept.rows.numpy())

    def encoded(self, side: Side) -> Ids:
        """Ids of the items that are encoded."""
        return self.ids(side)[self.encoded_rows(side)]


@dataclass(frozen=True)
class Batches:
    """Makes the batch of any step: a map-style data set over steps, picklable for loader workers."""

    sampler: PairSampler
    images: Source
    texts: Source
    matches: Matches
    scores: PairScores | None = None
    candidates: tuple[CandidateSampler, ...] = ()
    maps: Callable[[Ids, Ids], tuple[Tensor, Tensor]] | None = None  # image ids (P,), text ids (P,) -> maps, tokens
    towers: tuple[Callable[[Ids, Ids], tuple[Tensor, Tensor]], ...] = ()  # image ids (N,), text ids (M,) -> vectors
    revision: Revision | None = None  # what becomes of suspected false negatives
    share: tuple[int, int] = (0, 1)  # whose inputs are made: process i of n
    memory: Mapping[Side, Callable[[Ids], Tensor]] = field(default_factory=dict)  # vectors (N, D) of mined items

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
        sides: tuple[tuple[Side, Ids, Ids], ...] = (("image", image_ids, own["i2t"]), ("text", text_ids, own["t2i"]))
        remembered = {side: self._remembered(side, ids, mine) for side, ids, mine in sides if side in self.memory}
        encoded = (own["i2t"], own["t2i"]) if remembered else (image_ids, text_ids)
        grids = {direction: self._grid(direction, own, image_ids, text_ids, step=step) for direction in DIRECTIONS}
        return StepBatch(
            step,
            image_ids,
            text_ids,
            self._images(step, encoded[0][share_of(len(encoded[0]), *self.share)]),
            self.texts(encoded[1][share_of(len(encoded[1]), *self.share)]),
            grids,
            (
                torch.from_numpy(np.searchsorted(encoded[0], pairs[:, 0])),
                torch.from_numpy(np.searchsorted(encoded[1], pairs[:, 1])),
            ),
            None if self.maps is None else self.maps(pairs[:, 0], pairs[:, 1]),
            tuple(tower(image_ids, text_ids) for tower in self.towers),
            remembered,
        )

    def _images(self, step: int, rows: Ids) -> Inputs:
        if isinstance(self.images, AugmentedSource):
            return self.images.at(step // self.sampler.steps_per_epoch, rows)
        return self.images(rows)

    def _remembered(self, side: Side, ids: Ids, own: Ids) -> Remembered:
        """Of the mined items among a step's; what is the batch's own is encoded, mined or not."""
        import torch

        rows = np.flatnonzero(~np.isin(ids, own))
        return Remembered(torch.from_numpy(rows), self.memory[side](ids[rows]))

    def _grid(
        self, direction: Direction, own: dict[Direction, Ids], image_ids: Ids, text_ids: Ids, *, step: int
    ) -> Grid:
        """Filled from what is known of each query: looking every cell up would cost more than the step's arithmetic."""
        import torch

        queries = own[direction]
        on_query_side, items = (image_ids, text_ids) if direction == "i2t" else (text_ids, image_ids)
        own_items = own["t2i" if direction == "i2t" else "i2t"]
        teacher = np.full((len(queries), len(items)), np.nan, np.float32)
        positive = np.zeros(teacher.shape, np.bool_)
        offsets, matching = self.matches.of(direction, queries)
        cells, _ = _cells(offsets, matching, items)
        positive[cells] = True
        if self.scores is not None:
            offsets, asked, scores = self.scores.of_queries(direction, queries)
            cells, kept = _cells(offsets, asked, items)
            teacher[cells] = scores[kept]
        in_batch = np.tile(np.isin(items, own_items), (len(queries), 1))
        rows = np.searchsorted(on_query_side, queries)
        arrays = [rows, teacher, positive, in_batch]
        if self.revision is not None:
            offsets, revised, promoted = self.revision.of_queries(direction, queries, step)
            (at_rows, at_columns), kept = _cells(offsets, revised, items)
            valid = np.ones(teacher.shape, np.bool_)
            positive[at_rows, at_columns] |= promoted[kept]
            valid[at_rows, at_columns] = promoted[kept]
            arrays.append(valid)
        return Grid(*(torch.from_numpy(array) for array in arrays))


def _cells(offsets: Ids, found: Ids, items: Ids) -> tuple[tuple[Ids, Ids], Mask]:
    """(rows, columns) of the found ids among the items (C,), ascending, and which of the found are there."""
    columns = np.minimum(np.searchsorted(items, found), len(items) - 1)
    there = items[columns] == found
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return (rows[there], columns[there]), there
