"""Random batches, and every loss in every option beside its loop reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from distill.losses import CPRD, KL, M3SE, Attention, Contrastive, MarginMSE
from distill.protocols import Scored
from tests.losses import loops

SCALE = 7.0


def draw(seed, *, rows=7, columns=9, ties=False, dtype=torch.float64):
    """Ragged rows, cells not asked, zero to many positives, in-batch marks; NaN and rubbish where nothing is."""
    g = torch.Generator().manual_seed(seed)

    def chance(p):
        return torch.rand(rows, columns, generator=g) < p

    student = torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 - 1
    teacher = torch.randn(rows, columns, generator=g, dtype=torch.float64) * 3
    if ties:
        teacher = teacher.round().clamp(-2, 2)
    length = torch.randint(1, columns + 1, (rows, 1), generator=g)
    valid = (torch.arange(columns) < length) & chance(0.9)
    positive = chance(0.3)
    student = torch.where(valid, student, torch.full_like(student, torch.nan))
    teacher = torch.where(chance(0.75), teacher, torch.full_like(teacher, torch.nan))
    return Scored(
        student=student.to(dtype),
        teacher=teacher.to(dtype),
        positive=positive,
        valid=valid,
        scale=torch.tensor(SCALE, dtype=dtype),
        in_batch=chance(0.7) | (positive & chance(0.7)),
        extras=draw_maps(g, dtype),
    )


def draw_maps(g, dtype, *, pairs=3, tokens=4, cells=6):
    shape = (pairs, tokens, cells)
    return {
        "student_attention": torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(dim=2).to(dtype),
        "teacher_attention": torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(dim=2).to(dtype),
        "attention_tokens": torch.rand(pairs, tokens, generator=g) < 0.7,
    }


def grad_ready(scored):
    """(the batch with leaves, the leaves): student scores, the scale, the student's maps."""
    maps = {name: value.clone() for name, value in scored.extras.items()}
    leaves = [scored.student.clone().requires_grad_(), scored.scale.clone().requires_grad_()]
    if maps:
        maps["student_attention"].requires_grad_()
        leaves.append(maps["student_attention"])
    return replace(scored, student=leaves[0], scale=leaves[1], extras=maps), leaves


def cells(scored, function):
    """The batch with ``function`` applied to each of its (B, K) tensors."""
    return replace(
        scored,
        student=function(scored.student),
        teacher=function(scored.teacher),
        positive=function(scored.positive),
        valid=function(scored.valid),
        in_batch=None if scored.in_batch is None else function(scored.in_batch),
    )


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable
    reference: Callable
    reads_scores: bool = True
    reads_teacher: bool = True


def _bar(threshold):
    return lambda neg, _: sum(cell.teacher >= threshold for cell in neg)


def _margin(margin):
    return lambda neg, pos: sum(cell.teacher >= max(p.teacher for p in pos) - margin for cell in neg) if pos else 0


def _case(name, loss, reference, **options):
    return Case(
        name, loss, lambda scored: reference(scored, **options), reads_teacher=reference is not loops.contrastive
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
    Case("attention", Attention(), loops.attention, reads_scores=False),
]
SCORE_CASES = [case for case in CASES if case.reads_scores]
DISTILLATION = [case for case in SCORE_CASES if case.reads_teacher]
assert len(CASES) == len({case.name for case in CASES}) > len(SCORE_CASES) > len(DISTILLATION) > 20


def named(cases):
    return {"argvalues": cases, "ids": [case.name for case in cases]}
