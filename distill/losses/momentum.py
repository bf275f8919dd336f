"""Momentum distillation: soft targets from a slow copy of the student, over the batch and a queue of older items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distill.losses.embedding import need
from distill.losses.numeric import check_positive, full, log_softmax_over, mean_over

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored


def same_item(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B, C) bool: a key belongs to the query's item. Ids (B,) and (C,); below 0, as in an empty queue slot: no match.

    The id is that of the image on both sides (a caption's is its image's), so that other captions of an image in the
    batch or the queue are positives and never negatives.
    """
    return (query_ids.unsqueeze(1) == key_ids.unsqueeze(0)) & (key_ids >= 0) & (query_ids >= 0).unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """Contrastive loss with momentum distillation (ALBEF, NeurIPS 2021, arXiv 2107.07651; BLIP), one direction.

    -sum over keys of y log softmax(z), y = alpha softmax(z') + (1 - alpha) p: z compares the student's query with the
    momentum model's keys (batch and queue), z' the momentum model's own query with them, p is spread evenly over the
    keys of the query's item. The target holds no gradient. With ``alpha`` 0 it is a contrastive loss with several
    positives. The loss is linear in alpha, so ALBEF's ramp from 0 to 0.4 over the first epoch is two parts with
    schedules: ``alpha=0`` at a weight of 1 down to 0.6, and ``alpha=1`` at 0 up to 0.4. A row needs a positive key, and
    another key to compare it with.

    Reads ``Scored.extras``: ``keys_student`` (B, C), cosines of this direction's queries with the momentum keys, with
    gradient; ``keys_momentum`` (B, C), the same of the momentum model's queries; ``keys_positive`` (B, C) bool, see
    ``same_item``; ``keys_valid`` (B, C) bool, False for slots of the queue that are still empty. Of the scores only
    ``Scored.scale`` is read.

    Attributes:
        alpha: share of the soft targets, 0 to 1.
        temperature: of both sides: None multiplies the cosines by the student's learned scale; a number divides.
        train_scale: let this loss train the learned scale. True, as in ``Contrastive``: use one of the two.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_student", "keys_momentum", "keys_positive", "keys_valid"})
    reads_teacher: ClassVar[bool] = False

    alpha: float = 0.4
    temperature: float | None = None
    train_scale: bool = True

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has.

        Raises:
            ValueError: an extra is missing, or the shapes do not agree.
        """
        need(scored.extras, self.needs, "momentum")
        student, momentum, positive, valid = (
            scored.extras[name] for name in ("keys_student", "keys_momentum", "keys_positive", "keys_valid")
        )
        shapes = {tuple(tensor.shape) for tensor in (student, momentum, positive, valid)}
        if len(shapes) > 1 or student.dim() != 2:
            raise ValueError(f"the four extras of momentum must share one (queries, keys) shape, got {sorted(shapes)}")
        positive = positive & valid
        zero = torch.zeros_like(full(student))
        log_q = log_softmax_over(self._logits(torch.where(valid, full(student), zero), scored), valid)
        with torch.no_grad():
            soft = log_softmax_over(self._logits(torch.where(valid, full(momentum), zero), scored), valid).exp()
            hard = positive.to(soft) / positive.sum(dim=1, keepdim=True).clamp(min=1)
            target = self.alpha * soft + (1 - self.alpha) * hard
        values = -torch.where(valid, target * log_q, zero).sum(dim=1)
        return mean_over(values, positive.any(dim=1) & (valid.sum(dim=1) > 1))

    def _logits(self, cosines: Tensor, scored: Scored) -> Tensor:
        if self.temperature is not None:
            return cosines / self.temperature
        return cosines * full(scored.scale if self.train_scale else scored.scale.detach())
