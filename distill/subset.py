"""Which of a round's candidate pairs the teacher is asked about, where it is not all of them (``mine.subset``).

Each pair, or each query, has a probability of being drawn and a number of its own in [0, 1), which is a function of
the subset's seed and its ids alone; it is drawn where the number is below the probability. So a draw depends neither on
the order of pairs, nor on processes, rounds or arms: a pair that was drawn once is drawn again wherever its probability
is as high, and a larger share holds what a smaller one held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from distill.protocols import DIRECTIONS, Candidates, Direction
from distill.sampler import hash_uniform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.exact import Mask
    from distill.protocols import Ids

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
_PAIRS, _QUERIES = 3, 4  # set these draws apart from others of the same seed
_HALVINGS = 60  # of the interval in which the factor is looked for: beyond float64's digits


@dataclass(frozen=True)
class Subset:
    """A share of the candidate pairs.

    Attributes:
        share: part of each direction's candidates that is drawn, on average over seeds.
        by: ``uniform``: all with the same probability. ``hardness``: in proportion to sigmoid(gap / its deviation over
            the direction), gap being the student's similarity of the candidate less that of the labelled match: how
            likely the student is to mistake the one for the other.
        unit: ``pair``: each candidate by itself. ``query``: all candidates of a query or none, by the mean of theirs.
        floor: least probability, as a part of ``share``; 1 / probability is at most 1 / (floor * share).
        seed: of the draw; not the run's, so that runs that differ in their seed can share scores.
    """

    share: float
    by: Literal["uniform", "hardness"] = "uniform"
    unit: Literal["pair", "query"] = "pair"
    floor: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 < self.floor <= 1:
            raise ValueError(
                f"share and floor must be above 0 and at most 1, got {self.share} and {self.floor}: a pair that can "
                "never be drawn cannot be weighted"
            )

    def probabilities(self, found: Candidates) -> Numbers:
        """With what probability each candidate (B, K) is drawn as this direction's; 0 where there is none.

        Raises:
            ValueError: hardness is asked for, and the candidates do not say how similar the labelled match is.
        """
        there = found.item_ids >= 0
        if self.by == "uniform":
            return np.where(there, self.share, 0.0)
        weight = _hardness(found)
        if self.unit == "pair":
            drawn = np.zeros(there.shape)
            drawn[there] = in_proportion(weight[there], self.share, least=self.floor * self.share)
            return drawn
        counts = there.sum(axis=1)
        of_query = np.zeros(len(counts))
        some = counts > 0
        mean = np.where(there, weight, 0.0).sum(axis=1)[some] / counts[some]
        of_query[some] = in_proportion(mean, self.share, least=self.floor * self.share, counts=counts[some])
        return np.where(there, of_query[:, None], 0.0)

    def drawn(self, found: Candidates, n_texts: int) -> Mask:
        """(B, K) True = this direction asks for the pair."""
        chance = self.probabilities(found)
        if self.unit == "query":
            draw = (self.seed, _QUERIES, DIRECTIONS.index(found.direction))
            return np.asarray(hash_uniform(draw, found.query_ids, 1) < chance)
        own = hash_uniform((self.seed, _PAIRS), _keys(found, n_texts).reshape(-1), 1)
        return np.asarray(own.reshape(chance.shape) < chance)


def drawn_cells(subset: Subset, found: Mapping[Direction, Candidates], n_texts: int) -> dict[Direction, Mask]:
    """Which cells (B, K) of a round's candidates the teacher is asked about.

    A score is one of the pair: what one direction asks for, the other has too.
    """
    keys = {direction: _keys(those, n_texts) for direction, those in found.items()}
    drawn = [keys[direction][subset.drawn(those, n_texts)] for direction, those in found.items()]
    asked = np.unique(np.concatenate([np.empty(0, np.int64), *drawn]))
    return {direction: np.isin(keys[direction], asked) & (those.item_ids >= 0) for direction, those in found.items()}


def chance_of_pairs(subset: Subset, found: Mapping[Direction, Candidates], n_texts: int) -> tuple[Ids, Numbers]:
    """Distinct candidate pairs (P,), as image id * n_texts + text id, ascending, and the probability of being asked.

    A pair that both directions hold is asked where either draws it. Its inverse is the weight with which sums over what
    was asked estimate, without bias, sums over all candidates.
    """
    keys, chances = [np.empty(0, np.int64)], [np.empty(0)]
    for those in found.values():
        there = those.item_ids >= 0
        keys.append(_keys(those, n_texts)[there])
        chances.append(subset.probabilities(those)[there])
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    flat = np.concatenate(chances)
    if subset.unit == "pair":  # both directions look at the same number
        chance = np.zeros(len(pairs))
        np.maximum.at(chance, place, flat)
        return pairs, chance
    missed = np.ones(len(pairs))
    np.multiply.at(missed, place, 1 - flat)
    return pairs, 1 - missed


def in_proportion(weight: Numbers, share: float, *, least: float, counts: Any = 1) -> Numbers:
    """Probabilities (P,) in proportion to ``weight``, between ``least`` and 1, whose mean is ``share``.

    ``counts``: (P,) how often each counts in the mean. ``weight`` is not negative.
    """
    if not len(weight):
        return np.zeros(0)
    counts = np.broadcast_to(np.asarray(counts, np.float64), weight.shape)
    wanted = share * counts.sum()
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(weight, np.float64))  # -inf: never more than the least

    def chances(log_factor: float) -> Numbers:
        return np.asarray(np.clip(np.exp(np.minimum(logs + log_factor, 0.0)), least, 1.0))

    known = logs[np.isfinite(logs)]
    low, high = -750.0, -float(known.min(initial=0.0))  # at the upper end all are 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float((chances(middle) * counts).sum()) < wanted:
            low = middle
        else:
            high = middle
    return chances(high)


def _hardness(found: Candidates) -> Numbers:
    """(B, K) in (0, 1); 0 where there is no candidate."""
    if found.labelled is None:
        raise ValueError(
            f"the {found.direction} candidates do not say how similar the labelled match is, by which hardness is "
            "judged: they were mined by an older version; mine anew in another run, or set mine.subset.by to uniform"
        )
    there = found.item_ids >= 0
    gap = np.where(there, found.similarity, 0.0).astype(np.float64) - found.labelled[:, None]
    spread = float(gap[there].std()) if there.any() else 0.0
    return np.where(there, 1 / (1 + np.exp(-np.clip(gap / (spread or 1.0), -50, 50))), 0.0)


def _keys(found: Candidates, n_texts: int) -> Ids:
    """(B, K) image id * n_texts + text id; -1 where there is no candidate."""
    queries = found.query_ids[:, None]
    keys = queries * n_texts + found.item_ids if found.direction == "i2t" else found.item_ids * n_texts + queries
    return np.asarray(np.where(found.item_ids >= 0, keys, -1), np.int64)


def only(found: Candidates, wanted: Mask) -> Candidates:
    """The wanted cells of each row, order kept, filled up with -1; as wide as before."""
    order = np.argsort(~wanted, axis=1, kind="stable")
    left = np.take_along_axis(wanted, order, axis=1)
    return replace(
        found,
        item_ids=np.where(left, np.take_along_axis(found.item_ids, order, axis=1), -1),
        similarity=np.where(left, np.take_along_axis(found.similarity, order, axis=1), np.float32(-np.inf)),
        positive=left & np.take_along_axis(found.positive, order, axis=1),
    )
