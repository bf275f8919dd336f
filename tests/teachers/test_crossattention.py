"""Packed cross-attention against attention of one pair at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.crossattention import PackedPairs, plan_pairs, score_packed

HEADS, WIDTH, TOKENS, LAYERS = 2, 8, 5, 2
N_IMAGES, N_TEXTS, LONGEST = 6, 9, 7


def memories(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (N_TEXTS,), generator=draw)
    images = {
        name: torch.randn(N_IMAGES, LAYERS, TOKENS, WIDTH, generator=draw, dtype=torch.float64)
        for name in ("keys", "values")
    }
    states = torch.randn(N_TEXTS, LONGEST, WIDTH, generator=draw, dtype=torch.float64)
    return images, {"states": states, "attention_mask": (torch.arange(LONGEST) < lengths[:, None]).long()}


def slow_context(images, query, image, layer):
    """(tokens, WIDTH) of one pair's queries (tokens, WIDTH), head by head."""
    keys, values = (images[name][image, layer].unflatten(1, (HEADS, -1)) for name in ("keys", "values"))
    query = query.unflatten(1, (HEADS, -1))
    rows = [(query[:, h] @ keys[:, h].T / (WIDTH // HEADS) ** 0.5).softmax(dim=1) @ values[:, h] for h in range(HEADS)]
    return torch.cat(rows, dim=1)


pairs_of = st.lists(st.tuples(st.integers(0, N_IMAGES - 1), st.integers(0, N_TEXTS - 1)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of, layer=st.integers(0, LAYERS - 1))
def test_context_of_every_token_and_of_every_pair_equals_one_pair_at_a_time(pairs, layer):
    images, texts = memories()
    image_rows, text_rows = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    packed = PackedPairs.of(images, texts, image_rows, text_rows)
    tokens = packed.packing.pad(packed.source(layer).attend(packed.states, HEADS))
    first = packed.source(layer).attend(packed.states[packed.packing.first], HEADS, per_pair=True)
    tokens, first = packed.in_given_order(tokens), packed.in_given_order(first)
    for at, (image, text) in enumerate(pairs):
        real = int(texts["attention_mask"][text].sum())
        expected = slow_context(images, texts["states"][text, :real], image, layer)
        torch.testing.assert_close(tokens[at, :real], expected)
        torch.testing.assert_close(first[at], expected[0])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("gradient", [False, True])
def test_chunks_and_gradient_change_no_score_and_no_order(chunk, gradient):
    images, texts = memories()
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(N_IMAGES, (40,), generator=draw), torch.randint(N_TEXTS, (40,), generator=draw)
    sizes = []

    def score(pairs):
        sizes.append(len(pairs.plan.order))
        return pairs.source(1).attend(pairs.states[pairs.packing.first], HEADS, per_pair=True)

    with torch.set_grad_enabled(gradient):
        got = score_packed(score, images, texts, rows, pairs_per_chunk=chunk)
    expected = [slow_context(images, texts["states"][t, :1], i, 1)[0] for i, t in zip(*rows, strict=True)]
    torch.testing.assert_close(got, torch.stack(expected))
    assert sum(sizes) == 40
    assert max(sizes) == (40 if gradient else min(chunk, 40))  # a gradient wants all pairs in one graph


def test_images_of_like_size_share_a_call_and_lie_in_the_memory_as_they_are():
    even = plan_pairs(torch.tensor([2, 3, 4, 2, 3, 4]), torch.full((6,), 5))
    (bucket,) = even.buckets
    assert bucket.rows == slice(2, 5)  # a view, no copy
    assert (bucket.images, bucket.tokens.width, bucket.tokens.places) == (3, 10, None)
    assert even.order.tolist() == [0, 3, 1, 4, 2, 5]
    uneven = plan_pairs(torch.tensor([0] * 50 + [1, 4]), torch.full((52,), 5))
    assert [bucket.images for bucket in uneven.buckets] == [2, 1]
    assert uneven.buckets[0].rows.tolist() == [1, 4]
    for plan in (even, uneven):
        for bucket in plan.buckets:  # padding stays below the growth from one size to the next
            tokens = bucket.tokens
            assert tokens.width * bucket.images <= 1.5 * (tokens.stop - tokens.start)


def test_keys_and_values_get_their_gradient():
    images, texts = memories()
    for name in ("keys", "values"):
        images[name].requires_grad_(True)
    packed = PackedPairs.of(images, texts, torch.tensor([0, 0, 3]), torch.tensor([1, 2, 1]))
    packed.source(0).attend(packed.states, HEADS).sum().backward()
    for name in ("keys", "values"):
        moved = images[name].grad.abs().sum(dim=(2, 3)) > 0  # (N, F)
        assert (
            moved[:, 0].tolist() == [name == "values", False, False, name == "values", False, False] or name == "keys"
        )
        assert not moved[:, 1].any()
    assert images["keys"].grad[[0, 3], 0].abs().sum() > 0
