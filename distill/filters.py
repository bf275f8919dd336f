"""Filters over mined candidates: what the teacher finds truer than the labelled match is likely a false negative."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.protocols import Candidates

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.data.matches import Matches
    from distill.exact import Mask, Vectors
    from distill.protocols import Direction, Ids


@dataclass(frozen=True)
class TeacherMargin:
    """Drops the candidates that the teacher scores above the query's best match by more than ``margin``.

    Such candidates are likely true but unlabelled. Usable as ``drop`` where the teacher can be asked while mining;
    :func:`filter_by_teacher` does the same to candidates mined before.

    Attributes:
        margin: In units of the teacher's raw score; negative values also drop candidates close below the match.
        lookup: (image ids (P,), text ids (P,)) -> scores (P,), NaN = not asked.
        matches: The labelled pairs.
        direction: As in :func:`distill.mine.mine`.
        unasked: What to do with a candidate that has no score: ``error``, or ``keep`` it.
    """

    margin: float
    lookup: Callable[[Ids, Ids], Vectors]
    matches: Matches
    direction: Direction
    unasked: Literal["error", "keep"] = "error"

    def __call__(self, query_ids: Ids, item_ids: Ids) -> Mask:
        """(P,) True = drop.

        Raises:
            ValueError: As ``compared``.
        """
        scores, best = self.compared(query_ids, item_ids)
        return np.asarray(scores > best + self.margin)  # NaN compares False: kept

    def compared(self, query_ids: Ids, item_ids: Ids) -> tuple[Vectors, Vectors]:
        """Score of each pair (P,), and that of its query's best match (P,).

        Raises:
            ValueError: No match of a query has a score, or a candidate has none where that is an error.
        """
        queries, place = np.unique(query_ids, return_inverse=True)
        scores = self._scores(query_ids, item_ids)
        unasked = np.isnan(scores)
        if self.unasked == "error" and unasked.any():
            raise ValueError(
                f"the teacher has not scored {int(unasked.sum())} of {len(scores)} candidates: score them first, or "
                "keep those without a score (unasked='keep')"
            )
        return scores, self._best_match(queries)[place]

    def _best_match(self, queries: Ids) -> Vectors:
        offsets, items = self.matches.of(self.direction, queries)
        rows = np.repeat(np.arange(len(queries)), np.diff(offsets))
        best = np.full(len(queries), -np.inf, np.float32)
        scores = self._scores(queries[rows], items)
        np.fmax.at(best, rows, scores)  # passes over NaN
        missing = np.isneginf(best)
        if missing.any():
            raise ValueError(
                f"{int(missing.sum())} queries have no match with a teacher score: score their labelled pairs first; "
                f"query ids {_some(queries[missing])}"
            )
        return best

    def _scores(self, queries: Ids, items: Ids) -> Vectors:
        images, texts = (queries, items) if self.direction == "i2t" else (items, queries)
        return self.lookup(images, texts)


def filter_by_teacher(
    candidates: Candidates, *, scores: Vectors, positive_scores: Vectors, margin: float, keep: int
) -> Candidates:
    """Of candidates mined in excess, drop those the teacher puts above the match by a margin; keep the first ``keep``.

    Args:
        candidates: (B, K), hardest first, with or without columns of matches.
        scores: (B, K) raw teacher scores of the candidates; only those that are there are read.
        positive_scores: (B,) the teacher's score of each query's best labelled match.
        margin: A negative is dropped where its score > the query's positive score + margin.
        keep: Negatives left a query, at most.

    Returns:
        Candidates (B, P + keep), P the columns that held any match: matches first, then negatives in their old order,
        filled up with -1.

    Raises:
        ValueError: Wrong shapes, ``keep`` below 1, or scores missing where one is needed.
    """
    if scores.shape != candidates.item_ids.shape or positive_scores.shape != candidates.query_ids.shape:
        raise ValueError(
            f"scores must be {candidates.item_ids.shape} and positive_scores {candidates.query_ids.shape}, got "
            f"{scores.shape} and {positive_scores.shape}"
        )
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1")
    negative = (candidates.item_ids >= 0) & ~candidates.positive
    missing = int(np.isnan(scores[negative]).sum()) + int(np.isnan(positive_scores).sum())
    if missing:
        raise ValueError(f"{missing} teacher scores of candidates or matches are missing: score these pairs first")
    wanted = negative & (scores <= positive_scores[:, None] + margin)
    left = take_first(
        candidates.item_ids,
        candidates.similarity,
        candidates.positive,
        int(candidates.positive.sum(axis=1).max(initial=0)),
    )
    right = take_first(candidates.item_ids, candidates.similarity, wanted, keep)
    ids = np.concatenate([left[0], right[0]], axis=1)
    similarity = np.concatenate([left[1], right[1]], axis=1)
    positive = (np.arange(ids.shape[1]) < left[0].shape[1]) & (ids >= 0)
    return replace(candidates, item_ids=ids, similarity=similarity, positive=positive)


def take_first(ids: Ids, similarity: Vectors, wanted: Mask, count: int) -> tuple[Ids, Vectors]:
    """The first ``count`` wanted cells of each row, order kept, filled up with -1 and -inf."""
    place = np.cumsum(wanted, axis=1) - 1
    rows, columns = np.nonzero(wanted & (place < count))
    chosen_ids, chosen = empty(len(ids), count)
    chosen_ids[rows, place[rows, columns]] = ids[rows, columns]
    chosen[rows, place[rows, columns]] = similarity[rows, columns]
    return chosen_ids, chosen


def empty(rows: int, width: int) -> tuple[Ids, Vectors]:
    """No candidates yet: ids -1 and similarities -inf, (rows, width)."""
    return np.full((rows, width), -1, np.int64), np.full((rows, width), -np.inf, np.float32)


def _some(ids: Ids, most: int = 5) -> str:
    shown = ", ".join(str(int(one)) for one in ids[:most])
    return f"{shown}, ..." if len(ids) > most else shown
