"""The contrastive loss: no teacher, every true match a positive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from torch.nn.functional import softplus

from distill.losses.numeric import (
    LOW,
    check_choice,
    check_positive,
    log_softmax_over,
    mean_over,
    row_mean,
    student_logits,
)

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

Positives = Literal["softmax_all", "shared"]
Negatives = Literal["in_batch", "all"]


def in_scope(scored: Scored, negatives: Negatives) -> tuple[Tensor, Tensor]:
    """Positives and negatives (B, K) bool, each, among the columns in scope; ``all`` takes mined columns too."""
    scope = scored.valid
    if negatives == "in_batch" and scored.in_batch is not None:
        scope = scope & scored.in_batch
    return scope & scored.positive, scope & ~scored.positive


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """InfoNCE with all positives of a row, for one direction.

    ``softmax_all``: the mean over the positives p of -log(e^z_p / (e^z_p + sum over negatives e^z_n)); the other
    positives are in nobody's denominator, so no true match is ever pushed away. ``shared``: cross-entropy with a target
    spread evenly over the positives, all of them in the one denominator (ALBEF, arXiv 2107.07651; BLIP).

    A row has a term where it has a positive among the columns in scope and something else to compare it with. A
    positive outside the scope is ignored: it is never a negative.

    Attributes:
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. True here, and in what takes its place (``SigLIP``,
            ``Momentum``): the scale belongs to this loss, every other one reads the value that it has learned.
        positives: how several positives of one row share the loss.
        negatives: ``in_batch`` uses only columns of the batch's own items (every column when ``Scored.in_batch`` is
            None); ``all`` uses mined columns too.
    """

    reads_teacher: ClassVar[bool] = False

    temperature: float | None = None
    train_scale: bool = True
    positives: Positives = "softmax_all"
    negatives: Negatives = "in_batch"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("positives", self.positives, get_args(Positives))
        check_choice("negatives", self.negatives, get_args(Negatives))

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        positive, negative = in_scope(scored, self.negatives)
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)  # (B, K)
        if self.positives == "shared":
            scope = positive | negative
            return row_mean(-log_softmax_over(z, scope), positive), positive.any(dim=1) & (scope.sum(dim=1) > 1)
        others = z.masked_fill(~negative, LOW).logsumexp(dim=1, keepdim=True)  # (B, 1)
        # softplus of the difference keeps the digits that a difference of two logarithms would cancel
        values = softplus(others - z, threshold=50.0)
        return row_mean(values, positive), positive.any(dim=1) & negative.any(dim=1)
