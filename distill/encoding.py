"""A step's items through the student: each process its share, all at once or piece by piece under gradient caching.

Gradient caching (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021):
the pieces are encoded without gradient, the loss over all vectors gives each vector's gradient, and each piece is
encoded once more to carry it on to the weights. The loss sees the whole batch, memory holds the activations of one
piece, and each item is encoded twice. Where a student draws random numbers (dropout), a piece draws the same ones both
times; running statistics of a batch norm move twice.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.inference import random_state, set_random_state
from distill.protocols import SIDES, Embeddings
from distill.ranks import Ranks
from distill.sampler import share_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from distill.batches import StepBatch

    Tensors = Mapping[str, Tensor]


def encode(
    model: Any,
    images: Tensors,
    texts: Tensors,
    *,
    accelerator: Accelerator,
    counts: tuple[int, int],
    micro_batch: int | None = None,
    attention_pairs: tuple[Tensor, Tensor] | None = None,
) -> Encoded:
    """Encode a step's distinct items with gradient; every process gets the vectors of all.

    Args:
        model: the student, prepared by the accelerator; its ``forward`` is called.
        images: inputs of this process's share of the images, on the device.
        texts: inputs of its share of the texts, on the device.
        accelerator: casts, and knows the processes.
        counts: N images and M texts of the whole step.
        micro_batch: most items of a side at once, by gradient caching; None, or at least both shares: all in one pass.
        attention_pairs: rows of the pairs whose text→image map is wanted; only in one process and one pass.

    Raises:
        ValueError: maps are asked for together with pieces or with several processes.
    """
    ranks = Ranks(accelerator)
    most = max(-(-count // ranks.count) for count in counts)  # the same in every process
    in_pieces = micro_batch is not None and most > micro_batch
    if attention_pairs is not None and (in_pieces or ranks.count > 1):
        raise ValueError(
            "attention maps need the whole batch's token states in one place: leave micro_batch out and train in one "
            "process"
        )
    if not in_pieces:
        with accelerator.autocast():
            out: Embeddings = model(images, texts, attention_pairs=attention_pairs)
        return Encoded(_joined(out, ranks, counts))
    assert micro_batch is not None
    pieces = _pieces(images, texts, -(-most // micro_batch))
    found: list[Embeddings] = []
    with torch.no_grad():
        for piece in pieces:
            piece.random = random_state(piece.device)
            found.append(piece.through(model, accelerator))
    own = Embeddings(
        torch.cat([out.images for out in found if out.images is not None]).requires_grad_(),
        torch.cat([out.texts for out in found if out.texts is not None]).requires_grad_(),
        found[0].scale.detach().clone().requires_grad_(),
    )
    return Encoded(_joined(own, ranks, counts), _Cache(model, accelerator, pieces, own))


def _joined(out: Embeddings, ranks: Ranks, counts: tuple[int, int]) -> Embeddings:
    if ranks.count == 1:
        return out
    assert out.images is not None
    assert out.texts is not None
    images, texts = (ranks.sizes(count) for count in counts)
    return replace(out, images=ranks.joined(out.images, images), texts=ranks.joined(out.texts, texts))


def with_remembered(out: Embeddings, batch: StepBatch) -> Embeddings:
    """The vectors of all of a step's items: the encoded ones with gradient, those that are remembered among them."""
    if not batch.remembered:
        return out
    found = []
    for side, vectors in zip(SIDES, (out.images, out.texts), strict=True):
        assert vectors is not None
        kept, encoded = batch.remembered[side], torch.from_numpy(batch.encoded_rows(side)).to(vectors.device)
        whole = vectors.new_zeros((len(batch.ids(side)), vectors.shape[1])).index_copy(0, encoded, vectors)
        found.append(whole.index_copy(0, kept.rows.to(vectors.device), kept.vectors.to(vectors)))
    return replace(out, images=found[0], texts=found[1])


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
    images: tuple[Tensors, slice] | None  # inputs and where their vectors go; None where this piece has none
    texts: tuple[Tensors, slice] | None
    random: list[Tensor] | None = None  # before it was encoded

    @property
    def device(self) -> torch.device:
        inputs, _ = self.images or self.texts or ({}, slice(0))
        return next(iter(inputs.values())).device

    def through(self, model: Any, accelerator: Accelerator) -> Embeddings:
        with accelerator.autocast():
            out: Embeddings = model(*(None if side is None else side[0] for side in (self.images, self.texts)))
        return out


@dataclass(frozen=True)
class _Cache:
    model: Any
    accelerator: Accelerator
    pieces: list[_Piece]
    own: Embeddings  # leaves, with gradient once the loss was differentiated

    def backward(self) -> None:
        for piece in self.pieces:
            last = piece is self.pieces[-1]  # the processes average their gradients once
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self._backward(piece, scale=last)

    def _backward(self, piece: _Piece, *, scale: bool) -> None:
        assert piece.random is not None
        set_random_state(piece.random, piece.device)
        out = piece.through(self.model, self.accelerator)
        due = [(out.scale, self.own.scale, slice(None))] if scale else []
        for side, vectors, leaf in (
            (piece.images, out.images, self.own.images),
            (piece.texts, out.texts, self.own.texts),
        ):
            if side is not None and vectors is not None and leaf is not None:
                due.append((vectors, leaf, side[1]))
        # nothing is due where all is frozen, or where the loss reads only one side
        with_gradient = [(t, leaf.grad, rows) for t, leaf, rows in due if t.requires_grad and leaf.grad is not None]
        if with_gradient:
            torch.autograd.backward(
                [tensor for tensor, _, _ in with_gradient],
                [grad if grad.dim() == 0 else grad[rows] for _, grad, rows in with_gradient],
            )


def _pieces(images: Tensors, texts: Tensors, number: int) -> list[_Piece]:
    """Each with items of both sides, as far as there are enough, so that it passes every weight."""
    return [_Piece(_part(images, place, number), _part(texts, place, number)) for place in range(number)]


def _part(inputs: Tensors, place: int, number: int) -> tuple[Tensors, slice] | None:
    rows = share_of(_count(inputs), place, number)
    # copies: a view's place in the whole is part of what a compiled student is compiled for
    return ({name: tensor[rows].clone() for name, tensor in inputs.items()}, rows) if rows.start < rows.stop else None


def _count(inputs: Tensors) -> int:
    return len(next(iter(inputs.values())))
