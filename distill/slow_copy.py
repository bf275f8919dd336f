"""A slow copy of the student and a queue of its older vectors: what momentum distillation compares a batch with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.matches import ragged_ranges
from distill.inference import device_of
from distill.sharding import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.data.matches import Matches
    from distill.protocols import Direction, Embeddings, Ids

EMPTY = -1  # "no item", as everywhere


@dataclass(frozen=True)
class MomentumSettings:
    """How slow the copy is, and how much it remembers.

    Attributes:
        decay: share of the copy's weights that a step keeps; the rest comes from the student (ALBEF: 0.995).
        queue: items of each side that are remembered; 0 = the batch alone (ALBEF: 65,536).
    """

    decay: float = 0.995
    queue: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1 or self.queue < 0:
            raise ValueError(f"decay must be in [0, 1] and queue at least 0, got {self.decay!r} and {self.queue!r}")


class Queue(nn.Module):
    """The newest vectors of one side and whose they are, in a ring."""

    vectors: Tensor  # (Q, D) unit
    ids: Tensor  # (Q,) rows of the corpus; EMPTY where nothing is yet
    at: Tensor  # () where the next one goes

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(length, dim))
        self.register_buffer("ids", torch.full((length,), EMPTY))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        """Vectors (N, D) and ids (N,) take the place of the oldest; of more than Q, the last Q stay."""
        length = len(self.ids)
        if not length:
            return
        vectors, ids = vectors[-length:], ids[-length:].to(self.ids.device)
        places = (self.at + torch.arange(len(ids), device=self.ids.device)) % length
        self.vectors[places] = vectors.to(self.vectors)
        self.ids[places] = ids
        self.at.copy_((self.at + len(ids)) % length)


class SlowCopy(nn.Module):
    """The copy, never trained, and a queue of each side."""

    def __init__(self, student: Any, settings: MomentumSettings) -> None:
        """``student``: what is copied, as it is now; frozen weights are shared, not copied."""
        super().__init__()
        self.settings = settings
        self.model: Any = copy.deepcopy(student).requires_grad_(False)
        self._moving = tuple(name for name, weight in student.named_parameters() if weight.requires_grad)
        own = dict(self.model.named_parameters())
        for name, weight in student.named_parameters():
            if name not in self._moving:
                own[name].data = weight.data
        self.images, self.texts = (Queue(settings.queue, student.dim).to(device_of(student)) for _ in range(2))

    def begin(self, student: nn.Module) -> None:
        """Start anew from the student's weights, with empty queues."""
        self._step_towards(student, decay=0.0)
        for queue in (self.images, self.texts):
            queue.ids.fill_(EMPTY)
            queue.at.zero_()

    def follow(self, student: nn.Module) -> None:
        """Copy = decay * copy + (1 - decay) * student; before each step, as ALBEF does. Buffers are taken over."""
        self._step_towards(student, decay=self.settings.decay)

    def _step_towards(self, student: nn.Module, decay: float) -> None:
        theirs, own = dict(student.named_parameters()), dict(self.model.named_parameters())
        with torch.no_grad():
            for name in self._moving:
                own[name].mul_(decay).add_(whole(theirs[name]), alpha=1 - decay)
            for mine, buffer in zip(self.model.buffers(), student.buffers(), strict=True):
                mine.copy_(buffer)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs; frozen weights are the student's."""
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        buffers = [name for name, _ in self.model.named_buffers()]
        return kept | {f"model.{name}": own[name].detach() for name in (*self._moving, *buffers)}

    def load(self, state: Mapping[str, Tensor]) -> bool:
        """Take over what ``state`` gave; False, and nothing is changed, where it is of another shape or student."""
        own = self.state()
        if state.keys() != own.keys() or any(state[name].shape != own[name].shape for name in own):
            return False
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        return True

    def encode(self, images: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, D) and (M, D) float32 by the copy, without dropout and without gradient."""
        self.model.eval()  # a target without noise; and the training's random state is left alone
        with torch.no_grad():
            out: Embeddings = self.model(images, texts)
        assert out.images is not None
        assert out.texts is not None
        return out.images.float(), out.texts.float()


def positives(matches: Matches, direction: Direction, query_ids: Ids, key_ids: Ids) -> Tensor:
    """(B, C) bool: the key is true of the query, by the corpus.

    Not by the image that a caption was written for alone: other captions of the image, and copies of it, are true too.
    A key that is there twice is true twice; an empty slot never is.
    """
    order = np.argsort(key_ids, kind="stable")
    offsets, matching = matches.of(direction, query_ids)
    starts = np.searchsorted(key_ids[order], matching)
    stops = np.searchsorted(key_ids[order], matching, side="right")
    found = np.zeros((len(query_ids), len(key_ids)), np.bool_)
    _, places = ragged_ranges(starts, stops)
    rows = np.repeat(np.repeat(np.arange(len(query_ids)), np.diff(offsets)), stops - starts)
    found[rows, order[places]] = True
    return torch.from_numpy(found)
