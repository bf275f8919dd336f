"""Evaluation of a student by its embeddings, of a teacher by re-ranking a shortlist, and of their agreement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.durable import write_atomically
from distill.metrics import Retrieval, first_positive_ranks, ranks_from_embeddings, summarise
from distill.protocols import DIRECTIONS, Candidates

if TYPE_CHECKING:
    from distill.data.matches import Matches
    from distill.exact import Mask, Vectors
    from distill.index import VectorIndex
    from distill.protocols import Direction, Ids

LookUp: TypeAlias = "Callable[[Ids, Ids], Vectors]"
"""(image ids (P,), text ids (P,)) -> the teacher's raw scores (P,)."""

_PER_QUERY, _METRICS = "per_query.parquet", "metrics.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The rank of the first true item of every query, and the metrics that follow from it."""

    image_ids: Ids  # (N,)
    i2t_ranks: Ids  # (N,)
    text_ids: Ids  # (M,)
    t2i_ranks: Ids  # (M,)

    @property
    def retrieval(self) -> Retrieval:
        """The metrics."""
        return summarise(self.i2t_ranks, self.t2i_ranks)

    def queries(self, direction: Direction) -> tuple[Ids, Ids]:
        """Query ids and ranks of one direction."""
        return (self.image_ids, self.i2t_ranks) if direction == "i2t" else (self.text_ids, self.t2i_ranks)

    def save(self, folder: str | Path) -> None:
        """Write ``per_query.parquet`` (direction, query_id, rank) and ``metrics.json``; each whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        directions = np.repeat(DIRECTIONS, [len(self.image_ids), len(self.text_ids)])
        table = pa.table(
            {
                "direction": directions,
                "query_id": np.concatenate([self.image_ids, self.text_ids]),
                "rank": np.concatenate([self.i2t_ranks, self.t2i_ranks]),
            }
        )
        write_atomically(folder / _PER_QUERY, lambda file: pq.write_table(table, file))
        text = json.dumps(self.retrieval.as_dict(), indent=2) + "\n"
        write_atomically(folder / _METRICS, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: Nothing was saved there.
        """
        import pyarrow.parquet as pq

        path = Path(folder) / _PER_QUERY
        if not path.is_file():
            raise FileNotFoundError(f"no evaluation in {folder}: {_PER_QUERY} is not there; run the evaluation first")
        table = pq.read_table(path)
        directions = np.asarray(table["direction"].to_pylist())
        ids, ranks = table["query_id"].to_numpy(), table["rank"].to_numpy()
        of_images, of_texts = (directions == direction for direction in DIRECTIONS)
        return cls(ids[of_images], ranks[of_images], ids[of_texts], ranks[of_texts])


@dataclass(frozen=True)
class Agreement:
    """How far two scorers order the same candidates alike.

    Attributes:
        spearman: Mean over queries of the rank correlation.
        kendall: Mean over queries of Kendall's tau-b.
        top1: Percent of queries whose one best candidate by the student is a best one by the teacher.
        queries: Queries with at least two candidates, over which ``top1`` is taken.
        undefined: Of these, queries left out of both correlations: one scorer gave all candidates the same score.
    """

    spearman: float
    kendall: float
    top1: float
    queries: int
    undefined: int

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def evaluate_embeddings(
    image_vectors: Vectors, text_vectors: Vectors, *, image_ids: Ids, text_ids: Ids, matches: Matches
) -> Evaluation:
    """Rank every text for every image (N, D) and every image for every text (M, D), by inner product.

    Args:
        image_vectors: (N, D).
        text_vectors: (M, D).
        image_ids: (N,) corpus rows, those of one split.
        text_ids: (M,) corpus rows, those of the same split.
        matches: Every true pair of the corpus.

    Raises:
        ValueError: Shapes that do not fit, or an image or text without a match in the split (named).
    """
    i2t = ranks_from_embeddings(
        image_vectors, text_vectors, query_ids=image_ids, item_ids=text_ids, matches=matches, direction="i2t"
    )
    t2i = ranks_from_embeddings(
        text_vectors, image_vectors, query_ids=text_ids, item_ids=image_ids, matches=matches, direction="t2i"
    )
    return Evaluation(image_ids, i2t, text_ids, t2i)


def shortlist(
    index: VectorIndex, query_vectors: Vectors, *, query_ids: Ids, matches: Matches, direction: Direction, k: int
) -> Candidates:
    """The first stage: the ``k`` most similar items of each query (B, D), true ones included and marked.

    Raises:
        ValueError: As :meth:`VectorIndex.search`.
    """
    similarity, items = index.search(query_vectors, min(k, len(index)))
    queries = query_ids[:, None]
    pairs = (queries, items) if direction == "i2t" else (items, queries)
    return Candidates(direction, query_ids, items, similarity, matches.is_match(*pairs))


