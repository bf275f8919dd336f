"""Every loss that reads scores, in every option, beside its loop reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from distill.losses import (
    ADRMSE,
    CPRD,
    KL,
    M3SE,
    ApproxNDCG,
    Attention,
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
from tests.losses import loops, slow
from tests.losses.batches import SCALE

LOG2 = math.log(2)


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable
    reference: Callable
    reads_scores: bool = True
    reads_teacher: bool = True
    differences: bool = True  # a constant added to a row of student scores changes nothing
    one_is_enough: bool = False  # a row of one scored candidate has a term
    ties: bool = True  # the teacher's ties are broken in one way only

    def __call__(self, scored):
        """The loss with the same draws whenever it draws."""
        torch.manual_seed(0)
        return self.loss(scored)

    @property
    def scaled(self):
        """Whether the student's learned scale is read."""
        reads = not isinstance(self.loss, Hinge) and not (isinstance(self.loss, Pearson) and self.loss.of == "scores")
        return reads and getattr(self.loss, "temperature", None) is None


def _bar(threshold):
    return lambda neg, _: sum(cell.teacher >= threshold for cell in neg)


def _margin(margin):
    return lambda neg, pos: sum(cell.teacher >= max(p.teacher for p in pos) - margin for cell in neg) if pos else 0


NO_TEACHER = (loops.contrastive, slow.siglip, slow.hinge)
ABSOLUTE = (slow.siglip, slow.logit_mse)  # they read the student's score itself, not only differences


def _case(name, loss, reference, **options):
    return Case(
        name,
        loss,
        lambda scored: reference(scored, **options),
        reads_teacher=reference not in NO_TEACHER,
        differences=reference not in ABSOLUTE,
        one_is_enough=reference is slow.logit_mse,
        ties=not isinstance(loss, RankDistil),
    )


