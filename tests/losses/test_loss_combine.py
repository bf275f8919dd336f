"""Weighted sums: every part reported, none computed twice, and a bad one named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.losses import KL, Attention, Contrastive, NonFiniteLossError, Part, Schedule, Weighted
from tests.losses.batches import draw, grad_ready

BOTH = Weighted((Part("contrastive", 0.5, Contrastive()), Part("kl", 2.0, KL())))


def test_sum_and_parts_agree():
    scored, (student, *_) = grad_ready(draw(0))
    parts = BOTH.parts_of(scored)
    assert list(parts) == ["contrastive", "kl"]
    torch.testing.assert_close(parts["contrastive"], Contrastive()(scored))
    torch.testing.assert_close(parts["kl"], KL()(scored))
    total = BOTH.total(parts)
    torch.testing.assert_close(total, 0.5 * Contrastive()(scored) + 2 * KL()(scored))
    torch.testing.assert_close(BOTH(scored), total)
    (got,) = torch.autograd.grad(total, student)
    (expected,) = torch.autograd.grad(0.5 * Contrastive()(scored) + 2 * KL()(scored), student)
    torch.testing.assert_close(got, expected)


def test_each_part_is_computed_once():
    calls = []

    def counted(scored):
        calls.append(1)
        return scored.student.nansum()

    loss = Weighted((Part("mine", 3.0, counted),))
    parts = loss.parts_of(draw(0))
    loss.total(parts)
    assert len(calls) == 1


def test_a_function_of_the_user_is_a_part():
    scored, (student, *_) = grad_ready(draw(1))
    loss = Weighted((Part("mine", 3.0, lambda scored: scored.student[scored.valid].mean()),))
    loss(scored).backward()
    assert student.grad[scored.valid].sum().item() == pytest.approx(3.0)


def test_weight_zero_is_reported_and_not_trained():
    scored, (student, *_) = grad_ready(draw(2))
    loss = Weighted((Part("kl", 1.0, KL()), Part("watched", 0.0, Contrastive())))
    parts = loss.parts_of(scored)
    assert parts["watched"].item() > 0
    assert not parts["watched"].requires_grad
    torch.testing.assert_close(loss.total(parts), KL()(scored))


def test_needs_is_the_union():
    def mine(scored):
        return scored.student.sum()

    mine.needs = {"captions"}
    assert BOTH.needs == frozenset()
    assert Weighted((*BOTH.parts, Part("a", 1, Attention()), Part("b", 1, mine))).needs == Attention.needs | {
        "captions"
    }


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Weighted(()), ValueError, "at least one part needs a weight above 0, got no parts"),
        (lambda: Weighted((Part("kl", 0.0, KL()),)), ValueError, "weight above 0"),
        (lambda: Weighted((Part("kl", 1, KL()), Part("kl", 1, KL()))), ValueError, "kl more than once"),
        (lambda: Part("kl", -1.0, KL()), ValueError, "weight of 'kl' must be a number >= 0, got -1.0"),
        (lambda: Part("kl", float("nan"), KL()), ValueError, "weight of 'kl'"),
        (lambda: Part("", 1.0, KL()), ValueError, "needs a name"),
        (lambda: Part("kl", 1.0, "kl"), TypeError, "must be a function of Scored, got str"),
        (
            lambda: BOTH.total({"kl": torch.zeros(())}),
            ValueError,
            r"expected parts \['contrastive', 'kl'\], got \['kl'\]",
        ),
    ],
)
def test_sums_that_make_no_sense_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_part_that_is_not_a_scalar_is_refused():
    for loss, got in [(lambda s: s.scale.expand(3), r"got \(3,\)"), (lambda s: 1.0, "got float")]:
        with pytest.raises(ValueError, match=f"loss 'mine' must give a scalar tensor .*{got}"):
            Weighted((Part("mine", 1.0, loss),))(draw(0))


def raised(loss, scored, part="kl"):
    with pytest.raises(NonFiniteLossError) as caught:
        loss.parts_of(scored)
    assert caught.value.part == part
    assert f"loss '{part}' is " in str(caught.value)
    return caught.value


def spoil(tensor, where, value):
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


def whole(seed):
    """Everything there and asked."""
    scored = draw(seed)
    student, teacher = scored.student.nan_to_num(0.1), scored.teacher.nan_to_num(0.2)
    return replace(scored, student=student, teacher=teacher, valid=scored.valid | True, in_batch=None)


def test_bad_inputs_are_named_by_part_and_rows():
    scored = whole(3)
    bad = raised(BOTH, replace(scored, student=spoil(scored.student, ([1, 4], [0, 2]), torch.nan)), "contrastive")
    assert bad.rows == (1, 4)
    assert "similarity is not finite in 2 rows (1, 4)" in str(bad)
    padded = replace(scored, student=spoil(scored.student, ([1, 4], [0, 2]), torch.nan), valid=scored.valid.clone())
    padded.valid[4, 2] = False  # rubbish in padding is not the cause
    assert raised(BOTH, padded, "contrastive").rows == (1,)
    bad = raised(BOTH, replace(scored, teacher=spoil(scored.teacher, (2, 3), torch.inf)))
    assert bad.rows == (2,)
    assert "teacher's score is infinite in 1 rows (2)" in str(bad)
    bad = raised(BOTH, replace(scored, scale=torch.tensor(torch.inf)), "contrastive")
    assert bad.rows == ()
    assert "learned scale is inf" in str(bad)


def test_a_loss_that_fails_on_some_rows_alone_names_them():
    def mine(scored):
        return (scored.student.amax(dim=1) - 0.5).sqrt().mean()  # NaN for rows that stay below 0.5

    scored = whole(4)
    bad = raised(Weighted((Part("mine", 1.0, mine),)), scored, "mine")
    assert bad.rows == tuple(row for row in range(7) if scored.student[row].max() < 0.5) != ()
    assert "inputs are finite" in str(bad)


def test_a_loss_that_fails_only_on_the_whole_says_so():
    bad = raised(
        Weighted((Part("mine", 1.0, lambda s: 1 / s.scale.new_tensor(float(len(s.student) == 1))),)), whole(5), "mine"
    )
    assert bad.rows == ()
    assert "every row alone is finite" in str(bad)


def test_bad_attention_maps_are_named():
    scored = whole(6)
    tokens = torch.ones(3, 4, dtype=torch.bool)
    maps = {**scored.extras, "attention_tokens": tokens}
    maps["teacher_attention"] = spoil(maps["teacher_attention"], (0, 1, 2), torch.nan)
    bad = raised(Weighted((Part("attention", 1.0, Attention()),)), replace(scored, extras=maps), "attention")
    assert "NaN in teacher_attention" in str(bad)
    assert bad.rows == ()


def test_rubbish_in_padding_is_no_failure():
    scored = draw(7)
    assert scored.student.isnan().any()
    assert BOTH(scored).isfinite()


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(), [0, 0.25, 0.5, 1]),
        (Schedule(begin=0.25, end=0.75), [0, 0, 0.5, 1]),
        (Schedule(first=1.0, last=0.2, end=0.5), [1, 0.6, 0.2, 0.2]),
        (Schedule(shape="cosine"), [0, 0.1464466, 0.5, 1]),
        (Schedule(shape="constant", last=0.7), [0.7] * 4),
        (Schedule(begin=0.5, end=0.5), [0, 0, 1, 1]),
        (Schedule(begin=1.0), [0, 0, 0, 1]),
    ],
)
def test_schedules_at_a_quarter_a_half_and_the_ends(schedule, values):
    assert [schedule(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values)


def test_a_schedule_changes_the_weight_and_the_gradient():
    ramp = Weighted((Part("contrastive", 1.0, Contrastive()), Part("kl", 4.0, KL(), Schedule(begin=0.2))))
    scored, (student, *_) = grad_ready(draw(0))
    for progress, weight in [(0.0, 0.0), (0.6, 2.0), (1.0, 4.0)]:
        assert ramp.weights(progress) == pytest.approx({"contrastive": 1.0, "kl": weight})
        parts = ramp.parts_of(scored)
        total = ramp.total(parts, progress)
        torch.testing.assert_close(total, parts["contrastive"] + weight * parts["kl"])
        torch.testing.assert_close(ramp(scored, progress), total)
        (got,) = torch.autograd.grad(total, student)
        (expected,) = torch.autograd.grad(Contrastive()(scored) + weight * KL()(scored), student)
        torch.testing.assert_close(got, expected)


def test_a_sum_whose_only_part_still_waits_has_a_gradient_of_zeros():
    scored, (student, *_) = grad_ready(draw(1))
    Weighted((Part("kl", 1.0, KL(), Schedule(begin=0.5)),))(scored, 0.1).backward()
    assert (student.grad == 0).all()


def test_a_schedule_without_progress_is_refused_and_none_needs_none():
    ramp = Weighted((Part("kl", 1.0, KL(), Schedule()),))
    with pytest.raises(ValueError, match="the weight of 'kl' has a schedule: the training must say its progress"):
        ramp(draw(0))
    assert BOTH.weights() == BOTH.weights(0.3) == {"contrastive": 0.5, "kl": 2.0}
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        ramp(draw(0), 1.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shape": "step"}, "shape must be one of constant, linear, cosine"),
        ({"first": -1.0}, "first must be a number >= 0, got -1.0"),
        ({"last": float("inf")}, "last must be a number >= 0"),
        ({"begin": 0.6, "end": 0.4}, "0 <= begin <= end <= 1, got begin=0.6 and end=0.4"),
        ({"end": 1.5}, "0 <= begin <= end <= 1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Schedule(**options)