def evaluate_reranked(first: Evaluation, *, i2t: Candidates, t2i: Candidates, lookup: LookUp) -> Evaluation:
    """The teacher re-ranks the first stage's shortlist; all other items follow in the first stage's order.

    Args:
        first: The first stage's evaluation over the same queries.
        i2t: Its shortlist of texts for every image, from an exact index.
        t2i: Its shortlist of images for every text.
        lookup: The teacher's scores of the shortlisted pairs.

    Raises:
        ValueError: Shortlists of other queries or of another first stage, or scores that are missing (with a count).
    """
    ranks = {}
    for direction, listed in zip(DIRECTIONS, (i2t, t2i), strict=True):
        query_ids, first_ranks = first.queries(direction)
        if listed.direction != direction or not np.array_equal(listed.query_ids, query_ids):
            raise ValueError(
                f"the {direction} shortlist is {listed.direction} over {len(listed.query_ids)} queries; expected the "
                f"{len(query_ids)} queries of the first stage's evaluation, in its order"
            )
        ranks[direction] = reranked_ranks(listed, scores=scores_of(listed, lookup), first_ranks=first_ranks)
    return Evaluation(first.image_ids, ranks["i2t"], first.text_ids, ranks["t2i"])


def reranked_ranks(listed: Candidates, *, scores: Vectors, first_ranks: Ids) -> Ids:
    """Pessimistic rank (B,) of the first true item once ``scores`` (B, K) order the shortlist.

    Where the shortlist holds no true item all its K items stay before the first true one, as in the first stage, and
    their order among themselves changes nothing: the first stage's rank stands.

    Raises:
        ValueError: A first-stage rank contradicts the shortlist.
    """
    there = listed.item_ids >= 0
    holds_one = (listed.positive & there).any(axis=1)
    impossible = ~holds_one & (first_ranks <= there.sum(axis=1))
    if impossible.any():
        raise ValueError(
            f"{int(impossible.sum())} queries have their first true item at a rank that the shortlist covers, yet the "
            "shortlist holds none: take both from the same embeddings, and the shortlist from an exact index ('Flat')"
        )
    ranks = np.array(first_ranks, np.int64)
    if holds_one.any():
        inside = np.where(there, scores, -np.inf)[holds_one]
        ranks[holds_one] = first_positive_ranks(inside, (listed.positive & there)[holds_one])
    return ranks


def scores_of(candidates: Candidates, lookup: LookUp) -> Vectors:
    """Teacher scores (B, K) of all candidates that are there; NaN where there is none.

    Raises:
        ValueError: A score is missing or not finite; says how many.
    """
    there = candidates.item_ids >= 0
    found = np.asarray(lookup(*candidates.pairs()), np.float32)
    if found.shape != (int(there.sum()),):
        raise ValueError(f"the look-up gave scores of shape {found.shape} for {int(there.sum())} pairs")
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(found)} teacher scores are missing or not finite: score these pairs first")
    scores = np.full(there.shape, np.nan, np.float32)
    scores[there] = found
    return scores


def agreement(student: Vectors, teacher: Vectors, *, valid: Mask | None = None) -> Agreement:
    """Compare two scorers (B, K) on the same candidate lists.

    Args:
        student: (B, K) similarities.
        teacher: (B, K) raw scores; NaN = not asked, such cells are passed over.
        valid: (B, K) False = padding; all cells when absent.

    Raises:
        ValueError: Shapes differ, a student's score is NaN where it is needed, or no query has two candidates.
    """
    from scipy.stats import rankdata

    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"student and teacher must share one (B, K) shape, got {student.shape} and {teacher.shape}")
    used = ~np.isnan(teacher) if valid is None else valid & ~np.isnan(teacher)
    if np.isnan(student[used]).any():
        raise ValueError(f"{int(np.isnan(student[used]).sum())} student similarities are NaN")
    rho, tau, top = [], [], []
    for row in np.flatnonzero(used.sum(axis=1) >= 2):
        ours, theirs = student[row, used[row]], teacher[row, used[row]]
        best = np.flatnonzero(ours == ours.max())
        top.append(len(best) == 1 and theirs[best[0]] == theirs.max())  # a tie of the student's is no answer
        if np.ptp(ours) > 0 and np.ptp(theirs) > 0:
            rho.append(np.corrcoef(rankdata(ours), rankdata(theirs))[0, 1])
            tau.append(_kendall(ours, theirs))
    if not top:
        raise ValueError("no query has two candidates with a teacher score: there is nothing to compare")
    return Agreement(_mean(rho), _mean(tau), 100 * _mean(top), len(top), len(top) - len(rho))


def gap_closed(
    plain: Mapping[str, float], distilled: Mapping[str, float], teacher: Mapping[str, float], *, key: str = "rsum"
) -> float | None:
    """Percent of the distance from the plain student to the teacher that distillation covered; may be negative.

    None where the teacher is not ahead of the plain student: then there is no gap to close.
    """
    gap = teacher[key] - plain[key]
    return 100 * (distilled[key] - plain[key]) / gap if gap > 0 else None


def _kendall(ours: Vectors, theirs: Vectors) -> float:
    """Tau-b of one list; scipy's own spends 1 ms a list, mostly on p-values."""
    above, over = (np.sign(values[:, None] - values) for values in (ours, theirs))
    return float(np.sum(above * over) / np.sqrt(np.sum(above**2) * np.sum(over**2)))


def _mean(values: list[Any]) -> float:
    return float(np.mean(values)) if values else float("nan")
