"""How well scores tell true pairs from false ones, and how finely: pure functions of arrays.

Shape key: ``N`` pictures of a sample, each with one true pair; ``R`` = 2 N candidate lists, first one a picture, then
one a caption, both in the order of the true pairs; ``K`` hard negatives of a list. Column 0 of a list (R, 1 + K) is the
true pair's score. Intervals are 95 % bootstrap intervals that draw whole pictures: scores that share a picture are not
independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.protocols import Ids

Values = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]

NEAR = 1e-3
"""A probability this close to 0 or 1 counts as saturated."""
RESAMPLES = 1000
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Spread:
    """Where scores of one kind lie. Of the finite ones; None where there are none."""

    count: int
    not_finite: int
    mean: float | None
    std: float | None
    quantiles: dict[str, float]  # "0" = least, "0.5" = median, "1" = most


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def plain(self) -> str:
        """``0.912 [0.880, 0.941]``."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self) -> str:
        """``91.2% [88.0, 94.1]``."""
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def points(self) -> str:
        """``+3.2 points [+1.1, +5.0]``, for a difference of two shares."""
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Saturation:
    """Shares of scores that would be lost as probabilities.

    Attributes:
        near: Sigmoid within ``NEAR`` of 0 or 1.
        float16: Sigmoid that float16 rounds to exactly 0 or 1.
        bfloat16: The same in bfloat16.
    """

    near: float
    float16: float
    bfloat16: float


@dataclass(frozen=True)
class Ties:
    """Shares of the pairs of candidates of one list whose scores are equal: as they are, and once rounded."""

    float32: float
    float16: float
    bfloat16: float


@dataclass(frozen=True)
class Difference:
    """How two scorers differ on the same pairs.

    Attributes:
        hits: First minus second in the share of hard negatives that the true pair is above.
        spearman: Rank correlation over all pairs; None where one scorer gives a constant.
        largest: Largest absolute difference of two scores of one pair; means something for scores of one unit only.
    """

    hits: Interval
    spearman: float | None
    largest: float


def spread(scores: Values) -> Spread:
    """Count, mean, deviation (n - 1) and quantiles of scores (P,)."""
    finite = scores[np.isfinite(scores)].astype(np.float64)
    bad = len(scores) - len(finite)
    if not len(finite):
        return Spread(len(scores), bad, None, None, {})
    std = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    found = np.quantile(finite, QUANTILES)
    named = {f"{at:g}": float(value) for at, value in zip(QUANTILES, found, strict=True)}
    return Spread(len(scores), bad, float(finite.mean()), std, named)


def auc(positive: Values, negative: Values) -> float:
    """Chance that a positive (N,) drawn at random scores above a negative (M,), a tie counting half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def auc_interval(positive: Values, negative: Values, negative_of: Ids, *, seed: int) -> Interval:
    """:func:`auc` with its interval.

    Args:
        positive: (N,) one score a picture.
        negative: (M,).
        negative_of: (M,) which of the N pictures each negative belongs to, and is drawn with.
        seed: Of the resampling.
    """
    count = len(positive)
    wins = np.zeros((count, count))  # of each picture's true pair over each picture's negatives
    above = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)  # (N, M)
    np.add.at(wins.T, negative_of, above.T)
    held = np.bincount(negative_of, minlength=count).astype(np.float64)

    def statistic(rows: Numbers) -> float:
        drawn = np.bincount(rows.astype(np.int64), minlength=count).astype(np.float64)
        there = float(drawn @ held)
        return float(drawn @ wins @ drawn) / (count * there) if there else 0.5  # no negative drawn: nothing known

    return _bootstrap(np.arange(count, dtype=np.float64), statistic, auc(positive, negative), seed)


def mean_interval(per_image: Numbers, *, seed: int) -> Interval:
    """Mean over pictures (N,) with its interval."""
    return _bootstrap(per_image, None, float(per_image.mean()), seed)


def _bootstrap(data: Numbers, statistic: Callable[[Numbers], float] | None, value: float, seed: int) -> Interval:
    from scipy.stats import bootstrap

    if len(data) < 2:
        return Interval(value, value, value)
    found = bootstrap(
        (data,),
        np.mean if statistic is None else statistic,
        n_resamples=RESAMPLES,
        vectorized=statistic is None,
        method="percentile",  # unlike BCa it is defined where all pictures agree
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def d_prime(positive: Values, negative: Values) -> float | None:
    """Distance of the two means over the root mean square of the two deviations; None where neither varies."""
    first, second = positive.astype(np.float64), negative.astype(np.float64)
    if len(first) < 2 or len(second) < 2:
        return None
    pooled = float(np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2))
    return float(first.mean() - second.mean()) / pooled if pooled > 0 else None


def hits(lists: Values) -> Numbers:
    """(R,) share of each list's negatives that the true pair is above, a tie counting half."""
    true, others = lists[:, :1], lists[:, 1:]
    return np.asarray(((true > others) + 0.5 * (true == others)).mean(axis=1), np.float64)


