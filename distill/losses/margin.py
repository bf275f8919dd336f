"""Losses that match margins: the distance of a positive above a negative, in the student and in the teacher.

A shift of either score is free, scale is not. The cosine of unit vectors gives margins of at most 2, a matching head's
log-odds routinely 5 to 15, so as cosines the two cannot meet and the loss saturates. By default the student's margins
are multiplied by its learned scale (about 14 to 100), which brings them to the size of log-odds. The other way is to
bring both near 1: ``teacher_std`` divides the teacher's margins by a standard deviation, and a ``temperature`` of about
0.1 to 0.2 the student's. Log the student's scale either way: the gradient grows with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from distill.losses.numeric import (
    FLAT,
    check_choice,
    check_positive,
    mean_over,
    row_mean,
    student_logits,
    teacher_scores,
)

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

TeacherStd = float | Literal["batch"]


def hardest_negative(scores: Tensor, negative: Tensor) -> Tensor:
    """Column (B, 1) of each row's best-scored negative, the first of equals; any column where there is none."""
    return scores.masked_fill(~negative, -torch.inf).argmax(dim=1, keepdim=True)


def _divided(margins: Tensor, keep: Tensor, teacher_std: TeacherStd) -> Tensor:
    """Teacher margins over ``teacher_std``. Margins of a batch that do not vary have no unit and stay as they are."""
    if not isinstance(teacher_std, str):
        return margins / teacher_std
    margins = torch.where(keep, margins, torch.zeros_like(margins))
    count = keep.sum()
    centred = torch.where(keep, margins - margins.sum() / count.clamp(min=1), torch.zeros_like(margins))
    std = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return margins / torch.where(std > FLAT * margins.abs().amax().clamp(min=1), std, torch.ones_like(std))


def _check_options(temperature: float | None, teacher_std: TeacherStd) -> None:
    check_positive("temperature", temperature)
    if isinstance(teacher_std, str):
        check_choice("teacher_std", teacher_std, ("batch", "a positive number"))
    else:
        check_positive("teacher_std", teacher_std)


@dataclass(frozen=True, kw_only=True)
class MarginMSE:
    """Margin-MSE (Hofstätter et al., arXiv 2010.02666): mean of ((z+ - z-) - (t+ - t-) / teacher_std)^2, one direction.

    Over every labelled positive and negative of a row that the teacher scored, then over the rows that have such a
    pair, so that a long list counts no more than a short one. The paper's raw dot products are unbounded; see the
    module's note on unit vectors.

    Attributes:
        negatives: ``all``, or ``hardest``: only the one the teacher scores best.
        teacher_std: divides the teacher's margins: a number (best: their standard deviation over the training set), or
            ``batch``: their standard deviation (n - 1) over this call's pairs.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False: a squared error would set the scale to fit the
            teacher's arbitrary magnitude, and the contrastive loss owns it.
    """

    negatives: Literal["all", "hardest"] = "all"
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_choice("negatives", self.negatives, ("all", "hardest"))
        _check_options(self.temperature, self.teacher_std)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        t = teacher_scores(scored)
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        if self.negatives == "hardest":
            hardest = hardest_negative(t, negative)
            negative = torch.zeros_like(negative).scatter(1, hardest, True) & negative
        pair = positive.unsqueeze(2) & negative.unsqueeze(1)  # (B, K, K): positive i, negative j
        margin = _divided(t.unsqueeze(2) - t.unsqueeze(1), pair, self.teacher_std)
        gap = (z.unsqueeze(2) - z.unsqueeze(1)) - margin
        return row_mean(gap.square(), pair), pair.flatten(1).any(dim=1)


@dataclass(frozen=True, kw_only=True)
class M3SE:
    """Multi-margin MSE (Menon et al., ICML 2022, eq. 4), one direction.

    With j* the negative that the teacher scores best: the sum over positives i of ((t_i - t_j*) - (z_i - z_j*))^2, plus
    the sum over negatives j of relu(z_j - z_j*)^2. Only the hardest negative's margin is matched; every other negative
    merely has to score no higher, so the order among easy negatives teaches nothing. A row needs a positive and a
    negative that the teacher scored. The module's note on unit vectors holds here too.

    Attributes:
        same_index: True is eq. 4. False is another reading of "margin to the hardest negative": z_i - max_j z_j against
            t_i - max_j t_j, where the two maxima may be different items; no second term, which would then be zero.
        teacher_std: divides the teacher's margins: a number, or ``batch``: the standard deviation (n - 1) of this
            call's margins.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False, for the reason given in ``MarginMSE``.
    """

    same_index: bool = True
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        _check_options(self.temperature, self.teacher_std)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        t = teacher_scores(scored)
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        has_term = positive.any(dim=1) & negative.any(dim=1)
        hardest = hardest_negative(t, negative)  # (B, 1)
        own = hardest if self.same_index else hardest_negative(z.detach(), negative)
        dz = z - z.gather(1, own)
        dt = _divided(t - t.gather(1, hardest), positive & has_term.unsqueeze(1), self.teacher_std)
        zero = torch.zeros_like(dz)
        values = torch.where(positive, (dt - dz).square(), zero).sum(dim=1)
        above = torch.where(negative, dz.relu().square(), zero).sum(dim=1)  # 0 where the student's own maximum is taken
        return values + above, has_term
