"""A look at teacher scores before they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distill.losses.advice import figures_of, setting_warnings
from distill.protocols import Scored

Array = Tensor | np.ndarray[Any, np.dtype[Any]]

CLIPPED = 0.05
"""Share of the scores at one end of their range from which they look cut off there, if they are more than a few."""
FEW = 3
SURE = 0.01
"""A probability this near to 0 or 1 is saturated."""
TIED = 0.05
"""Share of a row's neighbours with one score from which the order is no longer the teacher's."""
CHUNK = 1024
"""Rows looked at together: losses over pairs hold the square of the columns."""


class TeacherScoreError(ValueError):
    """Teacher scores that no loss may see."""


@runtime_checkable
class PerRow(Protocol):
    """A loss that can say which rows it has a term for."""

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""


def check_teacher_scores(
    teacher: Array, asked: Array, positive: Array, *, losses: Mapping[str, object], scale: float | None = None
) -> list[str]:
    """Warnings with numbers and, where there is one, a value to set; an empty list when nothing is odd.

    Args:
        teacher: (B, K) raw scores, a batch's or the whole training set's.
        asked: (B, K) bool, where a score must be; cells outside are not looked at.
        positive: (B, K) bool, labelled matches.
        losses: the losses to be trained, by name. Their temperatures are held against the scores; for each that reads
            the teacher and knows its rows, the rows it would learn nothing from are counted.
        scale: the student's learned scale, where it is known: without it, losses that have no temperature of their own
            are not held against the scores.

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
    found = [*_range_warnings(teacher[asked]), *_tie_warnings(teacher, asked), *_label_warnings(asked, positive)]
    figures = figures_of(teacher, asked, positive)
    if figures is not None:
        found += setting_warnings(figures, losses, scale=scale)
    return [*found, *_idle(teacher, asked, positive, losses)]


def _range_warnings(scores: Tensor) -> list[str]:
    low, high = scores.min().item(), scores.max().item()
    if low >= 0 and high <= 1:
        return _probability_warnings(scores, low, high)
    found = []
    for end, word in ((high, "highest"), (low, "lowest")):
        share = int((scores == end).sum())
        if high > low and share > max(FEW, CLIPPED * scores.numel()):
            found.append(
                f"{_share(share, scores.numel())} scores equal the {word} one, {end:.4g}: they look cut off there, and "
                "among those the teacher has no order; score again without a limit"
            )
    return found


def _probability_warnings(scores: Tensor, low: float, high: float) -> list[str]:
    said = (
        f"all {scores.numel()} teacher scores lie in [{low:.3g}, {high:.3g}]: they look like probabilities, but losses "
        "read raw logits, and the margins of probabilities vanish; take the log-odds log(p / (1 - p)), before a "
        "softmax or sigmoid rounds them"
    )
    sure = int(((scores < SURE) | (scores > 1 - SURE)).sum())
    if sure * 2 <= scores.numel():
        return [said]
    return [f"{said}; {_share(sure, scores.numel())} are within {SURE} of 0 or 1, where they are saturated"]


def _tie_warnings(teacher: Tensor, asked: Tensor) -> list[str]:
    listed = asked.sum(dim=1) > 1
    ordered = teacher.masked_fill(~asked, -torch.inf).sort(dim=1, descending=True).values
    both = ordered[:, 1:].isfinite()  # the cells asked come first
    same = both & (ordered[:, 1:] == ordered[:, :-1])
    flat = listed & (same == both).all(dim=1)
    tied, rows = int(flat.sum()), int(listed.sum())
    found = [f"{_share(tied, rows)} rows have one and the same teacher score throughout"] if tied else []
    rest = ~flat.unsqueeze(1)
    pairs, equal = int((both & rest).sum()), int((same & rest).sum())
    if pairs and equal > TIED * pairs:
        found.append(
            f"{_share(equal, pairs)} neighbours in the teacher's order of a row have one score: the same item "
            "under several ids, or were they rounded? If rounded, score in float32, or choose a loss that matches "
            "magnitudes (kl, margin_mse) rather than the order"
        )
    return found


def _label_warnings(asked: Tensor, positive: Tensor) -> list[str]:
    there = asked.any(dim=1)
    without = int((there & ~(asked & positive).any(dim=1)).sum())
    if not without:
        return []
    return [
        f"{_share(without, int(there.sum()))} rows have no labelled match among their scored candidates: losses that "
        "need a positive learn nothing from them; score the labelled pairs too"
    ]


def _idle(teacher: Tensor, asked: Tensor, positive: Tensor, losses: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    for name, loss in losses.items():
        if not isinstance(loss, PerRow) or not getattr(loss, "reads_teacher", True) or getattr(loss, "needs", None):
            continue  # cannot say, or reads no teacher scores, or more than scores
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a look must not move the training's random state
            parts = [slice(start, start + CHUNK) for start in range(0, len(teacher), CHUNK)]
            idle = sum(_idle_rows(loss, teacher[part], asked[part], positive[part]) for part in parts)
        if idle:
            rows = _share(idle, asked.shape[0])
            found.append(f"{name} learns nothing from {rows} rows (none accepted or too few)")
    return found


def _idle_rows(loss: PerRow, teacher: Tensor, asked: Tensor, positive: Tensor) -> int:
    score = teacher.masked_fill(~asked, torch.nan)
    # the teacher stands in for the student: which rows have a term never depends on a student that varies
    student = teacher.masked_fill(~asked, 0.0)
    return int((~loss.per_row(Scored(student, score, positive, asked, scale=torch.ones(())))[1]).sum())


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})"
