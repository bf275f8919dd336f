"""Retrieval losses without a teacher, beside InfoNCE: SigLIP and the hinges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch.nn.functional import softplus

from distill.losses.contrastive import Negatives, in_scope
from distill.losses.numeric import check_choice, check_positive, full, mean_over, row_mean, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored


@dataclass(frozen=True, kw_only=True)
class SigLIP:
    """Sigmoid loss (Zhai et al., ICCV 2023, arXiv 2303.15343), one direction.

    Sum over a row's columns of -log sigmoid(y (z + bias)), y = 1 at every true match and -1 elsewhere. Averaged over
    both directions of a square batch it is the paper's. A row needs a positive and a negative in scope.

    Attributes:
        bias: added to the scaled score, so that the many negatives start out right. The paper learns it from -10; a
            loss holds no parameters here, so it stays what it is given.
        temperature: None multiplies the cosine by the student's learned scale (the paper's starts at 10); a number
            divides by it.
        train_scale: let this loss train the learned scale. True, as in ``Contrastive``: use one of the two.
        negatives: ``in_batch`` uses only columns of the batch's own items (every column when ``Scored.in_batch`` is
            None); ``all`` uses mined columns too.
    """

    reads_teacher: ClassVar[bool] = False

    bias: float = -10.0
    temperature: float | None = None
    train_scale: bool = True
    negatives: Negatives = "in_batch"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("negatives", self.negatives, get_args(Negatives))

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        positive, negative = in_scope(scored, self.negatives)
        z = student_logits(scored, self.temperature, train_scale=self.train_scale) + self.bias
        values = softplus(torch.where(positive, -z, z), threshold=50.0)
        has_term = positive.any(dim=1) & negative.any(dim=1)
        return torch.where(positive | negative, values, torch.zeros_like(values)).sum(dim=1), has_term


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """Triplet hinge on the cosine itself, no scale, one direction.

    For each positive p of a row: the sum over negatives n of relu(margin - s_p + s_n) (``hardest=False``, VSE0), or
    its largest term (``hardest=True``, VSE++, Faghri et al., BMVC 2018, arXiv 1707.05612); then the mean over the
    positives. Other captions of an image are positives and never its negatives. The usual warm-up, sums for an epoch
    and then the hardest alone, is two parts of a sum with schedules. A row needs a positive and a negative in scope.

    Attributes:
        margin: 0.2 is usual.
        hardest: only the worst violation counts.
        reduction: ``mean`` over the rows, or their ``sum``, as VSE++ and its followers do (CORA takes the mean).
        negatives: as in ``SigLIP``.
    """

    reads_teacher: ClassVar[bool] = False

    margin: float = 0.2
    hardest: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    negatives: Negatives = "in_batch"

    def __post_init__(self) -> None:
        check_positive("margin", self.margin)
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_choice("negatives", self.negatives, get_args(Negatives))

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean (or sum) over the rows that have a term; 0 when none has."""
        values, has_term = self.per_row(scored)
        if self.reduction == "sum":
            return torch.where(has_term, values, torch.zeros_like(values)).sum()
        return mean_over(values, has_term)

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        positive, negative = in_scope(scored, self.negatives)
        s = torch.where(scored.valid, full(scored.student), torch.zeros_like(full(scored.student)))
        has_term = positive.any(dim=1) & negative.any(dim=1)
        if self.hardest:  # the worst negative is the same for every positive, so no (B, K, K) is needed
            worst = s.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
            worst = torch.where(has_term.unsqueeze(1), worst, torch.zeros_like(worst))
            return row_mean((self.margin - s + worst).relu(), positive), has_term
        pair = positive.unsqueeze(2) & negative.unsqueeze(1)  # (B, K, K): positive i, negative j
        cost = (self.margin - s.unsqueeze(2) + s.unsqueeze(1)).relu()
        values = torch.where(pair, cost, torch.zeros_like(cost)).sum(dim=2)
        return row_mean(values, positive), has_term
