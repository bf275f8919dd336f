"""A loss's temperatures held against the scores that it will read: what cannot work, in numbers, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.logits import KL, Pearson, SoftmaxCE
from distill.losses.margin import M3SE, MarginMSE

WIDEST_COSINE = 2.0
"""The largest margin that two cosines can have."""
USUAL_MARGIN = 0.15
"""About the standard deviation of a trained student's cosine margins: what a temperature of this size brings to 1."""
UNDERFLOW = 103.0
"""A float32 softmax is exactly 0 for what lies further below the best than this."""
ONE_HOT = 0.99
"""A softmax with more than this on one candidate says no more than a label."""
APART = 10.0
"""Margins that differ by more than this factor have no common scale."""


@dataclass(frozen=True)
class ScoreFigures:
    """What the scores of a list look like, in the teacher's units."""

    row_std: float  # median over rows of the standard deviation (n - 1) of a row's scores
    row_span: float  # largest difference within a row
    margin_std: float | None  # standard deviation (n - 1) of positive minus negative; None without such pairs
    lists: Tensor  # (R, K) scores of the rows with at least two, -inf elsewhere


def figures_of(teacher: Tensor, asked: Tensor, positive: Tensor) -> ScoreFigures | None:
    """Figures of (B, K) finite scores where ``asked``; None where no row has two."""
    rows = asked.sum(dim=1) > 1
    if not bool(rows.any()):
        return None
    teacher, asked, positive = teacher[rows].double(), asked[rows], positive[rows]
    lists = teacher.masked_fill(~asked, -torch.inf)
    count = asked.sum(dim=1)
    zero = torch.zeros_like(teacher)
    centre = torch.where(asked, teacher, zero).sum(dim=1, keepdim=True) / count.unsqueeze(1)
    centred = torch.where(asked, teacher - centre, zero)
    std = (centred.square().sum(dim=1) / (count - 1)).sqrt()
    span = lists.amax(dim=1) - teacher.masked_fill(~asked, torch.inf).amin(dim=1)
    return ScoreFigures(std.median().item(), span.max().item(), _margin_std(centred, asked, positive), lists)


def _margin_std(centred: Tensor, asked: Tensor, positive: Tensor) -> float | None:
    """Over all pairs of a positive and a negative of one row, from sums, so that no (B, K, K) is held."""
    pos, neg = (asked & positive).double(), (asked & ~positive).double()
    n_pos, n_neg = pos.sum(dim=1), neg.sum(dim=1)
    pairs = (n_pos * n_neg).sum()
    if pairs < 2:
        return None
    sums = [(centred * side).sum(dim=1) for side in (pos, neg)]
    squares = [(centred.square() * side).sum(dim=1) for side in (pos, neg)]
    total = (sums[0] * n_neg - sums[1] * n_pos).sum()
    square = (squares[0] * n_neg + squares[1] * n_pos - 2 * sums[0] * sums[1]).sum()
    return float(((square - total.square() / pairs) / (pairs - 1)).clamp(min=0).sqrt())


def setting_warnings(figures: ScoreFigures, losses: Mapping[str, object], *, scale: float | None) -> list[str]:
    """One sentence for each setting of a loss that these scores make useless."""
    found = []
    for name, loss in losses.items():
        if not getattr(loss, "reads_teacher", True):
            continue
        for said in (_margins(figures, loss, scale), _softmax(figures, loss), _student(loss)):
            if said:
                found.append(f"{name}: {said}")
    return found


def _margins(figures: ScoreFigures, loss: object, scale: float | None) -> str:
    """Margin losses: can the student's margins be as large as the teacher's, and are they not far larger?"""
    if not isinstance(loss, MarginMSE | M3SE) or figures.margin_std is None or isinstance(loss.teacher_std, str):
        return ""
    raw = isinstance(loss, MarginMSE) and loss.convention != "own"
    temperature = 1.0 if raw else loss.temperature
    factor = 1 / temperature if temperature is not None else scale
    if factor is None:
        return ""
    theirs = figures.margin_std / loss.teacher_std
    suggested = f"teacher_std: {figures.margin_std:.3g} with temperature: {USUAL_MARGIN} brings both near 1"
    if theirs > WIDEST_COSINE * factor:
        return (
            f"the teacher's margins spread by {theirs:.3g}, the student's can be {WIDEST_COSINE * factor:.3g} at most "
            f"(cosine times {factor:.3g}): it can never match them; {suggested}"
        )
    ours = USUAL_MARGIN * factor
    if ours > APART * theirs:
        return (
            f"the teacher's margins spread by {theirs:.3g}, the student's by about {ours:.3g} (cosine times "
            f"{factor:.3g}): it would learn to have none; {suggested}"
        )
    return ""


def _softmax(figures: ScoreFigures, loss: object) -> str:
    """Losses with a softmax of the teacher: what it leaves of a list."""
    reads = (
        (isinstance(loss, KL) and not loss.zscore)
        or (isinstance(loss, SoftmaxCE) and loss.target == "teacher")
        or (isinstance(loss, Pearson) and loss.of == "softmax")
    )
    divisor = getattr(loss, "teacher_std", 1.0)
    if not reads or isinstance(divisor, str) or figures.row_std == 0:
        return ""
    temperature: float = loss.teacher_temperature  # type: ignore[attr-defined]  # one of the three
    logits = figures.lists / (divisor * temperature)
    top = logits.softmax(dim=1).amax(dim=1)
    gone = logits.isfinite() & (logits < logits.amax(dim=1, keepdim=True) - UNDERFLOW)
    sure, rows, lost, cells = int((top > ONE_HOT).sum()), len(top), int(gone.sum()), int(logits.isfinite().sum())
    if sure * 2 <= rows and not lost:
        return ""
    said = f"teacher_temperature {temperature:g} leaves over {ONE_HOT:.0%} on one candidate in {sure} of {rows} rows"
    if lost:
        said += f" and underflows to exactly 0 for {lost} of {cells} (rows span up to {figures.row_span:.3g})"
    return (
        f"{said}: what is left says no more than a label; teacher_temperature: {figures.row_std / divisor:.3g}, the "
        "median standard deviation of a row, leaves the order in it"
    )


def _student(loss: object) -> str:
    temperature = getattr(loss, "temperature", None)
    if temperature is None or WIDEST_COSINE / temperature <= 2 * UNDERFLOW or getattr(loss, "zscore", False):
        return ""
    return (
        f"temperature {temperature:g} spreads cosines over up to {WIDEST_COSINE / temperature:.0f}, and what lies "
        f"{UNDERFLOW:.0f} below the best has no gradient left in float32; temperature: "
        f"{WIDEST_COSINE / UNDERFLOW:.2g} or more"
    )
