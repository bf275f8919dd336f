"""Candidates that the teacher puts above the labelled match: which they are, of what kind, what training makes of them.

A benchmark's caption is labelled with one picture although it is true of others; mined as hard negatives these are
pushed away. The teacher's score points at them, but the teacher errs too: so they are told apart by what else is known.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.data.matches import Matches, copies_too, ragged_ranges
from distill.filters import TeacherMargin
from distill.protocols import Candidates, Direction, Ids
from distill.sampler import hash_uniform

if TYPE_CHECKING:
    from distill.data.hashes import Hashes

    Vectors = np.ndarray[Any, np.dtype[np.float32]]
    Codes = np.ndarray[Any, np.dtype[np.int8]]

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Score: TypeAlias = "Callable[[Ids, Ids], Vectors]"
"""(image ids (P,), text ids (P,)) -> the teacher's raw scores (P,)."""
PairTest: TypeAlias = Callable[[Ids, Ids], Mask]
"""(image ids (P,), text ids (P,)) -> (P,) bool."""
KINDS = ("same_image", "near_duplicate", "disagreement")
TREATMENTS = ("keep", "mask", "down_weight", "promote")
_BLOCK = 1 << 15  # pairs looked into together
_DRAW = 1  # sets these draws apart from those of candidates, which share seed and step


# --- which they are, and of what kind ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Suspects:
    """The suspected false negatives of one direction, in the order of their candidates."""

    direction: Direction
    query_ids: Ids  # (P,)
    item_ids: Ids  # (P,)
    scores: Vectors  # (P,) the teacher's, of the suspects
    labelled: Vectors  # (P,) the teacher's, of each one's query with its best labelled match
    kinds: Codes  # (P,) places in KINDS
    candidates: int  # how many were looked at

    @property
    def image_ids(self) -> Ids:
        """(P,) image rows."""
        return self.query_ids if self.direction == "i2t" else self.item_ids

    @property
    def text_ids(self) -> Ids:
        """(P,) text rows."""
        return self.item_ids if self.direction == "i2t" else self.query_ids

    @property
    def leads(self) -> Vectors:
        """(P,) by how much the teacher puts each above the labelled match."""
        return self.scores - self.labelled

    def counts(self) -> dict[str, int]:
        """Suspects of each kind."""
        found = np.bincount(self.kinds, minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, found, strict=True))


@dataclass(frozen=True, eq=False)
class Judged:
    """Every candidate of a direction that is no labelled match, with both scores of the teacher."""

    query_ids: Ids  # (P,)
    item_ids: Ids  # (P,)
    scores: Vectors  # (P,)
    labelled: Vectors  # (P,) of the query with its best labelled match


def judged(candidates: Candidates, score: Score, matches: Matches) -> Judged:
    """The candidates (B, K) that are no match, flat in row order, with what the teacher says of them.

    Raises:
        ValueError: As ``TeacherMargin.compared``: scores are missing.
    """
    rows, columns = np.nonzero((candidates.item_ids >= 0) & ~candidates.positive)
    queries, items = candidates.query_ids[rows], candidates.item_ids[rows, columns]
    margin = TeacherMargin(0.0, score, matches, candidates.direction)
    return Judged(queries, items, *margin.compared(queries, items))


def suspects(found: Judged, direction: Direction, *, margin: float, same: PairTest, near: PairTest) -> Suspects:
    """Those that the teacher puts above the query's best labelled match by more than ``margin``, and their kinds.

    Args:
        found: All candidates.
        direction: Theirs.
        margin: In units of the raw score; the comparison is that of ``TeacherMargin``.
        same: Whether a pair is a labelled one in other rows, see ``SameContent``.
        near: Whether the image is near one that the text is labelled with, see ``NearLabelled``; asked only of those
            that ``same`` does not say.
    """
    above = np.flatnonzero(found.scores > found.labelled + margin)
    queries, items = found.query_ids[above], found.item_ids[above]
    images, texts = (queries, items) if direction == "i2t" else (items, queries)
    kinds = np.full(len(above), KINDS.index("disagreement"), np.int8)
    as_labelled = same(images, texts)
    kinds[as_labelled] = KINDS.index("same_image")
    rest = np.flatnonzero(~as_labelled)
    kinds[rest[near(images[rest], texts[rest])]] = KINDS.index("near_duplicate")
    return Suspects(direction, queries, items, found.scores[above], found.labelled[above], kinds, len(found.scores))


class SameContent:
    """Whether a pair that is not labelled says what a labelled one says: byte-equal image, equal caption.

    Captions are equal when they differ in case, spaces, Unicode form or a final full stop alone.
    """

    def __init__(self, matches: Matches, image_fingerprints: Sequence[str], texts: Sequence[str]) -> None:
        pairs = copies_too(matches.pairs(), image_fingerprints, [plain_caption(text) for text in texts])
        self._same = Matches(pairs[:, 0], pairs[:, 1], n_images=matches.n_images, n_texts=matches.n_texts)

    def __call__(self, image_ids: Ids, text_ids: Ids) -> Mask:
        """(P,) bool."""
        return self._same.is_match(image_ids, text_ids)


