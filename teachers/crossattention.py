"""Cross-attention of many texts over few images, packed: a pair costs its own tokens and nothing else.

What a text cannot change is computed once per image (the keys and values of every layer), what an image cannot change
once per text (all before the first cross-attention). The texts of an image lie side by side without padding: dense
layers see one long matrix, cross-attention one call for all of an image's queries. Published re-ranking loops repeat
the image for every text and pad every text to the longest allowed.

Shape key: ``P`` pairs, ``N`` items of a memory, ``U`` distinct images of a call, ``F`` layers with cross-attention,
``L`` tokens of the longest text, ``S`` real tokens of all pairs, ``T`` image tokens, ``A`` heads, ``H`` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.protocols import Ids, Memory
from teachers.chunks import over_chunks
from teachers.dense import dense
from teachers.layers import Block, Packing, after, dropout_of, images_at_once, merge_heads, split_heads

if TYPE_CHECKING:
    from torch import nn

GROWTH = 1.5  # images whose texts have up to so many times as many tokens are attended to in one call


class Span(NamedTuple):
    """Where the queries of a bucket lie among all queries, and their places when every image gets as many."""

    start: int
    stop: int
    width: int  # most queries of one image
    places: Tensor | None  # (stop - start,) in U * width; None where every image has ``width`` queries


@dataclass(frozen=True)
class Bucket:
    """Images of like size, attended to in one call."""

    rows: slice | Tensor  # of the image memory; a slice takes a view where a tensor copies
    images: int
    tokens: Span  # a query for every token
    pairs: Span  # a query for every pair


@dataclass(frozen=True)
class Plan:
    """The order in which pairs are packed, and how their images are attended to."""

    order: Tensor  # (P,) pairs of an image side by side, images of a bucket side by side
    buckets: tuple[Bucket, ...]


def plan_pairs(image_rows: Tensor, lengths: Tensor) -> Plan:
    """Plan of the pairs with these image rows (P,) and numbers of tokens (P,)."""
    device = image_rows.device
    rows, tokens_of_pair = (numbers.cpu().numpy() for numbers in (image_rows, lengths))
    used, image, pairs = np.unique(rows, return_inverse=True, return_counts=True)
    tokens = np.bincount(image, weights=tokens_of_pair, minlength=len(used)).astype(np.int64)
    size = np.floor(np.log(np.maximum(tokens, 1)) / math.log(GROWTH))
    images = np.argsort(size, kind="stable")  # images of one size in the order of the memory
    position = np.empty_like(images)
    position[images] = np.arange(len(images))
    order = np.argsort(position[image], kind="stable")
    used, pairs, tokens, size = used[images], pairs[images], tokens[images], size[images]
    cuts = [0, *(np.flatnonzero(np.diff(size)) + 1).tolist(), len(used)] if len(used) else [0]
    buckets = tuple(
        Bucket(
            rows=_rows(used[start:stop], device),
            images=stop - start,
            tokens=_span(tokens, start, stop, device),
            pairs=_span(pairs, start, stop, device),
        )
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    )
    return Plan(torch.from_numpy(order).to(device), buckets)


def _rows(used: Ids, device: torch.device) -> slice | Tensor:
    if used[-1] - used[0] == len(used) - 1:
        return slice(int(used[0]), int(used[-1]) + 1)
    return torch.from_numpy(used).to(device)


def _span(counts: Ids, start: int, stop: int, device: torch.device) -> Span:
    before, mine = int(counts[:start].sum()), counts[start:stop]
    width, total = int(mine.max()), int(mine.sum())
    if total == width * len(mine):
        return Span(before, before + total, width, None)
    first = np.cumsum(mine) - mine
    within = np.arange(total) - np.repeat(first, mine)
    places = np.repeat(np.arange(len(mine)) * width, mine) + within
    return Span(before, before + total, width, torch.from_numpy(places).to(device))


@dataclass(frozen=True)
class Source:
    """What one layer's cross-attention reads: the keys and values of the memory's images, and who reads which."""

    keys: Tensor  # (N, T, H)
    values: Tensor  # (N, T, H)
    plan: Plan

    def attend(self, query: Tensor, heads: int, *, per_pair: bool = False, dropout: float = 0.0) -> Tensor:
        """Context, as the queries: (S, H) of every token, or with ``per_pair`` (P, H); both in the plan's order."""
        parts = []
        for bucket in self.plan.buckets:
            span = bucket.pairs if per_pair else bucket.tokens
            keys, values = (
                split_heads(memory[bucket.rows].to(query.device), heads) for memory in (self.keys, self.values)
            )
            spread = _spread(query[span.start : span.stop], span, bucket.images)
            context = functional.scaled_dot_product_attention(
                split_heads(spread, heads), keys, values, dropout_p=dropout
            )
            flat = merge_heads(context).flatten(0, 1)  # (U * width, H)
            parts.append(flat if span.places is None else flat[span.places])
        if not parts:  # no pairs, no images
            return query
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _spread(query: Tensor, span: Span, images: int) -> Tensor:
    """(stop - start, H) -> (U, width, H), zero where an image has fewer queries."""
    if span.places is not None:
        query = query.new_zeros((images * span.width, query.shape[1])).index_copy(0, span.places, query)
    return query.view(images, span.width, query.shape[1])


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in the order of their plan, ready for the layers that read both sides."""

    plan: Plan
    packing: Packing
    states: Tensor  # (S, H) what the text memory holds of the pairs' tokens
    keys: Tensor  # (N, F, T, H) of the whole image memory
    values: Tensor  # (N, F, T, H)

    @classmethod
    def of(
        cls, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor, *, trim: bool = True
    ) -> PackedPairs:
        """From memories with ``keys`` and ``values``, and with ``states`` and ``attention_mask``, on one device.

        ``trim`` False keeps the length of the text memory where all these texts are shorter.
        """
        texts_of_pairs = text_rows.to(texts["states"].device)
        lengths = texts["attention_mask"].sum(dim=1)[texts_of_pairs]
        plan = plan_pairs(image_rows.to(lengths.device), lengths)
        texts_of_pairs = texts_of_pairs[plan.order]
        attention = texts["attention_mask"][texts_of_pairs]
        if trim:
            attention = attention[:, : used_length(attention)]
        packing = Packing.of(attention)
        return cls(plan, packing, packing.take(texts["states"], texts_of_pairs), images["keys"], images["values"])

    def source(self, layer: int) -> Source:
        """What the cross-attention of the fused layer number ``layer`` reads."""
        return Source(self.keys[:, layer], self.values[:, layer], self.plan)

    def in_given_order(self, results: Tensor) -> Tensor:
        """Results (P, ...) of the packed pairs, in the order in which the pairs were given."""
        return results[self.plan.order.argsort()]


def score_packed(
    score: Callable[[PackedPairs], Tensor],
    images: Memory,
    texts: Memory,
    rows: tuple[Tensor, Tensor],
    *,
    pairs_per_chunk: int,
) -> Tensor:
    """Results (P, ...) of ``score`` on the pairs of image and text ``rows``, in their own order.

    Where no gradient is wanted, ``pairs_per_chunk`` bounds the memory of a call of any size.
    """
    image_rows, text_rows = rows

    def one_chunk(chunk: Tensor) -> Tensor:
        pairs = PackedPairs.of(images, texts, image_rows[chunk], text_rows[chunk])
        return pairs.in_given_order(score(pairs))

    order = image_rows.argsort(stable=True)  # an image's pairs share a chunk
    return over_chunks(one_chunk, order, len(order) if torch.is_grad_enabled() else pairs_per_chunk)


def keys_and_values(blocks: Sequence[tuple[nn.Module, nn.Module]], tokens: Tensor) -> dict[str, Tensor]:
    """{"keys", "values": (N, F, T, H)} of image tokens (N, T, C), by each layer's projections (key, value)."""
    names = "keys", "values"
    if torch.is_grad_enabled():
        found = zip(*((dense(key, tokens), dense(value, tokens)) for key, value in blocks), strict=True)
        return {name: torch.stack(of_layers, dim=1) for name, of_layers in zip(names, found, strict=True)}
    # The largest thing in memory by far is made once and filled, a few images at a time.
    memory: dict[str, Tensor] = {}
    size = images_at_once(tokens)
    for start in range(0, max(1, len(tokens)), size):
        part = tokens[start : start + size]
        for at, block in enumerate(blocks):
            for name, project in zip(names, block, strict=True):
                made = dense(project, part)  # (n, T, H)
                if name not in memory:
                    memory[name] = made.new_empty((len(tokens), len(blocks), *made.shape[1:]))
                memory[name][start : start + size, at] = made
    return memory


