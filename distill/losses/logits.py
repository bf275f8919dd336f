"""Losses that match a softmax over each row's candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from distill.losses.numeric import (
    check_choice,
    check_positive,
    full,
    log_softmax_over,
    mean_over,
    standardise,
    student_logits,
    teacher_scores,
    varies,
)

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

ENOUGH = 4
"""Scores that a row needs before its standard deviation says anything."""


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL(softmax(t / teacher_temperature) || softmax(z)) over each row's scored candidates, one direction.

    The two temperatures are separate because the two scores live on different ranges: a matching head's log-odds are
    peaked, a cosine is not. The reference is LoopITR (arXiv 2203.05465) and, for text, CADET and SimLM. A row has a
    term where at least two candidates were scored.

    Attributes:
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it (0.02 to 0.05 is
            usual for a cosine).
        teacher_temperature: divides the teacher's raw scores. Too small a value leaves one candidate with all the mass.
        symmetric: half the sum of both directions of KL (Jeffreys divergence over 2).
        zscore: standardise each row of teacher and of student first (Sun et al., CVPR 2024, arXiv 2403.01427), which
            makes the loss blind to any positive affine map of either. Needs a ``temperature`` (theirs: 2 for both),
            since the learned scale means nothing for standardised scores. Rows with fewer than four scores, or whose
            scores are all equal on either side, have no usable deviation and are left out.
        t_squared: multiply by the student's temperature squared (1 / scale^2 with the learned scale), which keeps the
            gradient's size when the temperature changes. Conventions differ between toolkits; off here.
        positive: ``keep`` labelled positives in the list, or ``drop`` them and distil the negatives alone.
        train_scale: let this loss train the learned scale. False: it could match a flat teacher by lowering the scale
            instead of learning from it, and the contrastive loss owns it.
    """

    temperature: float | None = None
    teacher_temperature: float = 1.0
    symmetric: bool = False
    zscore: bool = False
    t_squared: bool = False
    positive: Literal["keep", "drop"] = "keep"
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("teacher_temperature", self.teacher_temperature)
        check_choice("positive", self.positive, ("keep", "drop"))
        if self.zscore and self.temperature is None:
            raise ValueError(
                "zscore standardises the student's scores, so its learned scale has no meaning for them: give a number "
                "for temperature (2.0, with teacher_temperature 2.0, is the published setting)"
            )

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        there = scored.valid if self.positive == "keep" else scored.valid & ~scored.positive
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        t = teacher_scores(scored)
        has_term = there.sum(dim=1) > 1
        if self.zscore:
            has_term = (there.sum(dim=1) >= ENOUGH) & varies(t, there) & varies(full(scored.student), there)
            z, t = standardise(full(scored.student), there) / (self.temperature or 1.0), standardise(t, there)
        log_q = log_softmax_over(z, there)
        log_p = log_softmax_over(t / self.teacher_temperature, there)
        weight = (log_p.exp() - log_q.exp()) / 2 if self.symmetric else log_p.exp()
        values = torch.where(there, weight * (log_p - log_q), torch.zeros_like(z)).sum(dim=1)
        return (values * self._temperature_squared(scored) if self.t_squared else values), has_term

    def _temperature_squared(self, scored: Scored) -> Tensor | float:
        if self.temperature is not None:
            return self.temperature**2
        return 1 / full(scored.scale.detach()).square()
