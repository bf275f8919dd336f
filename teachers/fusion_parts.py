"""The new, trained parts of a fusion teacher: cross-attention blocks, pooled heads, positions of an image grid.

Shape key: ``N`` items, ``P`` pairs, ``L`` text tokens, ``S`` real tokens of all pairs, ``T`` image tokens, ``C`` width
of the vision backbone, ``H`` width of the text encoder, ``D`` embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from teachers.dense import dense

if TYPE_CHECKING:
    from torch import Tensor

    from teachers.crossattention import Source


class CrossAttention(nn.Module):
    """Cross-attention with a pre-norm residual, put between a text layer's self-attention and its feed-forward block.

    The output projection starts at zero: before training the layer does what the pretrained text encoder does.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Queries, keys and values all of ``width``; image tokens come projected to it."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.dropout = nn.Dropout(dropout)

    def queries(self, states: Tensor) -> Tensor:
        """Packed states (S, H) -> (S, H)."""
        return dense(self.query, self.norm(states))

    def forward(self, states: Tensor, source: Source) -> Tensor:
        """(S, H) -> (S, H)."""
        dropout = self.dropout.p if self.training else 0.0
        context = source.attend(self.queries(states), self.heads, dropout=dropout)
        added: Tensor = self.dropout(dense(self.output, context))
        return states + added


class ImageTokens(nn.Module):
    """Backbone features to tokens of the text encoder's width, each cell with a learned place in rows and columns."""

    def __init__(self, channels: int, width: int, *, grid: tuple[int, int], others: int, dropout: float) -> None:
        """``others`` tokens (class, registers) come before the cells of ``grid`` and have no place."""
        super().__init__()
        self.others = others
        self.project = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)
        self.row = nn.Parameter(torch.empty(grid[0], 1, width).normal_(std=0.02))
        self.column = nn.Parameter(torch.empty(1, grid[1], width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, H)."""
        tokens = self.norm(self.project(features))
        place = functional.pad((self.row + self.column).flatten(0, 1), (0, 0, self.others, 0))  # (T, H)
        placed: Tensor = self.dropout(tokens + place)
        return placed


class PooledHead(nn.Module):
    """Tokens to one unit vector: a learned weighted mean, then a linear map and an MLP side by side.

    The weights start equal, so the head starts as a plain MLP over the mean.
    """

    def __init__(self, width: int, embed_dim: int, *, dropout: float, input_dropout: float) -> None:
        """From tokens of ``width`` to ``embed_dim``."""
        super().__init__()
        self.weigh = nn.Linear(width, 1)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.norm = nn.LayerNorm(width)
        self.input_dropout = nn.Dropout(input_dropout)
        self.linear = nn.Linear(width, embed_dim)
        hidden = 2 * embed_dim
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, width) and, for ragged tokens, (N, T) of 0 and 1 -> (N, D) float32 unit vectors."""
        weight = self.weigh(tokens).squeeze(-1)  # (N, T)
        if mask is not None:
            weight = weight.masked_fill(~mask.bool(), torch.finfo(weight.dtype).min)
        pooled = self.input_dropout(self.norm((weight.softmax(dim=1).unsqueeze(-1) * tokens).sum(dim=1)))  # (N, width)
        return functional.normalize((self.linear(pooled) + self.mlp(pooled)).float(), dim=-1)


class MatchingHead(nn.Module):
    """Two logits from the fused text: its first token beside the mean of all its tokens.

    Sentence encoders of the MiniLM kind are pretrained with the mean; their first token alone starts out saying little.
    """

    def __init__(self, width: int, dropout: float) -> None:
        """From tokens of ``width`` to no match / match."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 2))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """(P, L, H) and (P, L) of 0 and 1 -> (P, 2) float32."""
        real = attention_mask.to(states.dtype).unsqueeze(-1)  # (P, L, 1)
        mean = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        logits: Tensor = self.layers(torch.cat([states[:, 0], mean], dim=1))
        return logits.float()