def cross_attention(block: Block, states: Tensor, source: Source, *, per_pair: bool = False) -> Tensor:
    """The cross-attention block of a BERT-like layer: (S, H) -> (S, H), or (P, H) -> (P, H) with ``per_pair``."""
    heads = block.self.num_attention_heads
    context = source.attend(dense(block.self.query, states), heads, per_pair=per_pair, dropout=dropout_of(block))
    return after(block.output, context, states)


def attention_over_grid(query: Tensor, pairs: PackedPairs, heads: int, *, others: int) -> Tensor:
    """The last layer's text→image maps (P, L, G) in the order the pairs were given, of packed queries (S, H).

    Log-probabilities, mean over heads, over the image tokens after the first ``others`` (class tokens): the softmax
    runs over all tokens per head, the mean is of probabilities, and what is left of a row after the columns of class
    tokens are dropped is normalised again. Computed with logarithms: no cell becomes -inf.
    """
    source, parts = pairs.source(-1), list[Tensor]()
    padded = split_heads(pairs.packing.pad(query), heads).float()  # (P, A, L, H / A)
    counts = _pairs_of_images(pairs.plan)
    for bucket, of_image in zip(pairs.plan.buckets, counts, strict=True):
        keys = split_heads(source.keys[bucket.rows].to(query.device), heads).float().repeat_interleave(of_image, dim=0)
        mine = padded[bucket.pairs.start : bucket.pairs.stop]
        logits = mine @ keys.transpose(-1, -2) / mine.shape[-1] ** 0.5  # (P, A, L, T)
        mean = torch.logsumexp(logits.log_softmax(dim=-1), dim=1)  # (P, L, T), up to a constant the next line removes
        parts.append(mean[..., others:].log_softmax(dim=-1))
    return pairs.in_given_order(torch.cat(parts))


def _pairs_of_images(plan: Plan) -> list[Any]:
    """How many pairs each image of a bucket has (U,), bucket after bucket."""
    found = []
    for bucket in plan.buckets:
        span = bucket.pairs
        if span.places is None:
            found.append(torch.full((bucket.images,), span.width, device=plan.order.device))
        else:
            found.append(torch.bincount(span.places // span.width, minlength=bucket.images))
    return found


def used_length(attention_mask: Tensor) -> int:
    """Tokens of the longest text: columns past it are padding in every row."""
    columns = attention_mask.bool().any(dim=0).nonzero()
    return int(columns.max()) + 1 if columns.numel() else 1
