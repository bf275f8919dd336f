"""Statistics of recall that know its queries come in clusters: an image and the captions written for it.

Shape key: ``C`` clusters, ``R`` rows (an arm, or the difference of two), ``N`` images, ``M`` texts.

*Points* of a cluster are its hits at 1, 5 and 10 added up: those of its image (image to text) and those of its captions
(text to image). With n images and m texts in all,

    RSUM = 100 (sum over clusters of image points / n + sum over clusters of text points / m),

so RSUM and the difference of two RSUMs are sums of one contribution a cluster. Whatever is drawn or swapped here is a
whole cluster: five captions of one image are not five independent observations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.protocols import Ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.evaluate import Evaluation

Numbers = np.ndarray[Any, np.dtype[np.float64]]
CUTS = (1, 5, 10)
_BLOCK = 1 << 19  # numbers drawn at once: what a processor's cache holds is also fastest


@dataclass(frozen=True)
class Resampling:
    """How intervals and tests draw.

    Attributes:
        resamples: Of each interval and each test.
        seed: Of the draws; the same seed gives the same figures.
        confidence: Of intervals.
        alpha: A corrected p-value below it counts as a difference.
    """

    resamples: int = 9_999
    seed: int = 0
    confidence: float = 0.95
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.confidence < 1 or not 0 < self.alpha < 1:
            raise ValueError(
                "resamples must be at least 1, confidence and alpha between 0 and 1, got "
                f"{self.resamples}, {self.confidence}, {self.alpha}"
            )


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which queries belong together.

    Attributes:
        of_images: (N,) cluster of each image.
        of_texts: (M,) cluster of each text.
        images: (C,) how many images each cluster has: 1, or 0 where a text's image is not among the queries.
        texts: (C,) how many texts.
    """

    of_images: Ids
    of_texts: Ids
    images: Numbers
    texts: Numbers

    @classmethod
    def of(cls, image_ids: Ids, text_images: Ids) -> Clusters:
        """An image (N,) and the texts labelled with it (M,) are one cluster."""
        names, place = np.unique(np.concatenate([image_ids, text_images]), return_inverse=True)
        of_images, of_texts = place[: len(image_ids)], place[len(image_ids) :]
        counts = (np.bincount(part, minlength=len(names)).astype(np.float64) for part in (of_images, of_texts))
        return cls(of_images, of_texts, *counts)

    def __len__(self) -> int:
        return len(self.images)

    def points(self, evaluation: Evaluation) -> Numbers:
        """(C, 2) points of each cluster: its images' and its texts'. Whole numbers."""
        sides = ((self.of_images, evaluation.i2t_ranks), (self.of_texts, evaluation.t2i_ranks))
        return np.stack(
            [
                np.bincount(of, weights=sum((ranks <= cut).astype(np.float64) for cut in CUTS), minlength=len(self))
                for of, ranks in sides
            ],
            axis=-1,
        )


def rsum(points: Numbers, clusters: Clusters) -> Numbers:
    """(R,) RSUM in percent from points (R, C, 2); of a difference of points, the difference of RSUM."""
    image_points, text_points = points[..., 0].sum(axis=-1), points[..., 1].sum(axis=-1)
    return _rsum(image_points, clusters.images.sum(), text_points, clusters.texts.sum())


