"""Cross-attention of many pairs over few images: an image's keys and values stay where they lie, not copied per pair.

Shape key: ``P`` pairs, ``U`` distinct images, ``M`` most pairs of one image, ``A`` heads, ``L`` tokens, ``T`` image
tokens, ``d`` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

MOST_PADDING = (
    2.0  # beyond this many slots a pair, copying keys and values per pair is cheaper than attending from empty slots
)


@dataclass(frozen=True)
class ImageGroups:
    """Which of a call's distinct images each pair reads, and the pair's slot when every image gets as many slots."""

    used: Tensor  # (U,) rows of the image memory, ascending
    image: Tensor  # (P,) position in ``used``
    slots: Tensor | None  # (P,) position in U * M slots; None where groups are too uneven
    widest: int  # M


def group_by_image(image_rows: Tensor) -> ImageGroups:
    """Groups of the pairs (P,) by image."""
    used, image, counts = torch.unique(image_rows, return_inverse=True, return_counts=True)
    widest = int(counts.max()) if len(counts) else 1
    if len(used) * widest > MOST_PADDING * len(image_rows):
        return ImageGroups(used, image, None, widest)
    order = image.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    within = torch.empty_like(image)
    within[order] = torch.arange(len(image), device=image.device) - starts[image[order]]
    return ImageGroups(used, image, image * widest + within, widest)


def cross_context(query: Tensor, keys: Tensor, values: Tensor, groups: ImageGroups, dropout: float = 0.0) -> Tensor:
    """Attention (P, A, L, d) of the pairs' queries over their images' keys and values (U, A, T, d)."""
    attention = functional.scaled_dot_product_attention
    if groups.slots is None:
        return attention(query, keys[groups.image], values[groups.image], dropout_p=dropout)
    tokens, images = query.shape[2], len(groups.used)
    packed = query.new_zeros((images * groups.widest, *query.shape[1:])).index_copy(0, groups.slots, query)
    heads, width = query.shape[1], query.shape[3]
    by_image = (
        packed.view(images, groups.widest, heads, tokens, width).transpose(1, 2).flatten(2, 3)
    )  # (U, A, M * L, d)
    context = attention(by_image, keys, values, dropout_p=dropout).view(images, heads, groups.widest, tokens, width)
    return context.transpose(1, 2).flatten(0, 1)[groups.slots]


def over_chunks(score: Callable[[Tensor], Tensor], order: Tensor, pairs_per_chunk: int) -> Tensor:
    """Results (P, ...) of ``score`` over chunks of a permutation of the pairs, given back in the pairs' own order.

    Bounds the memory of a call of any size where no gradient is wanted.
    """
    starts = range(0, max(1, len(order)), pairs_per_chunk)
    parts = [score(order[start : start + pairs_per_chunk]) for start in starts]
    return torch.cat(parts)[order.argsort().to(parts[0].device)]
