"""Where two losses must agree, what a loss promises at its ends, and what sampling must give on average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

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
from distill.losses.pairwise import gains, ranks
from tests.losses import slow
from tests.losses.batches import SCALE, cells, draw, full_rows, grad_ready


def value_and_gradient(loss, scored):
    scored, (student, *_) = grad_ready(scored)
    value = loss(scored)
    value.backward()
    return value.detach(), student.grad


def agree(one, other, scored):
    torch.testing.assert_close(value_and_gradient(one, scored), value_and_gradient(other, scored))


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_cprd_that_accepts_everything_is_listmle_on_the_negatives(normalise):
    for seed in range(5):
        scored = draw(seed)
        everything = CPRD(accept="fraction", fraction=1.0, normalise=normalise)
        negatives = replace(scored, valid=scored.valid & ~scored.positive)
        agree(everything, ListMLE(normalise=normalise), negatives)
        whole = CPRD(accept="fraction", fraction=1.0, normalise=normalise)
        torch.testing.assert_close(whole(scored), ListMLE(normalise=normalise)(negatives))


def test_cprd_that_accepts_one_is_infonce_on_it():
    scored = draw(6)
    best = torch.zeros_like(scored.positive)
    there = scored.asked & ~scored.positive
    column = scored.teacher.masked_fill(~there, -torch.inf).argmax(dim=1, keepdim=True)
    best = best.scatter(1, column, True) & there
    infonce = replace(scored, positive=best, valid=there, in_batch=None)
    torch.testing.assert_close(CPRD(accept="top", top=1)(scored), Contrastive()(infonce))


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_rankdistil_at_a_vanishing_temperature_is_listmle(normalise):
    for seed in range(5):
        agree(
            RankDistil(teacher_temperature=1e-9, normalise=normalise, samples=3),
            ListMLE(normalise=normalise),
            draw(seed),
        )


def test_rankdistil_is_the_expectation_over_the_teachers_orders():
    """Against every order of four items, weighted by its probability."""
    s, t = [0.3, -0.2, 0.8, 0.1], [1.0, 0.2, -0.5, 0.6]
    for top in (None, 1, 2):
        expected = slow.expected_order_nll([SCALE * x for x in s], [x / 2 for x in t], top=top)
        on = torch.ones(4000, 4, dtype=torch.bool)
        student, teacher = (torch.tensor(x, dtype=torch.float64).expand(4000, 4) for x in (s, t))
        scored = replace(full_rows(0), student=student, teacher=teacher, positive=~on, valid=on)
        torch.manual_seed(0)
        values, keep = RankDistil(teacher_temperature=2.0, samples=4, top=top, normalise="sum").per_row(scored)
        assert keep.all()
        error = (values.std() / 4000**0.5).item()
        assert values.mean().item() == pytest.approx(expected, abs=5 * error)
        assert error < 0.05 * expected


def test_rankdistil_draws_from_torchs_random_state():
    scored, loss = draw(3), RankDistil(teacher_temperature=5.0, samples=1)
    torch.manual_seed(1)
    first = loss(scored)
    assert loss(scored) != first
    torch.manual_seed(1)
    assert loss(scored) == first


def test_margin_mse_with_one_negative_is_m3se():
    scored = full_rows(1, columns=2)
    for std in (1.0, 2.5):
        near = replace(scored, student=torch.tensor([[0.5, -0.5]], dtype=torch.float64).expand(5, 2))
        for batch in (scored, near):  # of one negative there is no second term
            agree(MarginMSE(teacher_std=std), M3SE(teacher_std=std), batch)


def test_margin_mse_on_the_hardest_is_m3ses_first_term():
    scored = full_rows(2)
    hardest = scored.teacher[:, 1:].argmax(dim=1, keepdim=True) + 1
    student = scored.student.scatter(1, hardest, 1.0)  # no other negative is above it: the second term is 0
    scored = replace(scored, student=student)
    agree(MarginMSE(negatives="hardest"), M3SE(), scored)


def test_all_pairs_hold_the_labelled_ones_when_the_teacher_ranks_the_positive_first():
    scored = full_rows(3, columns=2)
    scored = replace(scored, teacher=scored.teacher.sort(dim=1, descending=True).values)
    agree(MarginMSE(pairs="all"), MarginMSE(), scored)


def test_softmax_cross_entropy_has_the_gradient_of_kl_and_the_entropy_more():
    for options in ({}, {"teacher_temperature": 3.0}, {"teacher_std": "row", "temperature": 0.3}):
        scored = full_rows(4)
        ce, kl = SoftmaxCE(**options), KL(**options)
        torch.testing.assert_close(value_and_gradient(ce, scored)[1], value_and_gradient(kl, scored)[1])
        unit = scored.teacher.std(dim=1, keepdim=True) if "teacher_std" in options else 1.0
        p = (scored.teacher / unit / options.get("teacher_temperature", 1.0)).softmax(dim=1)
        torch.testing.assert_close(ce(scored) - kl(scored), torch.special.entr(p).sum(dim=1).mean())


def test_softmax_cross_entropy_on_labels_is_contrastive_on_one_positive():
    scored = full_rows(5)
    agree(SoftmaxCE(target="labels"), Contrastive(train_scale=False), scored)


def test_kl_is_zero_where_student_and_teacher_agree():
    scored = full_rows(6)
    same = replace(scored, teacher=scored.student * SCALE)
    for loss in (KL(), KL(symmetric=True), KL(zscore=True, temperature=2.0, teacher_temperature=2.0)):
        value, gradient = value_and_gradient(loss, same)
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-8


def test_pearson_is_zero_to_two():
    scored = full_rows(7)
    same = replace(scored, teacher=3 * scored.student - 2)
    torch.testing.assert_close(Pearson()(same), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)
    opposite = replace(scored, teacher=-scored.student)
    torch.testing.assert_close(Pearson()(opposite), torch.tensor(2.0, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "loss", [ListMLE(), RankNet(), LambdaRank(), ApproxNDCG(), ADRMSE(), RankDistil(teacher_temperature=1e-9)]
)
def test_an_order_loss_falls_to_its_least_as_the_student_takes_the_teachers_order(loss):
    """At a sharp scale: right order, one swap, reversed."""
    columns = torch.arange(6, dtype=torch.float64)
    right = replace(full_rows(0, rows=1, columns=6), teacher=-columns[None], student=-columns[None] / 5)
    right = replace(right, scale=torch.tensor(100.0, dtype=torch.float64))
    swapped = cells(right, lambda x: x)
    swapped = replace(right, student=right.student[:, [1, 0, 2, 3, 4, 5]])
    reversed_ = replace(right, student=right.student.flip(1))
    assert loss(right).item() == pytest.approx(0, abs=1e-6)
    assert 1e-3 < loss(swapped) < loss(reversed_)


def test_lambdarank_weighs_a_swap_at_the_top_above_one_further_down():
    columns = torch.arange(6, dtype=torch.float64)
    right = replace(full_rows(0, rows=1, columns=6), teacher=-columns[None], student=-columns[None] / 5)
    top, bottom = (
        replace(right, student=right.student[:, order]) for order in ([1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4])
    )
    assert LambdaRank()(top) > 1.02 * LambdaRank()(bottom)
    torch.testing.assert_close(RankNet()(top), RankNet()(bottom))


def test_ranks_share_places_among_equals_and_gains_stay_finite():
    scores = torch.tensor([[3.0, 1.0, 3.0, 0.5, 9.0]])
    there = torch.tensor([[True, True, True, True, False]])
    assert ranks(scores, there).tolist() == [[1.5, 3.0, 1.5, 4.0, 1.0]]
    for gain in ("reciprocal", "sigmoid", "exponential"):
        huge = gains(torch.tensor([[1e4, 9999.0, -1e4, 0.0, 5.0]]), there, gain)
        assert huge.isfinite().all()
        assert huge[0, 4] == 0
        assert (huge >= 0).all()
    doubled = gains(torch.tensor([[5.0, 4.0, -2.0]]), torch.ones(1, 3, dtype=torch.bool), "exponential")
    torch.testing.assert_close(doubled / doubled[0, 0], torch.tensor([[1.0, 15 / 31, 0.0]]))


def test_logit_mse_cares_for_a_shift_that_margins_do_not_see():
    scored = full_rows(8)
    same = replace(scored, teacher=scored.student * SCALE)
    shifted = replace(same, teacher=same.teacher + 5)
    for batch in (same, shifted):
        assert MarginMSE()(batch).item() == pytest.approx(0, abs=1e-18)
    assert LogitMSE()(same).item() == pytest.approx(0, abs=1e-18)
    assert LogitMSE()(shifted).item() == pytest.approx(25)


def test_siglip_over_both_directions_is_the_papers():
    g = torch.Generator().manual_seed(0)
    similarity = torch.rand(6, 6, generator=g, dtype=torch.float64) * 2 - 1
    eye = torch.eye(6, dtype=torch.bool)
    both = [
        replace(full_rows(0), student=s, teacher=s * torch.nan, positive=eye, valid=eye | True)
        for s in (similarity, similarity.T)
    ]
    ours = sum(SigLIP(bias=-5.0)(scored) for scored in both) / 2
    signs = 2 * eye.double() - 1
    paper = -torch.nn.functional.logsigmoid(signs * (similarity * SCALE - 5.0)).sum() / 6
    torch.testing.assert_close(ours, paper)


def test_the_sum_of_max_hinges_is_vse_plus_plus():
    """Two loops over a square batch in which pairs 0 and 3 are captions of one image."""
    g = torch.Generator().manual_seed(1)
    s = torch.rand(5, 5, generator=g, dtype=torch.float64)
    image = [0, 1, 2, 0, 4]
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if image[j] != image[i]]
        expected += max(max(0.0, 0.2 - s[i, i].item() + s[i, j].item()) for j in others)
        expected += max(max(0.0, 0.2 - s[i, i].item() + s[j, i].item()) for j in others)
    ids = torch.tensor(image)
    own, captions = torch.eye(5, dtype=torch.bool), ids[:, None] == ids
    loss = Hinge(reduction="sum")
    total = 0.0
    for matrix in (s, s.T):  # VSE++ knows one positive a row; other captions of its image are absent, not negatives
        total += loss(replace(full_rows(0), student=matrix, teacher=matrix, positive=own, valid=own | ~captions)).item()
    assert total == pytest.approx(expected)


def test_a_hinge_that_is_satisfied_is_zero_and_flat():
    scored = full_rows(9)
    satisfied = replace(scored, student=torch.where(scored.positive, 0.9, scored.student.clamp(max=0.5)))
    for hardest in (True, False):
        value, gradient = value_and_gradient(Hinge(hardest=hardest), satisfied)
        assert value == 0
        assert (gradient == 0).all()
    assert cross_entropy(satisfied.student, torch.zeros(5, dtype=torch.long)) > 0
