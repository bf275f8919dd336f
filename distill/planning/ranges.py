"""Numbers that are known within bounds: a middle, and how low and how high it may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True)
class Range:
    """Not negative: ``low <= mid <= high``. Sums and products are of like ends, as of errors that go together."""

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.mid <= self.high:
            raise ValueError(f"a range is 0 <= low <= mid <= high, got {self.low}, {self.mid}, {self.high}")

    @classmethod
    def exactly(cls, value: float) -> Range:
        """Known without doubt."""
        return cls(value, value, value)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Range:
        """The median, and how far the middle half of the samples lies around it.

        Raises:
            ValueError: there is no sample.
        """
        if not len(samples):
            raise ValueError("there is nothing to take a median of")
        low, mid, high = (float(value) for value in np.percentile(samples, [25, 50, 75]))
        return cls(max(0.0, low), max(0.0, mid), max(0.0, high))

    def __add__(self, other: Range | float) -> Range:
        that = as_range(other)
        return Range(self.low + that.low, self.mid + that.mid, self.high + that.high)

    def __mul__(self, other: Range | float) -> Range:
        that = as_range(other)
        return Range(self.low * that.low, self.mid * that.mid, self.high * that.high)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Range | float) -> Range:
        that = as_range(other)
        return Range(self.low / that.high, self.mid / that.mid, self.high / that.low)

    def less(self, other: Range | float) -> Range:
        """This without ``other``, of like ends, never below 0: of a time of which a part is told apart."""
        that = as_range(other)
        ends = sorted(max(0.0, own - its) for own, its in zip(self.ends, that.ends, strict=True))
        return Range(*ends)

    def at_least(self, other: Range | float) -> Range:
        """The larger of the two, end by end: of work that goes on side by side."""
        that = as_range(other)
        return Range(*(max(own, its) for own, its in zip(self.ends, that.ends, strict=True)))

    @property
    def ends(self) -> tuple[float, float, float]:
        """Low, mid, high."""
        return self.low, self.mid, self.high


Known: TypeAlias = "Range | float"
NOTHING = Range(0.0, 0.0, 0.0)


def as_range(value: Known) -> Range:
    """A plain number as one that is known without doubt."""
    return value if isinstance(value, Range) else Range.exactly(value)


def total(values: Iterable[Known]) -> Range:
    """Of all of them; nothing where there are none."""
    found = NOTHING
    for value in values:
        found = found + value
    return found
