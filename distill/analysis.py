"""From the cells of a comparison to what its page says: spread over seeds, intervals, tests, shares of the gap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.evaluate import gap_closed
from distill.protocols import DIRECTIONS
from distill.significance import Clusters, Numbers, Resampling, holm, intervals, rsum, sign_flip_p
from distill.verdicts import Difference, Interval, Spread, difference, notes, spread

if TYPE_CHECKING:
    from distill.compare import Cell, Comparison
    from distill.protocols import Direction


@dataclass(frozen=True)
class Cost:
    """What an arm cost.

    Attributes:
        seconds: Of one training; None where it was not measured.
        peak_bytes: Most of any seed; 0 where it was not measured.
        asked: Pairs the teacher scored, all seeds together.
        served: Pairs whose scores were stored already, all seeds together.
    """

    seconds: Spread | None
    peak_bytes: int
    asked: int
    served: int


@dataclass(frozen=True)
class ArmFigures:
    """One arm.

    Attributes:
        arm: Its name.
        losses: One line.
        seeds: That ended with a student.
        metrics: By name, as :class:`distill.metrics.Retrieval`; empty where no seed did.
        rsum: Mean over seeds with its interval over images.
        agreement: With the teacher: ``kendall``, ``spearman``, ``top1``, by direction.
        gap_closed: Percent of the RSUM gap between the undistilled arm and the teacher, each seed against the
            undistilled student of the same seed; None where that is not defined.
        cost: Time, memory, teacher calls.
    """

    arm: str
    losses: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Spread]
    rsum: Interval | None
    agreement: Mapping[Direction, Mapping[str, Spread]]
    gap_closed: Spread | None
    cost: Cost


@dataclass(frozen=True)
class Analysis:
    """All figures of a comparison.

    Attributes:
        arms: By mean RSUM, highest first; arms without any student last.
        plain: The undistilled arm.
        best: The arm with the highest mean RSUM; None where no cell ended.
        against_plain: One an other arm, in the order of ``arms``.
        against_best: Likewise.
        clusters: Images that were drawn from.
        how: Resampling.
        notes: What is missing or must be read with care, in words.
    """

    arms: tuple[ArmFigures, ...]
    plain: str
    best: str | None
    against_plain: tuple[Difference, ...]
    against_best: tuple[Difference, ...]
    clusters: int
    how: Resampling
    notes: tuple[str, ...]

    def arm(self, name: str) -> ArmFigures:
        """The figures of one arm."""
        return next(figures for figures in self.arms if figures.arm == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for JSON: what is not a number is None."""
        found: dict[str, Any] = without_nan(asdict(self))
        return found


def analyse(comparison: Comparison, how: Resampling | None = None) -> Analysis:
    """All figures of a comparison; the same comparison and ``how`` give the same figures."""
    how = how or Resampling()
    clusters = Clusters.of(comparison.image_ids, comparison.text_images)
    cells = {arm: comparison.cells_of(arm) for arm in comparison.arms}
    points = {
        arm: {seed: clusters.points(cell.evaluation) for seed, cell in by_seed.items()}
        for arm, by_seed in cells.items()
        if by_seed
    }
    ranges = _arm_intervals(points, clusters, how)
    arms = [_arm(comparison, arm, cells, ranges.get(arm)) for arm in comparison.arms]
    arms.sort(key=lambda figures: -figures.metrics["rsum"].mean if figures.metrics else math.inf)  # stable
    order = [figures.arm for figures in arms if figures.metrics]
    best = order[0] if order else None
    against_plain, against_best = (_family(other, order, points, clusters, how) for other in (comparison.plain, best))
    return Analysis(
        tuple(arms),
        comparison.plain,
        best,
        against_plain,
        against_best,
        len(clusters),
        how,
        tuple(notes(comparison, best, clusters=len(clusters), how=how)),
    )


