"""How well suspicion finds what is really true, where that is known: precision and recall, over margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill.data.matches import Matches
    from distill.false_negatives import Judged, Mask
    from distill.protocols import Direction


@dataclass(frozen=True)
class Detection:
    """Of the candidates that are no labelled match: how many are suspected, how many true, how many both."""

    margin: float
    candidates: int
    suspected: int
    true: int
    both: int

    @property
    def precision(self) -> float | None:
        """Share of the suspected that are true; None where none is suspected."""
        return self.both / self.suspected if self.suspected else None

    @property
    def recall(self) -> float | None:
        """Share of the true that are suspected; None where none is true."""
        return self.both / self.true if self.true else None

    def as_dict(self) -> dict[str, Any]:
        """Counts and shares by name."""
        return {**vars(self), "precision": self.precision, "recall": self.recall}


def holds(found: Judged, direction: Direction, truth: Matches) -> Mask:
    """(P,) whether each candidate is really true."""
    pairs = (found.query_ids, found.item_ids) if direction == "i2t" else (found.item_ids, found.query_ids)
    return truth.is_match(*pairs)


def detections(found: Judged, true: Mask, margins: Iterable[float]) -> list[Detection]:
    """One a margin; a candidate is suspected as in ``distill.false_negatives.suspects``."""
    made = []
    for margin in margins:
        suspected = found.scores > found.labelled + margin
        made.append(
            Detection(
                float(margin), len(true), int(suspected.sum()), int(true.sum()), int(np.count_nonzero(suspected & true))
            )
        )
    return made


def round_margins(found: Iterable[Judged], own: float, count: int = 10) -> list[float]:
    """About ``count`` round margins over the range where the choice matters, and the own one among them, ascending."""
    from matplotlib.ticker import MaxNLocator

    leads = np.concatenate([part.scores - part.labelled for part in found])
    if not len(leads):
        return [own]
    low, high = np.quantile(leads, [0.5, 0.999])
    return sorted({*np.asarray(MaxNLocator(count).tick_values(float(low), float(high))).tolist(), own})
