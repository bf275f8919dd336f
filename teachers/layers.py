"""Running the layers of BERT-like text encoders: post-norm blocks whose parts are named as in their checkpoints.

The parts (``attention.self.query``, ``attention.output``, ``intermediate``, ``output``) are named by every published
checkpoint of the family, so they cannot move; the library's own forward methods build masks and caches that a
bidirectional cross-encoder does not want, and run BLIP's attention unfused. States are packed: only real tokens go
through the dense layers, which are nearly all of the work; only attention sees padding.

Shape key: ``B`` texts or pairs, ``L`` tokens of the longest, ``S`` real tokens of all, ``A`` heads, ``H`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from teachers.dense import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

_ROWS_ON_CPU = 1024
Block = Any  # an attention block of a BERT-like layer: .self (query, key, value, dropout) and .output
Layer = Any  # a BERT-like layer: .attention, .intermediate, .output and, in BLIP, .crossattention


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of padded texts are."""

    attention: Tensor  # (B, L) of 0 and 1
    where: Tensor | None  # (S,) positions of the real tokens in B * L; None where all are real

    @classmethod
    def of(cls, attention: Tensor) -> Packing:
        """From an attention mask (B, L) of 0 and 1."""
        real = attention.bool().flatten()
        return cls(attention, None if bool(real.all()) else real.nonzero().squeeze(1))

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, 1, L) bool, True = may be attended to; None where all may."""
        return None if self.where is None else self.attention.bool()[:, None, None, :]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, H) -> (S, H)."""
        flat = padded.flatten(0, 1)
        return flat if self.where is None else flat[self.where]

    def take(self, padded: Tensor, rows: Tensor) -> Tensor:
        """What ``pack`` makes of the ``rows`` (B,) of (N, at least L, H): (S, H), without a padded copy between."""
        length = padded.shape[1]
        places = rows[:, None] * length + torch.arange(self.attention.shape[1], device=rows.device)  # (B, L)
        return padded.flatten(0, 1)[places.flatten() if self.where is None else places.flatten()[self.where]]

    @property
    def first(self) -> Tensor:
        """(B,) place of each text's first token in the packed order."""
        lengths = self.attention.sum(dim=1)
        return lengths.cumsum(dim=0) - lengths

    def pad(self, packed: Tensor) -> Tensor:
        """(S, H) -> (B, L, H), zero where there is no token."""
        count, length = self.attention.shape
        if self.where is not None:
            packed = packed.new_zeros((count * length, packed.shape[-1])).index_copy(0, self.where, packed)
        return packed.view(count, length, packed.shape[-1])


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, L, H) -> (B, A, L, H / A)."""
    return states.view(*states.shape[:-1], heads, states.shape[-1] // heads).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """(B, A, L, H / A) -> (B, L, H)."""
    return states.transpose(1, 2).flatten(2)


def self_attention(layer: Layer, states: Tensor, packing: Packing) -> Tensor:
    """The layer's self-attention block: (S, H) -> (S, H)."""
    block, inner = layer.attention, layer.attention.self
    query, key, value = (
        split_heads(packing.pad(dense(project, states)), inner.num_attention_heads)
        for project in (inner.query, inner.key, inner.value)
    )
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=packing.mask, dropout_p=dropout_of(block)
    )
    return after(block.output, packing.pack(merge_heads(context)), states)


def first_token_attention(layer: Layer, states: Tensor, packing: Packing) -> Tensor:
    """The layer's self-attention block for the first token of each text alone: (S, H) -> (B, H).

    Enough in the last layer of a model that reads nothing else of it.
    """
    block, inner = layer.attention, layer.attention.self
    own = states[packing.first]  # (B, H)
    query = split_heads(dense(inner.query, own)[:, None], inner.num_attention_heads)
    key, value = (
        split_heads(packing.pad(dense(project, states)), inner.num_attention_heads)
        for project in (inner.key, inner.value)
    )
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=packing.mask, dropout_p=dropout_of(block)
    )
    return after(block.output, merge_heads(context)[:, 0], own)


def dropout_of(block: Block) -> float:
    """Dropout of attention probabilities: none outside training."""
    return float(block.self.dropout.p) if block.self.dropout.training else 0.0


def feed_forward(layer: Layer, states: Tensor) -> Tensor:
    """The layer's feed-forward block: (S, H) -> (S, H)."""
    inner = dense(layer.intermediate.dense, states, layer.intermediate.intermediate_act_fn)
    return after(layer.output, inner, states)


def after(block: Any, rows: Tensor, residual: Tensor) -> Tensor:  # noqa: ANN401 - the output part of a block
    """What follows attention and feed-forward: dense layer, dropout, residual, norm: (S, C), (S, H) -> (S, H)."""
    output: Tensor = block.LayerNorm(block.dropout(dense(block.dense, rows)) + residual)
    return output


def text_only(layers: Iterable[Layer], states: Tensor, packing: Packing) -> Tensor:
    """Layers without cross-attention: (S, H) -> (S, H)."""
    for layer in layers:
        states = feed_forward(layer, self_attention(layer, states, packing))
    return states


def images_at_once(tokens: Tensor, *, each: int | None = None) -> int:
    """How many images (N, T, C) of ``each`` = T tokens to run in one go where no gradient is wanted.

    On a CPU one large image at a time: more do not fit its caches, and eight at once take an eighth longer an image.
    """
    if tokens.device.type != "cpu":
        return max(1, len(tokens))
    return max(1, _ROWS_ON_CPU // (tokens.shape[1] if each is None else each))


def image_tower(vision: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401 - a BlipVisionModel
    """BLIP's image tower with fused attention: (N, 3, height, width) -> (N, T, H), class token first."""
    states: Tensor = vision.embeddings(pixels)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        mixed = dense(attention.qkv, layer.layer_norm1(states))
        mixed = mixed.view(*states.shape[:2], 3, attention.num_heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # each (N, A, T, H / A)
        dropout = attention.dropout.p if attention.dropout.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        states = states + dense(attention.projection, merge_heads(context))
        inner = dense(layer.mlp.fc1, layer.layer_norm2(states), layer.mlp.activation_fn)
        states = states + dense(layer.mlp.fc2, inner)
    output: Tensor = vision.post_layernorm(states)
    return output


def dense_blocks(*, compiled: bool) -> tuple[Callable[[Any, Tensor], Tensor], Callable[[Layer, Tensor], Tensor]]:
    """``image_tower`` and ``feed_forward``, through ``torch.compile`` where asked for."""
    if not compiled:
        return image_tower, feed_forward
    return torch.compile(image_tower), torch.compile(feed_forward, dynamic=True)