def without_nan(value: Any) -> Any:
    """The same containers with None for what is not a finite number, and keys as text."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _arm_intervals(
    points: Mapping[str, Mapping[int, Numbers]], clusters: Clusters, how: Resampling
) -> dict[str, Interval]:
    if not points:
        return {}
    rows = np.stack([np.mean(list(by_seed.values()), axis=0) for by_seed in points.values()])  # (R, C, 2)
    return dict(zip(points, _with_intervals(rows, clusters, how), strict=True))


def _with_intervals(rows: Numbers, clusters: Clusters, how: Resampling) -> list[Interval]:
    values, ranges = rsum(rows, clusters).tolist(), intervals(rows, clusters, how)
    bounds: Sequence[tuple[float | None, float | None]] = ranges or [(None, None)] * len(values)
    return [Interval(value, low, high) for value, (low, high) in zip(values, bounds, strict=True)]


def _arm(
    comparison: Comparison, arm: str, cells: Mapping[str, Mapping[int, Cell]], found: Interval | None
) -> ArmFigures:
    own = cells[arm]
    return ArmFigures(
        arm,
        comparison.arms[arm],
        tuple(own),
        _by_name({seed: cell.evaluation.retrieval.as_dict() for seed, cell in own.items()}),
        found,
        _agreement(own),
        _gap_closed(comparison, arm, cells),
        Cost(
            spread({seed: cell.seconds for seed, cell in own.items()}),
            max((cell.peak_bytes for cell in own.values()), default=0),
            sum(cell.asked for cell in own.values()),
            sum(cell.served for cell in own.values()),
        ),
    )


def _by_name(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Spread]:
    names = dict.fromkeys(name for figures in by_seed.values() for name in figures)
    spreads = {name: spread({seed: figures[name] for seed, figures in by_seed.items()}) for name in names}
    return {name: found for name, found in spreads.items() if found is not None}


def _agreement(own: Mapping[int, Cell]) -> dict[Direction, dict[str, Spread]]:
    found = {}
    for direction in DIRECTIONS:
        by_seed = {
            seed: cell.agreement[direction].as_dict()
            for seed, cell in own.items()
            if cell.agreement is not None and direction in cell.agreement
        }
        shown = {
            seed: {name: figures[name] for name in ("kendall", "spearman", "top1")} for seed, figures in by_seed.items()
        }
        if shown:
            found[direction] = _by_name(shown)
    return found


def _gap_closed(comparison: Comparison, arm: str, cells: Mapping[str, Mapping[int, Cell]]) -> Spread | None:
    if comparison.teacher is None or arm == comparison.plain:
        return None
    shares = {}
    for seed, cell in cells[arm].items():
        if seed in cells[comparison.plain]:
            plain, own = (one.evaluation.retrieval.as_dict() for one in (cells[comparison.plain][seed], cell))
            share = gap_closed(plain, own, comparison.teacher.metrics)
            if share is not None:
                shares[seed] = share
    return spread(shares)


def _family(
    against: str | None,
    order: Iterable[str],
    points: Mapping[str, Mapping[int, Numbers]],
    clusters: Clusters,
    how: Resampling,
) -> tuple[Difference, ...]:
    """Every other arm against one: a family of tests that is corrected together."""
    if against is None or against not in points:
        return ()
    by_arm = {
        arm: {seed: own - points[against][seed] for seed, own in points[arm].items() if seed in points[against]}
        for arm in order
        if arm != against
    }
    by_arm = {arm: by_seed for arm, by_seed in by_arm.items() if by_seed}
    if not by_arm:
        return ()
    rows = np.stack([np.mean(list(by_seed.values()), axis=0) for by_seed in by_arm.values()])
    ranges = _with_intervals(rows, clusters, how)
    p_values = [sign_flip_p(np.sum(list(by_seed.values()), axis=0), clusters, how) for by_seed in by_arm.values()]
    return tuple(
        difference(
            arm,
            against,
            interval=interval,
            by_seed={seed: float(rsum(one, clusters)) for seed, one in by_arm[arm].items()},
            p=p,
            p_holm=corrected,
            alpha=how.alpha,
        )
        for arm, interval, p, corrected in zip(by_arm, ranges, p_values, holm(p_values), strict=True)
    )
