"""Running pairs through a model that reads both sides together from early on: chunks, padding, fused attention.

Shape key: ``P`` pairs of a chunk, ``L`` tokens, ``T`` tokens of what is attended to, ``A`` heads, ``H`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from teachers.chunks import over_chunks
from teachers.itm import take
from teachers.layers import merge_heads, split_heads

if TYPE_CHECKING:
    from torch import Tensor

Attention = Any  # a module with linear ``query``, ``key``, ``value`` and a number of ``num_attention_heads``


def in_chunks(score: Callable[[Tensor], Tensor], order: Tensor, pairs_per_chunk: int) -> Tensor:
    """Scores (P,) float32 of ``score`` over chunks of a permutation of all pairs, given back in the pairs' order."""
    return over_chunks(score, order, pairs_per_chunk).float() if len(order) else torch.zeros(0, device=order.device)


def by_length(mask: Tensor, rows: Tensor) -> Tensor:
    """Permutation (P,) that puts the pairs of short items first, so that a chunk holds little padding; stable.

    ``mask`` (N, L) is that of the items, ``rows`` (P,) say which item a pair has.
    """
    return take(mask.sum(dim=1), rows).to(rows.device).argsort(stable=True)


def gathered(states: Tensor, mask: Tensor, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """States (P, L, ...) and mask (P, L) of the rows of padded items, cut at the longest of these rows."""
    found = take(mask, rows).to(device)
    length = max(1, int(found.sum(dim=1).max()))
    return take(states[:, :length], rows).to(device), found[:, :length]


def key_mask(mask: Tensor) -> Tensor | None:
    """(P, 1, 1, L) bool, True = may be attended to, from a mask (P, L) of 0 and 1; None where all may."""
    real = mask.bool()
    return None if bool(real.all()) else real[:, None, None, :]


def attend(module: Attention, states: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention (P, L, H) of states (P, L, H) over a source (P, T, C), themselves when None; never causal.

    Without what follows it in a layer: the output projection belongs to the layer.
    """
    source = states if source is None else source
    query, key, value = (
        split_heads(project(read), module.num_attention_heads)
        for project, read in ((module.query, states), (module.key, source), (module.value, source))
    )
    return merge_heads(functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))
