"""What divides a teacher's scores: one option of every loss that matches magnitudes, and never a hidden one.

``teacher_std`` is a number (best: a standard deviation measured once over the training set), ``row``: the standard
deviation (n - 1) of each row's scores, or ``batch``: that of what this call sees. Where a loss is blind to a shift of
the teacher's scores, dividing by their deviation is the whole of a z-score; where it is not, the mean goes first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.losses.numeric import FLAT, check_choice, check_positive, mean_over, varies

TeacherStd = float | Literal["row", "batch"]

ENOUGH = 4
"""Scores that a row needs before its standard deviation says anything."""


def check_teacher_std(value: TeacherStd) -> None:
    """Raise ValueError unless it is ``row``, ``batch`` or a positive number."""
    if isinstance(value, str):
        check_choice("teacher_std", value, ("row", "batch", "a positive number"))
    else:
        check_positive("teacher_std", value)


def usable_rows(teacher: Tensor, there: Tensor, teacher_std: TeacherStd) -> Tensor:
    """(B,) bool: rows that can be divided; with ``row``, only those with enough scores that are not all equal."""
    if teacher_std == "row":
        return (there.sum(dim=1) >= ENOUGH) & varies(teacher, there)
    return torch.ones_like(there[:, 0])


def unit(values: Tensor, there: Tensor, teacher_std: TeacherStd) -> Tensor:
    """What divides ``values`` (B, K): (), (B, 1) or (1, 1); 1 where nothing varies."""
    if not isinstance(teacher_std, str):
        return values.new_full((), teacher_std)
    return _spread(values, there, dims=(1,) if teacher_std == "row" else (0, 1))[1]


def mean_unit(values: Tensor, there: Tensor, teacher_std: TeacherStd) -> Tensor:
    """(), ``unit`` for a log: with ``row`` the mean over the rows that can be divided."""
    divisor = unit(values, there, teacher_std)
    if teacher_std == "row":
        return mean_over(divisor.squeeze(1), usable_rows(values, there, teacher_std))
    return divisor.squeeze()


def standardised(values: Tensor, there: Tensor, teacher_std: TeacherStd) -> Tensor:
    """Values over the number; with ``row`` or ``batch`` their z-score. 0 where nothing is."""
    if not isinstance(teacher_std, str):
        return values / teacher_std
    centred, std = _spread(values, there, dims=(1,) if teacher_std == "row" else (0, 1))
    return centred / std


def spread_of(values: Tensor, keep: Tensor) -> Tensor:
    """() standard deviation (n - 1) of the kept values, of any shape; 1 where they do not vary."""
    return _spread(values, keep, dims=tuple(range(values.dim())))[1].squeeze()


def _spread(values: Tensor, keep: Tensor, *, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values around their mean, 0 where not kept, and their deviation with the summed dimensions kept as 1."""
    zero = torch.zeros_like(values)
    values = torch.where(keep, values, zero)
    count = keep.sum(dim=dims, keepdim=True)
    centred = torch.where(keep, values - values.sum(dim=dims, keepdim=True) / count.clamp(min=1), zero)
    std = (centred.square().sum(dim=dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    size = values.abs().amax(dim=dims, keepdim=True).clamp(min=1)
    return centred, torch.where(std > FLAT * size, std, torch.ones_like(std))
