"""Every loss on batches that hypothesis draws: order and padding, extremes, directions of the gradient."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.losses.batches import cells, draw, grad_ready
from tests.losses.cases import CASES, SCORE_CASES, named

QUICK = settings(max_examples=8, deadline=None, derandomize=True)
BATCHES = st.builds(
    lambda seed, rows, columns: draw(seed, rows=rows, columns=columns),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 9),
)


def value_and_gradient(case, scored):
    scored, leaves = grad_ready(scored)
    value = case(scored)
    value.backward()
    return value.detach(), leaves[0].grad if leaves[0].grad is not None else torch.zeros_like(leaves[0])


@pytest.mark.parametrize("case", **named(SCORE_CASES))
@QUICK
@given(scored=BATCHES, data=st.data())
def test_columns_in_any_order_with_any_padding(case, scored, data):
    """Columns of rubbish are put in, and all are shuffled."""
    rows, columns = scored.student.shape
    pad = data.draw(st.integers(0, 3))
    rubbish = data.draw(st.sampled_from([torch.nan, torch.inf, -1e30]))
    order = torch.tensor(data.draw(st.permutations(range(columns + pad))))

    def wider(x):
        fill = torch.full((rows, pad), True if x.dtype == torch.bool else rubbish, dtype=x.dtype)
        return torch.cat([x, fill], dim=1)[:, order]

    there = torch.cat([scored.valid, torch.zeros(rows, pad, dtype=torch.bool)], dim=1)[:, order]
    value, gradient = value_and_gradient(case, scored)
    again, moved = value_and_gradient(case, replace(cells(scored, wider), valid=there))
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(moved[:, order.argsort()[:columns]], gradient)
    assert (moved[:, order.argsort()[columns:]] == 0).all()


@pytest.mark.parametrize("case", **named([case for case in SCORE_CASES if case.differences]))
@QUICK
@given(scored=BATCHES, by=st.floats(-50, 50))
def test_a_constant_on_a_row_of_student_scores_changes_nothing(case, scored, by):
    shift = by * torch.linspace(-1, 1, len(scored.student), dtype=torch.float64).unsqueeze(1)
    value, gradient = value_and_gradient(case, scored)
    again, same = value_and_gradient(case, replace(scored, student=scored.student + shift))
    torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-7)


EXTREMES = {
    "all equal": lambda x, there: torch.full_like(x, 0.3),
    "all zero": lambda x, there: torch.zeros_like(x),
    "1e4 or -1e4": lambda x, there: torch.where(x.nan_to_num(0.0) > 0, 1e4, -1e4).to(x.dtype),
    "all 1e4": lambda x, there: torch.full_like(x, 1e4),
    "all -1e4": lambda x, there: torch.full_like(x, -1e4),
    "one apart": lambda x, there: torch.full_like(x, -1e4).index_fill(1, torch.tensor([0]), 1e4),
    "as drawn": lambda x, there: x,
}
VALID = {
    "as drawn": lambda valid: valid,
    "all": lambda valid: valid | True,
    "none": lambda valid: valid & False,
    "one": lambda valid: torch.zeros_like(valid).index_fill(1, torch.tensor([0]), True),
}


@pytest.mark.parametrize("case", **named(CASES))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scored=BATCHES,
    student=st.sampled_from(sorted(EXTREMES)),
    teacher=st.sampled_from(sorted(EXTREMES)),
    valid=st.sampled_from(sorted(VALID)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_finite_at_extremes(case, scored, student, teacher, valid, dtype):
    there = VALID[valid](scored.valid)
    asked = ~scored.teacher.isnan()
    made = EXTREMES[teacher](scored.teacher, there)
    scored = replace(
        scored,
        student=EXTREMES[student](scored.student, there).nan_to_num(0.1).to(dtype),
        teacher=torch.where(asked, made, torch.nan).to(dtype),
        valid=there,
        scale=scored.scale.to(dtype),
    )
    scored, leaves = grad_ready(scored)
    value = case(scored)
    value.backward()
    assert value.isfinite()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
    if case.reads_scores and valid == "none":
        assert value == 0


@pytest.mark.parametrize("case", **named(SCORE_CASES))
@QUICK
@given(scored=BATCHES, seed=st.integers(0, 1000))
def test_the_gradient_is_the_slope_in_any_direction(case, scored, seed):
    g = torch.Generator().manual_seed(seed)
    way = torch.randn(scored.student.shape, generator=g, dtype=torch.float64)
    _, gradient = value_and_gradient(case, scored)
    step = 1e-6
    ends = [case(replace(scored, student=scored.student + sign * step * way)) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=1e-5)