CASES = [
    _case("contrastive", Contrastive(), loops.contrastive, factor=SCALE),
    _case(
        "contrastive-all", Contrastive(negatives="all", temperature=0.2), loops.contrastive, factor=5, negatives="all"
    ),
    _case("contrastive-shared", Contrastive(positives="shared"), loops.contrastive, factor=SCALE, positives="shared"),
    _case(
        "contrastive-shared-all",
        Contrastive(positives="shared", negatives="all"),
        loops.contrastive,
        factor=SCALE,
        positives="shared",
        negatives="all",
    ),
    _case("cprd", CPRD(), loops.cprd, factor=SCALE, rule=_bar(0.0)),
    _case("cprd-bar", CPRD(threshold=1.0, temperature=0.5), loops.cprd, factor=2, rule=_bar(1.0)),
    _case(
        "cprd-sum", CPRD(threshold=-1.0, normalise="sum"), loops.cprd, factor=SCALE, rule=_bar(-1.0), normalise="sum"
    ),
    _case("cprd-margin", CPRD(accept="margin", margin=2.0), loops.cprd, factor=SCALE, rule=_margin(2.0)),
    _case("cprd-top", CPRD(accept="top", top=2), loops.cprd, factor=SCALE, rule=lambda neg, _: min(2, len(neg))),
    _case(
        "cprd-fraction",
        CPRD(accept="fraction", fraction=0.4),
        loops.cprd,
        factor=SCALE,
        rule=lambda neg, _: math.ceil(len(neg) * 2 / 5),
    ),
    _case("cprd-first", CPRD(positive="first"), loops.cprd, factor=SCALE, rule=_bar(0.0), positive="first"),
    _case(
        "cprd-first-top",
        CPRD(positive="first", accept="top", top=1),
        loops.cprd,
        factor=SCALE,
        rule=lambda neg, _: min(1, len(neg)),
        positive="first",
    ),
    _case("margin_mse", MarginMSE(), loops.margin_mse, factor=SCALE),
    _case("margin_mse-hardest", MarginMSE(negatives="hardest"), loops.margin_mse, factor=SCALE, negatives="hardest"),
    _case("margin_mse-std", MarginMSE(teacher_std=3.0, temperature=0.5), loops.margin_mse, factor=2, teacher_std=3.0),
    _case("margin_mse-batch", MarginMSE(teacher_std="batch"), loops.margin_mse, factor=SCALE, teacher_std="batch"),
    _case("m3se", M3SE(), loops.m3se, factor=SCALE),
    _case("m3se-own", M3SE(same_index=False), loops.m3se, factor=SCALE, same_index=False),
    _case("m3se-std", M3SE(teacher_std=2.0, temperature=0.5), loops.m3se, factor=2, teacher_std=2.0),
    _case("m3se-batch", M3SE(teacher_std="batch"), loops.m3se, factor=SCALE, teacher_std="batch"),
    _case("kl", KL(), loops.kl, factor=SCALE),
    _case("kl-soft", KL(temperature=0.25, teacher_temperature=2.0), loops.kl, factor=4, teacher_temperature=2.0),
    _case("kl-squared", KL(temperature=0.25, t_squared=True), loops.kl, factor=4, times=1 / 16),
    _case("kl-squared-scale", KL(t_squared=True), loops.kl, factor=SCALE, times=1 / SCALE**2),
    _case("kl-symmetric", KL(symmetric=True), loops.kl, factor=SCALE, symmetric=True),
    _case("kl-drop", KL(positive="drop"), loops.kl, factor=SCALE, positive="drop"),
    _case(
        "kl-zscore",
        KL(zscore=True, temperature=2.0, teacher_temperature=2.0),
        loops.kl,
        factor=0.5,
        teacher_temperature=2.0,
        zscore=True,
    ),
    _case(
        "kl-zscore-symmetric-drop",
        KL(zscore=True, temperature=0.5, symmetric=True, positive="drop"),
        loops.kl,
        factor=2,
        symmetric=True,
        zscore=True,
        positive="drop",
    ),
    _case("kl-row", KL(teacher_std="row"), slow.kl_in_units, factor=SCALE, teacher_std="row"),
    _case(
        "kl-batch",
        KL(teacher_std="batch", temperature=0.2, teacher_temperature=0.5),
        slow.kl_in_units,
        factor=5,
        teacher_std="batch",
        teacher_temperature=0.5,
    ),
    _case("margin_mse-row", MarginMSE(teacher_std="row"), slow.margin_mse, factor=SCALE, teacher_std="row"),
    _case("margin_mse-pairs", MarginMSE(over="pairs"), slow.margin_mse, factor=SCALE, over="pairs"),
    _case("margin_mse-all", MarginMSE(pairs="all"), slow.margin_mse, factor=SCALE, pairs="all"),
    _case(
        "margin_mse-all-std",
        MarginMSE(pairs="all", over="pairs", teacher_std=2.0, temperature=0.5),
        slow.margin_mse,
        factor=2,
        pairs="all",
        over="pairs",
        teacher_std=2.0,
    ),
    _case("m3se-row", M3SE(teacher_std="row"), slow.m3se_row, factor=SCALE),
    _case("softmax_ce", SoftmaxCE(), slow.softmax_ce, factor=SCALE),
    _case("softmax_ce-labels", SoftmaxCE(target="labels"), slow.softmax_ce, factor=SCALE, target="labels"),
    _case(
        "softmax_ce-row",
        SoftmaxCE(teacher_std="row", teacher_temperature=0.5, temperature=0.1),
        slow.softmax_ce,
        factor=10,
        teacher_std="row",
        teacher_temperature=0.5,
    ),
    _case("pearson", Pearson(), slow.pearson),
    _case(
        "pearson-softmax",
        Pearson(of="softmax", temperature=0.5, teacher_temperature=2.0),
        slow.pearson,
        factor=2,
        of="softmax",
        teacher_temperature=2.0,
    ),
    _case("logit_mse", LogitMSE(), slow.logit_mse, factor=SCALE),
    _case("logit_mse-number", LogitMSE(teacher_std=3.0, temperature=0.5), slow.logit_mse, factor=2, teacher_std=3.0),
    _case("logit_mse-row", LogitMSE(teacher_std="row"), slow.logit_mse, factor=SCALE, teacher_std="row"),
    _case("logit_mse-batch", LogitMSE(teacher_std="batch"), slow.logit_mse, factor=SCALE, teacher_std="batch"),
    _case("listmle", ListMLE(), slow.listmle, factor=SCALE),
    _case("listmle-sum", ListMLE(normalise="sum", temperature=0.5), slow.listmle, factor=2, normalise="sum"),
    # at this temperature every sampled order is the teacher's, so that a loop can follow
    _case("rankdistil", RankDistil(teacher_temperature=1e-9, samples=2), slow.listmle, factor=SCALE),
    _case(
        "rankdistil-top",
        RankDistil(teacher_temperature=1e-9, samples=2, top=2, normalise="sum"),
        slow.listmle,
        factor=SCALE,
        normalise="sum",
        top=2,
    ),
    _case("ranknet", RankNet(), slow.ranknet, factor=SCALE),
    _case("ranknet-pairs", RankNet(over="pairs", binary_log=True), slow.ranknet, factor=SCALE, over="pairs", log=LOG2),
    _case("lambdarank", LambdaRank(), slow.lambdarank, factor=SCALE),
    _case(
        "lambdarank-sigmoid",
        LambdaRank(gain="sigmoid", over="pairs"),
        slow.lambdarank,
        factor=SCALE,
        gain="sigmoid",
        over="pairs",
    ),
    _case(
        "lambdarank-exponential",
        LambdaRank(gain="exponential", binary_log=True, temperature=0.5),
        slow.lambdarank,
        factor=2,
        gain="exponential",
        log=LOG2,
    ),
    _case("approx_ndcg", ApproxNDCG(), slow.approx_ndcg, factor=SCALE),
    _case("approx_ndcg-sigmoid", ApproxNDCG(gain="sigmoid"), slow.approx_ndcg, factor=SCALE, gain="sigmoid"),
    _case(
        "approx_ndcg-exponential",
        ApproxNDCG(gain="exponential", temperature=0.5),
        slow.approx_ndcg,
        factor=2,
        gain="exponential",
    ),
    _case("adr_mse", ADRMSE(), slow.adr_mse, factor=SCALE),
    _case(
        "adr_mse-cells",
        ADRMSE(over="cells", discount="none"),
        slow.adr_mse,
        factor=SCALE,
        over="cells",
        discount="none",
    ),
    _case(
        "adr_mse-reciprocal",
        ADRMSE(discount="reciprocal", temperature=0.5),
        slow.adr_mse,
        factor=2,
        discount="reciprocal",
    ),
    _case("siglip", SigLIP(bias=-3.0), slow.siglip, factor=SCALE, bias=-3.0),
    _case("siglip-all", SigLIP(negatives="all", temperature=0.1), slow.siglip, factor=10, negatives="all"),
    _case("hinge", Hinge(), slow.hinge),
    _case("hinge-sum", Hinge(hardest=False, margin=0.5), slow.hinge, hardest=False, margin=0.5),
    _case("hinge-vse", Hinge(reduction="sum", negatives="all"), slow.hinge, reduction="sum", negatives="all"),
    Case("attention", Attention(), loops.attention, reads_scores=False),
]
SCORE_CASES = [case for case in CASES if case.reads_scores]
DISTILLATION = [case for case in SCORE_CASES if case.reads_teacher]
WHOLE_CALL = ("batch", "pairs", "-all-std", "cells", "vse")  # options that look at a call as a whole
ROW_BY_ROW = [case for case in SCORE_CASES if not any(word in case.name for word in WHOLE_CALL)]
assert len(CASES) == len({case.name for case in CASES}) > len(SCORE_CASES) > len(DISTILLATION) > 50
assert 40 < len(ROW_BY_ROW) < len(SCORE_CASES)


def named(cases):
    return {"argvalues": cases, "ids": [case.name for case in cases]}
