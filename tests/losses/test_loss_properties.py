"""What must hold for every loss: what it ignores, what it survives, where gradient may flow."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from distill.losses import (
    ADRMSE,
    CPRD,
    KL,
    M3SE,
    ApproxNDCG,
    Contrastive,
    Hinge,
    LambdaRank,
    ListMLE,
    LogitMSE,
    MarginMSE,
    Pearson,
    RankDistil,
    RankNet,
    SigLIP,
    SoftmaxCE,
)
from tests.losses.batches import cells, draw, grad_ready
from tests.losses.cases import CASES, DISTILLATION, ROW_BY_ROW, SCORE_CASES, named


def value_and_gradient(case, scored):
    scored, leaves = grad_ready(scored)
    value = case(scored)
    value.backward()
    return value.detach(), leaves[0].grad if leaves[0].grad is not None else torch.zeros_like(leaves[0])


@pytest.mark.parametrize("case", **named(SCORE_CASES))
def test_reordering_columns_changes_nothing(case):
    for seed in range(5):
        scored = draw(seed)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        value, gradient = value_and_gradient(case, scored)
        again, moved = value_and_gradient(case, cells(scored, lambda x, order=order: x[:, order]))
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(moved, gradient[:, order])


@pytest.mark.parametrize("case", **named(SCORE_CASES))
def test_padding_changes_nothing(case):
    for rubbish in (torch.nan, 1e30, -torch.inf):
        scored = draw(1)

        def wider(x, rubbish=rubbish):
            fill = {torch.bool: True}.get(x.dtype, rubbish)
            return torch.cat([x, torch.full((7, 4), fill, dtype=x.dtype)], dim=1)

        padded = cells(scored, wider)
        padded = replace(padded, valid=torch.cat([scored.valid, torch.zeros(7, 4, dtype=torch.bool)], dim=1))
        value, gradient = value_and_gradient(case, scored)
        again, more = value_and_gradient(case, padded)
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(more[:, :9], gradient)
        assert (more[:, 9:] == 0).all()


@pytest.mark.parametrize("case", **named(DISTILLATION))
def test_a_cell_not_asked_equals_the_cell_removed(case):
    scored = draw(2)
    removed = replace(scored, valid=scored.asked)
    assert (removed.valid != scored.valid).any()
    value, gradient = value_and_gradient(case, scored)
    again, same = value_and_gradient(case, removed)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(same, gradient)
    assert (gradient[~scored.asked] == 0).all()


@pytest.mark.parametrize("case", **named(CASES))
def test_nothing_to_learn_gives_zero_with_a_finite_graph(case):
    scored = draw(3)
    empty = {**scored.extras, "attention_tokens": torch.zeros_like(scored.extras["attention_tokens"])}
    nothing = [replace(scored, valid=torch.zeros_like(scored.valid), extras=empty)]
    if not case.one_is_enough:
        nothing.append(replace(scored, valid=torch.arange(9).expand(7, 9) < 1, extras=empty))  # one candidate a row
    for batch in nothing:
        batch, leaves = grad_ready(batch)
        value = case(batch)
        assert value.item() == 0
        value.backward()
        assert all(leaf.grad is None or (leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("case", **named(SCORE_CASES))
def test_a_row_without_terms_does_not_dilute_the_mean(case):
    scored = draw(4)
    extra = cells(scored, lambda x: torch.cat([x, x[:1]]))
    extra.valid[-1] = False
    torch.testing.assert_close(case(extra), case(scored))


@pytest.mark.parametrize("case", **named(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_stay_finite(case, dtype):
    g = torch.Generator().manual_seed(0)
    for seed in range(4):
        scored = draw(seed, dtype=dtype)
        sign = torch.randint(-1, 2, (2, 7, 9), generator=g).to(dtype) * 1e4
        scored = replace(scored, student=sign[0], teacher=torch.where(scored.asked, sign[1], scored.teacher))
        scored, leaves = grad_ready(scored)
        value = case(scored)
        value.backward()
        assert value.isfinite()
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("case", **named([case for case in SCORE_CASES if case.differences]))
def test_padding_weighs_nothing_beside_very_low_scores(case):
    """A stand-in for minus infinity that is not low enough would take over the softmax of such a row."""
    scored = draw(6)
    low = replace(scored, student=scored.student - 2e4)
    torch.testing.assert_close(case(low), case(scored), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", **named(CASES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(case, dtype):
    half = draw(7, dtype=dtype)
    single = cells(half, lambda x: x.float() if x.is_floating_point() else x)
    maps = {name: x.float() if x.is_floating_point() else x for name, x in half.extras.items()}
    value = case(half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, case(replace(single, scale=half.scale.float(), extras=maps)))


@pytest.mark.parametrize("case", **named(CASES))
def test_autocast_does_not_change_the_value(case):
    scored = draw(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case(scored)
    torch.testing.assert_close(inside, case(scored))


@pytest.mark.parametrize("case", **named(CASES))
def test_nothing_flows_into_the_teacher(case):
    scored, _ = grad_ready(draw(9))
    teacher = scored.teacher.clone().requires_grad_()
    maps = scored.extras["teacher_attention"].clone().requires_grad_()
    case(replace(scored, teacher=teacher, extras={**scored.extras, "teacher_attention": maps})).backward()
    assert teacher.grad is None
    assert maps.grad is None


@pytest.mark.parametrize("case", **named(SCORE_CASES))
def test_the_learned_scale_is_trained_only_where_asked(case):
    def trains(loss):
        moved = False
        for seed in range(5):
            scored, (_, scale, _) = grad_ready(draw(seed))
            loss(scored).backward()
            moved |= scale.grad is not None and bool(scale.grad != 0)
        return moved

    assert trains(case.loss) == (case.scaled and isinstance(case.loss, (Contrastive, SigLIP)))
    if hasattr(case.loss, "train_scale"):
        for train_scale in (False, True):
            assert trains(replace(case.loss, train_scale=train_scale)) == (case.scaled and train_scale)


def test_scale_and_temperature_are_each_others_inverse():
    pairs = 0
    for case in SCORE_CASES:
        if case.scaled and not getattr(case.loss, "t_squared", False):
            scored = draw(11)
            torch.testing.assert_close(replace(case, loss=replace(case.loss, temperature=1 / 7))(scored), case(scored))
            pairs += 1
    assert pairs > 10


@pytest.mark.parametrize("case", **named(ROW_BY_ROW))
def test_chunks_of_rows_add_up_to_the_whole(case):
    scored = draw(12)
    values, keep = case.loss.per_row(scored)
    halves = [case.loss.per_row(cells(scored, lambda x, p=p: x[p])) for p in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(torch.cat([half[0] for half in halves])[keep], values[keep])
    assert torch.equal(torch.cat([half[1] for half in halves]), keep)
    assert keep.any()


# What a change of the teacher's or the student's scores must leave alone, and what it must not.
SHIFT_T, SCALE_T, MAP_T, SHIFT_S, SCALE_S = "shift t", "scale t", "map t", "shift s", "scale s"
ZSCORE = KL(zscore=True, temperature=1.0)
BLIND = [
    (Contrastive(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (MarginMSE(), {SHIFT_T, SHIFT_S}),
    (MarginMSE(teacher_std="batch"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (M3SE(), {SHIFT_T, SHIFT_S}),
    (M3SE(same_index=False), {SHIFT_T, SHIFT_S}),
    (M3SE(teacher_std="batch"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (KL(), {SHIFT_T, SHIFT_S}),
    (KL(symmetric=True), {SHIFT_T, SHIFT_S}),
    (ZSCORE, {SHIFT_T, SCALE_T, SHIFT_S, SCALE_S}),
    (MarginMSE(teacher_std="row"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (MarginMSE(pairs="all"), {SHIFT_T, SHIFT_S}),
    (M3SE(teacher_std="row"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (KL(teacher_std="row"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (SoftmaxCE(), {SHIFT_T, SHIFT_S}),
    (SoftmaxCE(teacher_std="row"), {SHIFT_T, SCALE_T, SHIFT_S}),
    (SoftmaxCE(target="labels"), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (Pearson(), {SHIFT_T, SCALE_T, SHIFT_S, SCALE_S}),
    (Pearson(of="softmax"), {SHIFT_T, SHIFT_S}),
    (LogitMSE(), set()),
    (LogitMSE(teacher_std="row"), {SHIFT_T, SCALE_T}),
    (LogitMSE(teacher_std="batch"), {SCALE_T}),
    (ListMLE(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (RankDistil(teacher_temperature=1e-9, samples=1), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (RankNet(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (LambdaRank(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (LambdaRank(gain="sigmoid"), {SHIFT_S}),
    (ApproxNDCG(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (ApproxNDCG(gain="exponential"), {SHIFT_S}),
    (ADRMSE(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (SigLIP(bias=-3.0), {SHIFT_T, SCALE_T, MAP_T}),
    (Hinge(), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (CPRD(), {SCALE_T, SHIFT_S}),  # the bar is at 0: a sign rule
    (CPRD(accept="margin", margin=1.0), {SHIFT_T, SHIFT_S}),
    (CPRD(accept="top", top=3), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (CPRD(accept="fraction", fraction=0.5), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
    (CPRD(positive="first", accept="top", top=3), {SHIFT_T, SCALE_T, MAP_T, SHIFT_S}),
]
CHANGES = {
    SHIFT_T: lambda x, by, row: replace(x, teacher=x.teacher + by * row),
    SCALE_T: lambda x, by, row: replace(x, teacher=x.teacher * by),
    MAP_T: lambda x, by, row: replace(x, teacher=(x.teacher / by).exp() * by + x.teacher),
    SHIFT_S: lambda x, by, row: replace(x, student=x.student + by * row),
    SCALE_S: lambda x, by, row: replace(x, student=x.student * by),
}


PAIRS = [(loss, change) for loss, blind in BLIND for change in sorted(blind)]


@pytest.mark.parametrize(("loss", "change"), PAIRS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), by=st.floats(1.5, 6.0))
def test_a_loss_is_blind_to_what_it_should_be(loss, change, seed, by):
    scored = draw(seed)
    row = torch.linspace(-1, 1.3, 7, dtype=torch.float64).unsqueeze(1)  # another shift for every row
    torch.testing.assert_close(loss(CHANGES[change](scored, by, row)), loss(scored), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("loss", "blind"), BLIND)
def test_a_loss_sees_what_it_should_see(loss, blind):
    seen = [change for change in CHANGES if change not in blind]
    assert seen
    row = torch.linspace(-1, 1.3, 7, dtype=torch.float64).unsqueeze(1)
    for change in seen:
        differs = [
            not torch.isclose(loss(CHANGES[change](draw(s), 2.5, row)), loss(draw(s)), rtol=1e-4) for s in range(6)
        ]
        assert any(differs), change
