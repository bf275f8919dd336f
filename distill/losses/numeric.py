"""The arithmetic that every loss shares: masks before numbers, precision, means over rows, the teacher's order.

A row *has a term* where the loss could depend on the student: a softmax over one candidate, or a margin with no
negative, is a constant. Rows without a term are left out of the mean instead of pulling it towards zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distill.protocols import Scored

LOW = -1e30
"""Finite stand-in for minus infinity: -inf gives 0 * inf = NaN in gradients. Far below any scaled score, so that
padding weighs nothing even in a row whose real scores are at -1e6."""

FLAT = 1e-5
"""Scores that differ by less than this share of their size (or of 1) count as all equal: below it, float32 sees
noise."""


def full(values: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, so that gradients can be checked."""
    return values if values.dtype == torch.float64 else values.float()


def student_logits(scored: Scored, temperature: float | None, *, train_scale: bool) -> Tensor:
    """Scaled student scores z (B, K), 0 where there is no candidate.

    Args:
        scored: the batch.
        temperature: z = student / temperature; None takes the student's learned scale, z = student * scale.
        train_scale: let gradient reach the learned scale. A distillation loss would use it to fit the teacher's
            arbitrary magnitude (or to flatten its own softmax), and with it undo the temperature the contrastive loss
            has learned.
    """
    student = full(scored.student)
    student = torch.where(scored.valid, student, torch.zeros_like(student))  # padding may hold anything, NaN too
    if temperature is not None:
        return student / temperature
    return student * full(scored.scale if train_scale else scored.scale.detach())


def teacher_scores(scored: Scored) -> Tensor:
    """Raw teacher scores (B, K), detached, 0 wherever the teacher was not asked: NaN never reaches arithmetic."""
    teacher = full(scored.teacher.detach())
    return torch.where(scored.asked, teacher, torch.zeros_like(teacher))


def mean_over(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept entries; 0 with a graph when none is kept."""
    return torch.where(keep, values, torch.zeros_like(values)).sum() / keep.sum().clamp(min=1)


def row_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept entries of each row; every dimension after the first belongs to the row. -> (B,)."""
    values, keep = values.flatten(1), keep.flatten(1)
    return torch.where(keep, values, torch.zeros_like(values)).sum(dim=1) / keep.sum(dim=1).clamp(min=1)


def log_softmax_over(logits: Tensor, there: Tensor) -> Tensor:
    """Log-softmax of each row over the cells that are there; finite elsewhere too."""
    return logits.masked_fill(~there, LOW).log_softmax(dim=1)


def standardise(values: Tensor, there: Tensor) -> Tensor:
    """Zero mean and unit deviation (n - 1) over the cells of each row that are there; the others become 0."""
    zero = torch.zeros_like(values)
    values = torch.where(there, values, zero)
    count = there.sum(dim=1, keepdim=True)
    centred = torch.where(there, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), zero)
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (1e-7 + variance.clamp(min=1e-24).sqrt())  # the clamp keeps the gradient of the root finite


def varies(values: Tensor, there: Tensor) -> Tensor:
    """(B,) bool: the cells that are there are not all equal up to rounding."""
    values = values.detach()
    top = values.masked_fill(~there, -torch.inf).amax(dim=1)
    bottom = values.masked_fill(~there, torch.inf).amin(dim=1)
    return top - bottom > FLAT * torch.maximum(top.abs(), bottom.abs()).clamp(min=1)  # (B,)


def teacher_order(teacher: Tensor, first: Tensor, then: Tensor) -> Tensor:
    """Columns (B, K) of ``first``, then of ``then``, then the rest; within each by teacher score, ties by column."""
    order = teacher.argsort(dim=1, descending=True, stable=True)
    group = (~first).int() + (~first & ~then).int()  # 0, 1, 2
    return order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError unless ``value`` is None or a positive finite number."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