def intervals(points: Numbers, clusters: Clusters, how: Resampling) -> list[tuple[float, float]] | None:
    """Percentile bootstrap interval of RSUM for each row of points (R, C, 2); None for fewer than two clusters.

    All rows see the same draws. Percentiles, not BCa: RSUM is close to linear in the clusters, so there is little to
    correct, and BCa is undefined where two arms have the same hits.
    """
    from scipy.stats import bootstrap

    count = len(clusters)
    if count < 2 or not len(points):
        return None
    image_points, text_points = points[..., 0], points[..., 1]  # (R, C)

    def of_draws(drawn: Ids, axis: int) -> Numbers:
        """(R, b) RSUM of every row on the clusters drawn (b, C): a product with how often each one was."""
        times = np.stack([np.bincount(one, minlength=count) for one in np.atleast_2d(drawn)], axis=axis).astype(float)
        found = _rsum(image_points @ times, clusters.images @ times, text_points @ times, clusters.texts @ times)
        return found if drawn.ndim > 1 else found[:, 0]

    found = bootstrap(
        (np.arange(count),),
        of_draws,
        vectorized=True,
        n_resamples=how.resamples,
        batch=max(1, _BLOCK // count),
        confidence_level=how.confidence,
        method="percentile",
        rng=np.random.default_rng(how.seed),
    ).confidence_interval
    return list(zip(found.low.tolist(), found.high.tolist(), strict=True))


def recall_intervals(evaluation: Evaluation, clusters: Clusters, how: Resampling) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of each recall, in percent, by name (``i2t_r1`` ...); none for one cluster."""
    found: dict[str, tuple[float, float]] = {}
    sides = {
        "i2t": (clusters.of_images, evaluation.i2t_ranks, clusters.images),
        "t2i": (clusters.of_texts, evaluation.t2i_ranks, clusters.texts),
    }
    for way, (of, ranks, counts) in sides.items():
        for cut in CUTS:
            hits: Numbers = np.bincount(of, (ranks <= cut).astype(np.float64), len(clusters)).astype(np.float64)
            interval = _share_interval(hits, counts, how)
            if interval is not None:
                found[f"{way}_r{cut}"] = interval
    return found


def _share_interval(hits: Numbers, counts: Numbers, how: Resampling) -> tuple[float, float] | None:
    """Of 100 sum(hits) / sum(counts) over clusters (C,), which are drawn whole."""
    from scipy.stats import bootstrap

    if len(hits) < 2:
        return None
    found = bootstrap(
        (hits, counts),
        lambda drawn, of, axis: 100 * drawn.sum(axis=axis) / np.maximum(of.sum(axis=axis), 1),
        paired=True,
        vectorized=True,
        n_resamples=how.resamples,
        batch=max(1, _BLOCK // len(hits)),
        confidence_level=how.confidence,
        method="percentile",
        rng=np.random.default_rng(how.seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def sign_flip_p(points: Numbers, clusters: Clusters, how: Resampling) -> float:
    """Two-sided p-value that two arms are interchangeable on every cluster, from the difference of their points (C, 2).

    Where they are, exchanging them on one cluster flips the sign of what it contributes to the difference of RSUM and
    changes nothing else, so the sum of contributions with random signs is the null distribution. Contributions are
    taken times n m / 100, which makes them whole numbers where points are (give the sum over seeds, not the mean):
    ties with what was observed are then exact. Clusters that contribute nothing cannot change the sum and are left
    out; with few others all sign patterns are tried, else ``how.resamples`` random ones, p = 2 (b + 1) / (draws + 1).
    """
    from scipy.stats import permutation_test

    share = clusters.texts.sum() * points[:, 0] + clusters.images.sum() * points[:, 1]  # (C,)
    share = share[share != 0]
    if not len(share):
        return 1.0
    if len(share) == 1:  # two patterns, of which both are as extreme; scipy wants two observations
        return 1.0
    found = permutation_test(
        (share,),
        _total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=how.resamples,
        batch=max(1, _BLOCK // len(share)),
        rng=np.random.default_rng(how.seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of one family of tests, in the same order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _rsum(image_points: Numbers, images: Numbers, text_points: Numbers, texts: Numbers) -> Numbers:
    # a draw without any image or text is possible where clusters lack one; it then has no points to divide either
    return np.asarray(100 * (image_points / np.maximum(images, 1) + text_points / np.maximum(texts, 1)))


def _total(shares: Numbers, axis: int) -> Numbers:
    return np.asarray(shares.sum(axis=axis))
