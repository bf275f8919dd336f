"""What teachers with a two-way matching (ITM) head and a contrastive (ITC) head share: score kinds, scale, row checks.

Shape key: ``P`` pairs, ``U`` distinct items, ``D`` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from distill.protocols import Memory, ScoreKind

if TYPE_CHECKING:
    from torch import Tensor

ITM_SCORE_KINDS: tuple[ScoreKind, ...] = ("log_odds", "logit", "logit+cosine", "cosine")
FIRST_TEMPERATURE = 0.07
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.001, 0.5  # where ALBEF and BLIP clamp the learned temperature


def check_score_kind(kind: str) -> None:
    """Raise ValueError where an ITM teacher cannot give this kind of score."""
    if kind not in ITM_SCORE_KINDS:
        raise ValueError(f"score_kind is {kind!r}; this teacher gives one of {', '.join(ITM_SCORE_KINDS)}")


def scores_from(kind: ScoreKind, logits: Tensor | None, cosine: Tensor | None, *, cosine_weight: float = 1.0) -> Tensor:
    """Raw scores (P,) float32 from the two ITM logits (P, 2), column 1 = match, and the ITC cosine (P,).

    ``log_odds`` is l1 - l0; ``logit`` is l1, as ALBEF ranks; ``logit+cosine`` is what BLIP's published evaluation ranks
    by (``cosine_weight`` 1: unscaled); ``cosine`` needs no logits. What a kind does not need may be None.
    """
    if kind == "cosine":
        return _given(cosine).float()
    two = _given(logits).float()
    if kind == "log_odds":
        return two[:, 1] - two[:, 0]
    if kind == "logit":
        return two[:, 1]
    return two[:, 1] + cosine_weight * _given(cosine).float()


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "pair_scores computes what the kind reads"
    return value


def pair_scores(
    kind: ScoreKind,
    matching: Callable[[Memory, Memory, Tensor, Tensor], Tensor],
    images: Memory,
    texts: Memory,
    rows: tuple[Tensor, Tensor],
    *,
    cosine_weight: float = 1.0,
) -> Tensor:
    """Raw scores (P,) float32 of the pairs of image and text ``rows``; each head runs only where the kind reads it.

    ``matching`` gives the two ITM logits (P, 2) of pairs. ValueError where the rows do not make pairs.
    """
    check_rows(images, texts, *rows)
    logits = None if kind == "cosine" else matching(images, texts, *rows)
    cosine = pair_cosine(images, texts, *rows) if "cosine" in kind else None
    return scores_from(kind, logits, cosine, cosine_weight=cosine_weight)


def pair_cosine(images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
    """Cosines (P,) float32 of the pairs' ``embedding`` rows, which are unit vectors."""
    left = take(images["embedding"], image_rows).float()
    right = take(texts["embedding"], text_rows).float()
    return (left * right.to(left.device)).sum(dim=1)


def take(array: Tensor, rows: Tensor) -> Tensor:
    """Rows of an array, on the array's device."""
    return array.index_select(0, rows.to(array.device))


def check_rows(images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> None:
    """Raise ValueError where the two row vectors do not make pairs of the memories' items."""
    if image_rows.ndim != 1 or image_rows.shape != text_rows.shape:
        raise ValueError(
            f"image_rows and text_rows must share one (P,) shape, got {image_rows.shape}, {text_rows.shape}"
        )
    for name, rows, memory in (("image_rows", image_rows, images), ("text_rows", text_rows, texts)):
        count = len(next(iter(memory.values())))
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= count):
            raise ValueError(f"{name} must lie in 0..{count - 1}, got {int(rows.min())}..{int(rows.max())}")


def first_log_scale() -> Tensor:
    """() log of the scale that a contrastive head starts from, ln(1 / 0.07)."""
    return torch.tensor(math.log(1 / FIRST_TEMPERATURE))


def scale_of(log_scale: Tensor) -> Tensor:
    """() scale within 1/0.5 .. 1/0.001: the value is clamped, the gradient passes, so that it can come back."""
    lowest, highest = math.log(1 / HIGHEST_TEMPERATURE), math.log(1 / LOWEST_TEMPERATURE)
    outside = (log_scale.clamp(lowest, highest) - log_scale).detach()
    return (log_scale + outside).exp()
