"""Two models' attention maps brought to one shape: heads, image grid, tokens.

Log-probabilities throughout; the last dimension is the image grid, row-major, and each row's probabilities sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def mean_heads(log_maps: Tensor) -> Tensor:
    """Mean over heads of the probabilities: (P, H, L, G) -> (P, L, G), as log-probabilities."""
    return log_maps.logsumexp(dim=1) - math.log(log_maps.shape[1])


def resample_map(log_map: Tensor, own: Grid, wanted: Grid) -> Tensor:
    """A map on another grid of the same picture: (..., own cells) -> (..., wanted cells).

    A cell's probability is spread evenly over its area and every new cell takes what lies in it (linear interpolation
    of the cumulative distribution), so that rows keep their sum, a coarser grid is an exact sum of the finer cells, and
    equal grids change nothing. A cell of probability 0 has the logarithm -inf.

    Raises:
        ValueError: the map does not have the cells that its grid says.
    """
    if min(*own, *wanted) < 1 or log_map.shape[-1] != own[0] * own[1]:
        raise ValueError(
            f"a map of {log_map.shape[-1]} cells does not lie on a grid of {own[0]} x {own[1]} (asked for "
            f"{wanted[0]} x {wanted[1]}): both models must say the grid of their maps"
        )
    if own == wanted:
        return log_map
    cells = log_map.exp().reshape(*log_map.shape[:-1], *own)
    rows = _overlap(own[0], wanted[0]).to(cells)  # (wanted, own)
    columns = _overlap(own[1], wanted[1]).to(cells)
    with torch.autocast(cells.device.type, enabled=False):
        made: Tensor = rows @ cells @ columns.T
    return made.flatten(-2).log()


def _overlap(own: int, wanted: int) -> Tensor:
    """(wanted, own): share of each own cell of a line that lies in each wanted cell; columns sum to 1."""
    own_edges, wanted_edges = (torch.arange(n + 1, dtype=torch.float64) / n for n in (own, wanted))
    right = torch.minimum(own_edges[1:], wanted_edges[1:].unsqueeze(1))
    left = torch.maximum(own_edges[:-1], wanted_edges[:-1].unsqueeze(1))
    return (right - left).clamp(min=0) * own


def token_overlap(student_spans: Tensor, teacher_spans: Tensor) -> Tensor:
    """How the teacher's tokens make up each of the student's, by the characters they share.

    Args:
        student_spans: (P, L, 2) first character and the one past the last of each token in the same text, as a fast
            tokenizer's ``return_offsets_mapping`` gives; equal numbers for special tokens and padding.
        teacher_spans: (P, L', 2) likewise.

    Returns:
        (P, L, L') weights that sum to 1 over L', or to 0 where a student's token shares no character with any of the
        teacher's. Where both cut a text alike it is the identity on its tokens.

    Raises:
        ValueError: the spans are no (P, L, 2) of the same pairs, or a text with real tokens on both sides shares none:
            the two models did not read the same text.
    """
    for name, spans in (("student", student_spans), ("teacher", teacher_spans)):
        if spans.dim() != 3 or spans.shape[2] != 2 or len(spans) != len(student_spans):
            raise ValueError(
                f"token spans must be (pairs, tokens, 2) of the same pairs, {name} has {tuple(spans.shape)}"
            )
    ours, theirs = student_spans.unsqueeze(2), teacher_spans.unsqueeze(1)
    shared = torch.minimum(ours[..., 1], theirs[..., 1]) - torch.maximum(ours[..., 0], theirs[..., 0])
    shared = shared.clamp(min=0).double()  # (P, L, L') characters
    real = [(spans[..., 1] > spans[..., 0]).any(dim=1) for spans in (student_spans, teacher_spans)]
    lost = real[0] & real[1] & (shared.sum(dim=(1, 2)) == 0)
    if bool(lost.any()):
        raise ValueError(
            f"{int(lost.sum())} of {len(lost)} texts (first: pair {int(lost.nonzero()[0])}) share no character between "
            "the student's tokens and the teacher's: the offsets must be of one text, before any tokenizer changes it"
        )
    return shared / shared.sum(dim=2, keepdim=True).clamp(min=1)


def align_tokens(log_map: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's map with one row for each token of the student's.

    Args:
        log_map: (P, L', G) or (P, H, L', G).
        weights: (P, L, L') of ``token_overlap``.

    Returns:
        The mean of the rows of the teacher's tokens that make up each one, (P, L, G) or (P, H, L, G), uniform where
        none does, and which tokens (P, L) bool have a row.

    Raises:
        ValueError: the two do not fit.
    """
    if log_map.dim() not in (3, 4) or (len(log_map), log_map.shape[-2]) != (len(weights), weights.shape[2]):
        raise ValueError(
            f"a map {tuple(log_map.shape)} does not fit token weights {tuple(weights.shape)}: pairs and the teacher's "
            "tokens must agree"
        )
    there = weights.sum(dim=2) > 0  # (P, L)
    shape = (len(weights), *(1,) * (log_map.dim() - 3), *weights.shape[1:])
    used = (weights.sum(dim=1) > 0).reshape(len(weights), *(1,) * (log_map.dim() - 3), -1, 1)
    chances = torch.where(used, log_map.exp(), torch.zeros_like(log_map))  # padding may hold anything, NaN too
    with torch.autocast(log_map.device.type, enabled=False):
        mixed = weights.to(log_map).reshape(shape) @ chances
    row = there.reshape(len(weights), *(1,) * (log_map.dim() - 3), -1, 1)
    return torch.where(row, mixed, torch.full_like(mixed, 1 / log_map.shape[-1])).log(), there
