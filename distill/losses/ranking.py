"""Losses that read only the teacher's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from distill.losses.numeric import (
    LOW,
    check_choice,
    check_positive,
    mean_over,
    student_logits,
    teacher_order,
    teacher_scores,
)

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

Accept = Literal["log_odds", "margin", "top", "fraction"]


def plackett_luce(z: Tensor, order: Tensor, accepted: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
    """-log P(order | student) of a list, cut at the first item that is not accepted.

    Args:
        z: (B, K) scaled student scores.
        order: (B, K) columns, best first; the listed ones must come before the others.
        accepted: (B, K) bool, by column.
        listed: (B, K) bool, by column: what is in the list at all. With everything accepted the result is ListMLE's.

    Returns:
        The sum over the accepted items (B,) and how many there are (B,).
    """
    z = z.masked_fill(~listed, LOW)
    z = (z - z.detach().amax(dim=1, keepdim=True)).gather(1, order)  # around 0, where float32 is finest
    keep = (accepted & listed).gather(1, order).int().cumprod(dim=1).bool()  # True until the first item refused
    tail = z.flip(1).logcumsumexp(dim=1).flip(1)  # (B, K) log of the sum over k >= j of exp z_k
    return torch.where(keep, tail - z, torch.zeros_like(z)).sum(dim=1), keep.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class CPRD:
    """Contrastive partial ranking distillation (Chen et al., CVPR 2024, arXiv 2407.07479), for one direction.

    The negatives that the teacher scored are sorted by it, best first. Each accepted one in turn plays the positive of
    an InfoNCE against everything ranked below it; what is not accepted is only pushed down, in no order. It is the
    Plackett-Luce likelihood of the teacher's order, cut at the first item that is not accepted.

    The paper's acceptance threshold, temperature and normalisation are not public; they are options here. A row has a
    term where its first item is accepted and its list has at least two.

    Attributes:
        accept: ``log_odds``: teacher score >= ``threshold``; right only for a teacher whose scores are log-odds.
            ``margin``: teacher score >= that of the row's best scored positive - ``margin``; a row without one accepts
            nothing. ``top``: the first ``top`` of the list. ``fraction``: that share of the list, rounded up.
        threshold: for ``log_odds``; None is 0, an even chance.
        margin: for ``margin``, in the teacher's units; may be negative.
        top: for ``top``.
        fraction: for ``fraction``, in (0, 1].
        positive: ``out`` leaves labelled positives to the contrastive loss. ``first`` puts the scored ones at the head
            of the list, in the teacher's order among themselves, always accepted and beside the count of ``top`` and
            ``fraction``.
        normalise: ``mean`` or ``sum`` over the accepted items of a row.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it. Without either
            the terms are nearly flat for unit vectors.
        train_scale: let this loss train the learned scale. False: distillation would bend the scale to suit the
            teacher, and the contrastive loss owns it.
    """

    accept: Accept = "log_odds"
    threshold: float | None = None
    margin: float | None = None
    top: int | None = None
    fraction: float | None = None
    positive: Literal["out", "first"] = "out"
    normalise: Literal["mean", "sum"] = "mean"
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("accept", self.accept, get_args(Accept))
        check_choice("positive", self.positive, ("out", "first"))
        check_choice("normalise", self.normalise, ("mean", "sum"))
        given = {"log_odds": self.threshold, "margin": self.margin, "top": self.top, "fraction": self.fraction}
        option = {"log_odds": "threshold"}
        for rule, value in given.items():
            if rule != self.accept and value is not None:
                name = option.get(rule, rule)
                raise ValueError(f"{name}={value} is read only with accept={rule!r}, but accept is {self.accept!r}")
        if self.accept != "log_odds" and given[self.accept] is None:
            raise ValueError(f"accept={self.accept!r} needs a value for {self.accept}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        teacher = teacher_scores(scored)
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        head = positive if self.positive == "first" else torch.zeros_like(positive)
        listed = head | negative
        order = teacher_order(teacher, head, negative)
        accepted = head | (negative & self._accepted(teacher, positive, negative))
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        total, count = plackett_luce(z, order, accepted, listed)
        has_term = (count > 0) & (listed.sum(dim=1) > 1)
        return (total / count.clamp(min=1) if self.normalise == "mean" else total), has_term

    def _accepted(self, teacher: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(B, K) bool, meaningful at the negatives."""
        if self.accept == "log_odds":
            return teacher >= (self.threshold or 0.0)
        if self.accept == "margin":
            best = teacher.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # (B, 1)
            return (teacher >= best - (self.margin or 0.0)) & positive.any(dim=1, keepdim=True)
        rank = teacher_order(teacher, negative, negative).argsort(dim=1)  # (B, K) 0 = the teacher's best negative
        if self.accept == "top":
            return rank < (self.top or 0)
        # 0.28 * 25 is a little more than 7 in floating point and must not be rounded up to 8
        return rank < negative.sum(dim=1, keepdim=True).double() * (self.fraction or 0.0) - 1e-9