def plain_caption(text: str) -> str:
    """The caption without what makes no difference to a reader."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .!")


@dataclass(frozen=True, eq=False)
class Likeness:
    """When two pictures are near-duplicates: by their hashes, or by the cosine of their vectors; None = not asked."""

    hashes: Hashes | None = None
    hash_distance: int = 0  # most bits that differ
    vectors: Vectors | None = None  # (N, D) unit vectors of the images in ``vector_rows``
    vector_rows: Ids | None = None  # (N,) ascending
    cosine: float = 1.0

    def __call__(self, one: Ids, other: Ids) -> Mask:
        """(P,) whether the pictures one[p] and other[p] are near-duplicates."""
        near = np.zeros(len(one), np.bool_)
        if self.hashes is not None:
            near |= self.hashes.distance(one, other) <= self.hash_distance
        if self.vectors is not None and self.vector_rows is not None and len(self.vector_rows):
            places = [np.minimum(np.searchsorted(self.vector_rows, ids), len(self.vectors) - 1) for ids in (one, other)]
            known = (self.vector_rows[places[0]] == one) & (self.vector_rows[places[1]] == other)
            near |= known & (np.einsum("pd,pd->p", *(self.vectors[place] for place in places)) >= self.cosine)
        return near


@dataclass(frozen=True)
class NearLabelled:
    """Whether a pair's image is a near-duplicate of any image that its text is labelled with."""

    matches: Matches
    alike: Callable[[Ids, Ids], Mask]  # (image ids (P,), image ids (P,)) -> (P,)

    def __call__(self, image_ids: Ids, text_ids: Ids) -> Mask:
        """(P,) bool."""
        near = np.zeros(len(image_ids), np.bool_)
        for start in range(0, len(image_ids), _BLOCK):
            images, texts = image_ids[start : start + _BLOCK], text_ids[start : start + _BLOCK]
            offsets, labelled = self.matches.of("t2i", texts)
            rows = np.repeat(np.arange(len(texts)), np.diff(offsets))
            near[start + rows[self.alike(images[rows], labelled)]] = True
        return near


# --- what training makes of them --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Listed:
    """Pairs in the order of their query ids, then of their item ids."""

    queries: Ids  # (P,)
    items: Ids  # (P,)
    keys: Ids  # (P,) image * n_texts + text
    treatments: Codes  # (P,) places in TREATMENTS


@dataclass(frozen=True, eq=False)
class Revision:
    """What becomes of suspected pairs wherever a step holds them, mined or in the batch, in both directions.

    ``mask``: the cell is not valid, so no loss sees it. ``promote``: it is positive. ``down_weight``: it is masked in a
    share 1 - keep_share of the steps, drawn by (seed, step, pair) alone. So any sum over negatives holds the pair
    ``keep_share`` times on average: the sum inside the softmax of contrastive losses and KL, the sum over pairs of
    Margin-MSE or RankNet. What a loss then does with the sum (a logarithm, a division by how many there are) is not
    linear, so that its own average follows only nearly.
    """

    by_query: Mapping[Direction, _Listed]
    keep_share: float
    seed: int

    @classmethod
    def of(
        cls, found: Sequence[Suspects], treatments: Sequence[str], *, n_texts: int, keep_share: float, seed: int
    ) -> Revision:
        """From the suspects of both directions; ``treatments`` are those of KINDS. A pair that is kept is left out."""
        keys = np.concatenate([part.image_ids * n_texts + part.text_ids for part in found])
        codes = np.array([TREATMENTS.index(name) for name in treatments], np.int8)
        codes = codes[np.concatenate([part.kinds for part in found])]
        keys, codes = keys[codes > 0], codes[codes > 0]
        keys, first = np.unique(keys, return_index=True)  # a pair's kind is the same in both directions
        codes = codes[first]
        images, texts = np.divmod(keys, n_texts)
        by_text = np.argsort(texts, kind="stable")
        listed: dict[Direction, _Listed] = {
            "i2t": _Listed(images, texts, keys, codes),
            "t2i": _Listed(texts[by_text], images[by_text], keys[by_text], codes[by_text]),
        }
        return cls(listed, keep_share, seed)

    @property
    def arrays(self) -> tuple[Ids, Codes]:
        """Keys (P,) ascending and treatments (P,): what decides the training, for a fingerprint."""
        listed = self.by_query["i2t"]
        return listed.keys, listed.treatments

    def of_queries(self, direction: Direction, query_ids: Ids, step: int) -> tuple[Ids, Ids, Mask]:
        """What is revised of each query (Q,) in a step: offsets (Q + 1,), then flat item ids and whether promoted.

        A pair that is listed and not promoted is masked.
        """
        listed = self.by_query[direction]
        starts = np.searchsorted(listed.queries, query_ids)
        offsets, chosen = ragged_ranges(starts, np.searchsorted(listed.queries, query_ids, side="right"))
        treatments = listed.treatments[chosen]
        acts = np.ones(len(chosen), np.bool_)
        drawn = np.flatnonzero(treatments == TREATMENTS.index("down_weight"))
        if len(drawn):
            kept = hash_uniform((self.seed, step, _DRAW), listed.keys[chosen[drawn]], 1)[:, 0] < self.keep_share
            acts[drawn[kept]] = False
        counted = np.concatenate([[0], np.cumsum(acts)])[offsets]
        return counted, listed.items[chosen[acts]], treatments[acts] == TREATMENTS.index("promote")
