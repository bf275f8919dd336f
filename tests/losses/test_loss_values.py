"""Every loss and option against a loop reference, against finite differences, and against torch's own functions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from distill.losses import CPRD, KL, M3SE, Attention, Contrastive, MarginMSE, plackett_luce
from distill.protocols import Scored
from tests.losses import loops
from tests.losses.batches import SCALE, cells, draw, full_rows, grad_ready
from tests.losses.cases import CASES, named


@pytest.mark.parametrize("case", **named(CASES))
@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_the_loop_reference(case, ties):
    if ties and not case.ties:
        pytest.skip("draws the order of ties")
    values = []
    for seed in range(12):
        scored = draw(seed, ties=ties)
        values.append(case.reference(scored))
        assert case(scored).item() == pytest.approx(values[-1], rel=1e-9, abs=1e-12)
    assert sum(value > 0 for value in values) > 6  # the reference had something to say


@pytest.mark.parametrize("case", **named(CASES))
def test_without_in_batch_marks_every_column_counts(case):
    scored = replace(draw(3), in_batch=None)
    assert case(scored).item() == pytest.approx(case.reference(scored), rel=1e-9)


@pytest.mark.parametrize("case", **named(CASES))
def test_gradient_equals_finite_differences(case):
    scored = draw(5)
    scored, leaves = grad_ready(replace(scored, student=scored.student.nan_to_num(0.0)))
    scored.scale.requires_grad_(getattr(case.loss, "train_scale", False) and case.scaled)

    def of(student, scale, maps):
        return case(replace(scored, student=student, scale=scale, extras={**scored.extras, "student_attention": maps}))

    assert case.reference(scored) > 0
    assert torch.autograd.gradcheck(of, tuple(leaves), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("positives", ["softmax_all", "shared"])
def test_contrastive_with_one_positive_is_cross_entropy(positives):
    scored = full_rows(0)
    expected = cross_entropy(scored.student * SCALE, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(Contrastive(positives=positives)(scored), expected)


def test_contrastive_on_a_square_batch_is_clip():
    g = torch.Generator().manual_seed(1)
    similarity = torch.rand(6, 6, generator=g, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.bool)
    scored = Scored(similarity, torch.full_like(similarity, torch.nan), eye, torch.ones_like(eye), torch.tensor(20.0))
    expected = cross_entropy(similarity * 20, torch.arange(6))
    torch.testing.assert_close(Contrastive()(scored), expected)


def test_contrastive_never_pushes_a_positive_away():
    """Nor one outside the scope: with softmax_all the gradient at every positive is <= 0."""
    for seed in range(10):
        scored, (student, *_) = grad_ready(draw(seed))
        Contrastive()(scored).backward()
        gradient = student.grad[scored.valid & scored.positive]
        assert (gradient <= 0).all()
        assert (gradient < 0).any()
        outside = scored.valid & scored.positive & ~scored.in_batch
        assert (student.grad[outside] == 0).all()


def test_contrastive_reads_mined_columns_only_when_told():
    scored = full_rows(2)
    scored = replace(scored, in_batch=torch.arange(8).expand(5, 8) < 4)
    near = Contrastive()(cells(scored, lambda x: x[:, :4]))
    torch.testing.assert_close(Contrastive()(scored), near)
    assert Contrastive(negatives="all")(scored) > near


def test_cprd_with_one_accepted_is_infonce_on_the_hardest_negative():
    scored = full_rows(3)
    negatives, teacher = scored.student[:, 1:] * SCALE, scored.teacher[:, 1:]
    expected = cross_entropy(negatives, teacher.argmax(dim=1))
    torch.testing.assert_close(CPRD(accept="top", top=1)(scored), expected)


def test_cprd_with_all_accepted_is_listmle():
    scored = full_rows(4)
    total = 0.0
    for row in range(5):
        order = scored.teacher[row, 1:].argsort(descending=True)
        z = (scored.student[row, 1:] * SCALE)[order]
        total += -sum(z[j:].log_softmax(dim=0)[0].item() for j in range(7))
    assert CPRD(accept="fraction", fraction=1.0, normalise="sum")(scored).item() == pytest.approx(total / 5)


def test_cprd_with_the_positive_first_and_nothing_else_accepted_is_contrastive():
    scored = full_rows(5)
    torch.testing.assert_close(CPRD(positive="first", threshold=1e6)(scored), Contrastive()(scored))


def test_cprd_only_pushes_down_what_is_not_accepted():
    seen = 0
    for seed in range(10):
        scored, (student, *_) = grad_ready(draw(seed))
        CPRD(threshold=0.5)(scored).backward()
        refused = scored.asked & ~scored.positive & (scored.teacher < 0.5)
        assert (student.grad[refused] >= 0).all()
        seen += int((student.grad[refused] > 0).sum())
    assert seen > 10


def test_plackett_luce_is_cut_at_the_first_item_refused():
    z = torch.tensor([[0.3, 2.0, -1.0, 0.7]], dtype=torch.float64).expand(4, 4)
    order = torch.tensor([[1, 3, 0, 2]]).expand(4, 4)
    accepted = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    total, count = plackett_luce(z, order, accepted, torch.ones_like(accepted))
    assert count.tolist() == [1, 1, 0, 4]  # in the teacher's order: 1 | then 3, refused | 1 itself refused | all
    first = loops.logsumexp([2.0, 0.7, 0.3, -1.0]) - 2.0
    every = first + loops.logsumexp([0.7, 0.3, -1.0]) - 0.7 + loops.logsumexp([0.3, -1.0]) - 0.3
    assert total.tolist() == pytest.approx([first, first, 0.0, every])


def test_cprd_shares_are_rounded_up_but_not_by_floating_point():
    scored = full_rows(6, rows=1, columns=26)  # 25 negatives; 0.28 * 25 = 7.000000000000001
    for fraction, top in [(0.28, 7), (0.6, 15), (0.29, 8), (1.0, 25), (1e-6, 1)]:
        share = CPRD(accept="fraction", fraction=fraction, normalise="sum")(scored)
        torch.testing.assert_close(share, CPRD(accept="top", top=top, normalise="sum")(scored))


def test_margin_mse_is_zero_when_margins_agree():
    scored = full_rows(7)
    agreeing = replace(scored, teacher=scored.student * SCALE + torch.randn(5, 1, dtype=torch.float64))
    for loss in (MarginMSE(), MarginMSE(negatives="hardest"), M3SE(), M3SE(same_index=False)):
        assert loss(agreeing).item() == pytest.approx(0.0, abs=1e-20)
        assert loss(scored).item() > 1


def test_margin_mse_weighs_rows_not_pairs():
    """A row of one pair counts as much as a row of three."""
    student = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 0, torch.nan, torch.nan], [1.0, 0, 0, 0]], dtype=torch.float64)
    positive = torch.tensor([[True, False, False, False]] * 2)
    scored = Scored(student, teacher, positive, torch.ones_like(positive), torch.tensor(1.0))
    assert MarginMSE()(scored).item() == pytest.approx((4 + 0) / 2)


def test_m3se_lets_easy_negatives_be():
    """Below the hardest negative, neither the order nor the place of an easy one matters."""
    scored = full_rows(8)
    hardest = scored.teacher[:, 1:].argmax(dim=1, keepdim=True) + 1
    student = scored.student.clone().scatter(1, hardest, 0.5)
    easy = torch.ones_like(scored.positive).scatter(1, hardest, False) & ~scored.positive
    below = torch.where(easy, student.clamp(max=0.4), student)
    lower = torch.where(easy, below - 0.3, below)
    above = torch.where(easy, below + 0.3, below)
    value = M3SE()(replace(scored, student=below))
    torch.testing.assert_close(M3SE()(replace(scored, student=lower)), value, rtol=0, atol=0)
    assert M3SE()(replace(scored, student=above)) > value


def test_kl_is_torchs():
    scored = full_rows(9)
    log_q, p = (scored.student / 0.1).log_softmax(1), (scored.teacher / 2.0).softmax(1)
    loss = KL(temperature=0.1, teacher_temperature=2.0)
    torch.testing.assert_close(loss(scored), kl_div(log_q, p, reduction="batchmean"))
    squared = KL(temperature=0.1, teacher_temperature=2.0, t_squared=True)
    torch.testing.assert_close(squared(scored), kl_div(log_q, p, reduction="batchmean") * 0.01)


@pytest.mark.parametrize("symmetric", [False, True])
def test_kl_is_zero_at_agreement(symmetric):
    scored = full_rows(10)
    shifted = replace(scored, teacher=scored.student * SCALE + torch.randn(5, 1, dtype=torch.float64))
    assert KL(symmetric=symmetric)(shifted).item() == pytest.approx(0.0, abs=1e-12)


def test_symmetric_kl_does_not_care_who_is_who():
    scored = full_rows(11)
    swapped = replace(scored, student=scored.teacher, teacher=scored.student)
    loss = KL(symmetric=True, temperature=1.0)
    torch.testing.assert_close(loss(scored), loss(swapped))
    plain = KL(temperature=1.0)
    assert not torch.isclose(plain(scored), plain(swapped))


def test_zscored_kl_leaves_out_rows_without_a_usable_deviation():
    student = torch.rand(4, 5, dtype=torch.float64)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    teacher[0] = 1e4 / 3  # flat teacher
    student[1] = 0.3  # flat student
    teacher[2, :2] = torch.nan  # three scores
    off = torch.zeros(4, 5, dtype=torch.bool)
    loss = KL(zscore=True, temperature=1.0)
    for dtype in (torch.float64, torch.float32):
        scored, (leaf, _) = grad_ready(Scored(student.to(dtype), teacher.to(dtype), off, ~off, torch.tensor(1.0)))
        value = loss(scored)
        value.backward()
        assert value.item() == pytest.approx(
            loops.kl(replace(scored, student=leaf.detach()), factor=1, zscore=True), rel=1e-4
        )
        assert (leaf.grad[:3] == 0).all()
        assert (leaf.grad[3] != 0).all()


def maps(student, teacher, tokens):
    nothing = torch.zeros(1, 1)
    extras = {"student_attention": student, "teacher_attention": teacher, "attention_tokens": tokens}
    return Scored(nothing, nothing, nothing.bool(), nothing.bool(), torch.tensor(1.0), extras=extras)


def test_attention_is_zero_for_equal_maps_and_known_by_hand():
    tokens = torch.ones(1, 1, dtype=torch.bool)
    half = torch.tensor([[[0.5, 0.5]]]).log()
    skew = torch.tensor([[[0.25, 0.75]]]).log()
    assert Attention()(maps(half, half, tokens)).item() == 0
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert Attention()(maps(skew, half, tokens)).item() == pytest.approx(by_hand)
    sure = torch.tensor([[[1.0, 0.0]]]).log()  # log 0 = -inf weighs nothing
    assert Attention()(maps(half, sure, tokens)).item() == pytest.approx(math.log(2))


def test_attention_ignores_padding_tokens_whatever_they_hold():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=g).log_softmax(2) for _ in range(2))
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    value = Attention()(maps(student, teacher, tokens))
    for rubbish in (5.0, torch.nan, torch.inf, -torch.inf):
        leaf = student.masked_fill(~tokens[..., None], rubbish).requires_grad_()
        again = Attention()(maps(leaf, teacher.masked_fill(~tokens[..., None], rubbish), tokens))
        again.backward()
        torch.testing.assert_close(again, value, rtol=0, atol=0)
        assert leaf.grad.isfinite().all()
    teacher[0, 0, 0] = torch.nan  # but a NaN in a real row is not swept away
    assert Attention()(maps(student, teacher, tokens)).isnan()
