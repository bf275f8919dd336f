"""A step's items through the student: all at once, or piece by piece under gradient caching.

Gradient caching (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021):
the pieces are encoded without gradient, the loss over all vectors gives each vector's gradient, and each piece is
encoded once more to carry it on to the weights. The loss sees the whole batch, memory holds the activations of one
piece, and each item is encoded twice. Where a student draws random numbers (dropout), a piece draws the same ones both
times; running statistics of a batch norm move twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.protocols import SIDES, Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from distill.protocols import Side

    Tensors = Mapping[str, Tensor]
    Autocast = Callable[[], AbstractContextManager[Any]]


def encode(
    model: Any,
    images: Tensors,
    texts: Tensors,
    *,
    autocast: Autocast,
    micro_batch: int | None = None,
    attention_pairs: tuple[Tensor, Tensor] | None = None,
) -> Encoded:
    """Encode a step's distinct items with gradient.

    Args:
        model: the student; its ``forward`` is called.
        images: inputs of N images on the device.
        texts: inputs of M texts on the device.
        autocast: context of the forward passes.
        micro_batch: most items of a side at once, by gradient caching; None, or at least N and M: all in one pass.
        attention_pairs: rows of the pairs whose text→image map is wanted; only without gradient caching.

    Raises:
        ValueError: maps and pieces are asked for together.
    """
    if micro_batch is None or max(_count(images), _count(texts)) <= micro_batch:
        with autocast():
            return Encoded(model(images, texts, attention_pairs=attention_pairs))
    if attention_pairs is not None:
        raise ValueError("attention maps need the whole batch's token states: leave micro_batch out")
    sides: tuple[tuple[Side, Tensors], ...] = (("image", images), ("text", texts))
    pieces = [piece for side, inputs in sides for piece in _cut(side, inputs, micro_batch)]
    found: dict[Side, list[Tensor]] = {side: [] for side in SIDES}
    with torch.no_grad():
        for piece in pieces:
            piece.random = _RandomState.now(piece.device)
            with autocast():
                out = piece.through(model)
            found[piece.side].append(_vectors(out, piece.side))
    whole = {side: torch.cat(vectors).requires_grad_() for side, vectors in found.items()}
    leaf = Embeddings(whole["image"], whole["text"], out.scale.detach().clone().requires_grad_())
    return Encoded(leaf, _Cache(model, pieces, leaf, autocast))


@dataclass(frozen=True)
class Encoded:
    """What the loss reads, and what is left to do once it has been differentiated."""

    embeddings: Embeddings
    cache: _Cache | None = None  # None: one pass, whose graph reaches the weights itself

    def finish(self) -> None:
        """After the backward pass of the loss: carry the gradients on to the weights."""
        if self.cache is not None:
            self.cache.backward()


@dataclass
class _Piece:
    side: Side
    rows: slice
    inputs: Tensors
    random: _RandomState | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    def through(self, model: Any) -> Embeddings:
        out: Embeddings = model(*(self.inputs if self.side == side else None for side in SIDES))
        return out


@dataclass(frozen=True)
class _Cache:
    model: Any
    pieces: list[_Piece]
    leaf: Embeddings
    autocast: Autocast

    def backward(self) -> None:
        wholes = {"image": self.leaf.images, "text": self.leaf.texts}
        scale = self.leaf.scale.grad
        for piece in self.pieces:
            whole = wholes[piece.side]
            assert whole is not None
            assert piece.random is not None
            piece.random.restore(piece.device)
            with self.autocast():
                out = piece.through(self.model)
            due = [(_vectors(out, piece.side), _gradient(whole)[piece.rows])]
            if scale is not None:
                due, scale = [*due, (out.scale, scale)], None  # once
            due = [(tensor, gradient) for tensor, gradient in due if tensor.requires_grad]  # none where all is frozen
            if due:
                torch.autograd.backward([tensor for tensor, _ in due], [gradient for _, gradient in due])


@dataclass(frozen=True)
class _RandomState:
    cpu: Tensor
    cuda: Tensor | None = None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def _cut(side: Side, inputs: Tensors, size: int) -> Iterator[_Piece]:
    for start in range(0, _count(inputs), size):
        rows = slice(start, start + size)
        yield _Piece(side, rows, {name: tensor[rows] for name, tensor in inputs.items()})


def _count(inputs: Tensors) -> int:
    return len(next(iter(inputs.values())))


def _vectors(out: Embeddings, side: Side) -> Tensor:
    vectors = out.images if side == "image" else out.texts
    assert vectors is not None
    return vectors


def _gradient(whole: Tensor) -> Tensor:
    return torch.zeros_like(whole) if whole.grad is None else whole.grad
