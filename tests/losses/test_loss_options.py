"""Options that make no sense are refused with a sentence that says what would."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import distill.losses
from distill.losses import (
    ADRMSE,
    CPRD,
    KL,
    M3SE,
    ApproxNDCG,
    Attention,
    Contrastive,
    EmbeddingMatch,
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
from tests.losses.batches import draw


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Contrastive(temperature=0.0), "temperature must be a positive number, got 0.0"),
        (lambda: Contrastive(temperature=float("nan")), "temperature must be a positive number"),
        (lambda: Contrastive(positives="some"), "positives must be one of softmax_all, shared, got 'some'"),
        (lambda: Contrastive(negatives="queue"), "negatives must be one of in_batch, all"),
        (lambda: CPRD(accept="best"), "accept must be one of log_odds, margin, top, fraction"),
        (lambda: CPRD(accept="top"), "accept='top' needs a value for top"),
        (lambda: CPRD(top=3), "top=3 is read only with accept='top', but accept is 'log_odds'"),
        (lambda: CPRD(accept="top", top=3, threshold=1.0), "threshold=1.0 is read only with accept='log_odds'"),
        (lambda: CPRD(accept="top", top=0), "top must be at least 1"),
        (lambda: CPRD(accept="fraction", fraction=1.5), r"fraction must be in \(0, 1\]"),
        (lambda: CPRD(positive="last"), "positive must be one of out, first"),
        (lambda: CPRD(normalise="max"), "normalise must be one of mean, sum"),
        (lambda: MarginMSE(teacher_std="epoch"), "teacher_std must be one of row, batch, a positive number"),
        (lambda: MarginMSE(teacher_std=-1.0), "teacher_std must be a positive number"),
        (lambda: MarginMSE(negatives="in_batch"), "negatives must be one of all, hardest"),
        (lambda: M3SE(teacher_std=0.0), "teacher_std must be a positive number"),
        (lambda: KL(teacher_temperature=0.0), "teacher_temperature must be a positive number"),
        (lambda: KL(zscore=True), "zscore .* give a number for temperature"),
        (lambda: KL(positive="out"), "positive must be one of keep, drop"),
        (lambda: KL(zscore=True, temperature=2.0, teacher_std="row"), "leave teacher_std='row' out"),
        (lambda: KL(teacher_std=0.0), "teacher_std must be a positive number"),
        (lambda: MarginMSE(pairs="none"), "pairs must be one of labelled, all"),
        (lambda: MarginMSE(over="cells"), "over must be one of rows, pairs"),
        (lambda: SoftmaxCE(target="student"), "target must be one of teacher, labels"),
        (lambda: Pearson(of="ranks"), "of must be one of scores, softmax"),
        (lambda: LogitMSE(teacher_std="rows"), "teacher_std must be one of row, batch, a positive number"),
        (lambda: ListMLE(normalise="max"), "normalise must be one of mean, sum"),
        (lambda: RankDistil(samples=0), "samples must be at least 1, got 0"),
        (lambda: RankDistil(top=0), "top must be at least 1, got 0"),
        (lambda: RankNet(over="cells"), "over must be one of rows, pairs"),
        (lambda: LambdaRank(gain="log"), "gain must be one of reciprocal, sigmoid, exponential"),
        (lambda: ApproxNDCG(gain="log"), "gain must be one of reciprocal"),
        (lambda: ADRMSE(discount="ln"), "discount must be one of log2, reciprocal, none"),
        (lambda: ADRMSE(over="pairs"), "over must be one of rows, cells"),
        (lambda: SigLIP(negatives="queue"), "negatives must be one of in_batch, all"),
        (lambda: Hinge(margin=0.0), "margin must be a positive number"),
        (lambda: Hinge(reduction="none"), "reduction must be one of mean, sum"),
        (lambda: EmbeddingMatch(distance="dot"), "distance must be one of cosine, mse, l2"),
        (lambda: EmbeddingMatch(sides="text"), "sides must be one of both, images, texts"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        KL().temperature = 2.0


def with_maps(**changes):
    scored = draw(0)
    return replace(scored, extras={**scored.extras, **changes})


@pytest.mark.parametrize(
    ("scored", "says"),
    [
        (
            replace(draw(0), extras={}),
            "attention needs attention_tokens, student_attention, teacher_attention .* got none",
        ),
        (
            with_maps(teacher_attention=torch.zeros(3, 4, 9)),
            "different grids, 6 cells in the student and 9 in the teacher",
        ),
        (with_maps(teacher_attention=torch.zeros(3, 5, 6)), r"same tokens.*student \(3, 4, 6\), teacher \(3, 5, 6\)"),
        (with_maps(teacher_attention=torch.zeros(4, 6)), r"must be \(pairs, tokens, grid cells\).*teacher \(4, 6\)"),
        (with_maps(attention_tokens=torch.ones(3, 4)), "attention_tokens must be bool"),
        (with_maps(attention_tokens=torch.ones(4, 3, dtype=torch.bool)), r"tokens \(4, 3\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(scored, says):
    with pytest.raises(ValueError, match=says):
        Attention()(scored)


def test_attention_states_what_it_needs():
    assert Attention.needs == {"student_attention", "teacher_attention", "attention_tokens"}
    assert not hasattr(KL(), "needs")


def test_the_package_loads_torch_only_when_a_loss_is_asked_for():
    code = "import sys, distill.losses as l; assert 'torch' not in sys.modules; l.KL; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_exported_name_is_there_and_no_other():
    assert len(distill.losses.__all__) > 8
    assert sorted(distill.losses._MODULE_OF) == sorted(distill.losses.__all__)
    for name in distill.losses.__all__:
        assert getattr(distill.losses, name).__name__ == name
        assert name in dir(distill.losses)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'; it has .*CPRD"):
        distill.losses.Nothing  # noqa: B018
