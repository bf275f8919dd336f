"""The look at teacher scores before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.losses import CPRD, KL, Contrastive, MarginMSE, TeacherScoreError, check_teacher_scores

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
    (warning,) = check_teacher_scores(teacher, asked, positive, losses={"margin": MarginMSE()})
    assert warning.startswith("margin learns nothing from 5 of 10 (50.0%) rows")


def test_nothing_asked_is_said_plainly():
    teacher, asked, positive = good()
    (warning,) = check_teacher_scores(teacher, ~asked, positive, losses=LOSSES)
    assert "asked for no pair" in warning
