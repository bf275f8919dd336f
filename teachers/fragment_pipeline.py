"""From the fragments of an image and a text to one similarity, in five stages, each a function that knows no other.

affinity -> normalise -> attend -> relevance -> pool. A direction has *query* fragments, each of which attends to the
*context* fragments of the other side: "t2i" words over cells, "i2t" cells over words. After Lee et al., "Stacked Cross
Attention for Image-Text Matching", ECCV 2018 (SCAN). Fragments are unit vectors, and only their products are read: a
query's cosine with what it attends to follows from its affinities and the context's Gram matrix, so that no attended
vector of width ``D`` is ever made, and a batch of pairs costs ``Q * C`` numbers a pair instead of ``Q * D``.

Shape key: ``Q`` query and ``C`` context fragments, ``G`` grid cells, ``L`` words, ``...`` any leading dimensions that
broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from distill.protocols import Direction

Clip = Literal["leaky", "relu"]
Pooling = Literal["avg", "lse"]
_SMALL = 1e-8  # a length below this counts as this: no division by zero, no gradient without end
_SLOPE = 0.1


@dataclass(frozen=True)
class DirectionDesign:
    """The stages of one direction.

    clip: what affinities below zero become before they are normalised: "leaky" a tenth of themselves, "relu" zero.
    attention_scale: multiplies the normalised affinity before the softmax over the context (SCAN's lambda 1).
    pooling: of the relevances of all query fragments: "avg" their mean, "lse" a soft maximum.
    pooling_scale: how near "lse" comes to the maximum (SCAN's lambda 2); "avg" does not read it.
    """

    clip: Clip = "leaky"
    attention_scale: float = 9.0
    pooling: Pooling = "avg"
    pooling_scale: float = 6.0

    def __post_init__(self) -> None:
        for name, value, allowed in (("clip", self.clip, Clip), ("pooling", self.pooling, Pooling)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(allowed))}")
        for name in ("attention_scale", "pooling_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")


@dataclass(frozen=True)
class ScanDesign:
    """Both directions of stacked cross attention, and how they are weighed; the published settings.

    i2t_share: weight of image->text in the similarity, the rest is text->image's; 0 or 1 = one direction alone.
    """

    i2t: DirectionDesign = DirectionDesign(attention_scale=4.0, pooling_scale=5.0)
    t2i: DirectionDesign = DirectionDesign(attention_scale=9.0, pooling_scale=6.0)
    i2t_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.i2t_share <= 1:
            raise ValueError(f"i2t_share is {self.i2t_share}; expected 0 (text->image alone) to 1 (image->text alone)")


# --- stages -----------------------------------------------------------------------------------------------------------


def affinity(cells: Tensor, words: Tensor) -> Tensor:
    """Cosines (B, M, G, L) of the cells (B, G, D) of B images with the words (B, M, L, D) of M texts each.

    Words (M, L, D) are those of M texts that all B images are compared with.
    """
    count, length = words.shape[-3:-1]
    flat = words.flatten(-3, -2)  # (B, M * L, D) or (M * L, D)
    cosines = cells @ flat.transpose(-1, -2)  # (B, G, M * L)
    return cosines.view(*cosines.shape[:-1], count, length).transpose(1, 2)


def normalise(cosines: Tensor, query_mask: Tensor | None, clip: Clip) -> Tensor:
    """Affinities (..., Q, C), clipped and of unit length over the query axis; padding queries get and give nothing."""
    clipped = functional.leaky_relu(cosines, _SLOPE) if clip == "leaky" else functional.relu(cosines)
    if query_mask is not None:
        clipped = clipped * query_mask.unsqueeze(-1)
    length = clipped.square().sum(dim=-2, keepdim=True).clamp(min=_SMALL**2).sqrt()
    return clipped / length


def attend(normalised: Tensor, context_mask: Tensor | None, scale: float) -> Tensor:
    """Weights (..., Q, C) of each query over the context: a softmax in which padding has no part."""
    logits = scale * normalised
    if context_mask is not None:
        logits = logits.masked_fill(~context_mask.unsqueeze(-2), torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


def relevance(cosines: Tensor, weights: Tensor, gram: Tensor) -> Tensor:
    """Cosine (..., Q) of each query with its weighted sum of the context, whose Gram matrix is ``gram`` (..., C, C).

    With unit vectors q and c_j and a = sum_j w_j c_j: q.a = sum_j w_j (q.c_j) and |a|^2 = w' gram w.
    """
    along = (weights * cosines).sum(dim=-1)
    mixed = torch.einsum("...qc,...cd->...qd", weights, gram)  # folds what the Gram matrix is shared over
    return along / (mixed * weights).sum(dim=-1).clamp(min=_SMALL**2).sqrt()


def pool_mean(relevances: Tensor, query_mask: Tensor | None, scale: float) -> Tensor:
    """Mean (...) of the relevances (..., Q) of real queries."""
    if query_mask is None:
        return relevances.mean(dim=-1)
    return (relevances * query_mask).sum(dim=-1) / query_mask.sum(dim=-1)


def pool_lse(relevances: Tensor, query_mask: Tensor | None, scale: float) -> Tensor:
    """Soft maximum (...): log-sum-exp at ``scale``, divided by it; padding is minus infinity before the sum."""
    logits = scale * relevances
    if query_mask is not None:
        logits = logits.masked_fill(~query_mask, -torch.inf)
    return logits.logsumexp(dim=-1) / scale


_POOL: Mapping[Pooling, Callable[[Tensor, Tensor | None, float], Tensor]] = {"avg": pool_mean, "lse": pool_lse}


# --- members ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fragments:
    """What the stages after ``affinity`` read of B images with M texts each."""

    affinity: Tensor  # (B, M, G, L)
    cell_gram: Tensor  # (B, 1, G, G)
    word_gram: Tensor  # (B, M, L, L), or (M, L, L) of texts that all images share
    word_mask: Tensor  # (B, M, L) or (M, L) bool; at least one word of every text is real

    @classmethod
    def of(cls, cells: Tensor, words: Tensor, word_mask: Tensor) -> Fragments:
        """From unit vectors: cells (B, G, D); words (B, M, L, D) or (M, L, D), and which of them are real."""
        cell_gram = (cells @ cells.transpose(-1, -2)).unsqueeze(1)
        return cls(affinity(cells, words), cell_gram, words @ words.transpose(-1, -2), word_mask)


def directed(fragments: Fragments, design: DirectionDesign, direction: Direction) -> Tensor:
    """Similarity (B, M) of one direction."""
    query_mask: Tensor | None
    context_mask: Tensor | None
    if direction == "i2t":  # cells look at words, and every cell is real
        cosines, gram, query_mask, context_mask = fragments.affinity, fragments.word_gram, None, fragments.word_mask
    else:
        cosines, gram = fragments.affinity.transpose(-1, -2), fragments.cell_gram
        query_mask, context_mask = fragments.word_mask, None
    weights = attend(normalise(cosines, query_mask, design.clip), context_mask, design.attention_scale)
    relevances = relevance(cosines, weights, gram)
    return _POOL[design.pooling](relevances, query_mask, design.pooling_scale)


def scan(fragments: Fragments, design: ScanDesign) -> Tensor:
    """Stacked cross attention: similarity (B, M), both directions in their shares."""
    share = design.i2t_share
    if share == 0:
        return directed(fragments, design.t2i, "t2i")
    if share == 1:
        return directed(fragments, design.i2t, "i2t")
    both = directed(fragments, design.i2t, "i2t"), directed(fragments, design.t2i, "t2i")
    return share * both[0] + (1 - share) * both[1]
