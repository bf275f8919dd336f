"""From token states to one vector, and from two towers' token states to a text→image map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean (N, H), float32, of the tokens (N, L, H) where the mask (N, L) is not 0; a row with none gives zeros."""
    tokens, weight = tokens.float(), (mask != 0).float()[..., None]  # (N, L, 1)
    # where, not only a product: what a padded token holds may be anything, NaN included.
    kept = torch.where(weight > 0, tokens, torch.zeros_like(tokens))
    return (kept * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def cells_of(hidden: Tensor, prefix: int) -> Tensor:
    """Grid cells (N, G, H), row-major, of a last state: a map (N, H, rows, columns) or tokens (N, prefix + G, H)."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, prefix:]


def grid_of(hidden: Tensor, pixels: Tensor, patch_size: object) -> tuple[tuple[int, int], int] | None:
    """((rows, columns), tokens before the first cell) of a tower's last state; None where there is no grid to be found.

    Class (and register) tokens come first, then cells row by row: the order of the ViTs of transformers.
    """
    if hidden.dim() == 4:
        return (hidden.shape[2], hidden.shape[3]), 0
    length, (height, width) = hidden.shape[1], pixels.shape[-2:]
    if isinstance(patch_size, int) and patch_size > 0:
        grid = (height // patch_size, width // patch_size)
        prefix = length - grid[0] * grid[1]
        if 0 <= prefix <= _MOST_PREFIX and prefix < length:
            return grid, prefix
    if height == width:  # towers that merge patches (Swin): a square picture makes a square grid
        for prefix in (0, 1):
            side = math.isqrt(length - prefix)
            if side and side * side == length - prefix:
                return (side, side), prefix
    return None


_MOST_PREFIX = 16  # one class token, one distillation token, up to eight registers are in use; leave room


class MlpHead(nn.Module):
    """(N, inputs) -> (N, outputs): LayerNorm, Linear, GELU, Dropout, Linear."""

    def __init__(self, inputs: int, outputs: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs), not normalised."""
        result: Tensor = self.layers(pooled)
        return result


class AttentionHeads(nn.Module):
    """The text→image map of a model whose towers never meet: two small maps of token states in the joint space.

    Attention distillation (DiDE, arXiv 2112.08723) for a teacher with cross-attention: one map, the teacher's heads
    averaged. Tokens and cells go through what turns pooled vectors into embeddings first, so that the loss trains that
    too: with frozen towers it would otherwise train nothing but these maps, which are thrown away.
    """

    def __init__(self, dim: int, *, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(dim, width, bias=False)
        self.scale = width**-0.5

    def forward(
        self, tokens: Tensor, cells: Tensor, pairs: tuple[Tensor, Tensor], heads: tuple[nn.Module | None, ...]
    ) -> Tensor:
        """Log-probabilities (P, L, G) over the grid cells.

        Args:
            tokens: of texts (M, L, H).
            cells: of images (N, G, H').
            pairs: image rows (P,) and text rows (P,).
            heads: what maps tokens, and what maps cells, to the joint space; None where they lie in it.
        """
        query = _through(heads[0], self.query, tokens)[pairs[1]]  # (P, L, width)
        key = _through(heads[1], self.key, cells)[pairs[0]]  # (P, G, width)
        logits: Tensor = query @ key.transpose(1, 2) * self.scale
        return logits.float().log_softmax(dim=-1)


def _through(head: nn.Module | None, small: nn.Linear, states: Tensor) -> Tensor:
    """small(head(states)); where both are linear their product is taken first, which is as cheap as ``small`` alone."""
    if not isinstance(head, nn.Linear):
        result: Tensor = small(states if head is None else head(states))
        return result
    bias = None if head.bias is None else small.weight @ head.bias
    return functional.linear(states, small.weight @ head.weight, bias)
