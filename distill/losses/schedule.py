"""A part's weight as a function of how far the training is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from distill.losses.numeric import check_choice

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor of a weight: ``first`` up to progress ``begin``, ``last`` from ``end`` on, on the way as ``shape`` says.

    Progress runs from 0 at the first step of the whole training to 1 at its last, shared steps counted.

    Attributes:
        shape: ``linear``: a straight line; ``cosine``: half a cosine, flat at both ends; ``constant``: ``last``
            throughout.
        first: factor at the beginning.
        last: factor at the end.
        begin: progress at which the factor begins to change.
        end: progress at which it has changed.
    """

    shape: Shape = "linear"
    first: float = 0.0
    last: float = 1.0
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, get_args(Shape))
        for name, value in (("first", self.first), ("last", self.last)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"a schedule needs 0 <= begin <= end <= 1, got begin={self.begin} and end={self.end}")

    def __call__(self, progress: float) -> float:
        """Factor at a progress in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress!r}")
        if self.shape == "constant" or progress >= self.end:
            return self.last
        if progress <= self.begin:
            return self.first
        way = (progress - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.first + (self.last - self.first) * way
