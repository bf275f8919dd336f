"""What a loss divides the teacher's scores by when it measures that itself: reported as it was used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.losses import KL, M3SE, Contrastive, LogitMSE, MarginMSE, Part, SoftmaxCE, Weighted
from tests.losses.batches import draw

SHIFT_FREE = [
    lambda std: KL(teacher_std=std),
    lambda std: KL(teacher_std=std, positive="drop"),
    lambda std: SoftmaxCE(teacher_std=std),
    lambda std: MarginMSE(teacher_std=std),
    lambda std: MarginMSE(teacher_std=std, negatives="hardest"),
    lambda std: MarginMSE(teacher_std=std, pairs="all"),
    lambda std: M3SE(teacher_std=std),
]


@pytest.mark.parametrize("make", SHIFT_FREE)
@pytest.mark.parametrize("seed", range(3))
def test_the_reported_number_in_place_of_batch_gives_the_same_loss(make, seed):
    scored = draw(seed, rows=9, columns=12)
    measured = make("batch")
    reported = measured.teacher_unit(scored).item()
    assert reported > 1.5  # draws have a deviation of 3: a fallback of 1 would not do
    torch.testing.assert_close(make(reported)(scored), measured(scored), rtol=1e-12, atol=0)


def test_of_rows_the_mean_deviation_of_those_that_can_be_divided():
    scored = draw(1, rows=9, columns=12)
    teacher = scored.teacher.clone()
    teacher[0] = 2.0  # all equal
    scored = replace(scored, teacher=teacher)
    rows = [row[there].numpy() for row, there in zip(scored.teacher, scored.asked, strict=True)]
    expected = np.mean([row.std(ddof=1) for row in rows if len(row) >= 4 and np.ptp(row) > 0])
    for loss in (
        KL(teacher_std="row"),
        MarginMSE(teacher_std="row"),
        M3SE(teacher_std="row"),
        LogitMSE(teacher_std="row"),
    ):
        assert loss.teacher_unit(scored).item() == pytest.approx(expected)


def test_logit_mse_reports_the_deviation_of_its_z_score():
    scored = draw(2)
    asked = scored.teacher[scored.asked].numpy()
    assert LogitMSE(teacher_std="batch").teacher_unit(scored).item() == pytest.approx(asked.std(ddof=1))


def test_a_sum_reports_the_parts_that_measure_and_no_others():
    loss = Weighted(
        (
            Part("contrastive", 1.0, Contrastive()),
            Part("fixed", 1.0, KL(teacher_std=2.0)),
            Part("m3se", 0.0, M3SE(teacher_std="batch")),
            Part("mine", 1.0, lambda scored: scored.student.nansum()),
        )
    )
    assert list(loss.teacher_units(draw(0))) == ["m3se"]
