"""Losses that read more than scores: embeddings, affinities, momentum keys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from distill.losses import Affinity, Contrastive, EmbeddingMatch, Momentum, same_item
from tests.losses import loops
from tests.losses.batches import SCALE, draw, full_rows


def units(seed, rows, width):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=1)


def towers(seed=0, width=6):
    return {
        "student_images": units(seed, 4, width),
        "student_texts": units(seed + 1, 5, width),
        "teacher_images": units(seed + 2, 4, width),
        "teacher_texts": units(seed + 3, 5, width),
    }


def with_extras(extras, scored=None):
    return replace(draw(0) if scored is None else scored, extras=extras)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
@pytest.mark.parametrize("sides", ["both", "images", "texts"])
def test_embeddings_agree_with_a_loop(distance, sides):
    extras = towers()

    def one(a, b):
        squares = [(x - y) ** 2 for x, y in zip(a, b, strict=True)]
        cosine = sum(x * y for x, y in zip(a, b, strict=True))
        return {"cosine": 1 - cosine, "mse": sum(squares) / len(a), "l2": math.sqrt(sum(squares))}[distance]

    wanted = []
    for side in ("images", "texts") if sides == "both" else (sides,):
        pairs = zip(extras[f"student_{side}"].tolist(), extras[f"teacher_{side}"].tolist(), strict=True)
        wanted.append(loops.mean([one(a, b) for a, b in pairs]))
    assert EmbeddingMatch(distance=distance, sides=sides)(with_extras(extras)).item() == pytest.approx(
        loops.mean(wanted)
    )


@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
def test_embeddings_gradient_equals_finite_differences_and_spares_the_teacher(distance):
    extras = towers()
    loss = EmbeddingMatch(distance=distance)
    teacher = extras["teacher_images"].requires_grad_()

    def of(images, texts):
        return loss(with_extras({**extras, "student_images": images, "student_texts": texts}))

    leaves = [extras[name].clone().requires_grad_() for name in ("student_images", "student_texts")]
    assert torch.autograd.gradcheck(of, tuple(leaves), eps=1e-6, atol=1e-6)
    of(*leaves).backward()
    assert leaves[0].grad.abs().sum() > 0
    assert teacher.grad is None
    same = {**extras, **{f"student_{side}": extras[f"teacher_{side}"].detach() for side in ("images", "texts")}}
    same["student_images"].requires_grad_()
    value = loss(with_extras(same))
    assert value.item() == pytest.approx(0, abs=1e-9)
    value.backward()
    assert same["student_images"].grad.isfinite().all()


def test_embeddings_that_do_not_fit_are_refused():
    extras = towers()
    with pytest.raises(ValueError, match=r"needs student_texts, teacher_texts in extras"):
        EmbeddingMatch()(with_extras({name: extras[name] for name in ("student_images", "teacher_images")}))
    with pytest.raises(
        ValueError, match=r"images: the student's embeddings are \(4, 6\), the teacher's \(4, 8\).*affin"
    ):
        EmbeddingMatch()(with_extras({**extras, "teacher_images": units(9, 4, 8)}))
    assert EmbeddingMatch(sides="texts").needs == {"student_texts", "teacher_texts"}


# --- affinities -------------------------------------------------------------------------------------------------------


def affinities(scored, seed=0, teachers=2):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(teachers, *scored.student.shape, generator=g, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("columns", ["in_batch", "all"])
@pytest.mark.parametrize("value", ["cross_entropy", "kl"])
def test_affinity_agrees_with_a_loop(columns, value):
    scales = (4.0, 9.0)
    values = []
    for seed in range(6):
        scored = draw(seed)
        teachers = affinities(scored, seed)
        teachers[1, 2, 3] = torch.nan  # a cell that one teacher does not know is in nobody's softmax
        wanted = []
        for b in range(7):
            keep = [
                k
                for k in range(9)
                if scored.valid[b, k] and (columns == "all" or scored.in_batch[b, k]) and (b, k) != (2, 3)
            ]
            if len(keep) < 2:
                continue
            soft = [loops.log_softmax([c * teachers[m, b, k].item() for k in keep]) for m, c in enumerate(scales)]
            p = [loops.mean([math.exp(x) for x in column]) for column in zip(*soft, strict=True)]
            log_q = loops.log_softmax([SCALE * scored.student[b, k].item() for k in keep])
            entropy = -sum(x * math.log(x) for x in p) if value == "kl" else 0.0
            wanted.append(-sum(x * q for x, q in zip(p, log_q, strict=True)) - entropy)
        loss = Affinity(teacher_scales=scales, value=value, columns=columns)
        values.append(loops.mean(wanted))
        assert loss(with_extras({"teacher_affinity": teachers}, scored)).item() == pytest.approx(values[-1])
    assert min(values) > 0


def test_affinity_with_one_teacher_is_soft_cross_entropy_and_at_agreement_flat():
    scored = full_rows(0)
    teacher = affinities(scored, teachers=1)
    loss = Affinity(teacher_scales=(10.0,))
    expected = cross_entropy(scored.student * SCALE, (teacher[0] * 10).softmax(dim=1))
    torch.testing.assert_close(loss(with_extras({"teacher_affinity": teacher}, scored)), expected)
    student = scored.student.clone().requires_grad_()
    same = replace(scored, student=student, extras={"teacher_affinity": scored.student[None]})
    value = Affinity(teacher_scales=(SCALE,), value="kl")(same)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_teachers_are_averaged_after_their_softmax():
    scored = replace(full_rows(0, rows=1, columns=2))
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    loss = Affinity(teacher_scales=(3.0, 30.0), value="cross_entropy")
    log_q = (scored.student * SCALE).log_softmax(dim=1)[0]
    p = ((3 * sure[0, 0]).softmax(0) + (30 * sure[1, 0]).softmax(0)) / 2
    torch.testing.assert_close(loss(with_extras({"teacher_affinity": sure}, scored)), -(p * log_q).sum())


def test_affinity_gradient_padding_and_extremes():
    scored = draw(4)
    teachers = affinities(scored).masked_fill(~scored.valid, torch.nan).requires_grad_()
    loss = Affinity(value="kl", train_scale=True)

    def of(student, scale):
        return loss(replace(scored, student=student, scale=scale, extras={"teacher_affinity": teachers}))

    leaves = scored.student.nan_to_num(0.0).requires_grad_(), scored.scale.clone().requires_grad_()
    assert torch.autograd.gradcheck(of, leaves, eps=1e-6, atol=1e-6)
    student = (scored.student.nan_to_num(0.0) * 1e4).requires_grad_()
    value = of(student, scored.scale)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert teachers.grad is None
    nothing = replace(scored, valid=scored.valid & False, extras={"teacher_affinity": teachers})
    assert loss(nothing) == 0


def test_affinity_that_does_not_fit_is_refused():
    scored = full_rows(0)
    with pytest.raises(ValueError, match="affinity needs teacher_affinity"):
        Affinity()(scored)
    with pytest.raises(ValueError, match=r"must be \(teachers, 5, 8\).*got \(5, 8\)"):
        Affinity()(with_extras({"teacher_affinity": scored.teacher}, scored))
    with pytest.raises(ValueError, match="3 teachers, but 2 teacher_scales"):
        Affinity(teacher_scales=(1.0, 2.0))(with_extras({"teacher_affinity": affinities(scored, teachers=3)}, scored))
    with pytest.raises(ValueError, match="teacher_scales must be positive numbers"):
        Affinity(teacher_scales=(0.0,))


# --- momentum ---------------------------------------------------------------------------------------------------------


def keys(seed, rows=4, columns=7):
    g = torch.Generator().manual_seed(seed)

    def cosines():
        return torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 - 1

    query, key = torch.tensor([0, 1, 2, 9]), torch.tensor([0, 1, 2, 0, 5, -1, 1])  # -1: an empty slot; 9 has no key
    return {
        "keys_student": cosines(),
        "keys_momentum": cosines(),
        "keys_positive": same_item(query, key),
        "keys_valid": (key >= 0).expand(rows, columns),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_momentum_agrees_with_a_loop(alpha):
    extras = keys(0)
    wanted = []
    for b in range(3):  # the fourth query has no positive key
        there = [k for k in range(7) if extras["keys_valid"][b, k]]
        log_q = loops.log_softmax([SCALE * extras["keys_student"][b, k].item() for k in there])
        soft = loops.log_softmax([SCALE * extras["keys_momentum"][b, k].item() for k in there])
        positive = [float(extras["keys_positive"][b, k]) for k in there]
        target = [alpha * math.exp(s) + (1 - alpha) * p / sum(positive) for s, p in zip(soft, positive, strict=True)]
        wanted.append(-sum(t * q for t, q in zip(target, log_q, strict=True)))
    loss = Momentum(alpha=alpha)
    assert loss(with_extras(extras)).item() == pytest.approx(loops.mean(wanted))


def test_momentum_is_linear_in_alpha_so_that_a_ramp_is_two_parts():
    scored = with_extras(keys(1))
    hard, soft = Momentum(alpha=0.0)(scored), Momentum(alpha=1.0)(scored)
    torch.testing.assert_close(Momentum(alpha=0.4)(scored), 0.6 * hard + 0.4 * soft)


def test_momentum_without_soft_targets_is_contrastive():
    extras = keys(2)
    scored = with_extras(extras)
    same = replace(
        scored,
        student=extras["keys_student"],
        teacher=extras["keys_student"] * torch.nan,
        positive=extras["keys_positive"],
        valid=extras["keys_valid"],
        in_batch=None,
        extras={},
    )
    torch.testing.assert_close(Momentum(alpha=0.0)(scored), Contrastive(positives="shared")(same))


def test_momentum_gradient_reaches_the_student_and_the_scale_alone():
    extras = keys(3)
    extras["keys_student"][:, 5] = 1e30  # rubbish in an empty slot
    momentum = extras["keys_momentum"].requires_grad_()
    scored = draw(0)

    def of(student, scale, alpha=0.4):
        return Momentum(alpha=alpha)(replace(scored, scale=scale, extras={**extras, "keys_student": student}))

    student = extras["keys_student"].clone()
    assert torch.autograd.gradcheck(of, (student.requires_grad_(), scored.scale), atol=1e-6)
    scale = scored.scale.clone().requires_grad_()  # soft targets are scaled too, but hold no gradient
    assert torch.autograd.gradcheck(lambda student, scale: of(student, scale, 0.0), (student, scale), atol=1e-6)
    of(student, scored.scale).backward()
    assert momentum.grad is None
    assert (student.grad[:, 5] == 0).all()
    assert (student.grad[3] == 0).all()


def test_momentum_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="momentum needs keys_momentum, keys_positive, keys_student, keys_valid"):
        Momentum()(with_extras({}))
    with pytest.raises(ValueError, match=r"share one \(queries, keys\) shape.*\(4, 6\), \(4, 7\)"):
        Momentum()(with_extras({**keys(0), "keys_valid": torch.ones(4, 6, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        Momentum(alpha=1.5)


def test_keys_of_one_item_are_positives_and_empty_slots_are_not():
    wanted = [[True, False, False], [False, True, False], [False, False, False]]
    assert same_item(torch.tensor([3, 7, -1]), torch.tensor([3, 7, -1])).tolist() == wanted
