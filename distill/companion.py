"""What goes with the student through a training and is no part of it: its slow copy, a learned map of its scores.

A companion is in the checkpoints, so that a killed training goes on as it was, and not in the exported student.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.inference import device_of
from distill.protocols import SIDES
from distill.ranks import Ranks
from distill.slow_copy import MomentumSettings, SlowCopy, positives

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from distill.batches import StepBatch
    from distill.data.matches import Matches
    from distill.protocols import Direction, Embeddings

log = logging.getLogger(__name__)
KEYS = frozenset({"keys_student", "keys_momentum", "keys_positive", "keys_valid"})
CUT_KEYS = frozenset({"keys_queries", "keys_vectors"})  # beside them, for whoever cuts vectors: (B, D), (C, D)
AFFINE = frozenset({"affine"})
AFFINE_LR = 0.01  # at the height of the schedule: 1 % of the factor a step, whatever the student's own rate


class Companion:
    """Made of what the losses need; empty where they need nothing of it."""

    def __init__(self, student: nn.Module, needs: frozenset[str], momentum: MomentumSettings | None) -> None:
        """``momentum``: of the slow copy; its defaults where a loss needs one and nothing was said."""
        self.slow = SlowCopy(student, momentum or MomentumSettings()) if needs & KEYS else None
        # b = a * shift: exp(log_a) and shift are of like size whatever the teacher's scale, and a stays positive
        self._affine = torch.zeros(2, device=device_of(student)).requires_grad_() if needs & AFFINE else None
        self._optimizer = (
            None if self._affine is None else torch.optim.AdamW([self._affine], lr=AFFINE_LR, weight_decay=0.0)
        )
        self._fresh = True

    @property
    def is_empty(self) -> bool:
        """Whether the losses need nothing of it."""
        return self.slow is None and self._affine is None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        own: dict[str, Any] = {}
        if self._affine is not None and self._optimizer is not None:
            own |= {"affine": self._affine.detach().clone(), "optimizer": self._optimizer.state_dict()}
        return own | ({} if self.slow is None else {"slow": self.slow.state()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of other losses, as the shared steps have it, leaves this companion fresh."""
        fits = state.keys() == self.state_dict().keys()
        if not fits or (self.slow is not None and not self.slow.load(state["slow"])):
            log.info("the slow copy and what is learned beside the student begin anew: the losses are others")
            return
        if self._affine is not None and self._optimizer is not None:
            with torch.no_grad():
                self._affine.copy_(state["affine"])
            self._optimizer.load_state_dict(state["optimizer"])
        self._fresh = False

    def begin_step(self, student: nn.Module) -> None:
        """Before a step: the copy follows the student; at the very first, it becomes the student."""
        if self.slow is not None:
            (self.slow.begin if self._fresh else self.slow.follow)(student)

    def extras(
        self, out: Embeddings, batch: StepBatch, matches: Matches, accelerator: Accelerator
    ) -> dict[Direction, dict[str, Tensor]]:
        """What the losses of each direction read of it. Once a step: the batch's keys join the queue."""
        assert out.images is not None
        if self._fresh and self._affine is not None:
            with torch.no_grad():
                self._affine[0] = out.scale.log()  # a * s is then the student's own logit
        self._fresh = False
        affine = self.affine()
        shared = {} if affine is None else {"affine": affine}
        made: dict[Direction, dict[str, Tensor]] = {"i2t": dict(shared), "t2i": dict(shared)}
        if self.slow is not None:
            for direction, keys in _keys(self.slow, out, batch, matches, accelerator).items():
                made[direction] |= keys
        return made

    def affine(self) -> Tensor | None:
        """(2,) a and b of a * s + b, with gradient; None where no loss reads them."""
        if self._affine is None:
            return None
        a = self._affine[0].exp()
        return torch.stack([a, a * self._affine[1]])

    def step(self, share: float, scaler: Any) -> None:
        """Move what is learned, after a backward pass.

        Args:
            share: of the full rate, as the schedule has it.
            scaler: gradient scaler of fp16, which has multiplied the gradient; None elsewhere.
        """
        if self._affine is None or self._optimizer is None or self._affine.grad is None:
            return
        if scaler is not None:
            self._affine.grad /= scaler.get_scale()
        if bool(self._affine.grad.isfinite().all()):
            self._optimizer.param_groups[0]["lr"] = AFFINE_LR * share
            self._optimizer.step()
        self._optimizer.zero_grad()

    def logged(self) -> dict[str, float]:
        """Values for the metrics."""
        affine = self.affine()
        return {} if affine is None else dict(zip(("affine_a", "affine_b"), affine.detach().tolist(), strict=True))


def _keys(
    slow: SlowCopy,
    out: Embeddings,
    batch: StepBatch,
    matches: Matches,
    accelerator: Accelerator,
) -> dict[Direction, dict[str, Tensor]]:
    """Queries of the batch against the copy's vectors of the batch's own items and of the queue."""
    assert out.images is not None
    assert out.texts is not None
    device = out.images.device
    rows = {"image": batch.grids["i2t"].rows, "text": batch.grids["t2i"].rows}
    ranks, inputs, sizes = Ranks(accelerator), [], []
    for side, share in zip(SIDES, (batch.images, batch.texts), strict=True):
        # queries, ascending, among the encoded items; each process holds the inputs of its share of these
        wanted = np.searchsorted(batch.encoded_rows(side), rows[side].numpy())
        shares = ranks.shares(len(batch.encoded_rows(side)))
        ends = np.searchsorted(wanted, [0, *(one.stop for one in shares)])
        own = wanted[ends[ranks.index] : ends[ranks.index + 1]] - shares[ranks.index].start
        inputs.append({name: tensor[torch.from_numpy(own)].to(device) for name, tensor in share.items()})
        sizes.append(np.diff(ends).tolist())
    with accelerator.autocast():
        images, texts = slow.encode(*inputs)
    images, texts = ranks.joined(images, sizes[0]), ranks.joined(texts, sizes[1])
    image_ids = torch.from_numpy(batch.image_ids)[rows["image"]]
    text_ids = torch.from_numpy(batch.text_ids)[rows["text"]]
    of_direction: tuple[tuple[Direction, Tensor, Tensor, Tensor, Tensor, Tensor], ...] = (
        ("i2t", out.images[rows["image"].to(device)], images, image_ids, texts, text_ids),
        ("t2i", out.texts[rows["text"].to(device)], texts, text_ids, images, image_ids),
    )
    made: dict[Direction, dict[str, Tensor]] = {}
    for direction, student, momentum, query_ids, own, own_ids in of_direction:
        queue = slow.texts if direction == "i2t" else slow.images
        keys = torch.cat([own, queue.vectors])  # (C, D)
        key_ids = torch.cat([own_ids, queue.ids.cpu()])
        true = positives(matches, direction, query_ids.numpy(), key_ids.numpy())
        made[direction] = {
            "keys_student": student.float() @ keys.T,
            "keys_queries": student.float(),
            "keys_vectors": keys,
            "keys_momentum": momentum @ keys.T,
            "keys_positive": true.to(device),
            "keys_valid": (key_ids >= 0).to(device).expand(len(query_ids), -1),
        }
    slow.images.add(images, image_ids)
    slow.texts.add(texts, text_ids)
    return made