def firsts(lists: Values) -> Numbers:
    """(R,) 1 where the true pair is above every negative of its list, else 0; a tie is no success."""
    return np.asarray((lists[:, :1] > lists[:, 1:]).all(axis=1), np.float64)


def per_image(of_lists: Numbers) -> Numbers:
    """(N,) mean of the two lists, picture's and caption's, of each true pair."""
    return np.asarray(of_lists.reshape(2, -1).mean(axis=0), np.float64)


def margins(lists: Values) -> Numbers:
    """(R, K) true pair minus each negative."""
    wide = lists.astype(np.float64)
    return np.asarray(wide[:, :1] - wide[:, 1:])


def difference(first: Values, second: Values, first_lists: Values, second_lists: Values, *, seed: int) -> Difference:
    """Compare two scorers on the same pairs (P,) and lists (R, 1 + K); the interval is of the paired difference."""
    from scipy.stats import spearmanr

    varied = np.ptp(first) > 0 and np.ptp(second) > 0
    return Difference(
        mean_interval(per_image(hits(first_lists) - hits(second_lists)), seed=seed),
        float(spearmanr(first, second).statistic) if varied else None,
        float(np.abs(first.astype(np.float64) - second).max()),
    )


def saturation(log_odds: Values) -> Saturation:
    """What would be lost if log-odds (P,) were turned into probabilities."""
    from scipy.special import expit

    distance = expit(-np.abs(log_odds.astype(np.float64)))  # of the probability from 0 or 1, whichever is nearer
    probability = expit(log_odds.astype(np.float64))
    coarse = {name: rounded(probability, name) for name in ("float16", "bfloat16")}
    lost = {name: float(np.mean((values == 0) | (values == 1))) for name, values in coarse.items()}
    return Saturation(float(np.mean(distance < NEAR)), lost["float16"], lost["bfloat16"])


def ties(lists: Values) -> Ties:
    """Equal scores within lists (R, 1 + K)."""
    return Ties(tied(lists), tied(rounded(lists, "float16")), tied(rounded(lists, "bfloat16")))


def tied(lists: Values) -> float:
    """Share of the pairs of columns of one row (R, C) that hold equal scores."""
    left, right = np.triu_indices(lists.shape[1], 1)
    return float(np.mean(lists[:, left] == lists[:, right]))


def rounded(values: Values | Numbers, precision: str) -> Values:
    """The values as ``float16`` or ``bfloat16`` keeps them."""
    import torch

    kept = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, precision))
    return np.asarray(kept.float().numpy())


def entropy(lists: Values, temperature: float) -> Numbers:
    """(R,) entropy of softmax(scores / temperature) over each list (R, C), as a share of the uniform list's, 0 .. 1."""
    from scipy.special import log_softmax

    log_p = log_softmax(lists.astype(np.float64) / temperature, axis=1)
    return np.asarray(-(np.exp(log_p) * log_p).sum(axis=1) / np.log(lists.shape[1]), np.float64)


def medium_temperature(lists: Values, level: float = 0.5) -> float | None:
    """The temperature at which the lists' mean entropy is ``level``; None where no temperature gives it.

    Entropy rises with temperature. Scores that are all equal have entropy 1 at any; ties at the top bound it below.
    """
    from scipy.optimize import brentq

    size = float(lists.astype(np.float64).std())
    low, high = np.log(size * 1e-4) if size > 0 else 0.0, np.log(size * 1e4) if size > 0 else 0.0

    def above(log_temperature: float) -> float:
        return float(entropy(lists, float(np.exp(log_temperature))).mean()) - level

    if size == 0 or above(low) > 0 or above(high) < 0:
        return None
    return float(np.exp(brentq(above, low, high)))
