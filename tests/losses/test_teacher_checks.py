"""The look at teacher scores before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.losses import (
    CPRD,
    KL,
    M3SE,
    Affinity,
    Attention,
    Contrastive,
    Hinge,
    ListMLE,
    MarginMSE,
    Pearson,
    RankDistil,
    RankNet,
    SigLIP,
    SoftmaxCE,
    TeacherScoreError,
    check_teacher_scores,
)
from distill.losses.advice import figures_of

LOSSES = {"contrastive": Contrastive(), "cprd": CPRD(), "kl": KL(), "mine": lambda scored: scored.student.sum()}


def good(seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(10, 6, generator=g) * 4
    teacher[:, 1] = teacher[:, 1].abs() + 0.1  # one accepted negative in every row
    positive = torch.zeros(10, 6, dtype=torch.bool)
    positive[:, 0] = True
    return teacher, torch.ones_like(positive), positive


def test_good_scores_give_no_warning():
    teacher, asked, positive = good()
    assert check_teacher_scores(teacher, asked, positive, losses=LOSSES) == []
    assert check_teacher_scores(teacher.half().numpy(), asked.numpy(), positive.numpy(), losses=LOSSES) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_with_a_count(bad):
    teacher, asked, positive = good()
    teacher[3, 2] = teacher[7, 5] = bad
    with pytest.raises(TeacherScoreError, match=r"2 of 60 teacher scores are NaN or infinite, first in rows \[3, 7\]"):
        check_teacher_scores(teacher, asked, positive, losses=LOSSES)
    asked[3, 2] = asked[7, 5] = False
    assert check_teacher_scores(teacher, asked, positive, losses=LOSSES) == []


def test_probabilities_are_noticed():
    teacher, asked, positive = good()
    (warning,) = check_teacher_scores(teacher.sigmoid(), asked, positive, losses=LOSSES)
    assert "all 60 teacher scores lie in [0" in warning
    assert "look like probabilities" in warning


def test_ties_are_counted():
    teacher, asked, positive = good()
    teacher[:3] = 2.0
    asked[9, 1:] = False  # one score is no tie
    (ties, idle, kl) = check_teacher_scores(teacher, asked, positive, losses=LOSSES)
    assert ties.startswith("3 of 9 (33.3%) rows have one and the same teacher score")
    assert idle.startswith("cprd learns nothing from 1 of 10")
    assert kl.startswith("kl learns nothing from 1 of 10")


def test_rows_without_an_accepted_item_are_counted():
    teacher, asked, positive = good()
    teacher[:4, 1:] = -teacher[:4, 1:].abs() - 0.1
    (warning,) = check_teacher_scores(teacher, asked, positive, losses=LOSSES)
    assert warning.startswith("cprd learns nothing from 4 of 10 (40.0%) rows")


def test_rows_without_a_scored_positive_are_counted_for_margins():
    teacher, asked, positive = good()
    asked[:5, 0] = False
    (labels, margins) = check_teacher_scores(teacher, asked, positive, losses={"margin": MarginMSE()})
    assert labels.startswith("5 of 10 (50.0%) rows have no labelled match among their scored candidates")
    assert "score the labelled pairs too" in labels
    assert margins.startswith("margin learns nothing from 5 of 10 (50.0%) rows")


def test_nothing_asked_is_said_plainly():
    teacher, asked, positive = good()
    (warning,) = check_teacher_scores(teacher, ~asked, positive, losses=LOSSES)
    assert "asked for no pair" in warning


def test_saturated_probabilities_are_counted():
    teacher, asked, positive = good()
    (warning, ties) = check_teacher_scores((teacher * 10).sigmoid(), asked, positive, losses={})
    assert "were they rounded?" in ties  # the ones of float32
    count = int((((teacher * 10).sigmoid() - 0.5).abs() > 0.49).sum())
    assert f"{count} of 60" in warning
    assert "saturated" in warning
    assert "log(p / (1 - p))" in warning


def test_scores_that_were_cut_off_are_counted():
    teacher, asked, positive = good()
    cut = teacher.clamp(max=2.0)
    count = int((cut == 2.0).sum())
    found = check_teacher_scores(cut, asked, positive, losses={})
    assert found[0].startswith(f"{count} of 60")
    assert "equal the highest one, 2: they look cut off there" in found[0]
    found = check_teacher_scores(-cut, asked, positive, losses={})
    assert "equal the lowest one, -2" in found[0]


def test_rounded_scores_are_noticed():
    teacher, asked, positive = good()
    rounded = (teacher / 3).round() * 3
    for columns in (6, 3):  # only what was asked counts
        asked[:, columns:] = False
        ordered = rounded[:, :columns].sort(dim=1).values
        same = ordered[:, 1:] == ordered[:, :-1]
        same = same[~same.all(dim=1)]  # rows with one score throughout have a warning of their own
        warning = check_teacher_scores(rounded, asked, positive, losses={})[-1]
        assert warning.startswith(f"{int(same.sum())} of {same.numel()} ")
        assert "were they rounded?" in warning
    assert check_teacher_scores(teacher, asked, positive, losses={}) == []


def test_a_teacher_temperature_that_leaves_one_candidate_is_answered_with_one_that_does_not():
    teacher, asked, positive = good()
    for loss in (KL(teacher_temperature=0.05), SoftmaxCE(teacher_temperature=0.05)):
        (warning,) = check_teacher_scores(teacher, asked, positive, losses={"mine": loss})
        assert warning.startswith("mine: teacher_temperature 0.05 leaves over 99% on one candidate in ")
        gone = (teacher.double() / 0.05 < (teacher.double() / 0.05).amax(dim=1, keepdim=True) - 103).sum()
        assert f"underflows to exactly 0 for {int(gone)} of 60 " in warning
        median = teacher.double().std(dim=1).median()
        assert f"teacher_temperature: {median:.3g}, the median standard deviation of a row" in warning
        better = type(loss)(teacher_temperature=float(f"{median:.3g}"))
        assert check_teacher_scores(teacher, asked, positive, losses={"mine": better}) == []
    quiet = {
        "row": KL(teacher_temperature=0.5, teacher_std="row"),
        "zscore": KL(zscore=True, temperature=2.0, teacher_temperature=0.01),
        "labels": SoftmaxCE(target="labels", teacher_temperature=0.01),
        "raw": Pearson(teacher_temperature=0.01),
    }
    assert check_teacher_scores(teacher, asked, positive, losses=quiet) == []


def test_margins_that_no_cosine_reaches_are_answered_with_a_scale():
    teacher, asked, positive = good()
    teacher[:, 0] += 10  # positives well above
    margin_std = (teacher[:, :1] - teacher[:, 1:]).double().std()
    for loss in (MarginMSE(temperature=1.0), M3SE(temperature=1.0), MarginMSE(convention="sentence_transformers")):
        (warning,) = check_teacher_scores(teacher, asked, positive, losses={"mine": loss})
        assert warning.startswith(
            f"mine: the teacher's margins spread by {margin_std:.3g}, the student's can be 2 at most"
        )
        assert f"teacher_std: {margin_std:.3g} with temperature: 0.15" in warning
    fits = {"own": MarginMSE(), "divided": MarginMSE(teacher_std=margin_std.item(), temperature=0.15)}
    assert check_teacher_scores(teacher, asked, positive, losses=fits, scale=50.0) == []
    (warning,) = check_teacher_scores(teacher, asked, positive, losses={"own": MarginMSE()}, scale=1.0)
    assert "can be 2 at most (cosine times 1)" in warning


def test_margins_of_squashed_scores_are_called_tiny():
    teacher, asked, positive = good()
    (probabilities, warning) = check_teacher_scores(
        teacher.sigmoid(), asked, positive, losses={"mine": MarginMSE()}, scale=50.0
    )
    assert "look like probabilities" in probabilities
    assert "the student's by about 7.5 (cosine times 50): it would learn to have none" in warning


def test_a_student_temperature_that_underflows_is_named():
    teacher, asked, positive = good()
    (warning,) = check_teacher_scores(teacher, asked, positive, losses={"mine": RankNet(temperature=0.001)})
    assert warning.startswith("mine: temperature 0.001 spreads cosines over up to 2000")
    assert "temperature: 0.019 or more" in warning
    assert check_teacher_scores(teacher, asked, positive, losses={"mine": RankNet(temperature=0.02)}) == []


def test_the_margins_deviation_is_that_of_all_pairs():
    teacher, asked, positive = good(3)
    positive[:, 3] = True
    asked[2:5, 1:3] = False
    pairs = [
        (teacher[b, i] - teacher[b, j]).item()
        for b in range(10)
        for i in range(6)
        for j in range(6)
        if asked[b, i] and asked[b, j] and positive[b, i] and not positive[b, j]
    ]
    figures = figures_of(teacher, asked, positive)
    assert figures.margin_std == pytest.approx(np.std(pairs, ddof=1), rel=1e-6)
    assert figures_of(teacher, asked & False, positive) is None
    assert figures_of(teacher, asked, positive & False).margin_std is None


def test_losses_that_read_no_scores_are_left_alone_and_the_random_state_too():
    teacher, asked, positive = good()
    others = {"a": SigLIP(), "b": Hinge(), "c": Affinity(), "d": Attention(), "e": Contrastive()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert check_teacher_scores(teacher, asked, positive, losses={**others, "f": RankDistil(), "g": ListMLE()}) == []
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_needs_more_than_scores_is_not_asked():
    class Mine:
        needs = frozenset({"captions"})

        def per_row(self, scored):
            return scored.extras["captions"], scored.valid.any(dim=1)

    assert check_teacher_scores(*good(), losses={"mine": Mine()}) == []


def test_many_rows_are_counted_in_pieces():
    teacher, asked, positive = (x.repeat(300, 1) for x in good())
    teacher[:1500, 1:] = -teacher[:1500, 1:].abs() - 0.1
    (warning,) = check_teacher_scores(teacher, asked, positive, losses={"cprd": CPRD()})
    assert warning.startswith("cprd learns nothing from 1500 of 3000 (50.0%) rows")
