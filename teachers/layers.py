"""Running the layers of BERT-like text encoders: post-norm blocks whose parts are named as in their checkpoints.

The parts (``attention.self.query``, ``attention.output``, ``intermediate``, ``output``) are named by every published
checkpoint of the family, so they cannot move; the library's own forward methods build masks and caches that a
bidirectional cross-encoder does not want, and run BLIP's attention unfused. States are packed: only real tokens go
through the dense layers, which are nearly all of the work; only attention sees padding.

Shape key: ``B`` texts or pairs, ``L`` tokens of the longest, ``S`` real tokens of all, ``U`` distinct images, ``T``
image tokens, ``A`` heads, ``H`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from teachers.grouping import ImageGroups, cross_context

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

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


def keys_values(block: Block, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, A, T, H / A) of the states (B, T, C)."""
    heads = block.self.num_attention_heads
    return split_heads(block.self.key(states), heads), split_heads(block.self.value(states), heads)


def queries(block: Block, states: Tensor, packing: Packing) -> Tensor:
    """Queries (B, A, L, H / A) of packed states (S, H)."""
    return split_heads(packing.pad(block.self.query(states)), block.self.num_attention_heads)


def self_attention(layer: Layer, states: Tensor, packing: Packing) -> Tensor:
    """The layer's self-attention block: (S, H) -> (S, H)."""
    block, inner = layer.attention, layer.attention.self
    query, key, value = (
        split_heads(packing.pad(project(states)), inner.num_attention_heads)
        for project in (inner.query, inner.key, inner.value)
    )
    context = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=packing.mask, dropout_p=dropout_of(block)
    )
    output: Tensor = block.output(packing.pack(merge_heads(context)), states)
    return output


@dataclass(frozen=True)
class Source:
    """What cross-attention reads: keys and values of distinct images, and which pair reads which."""

    keys: Tensor  # (U, A, T, H / A)
    values: Tensor  # (U, A, T, H / A)
    groups: ImageGroups


def cross_attention(block: Block, states: Tensor, packing: Packing, source: Source) -> Tensor:
    """A layer's cross-attention block: (S, H) -> (S, H)."""
    query = queries(block, states, packing)
    context = cross_context(query, source.keys, source.values, source.groups, dropout_of(block))
    output: Tensor = block.output(packing.pack(merge_heads(context)), states)
    return output


def dropout_of(block: Block) -> float:
    """Dropout of attention probabilities: none outside training."""
    return float(block.self.dropout.p) if block.self.dropout.training else 0.0


def feed_forward(layer: Layer, states: Tensor) -> Tensor:
    """The layer's feed-forward block: (S, H) -> (S, H)."""
    output: Tensor = layer.output(layer.intermediate(states), states)
    return output


def text_only(layers: Iterable[Layer], states: Tensor, packing: Packing) -> Tensor:
    """Layers without cross-attention: (S, H) -> (S, H)."""
    for layer in layers:
        states = feed_forward(layer, self_attention(layer, states, packing))
    return states


def grid_attention(query: Tensor, keys: Tensor, others: int) -> Tensor:
    """Log-probabilities (B, L, G) float32, mean over heads, over the keys after the first ``others`` (class tokens).

    The softmax runs over all keys per head, the mean over heads is of probabilities, and what is left of a row after
    the columns of class tokens are dropped is normalised again. Computed with logarithms: no cell becomes -inf.
    """
    logits = query.float() @ keys.float().transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, A, L, T)
    mean = torch.logsumexp(logits.log_softmax(dim=-1), dim=1)  # (B, L, T), up to a constant that the next line removes
    return mean[..., others:].log_softmax(dim=-1)


def used_length(attention_mask: Tensor) -> int:
    """Tokens of the longest text: columns past it are padding in every row."""
    columns = attention_mask.bool().any(dim=0).nonzero()
    return int(columns.max()) + 1 if columns.numel() else 1


def image_tower(vision: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401 - a BlipVisionModel
    """BLIP's image tower with fused attention: (N, 3, height, width) -> (N, T, H), class token first."""
    states: Tensor = vision.embeddings(pixels)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        mixed = attention.qkv(layer.layer_norm1(states)).view(*states.shape[:2], 3, attention.num_heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # each (N, A, T, H / A)
        dropout = attention.dropout.p if attention.dropout.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        states = states + attention.projection(merge_heads(context))
        states = states + layer.mlp(layer.layer_norm2(states))
    output: Tensor = vision.post_layernorm(states)
    return output
