"""Attention maps of two models brought to one shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import Attention, align_tokens, mean_heads, resample_map, token_overlap
from tests.losses.batches import draw


def maps(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(dim=-1)


def by_hand(chances, own, wanted):
    """Each wanted cell's mass from the areas it shares with the own cells."""

    def share(a, n, b, m):  # of own cell a of n in wanted cell b of m
        return max(0.0, min((a + 1) / n, (b + 1) / m) - max(a / n, b / m)) * n

    return [
        sum(
            chances[i * own[1] + j] * share(i, own[0], r, wanted[0]) * share(j, own[1], c, wanted[1])
            for i in range(own[0])
            for j in range(own[1])
        )
        for r in range(wanted[0])
        for c in range(wanted[1])
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_a_map_on_another_grid_keeps_its_mass_where_it_was(own, wanted):
    source = maps(own[0] + 7 * wanted[1], 2, 3, own[0] * own[1])
    made = resample_map(source, own, wanted)
    assert made.shape == (2, 3, wanted[0] * wanted[1])
    torch.testing.assert_close(made.exp().sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    assert made[1, 2].exp().tolist() == pytest.approx(by_hand(source[1, 2].exp().tolist(), own, wanted), abs=1e-12)


def test_equal_grids_change_nothing_and_a_coarser_one_is_a_sum():
    source = maps(0, 1, 1, 16)
    assert resample_map(source, (4, 4), (4, 4)) is source
    halves = source.exp().reshape(2, 2, 2, 2).sum(dim=(1, 3)).flatten()
    torch.testing.assert_close(resample_map(source, (4, 4), (2, 2)).exp().flatten(), halves)
    finer = resample_map(resample_map(source, (4, 4), (8, 8)), (8, 8), (4, 4))
    torch.testing.assert_close(finer, source)
    with pytest.raises(ValueError, match="a map of 16 cells does not lie on a grid of 3 x 4"):
        resample_map(source, (3, 4), (2, 2))


def test_mean_heads_is_the_mean_of_probabilities():
    source = maps(1, 2, 3, 4, 5)
    torch.testing.assert_close(mean_heads(source).exp(), source.exp().mean(dim=1))


# "a red cap": [CLS] a red cap [SEP] against a r ##ed cap, and padding
STUDENT = torch.tensor([[[0, 0], [0, 1], [2, 5], [6, 9], [0, 0]]])
TEACHER = torch.tensor([[[0, 1], [2, 3], [3, 5], [6, 9], [0, 0], [0, 0]]])


def test_tokens_are_aligned_by_the_characters_they_share():
    weights = token_overlap(STUDENT, TEACHER)
    expected = torch.zeros(1, 5, 6, dtype=torch.float64)
    expected[0, 1, 0] = expected[0, 3, 3] = 1
    expected[0, 2, 1], expected[0, 2, 2] = 1 / 3, 2 / 3  # "red" is one third "r", two thirds "ed"
    torch.testing.assert_close(weights, expected)
    teacher = maps(2, 1, 6, 4)
    teacher[0, 5] = torch.nan  # padding
    made, there = align_tokens(teacher, weights)
    assert there.tolist() == [[False, True, True, True, False]]
    torch.testing.assert_close(made[0, 1], teacher[0, 0])
    torch.testing.assert_close(made[0, 2].exp(), teacher[0, 1].exp() / 3 + teacher[0, 2].exp() * 2 / 3)
    torch.testing.assert_close(made.exp().sum(dim=-1), torch.ones(1, 5, dtype=torch.float64))
    heads, _ = align_tokens(torch.stack([teacher, teacher.roll(1, dims=2)], dim=1), weights)
    torch.testing.assert_close(heads[:, 0], made)


def test_one_tokenizer_changes_nothing():
    weights = token_overlap(TEACHER, TEACHER)
    source = maps(3, 1, 6, 4)
    made, there = align_tokens(source, weights)
    assert there.tolist() == [[True, True, True, True, False, False]]
    torch.testing.assert_close(made[there], source[there])


def test_texts_that_share_nothing_are_refused():
    with pytest.raises(ValueError, match="1 of 2 texts .first: pair 1. share no character"):
        token_overlap(torch.tensor([[[0, 3]], [[0, 3]]]), torch.tensor([[[0, 3]], [[4, 6]]]))
    with pytest.raises(ValueError, match=r"teacher has \(1, 6\)"):
        token_overlap(STUDENT, TEACHER[..., 0])
    with pytest.raises(ValueError, match=r"a map \(1, 5, 4\) does not fit token weights \(1, 5, 6\)"):
        align_tokens(maps(0, 1, 5, 4), token_overlap(STUDENT, TEACHER))


def attention(student, teacher, tokens=None, **more):
    tokens = torch.ones(student.shape[0], student.shape[-2], dtype=torch.bool) if tokens is None else tokens
    extras = {"student_attention": student, "teacher_attention": teacher, "attention_tokens": tokens, **more}
    return Attention()(replace(draw(0), extras=extras))


def test_equal_heads_are_matched_one_by_one():
    student, teacher = maps(4, 2, 3, 5, 6), maps(5, 2, 3, 5, 6)
    tokens = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    single = torch.stack([attention(student[:, h], teacher[:, h], tokens) for h in range(3)])
    torch.testing.assert_close(attention(student, teacher, tokens), single.mean())
    assert attention(student, teacher) > attention(mean_heads(student), mean_heads(teacher))


@pytest.mark.parametrize("heads", [None, 2])
def test_unequal_heads_are_averaged(heads):
    student = maps(6, 2, 5, 6) if heads is None else maps(6, 2, heads, 5, 6)
    teacher = maps(7, 2, 3, 5, 6)
    own = student if heads is None else mean_heads(student)
    torch.testing.assert_close(attention(student, teacher), attention(own, mean_heads(teacher)))


def test_unequal_grids_are_resampled_where_both_are_told():
    student, teacher = maps(8, 2, 5, 4), maps(9, 2, 5, 9)
    grids = {"student_grid": torch.tensor([2, 2]), "teacher_grid": torch.tensor([3, 3])}
    torch.testing.assert_close(
        attention(student, teacher, **grids), attention(student, resample_map(teacher, (3, 3), (2, 2)))
    )
    with pytest.raises(
        ValueError, match="different grids, 4 cells in the student and 9 in the teacher: give student_grid"
    ):
        attention(student, teacher)
    with pytest.raises(ValueError, match="student_grid is 3 x 2, but its maps have other cells"):
        attention(student, teacher, student_grid=torch.tensor([3, 2]), teacher_grid=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="an image grid is"):
        attention(student, teacher, student_grid=torch.tensor([4]), teacher_grid=torch.tensor([3, 3]))


def test_unequal_tokens_are_aligned_where_weights_are_given():
    student, teacher = maps(10, 1, 5, 4), maps(11, 1, 6, 4)
    weights = token_overlap(STUDENT, TEACHER)
    made, there = align_tokens(teacher, weights)
    torch.testing.assert_close(attention(student, teacher, token_weights=weights), attention(student, made, there))
    with pytest.raises(ValueError, match="same tokens: use one tokenizer for both models, or give token_weights"):
        attention(student, teacher)


def test_gradient_through_all_three():
    student, teacher = maps(12, 1, 2, 5, 4), maps(13, 1, 3, 6, 9)
    grids = {"student_grid": torch.tensor([2, 2]), "teacher_grid": torch.tensor([3, 3])}

    def of(maps_):
        return attention(maps_, teacher, token_weights=token_overlap(STUDENT, TEACHER), **grids)

    assert torch.autograd.gradcheck(of, (student.requires_grad_(),), atol=1e-6)
