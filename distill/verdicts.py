"""What a comparison may say in words: leads with interval, p-value and seeds, and what must be read with care."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from distill.compare import Comparison
    from distill.significance import Resampling

Verdict = Literal["ahead", "behind", "none"]
FEW_CLUSTERS = 50
_EQUAL = 1e-9  # percent: what rounding leaves of a difference of nothing


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: Over the seeds at hand.
        std: Sample standard deviation (n - 1); None with one seed.
        by_seed: Seed -> value.
    """

    mean: float
    std: float | None
    by_seed: Mapping[int, float]


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap interval; None where there is but one image to draw from."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """One arm minus another, in RSUM, over the seeds that both have.

    Attributes:
        arm: Whose lead.
        against: Over whom.
        rsum: Mean difference with its interval over images.
        seeds: Difference by seed.
        p: Of the paired sign-flip test.
        p_holm: Corrected for the arms compared with the same one.
        verdict: ``none`` where ``p_holm`` is not below alpha.
        agreeing: Seeds whose difference has the sign of the mean.
        words: The same as a sentence.
    """

    arm: str
    against: str
    rsum: Interval
    seeds: Spread
    p: float
    p_holm: float
    verdict: Verdict
    agreeing: int
    words: str


def spread(by_seed: Mapping[int, float]) -> Spread | None:
    """Mean and sample deviation of what is a number; None where nothing is."""
    there = {seed: float(value) for seed, value in by_seed.items() if math.isfinite(value)}
    if not there:
        return None
    values = np.array(list(there.values()))
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, there)


def difference(
    arm: str, against: str, *, interval: Interval, by_seed: Mapping[int, float], p: float, p_holm: float, alpha: float
) -> Difference:
    """Judge one difference: it counts where its corrected p-value is below ``alpha``."""
    seeds = Spread(interval.value, _deviation(list(by_seed.values())), by_seed)
    verdict: Verdict = "none" if p_holm >= alpha else "ahead" if interval.value > 0 else "behind"
    signs = [0 if abs(one) < _EQUAL else math.copysign(1, one) for one in by_seed.values()]
    whole = 0 if abs(interval.value) < _EQUAL else math.copysign(1, interval.value)
    agreeing = sum(sign == whole for sign in signs)
    words = _words(against, interval, verdict, p_holm, f"{agreeing} of {len(by_seed)} seed{_s(len(by_seed))}")
    return Difference(arm, against, interval, seeds, p, p_holm, verdict, agreeing, words)


def _words(against: str, interval: Interval, verdict: Verdict, p_holm: float, seeds: str) -> str:
    way = "equal" if abs(interval.value) < _EQUAL else "ahead" if interval.value > 0 else "behind"
    tail = f"p = {p_value(p_holm)} (Holm)"
    if verdict == "none":
        return f"no significant difference from {against}: {bounds(interval, sign='+')}, {tail}, {way} in {seeds}"
    if verdict == "ahead":
        return f"ahead of {against} by {bounds(interval)}, {tail}, in {seeds}"
    low, high = (None if bound is None else -bound for bound in (interval.high, interval.low))
    return f"behind {against} by {bounds(Interval(-interval.value, low, high))}, {tail}, in {seeds}"


def bounds(interval: Interval, *, sign: str = "", unit: str = " RSUM") -> str:
    """``4.1 RSUM [1.2, 7.0]``, or the value alone where there is no interval; ``sign="+"`` shows every sign."""
    value = f"{number(interval.value, sign=sign)}{unit}"
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{number(interval.low, sign=sign)}, {number(interval.high, sign=sign)}]"


def number(value: float, *, sign: str = "", digits: int = 1) -> str:
    """``4.1``; nothing is ever minus zero."""
    text = format(value, f"{sign}.{digits}f")
    return text if float(text) else format(0.0, f".{digits}f")


def p_value(p: float) -> str:
    """Two digits that say something: ``0.52``, ``0.0014``."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def notes(comparison: Comparison, best: str | None, *, clusters: int, how: Resampling) -> Iterator[str]:
    """What is missing, and what must be read with care."""
    trained = {arm: comparison.cells_of(arm) for arm in comparison.arms}
    yield from _missing(comparison)
    if not trained[comparison.plain] and any(trained.values()):
        yield (
            f"The undistilled arm {comparison.plain} has no finished seed: nothing is compared with it, and there is "
            "no share of the gap to give."
        )
    if max(map(len, trained.values())) == 1:
        yield (
            "No arm has more than one finished seed: there is no spread, and nothing here tells how another training "
            "would turn out."
        )
    compared = sum(bool(cells) for cells in trained.values()) - 1
    if compared < 1:
        yield "Fewer than two arms have a student: there is nothing to compare."
    elif compared * 2 / (how.resamples + 1) >= how.alpha:
        yield (
            f"With {how.resamples} resamples and {compared} comparisons a corrected p-value can hardly fall below "
            f"{how.alpha:g}: ask for more resamples."
        )
    if compared >= 1 and best is not None:
        yield from _strangers(comparison, best)
        yield from _of_best(comparison, best)
    if clusters < FEW_CLUSTERS:
        yield f"Only {clusters} image{_s(clusters)} to draw from: intervals and tests are rough."
    if comparison.teacher is None:
        yield "No arm has a teacher: agreement and shares of the gap are not there."
    elif trained[comparison.plain]:
        yield from _of_teacher(comparison, comparison.teacher.metrics["rsum"])


def _missing(comparison: Comparison) -> Iterator[str]:
    for arm in comparison.arms:
        there = comparison.cells_of(arm)
        lacking = [seed for seed in comparison.seeds if seed not in there]
        if lacking and there:
            yield (
                f"{arm} has {len(there)} of {len(comparison.seeds)} seeds (without {', '.join(map(str, lacking))}): "
                "its means are over those, and differences use the seeds that both arms have."
            )
        elif lacking:
            yield f"{arm} has no finished seed: it has no figures and is in no test."


def _strangers(comparison: Comparison, best: str) -> Iterator[str]:
    for other in dict.fromkeys((comparison.plain, best)):
        seeds = set(comparison.cells_of(other))
        for arm in comparison.arms:
            own = set(comparison.cells_of(arm))
            if seeds and own and not seeds & own:
                yield f"{arm} and {other} share no seed: they are not compared."


def _of_best(comparison: Comparison, best: str) -> Iterator[str]:
    if best == comparison.plain:
        yield f"The undistilled arm {best} has the highest mean RSUM: both families of tests are the same one."
    yield (
        f"{best} was picked as the best on these very images, which flatters it a little: choose on the validation "
        "split, then look here once."
    )


def _of_teacher(comparison: Comparison, teacher: float) -> Iterator[str]:
    no_gap = [
        seed
        for seed, cell in comparison.cells_of(comparison.plain).items()
        if cell.evaluation.retrieval.rsum >= teacher
    ]
    if no_gap:
        yield (
            f"The teacher is not ahead of {comparison.plain} with seed{_s(len(no_gap))} {', '.join(map(str, no_gap))}: "
            "there the gap has no share to close."
        )
