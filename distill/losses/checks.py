"""A look at teacher scores before they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distill.losses.contrastive import Contrastive
from distill.protocols import Scored

Array = Tensor | np.ndarray[Any, np.dtype[Any]]


class TeacherScoreError(ValueError):
    """Teacher scores that no loss may see."""


@runtime_checkable
class PerRow(Protocol):
    """A loss that can say which rows it has a term for."""

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""


def check_teacher_scores(teacher: Array, asked: Array, positive: Array, *, losses: Mapping[str, object]) -> list[str]:
    """Warnings with numbers, one sentence each; an empty list when nothing is odd.

    Args:
        teacher: (B, K) raw scores, a batch's or the whole training set's.
        asked: (B, K) bool, where a score must be; cells outside are not looked at.
        positive: (B, K) bool, labelled matches.
        losses: the losses to be trained, by name. For each that reads the teacher and knows its rows, the rows it would
            learn nothing from are counted.

    Raises:
        TeacherScoreError: a score that must be there is NaN or infinite.
    """
    teacher = torch.as_tensor(teacher).double()
    asked, positive = torch.as_tensor(asked), torch.as_tensor(positive)
    bad = asked & ~teacher.isfinite()
    if bool(bad.any()):
        rows = bad.any(dim=1).nonzero().flatten().tolist()
        raise TeacherScoreError(
            f"{int(bad.sum())} of {int(asked.sum())} teacher scores are NaN or infinite, first in rows {rows[:8]}: "
            "score these pairs again before training"
        )
    if not bool(asked.any()):
        return ["the teacher was asked for no pair at all: nothing can be distilled"]
    return [*_range_warnings(teacher[asked]), *_tie_warnings(teacher, asked), *_idle(teacher, asked, positive, losses)]


def _range_warnings(scores: Tensor) -> list[str]:
    low, high = scores.min().item(), scores.max().item()
    if low < 0 or high > 1:
        return []
    return [
        f"all {scores.numel()} teacher scores lie in [{low:.3g}, {high:.3g}]: they look like probabilities, but losses "
        "read raw logits, and the margins of probabilities vanish"
    ]


def _tie_warnings(teacher: Tensor, asked: Tensor) -> list[str]:
    listed = asked.sum(dim=1) > 1
    top = teacher.masked_fill(~asked, -torch.inf).amax(dim=1)
    bottom = teacher.masked_fill(~asked, torch.inf).amin(dim=1)
    tied, rows = int((listed & (top == bottom)).sum()), int(listed.sum())
    return [f"{_share(tied, rows)} rows have one and the same teacher score throughout"] if tied else []


def _idle(teacher: Tensor, asked: Tensor, positive: Tensor, losses: Mapping[str, object]) -> list[str]:
    score = teacher.masked_fill(~asked, torch.nan)
    # the teacher stands in for the student: which rows have a term never depends on a student that varies
    student = teacher.masked_fill(~asked, 0.0)
    scored = Scored(student, score, positive, asked, scale=torch.ones(()))
    found: list[str] = []
    for name, loss in losses.items():
        if isinstance(loss, Contrastive) or not isinstance(loss, PerRow):
            continue  # reads no teacher scores, or cannot say
        idle = int((~loss.per_row(scored)[1]).sum())
        if idle:
            rows = _share(idle, asked.shape[0])
            found.append(f"{name} learns nothing from {rows} rows (none accepted or too few)")
    return found


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})"
