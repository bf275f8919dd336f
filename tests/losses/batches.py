"""Random batches, and what is done to them."""

from __future__ import annotations

from dataclasses import replace

import torch

from distill.protocols import Scored

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


def full_rows(seed, rows=5, columns=8):
    """Everything there, everything asked, column 0 the one positive."""
    g = torch.Generator().manual_seed(seed)
    positive = torch.zeros(rows, columns, dtype=torch.bool)
    positive[:, 0] = True
    student = torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 - 1
    teacher = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    return Scored(student, teacher, positive, torch.ones_like(positive), scale)
