"""Training at several widths: against a slow loop that cuts by hand, in pieces, in two processes, by recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from distill.batches import Batches, PairScores
from distill.companion import Companion
from distill.experiment import Experiment
from distill.extras import extras_of_direction
from distill.losses import (
    CPRD,
    KL,
    Affinity,
    Contrastive,
    EmbeddingMatch,
    LogitMSE,
    MarginMSE,
    Momentum,
    Part,
    Weighted,
)
from distill.pipeline import SHARED, _phase, stretches, taught_teacher, trained_arm
from distill.protocols import DIRECTIONS, SIDES, Direction, Scored
from distill.recipe.build import builders
from distill.recipe.load import RecipeError, dump, load_recipe
from distill.slow_copy import MomentumSettings
from distill.step_loss import StepLoss, TrainingError, step_loss
from distill.train import Phase
from tests.test_ranks import ended, launch
from tests.test_ranks import lines as lines_of_run
from tests.test_remembered import batches as remembering
from tests.test_remembered import vectors_of
from tests.test_run import TINY
from tests.test_towers import CORPUS
from tests.test_towers import batches as towers  # noqa: F401
from tests.test_train import SETTINGS, lines, run
from tests.test_wrong_recipes import SMALL, distill
from tests.toys import ToyStudent, expected_scores

WIDTHS = (2, 5)
NESTED = replace(SETTINGS, matryoshka=WIDTHS)


@dataclass(frozen=True)
class Spread:
    """A loss of a user's own on the student's vectors alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"student_images", "student_texts"})

    def __call__(self, scored: Scored) -> Tensor:
        return scored.extras["student_images"].mean(dim=0).square().sum() + scored.extras["student_texts"].std()


ON_SCORES = (
    Part("contrastive", 1.0, Contrastive()),
    Part("kl", 0.5, KL(teacher_temperature=2.0)),
    Part("margin", 0.01, MarginMSE()),
    Part("cprd", 0.3, CPRD()),
    Part("map", 0.01, LogitMSE(affine="learned")),
)
ON_VECTORS = (
    Part("contrastive", 1.0, Contrastive()),
    Part("affinity", 0.7, Affinity()),
    Part("match", 3.0, EmbeddingMatch()),
    Part("momentum", 0.4, Momentum()),
    Part("spread", 0.2, Spread()),
)


@pytest.fixture
def stocked(towers: Batches) -> Batches:  # noqa: F811
    """With mined items, two towers and a score for every pair."""
    images, texts = (axis.ravel() for axis in np.meshgrid(*CORPUS.split("train").ids.values()))
    return replace(towers, scores=PairScores.of(images, texts, expected_scores(images, texts), CORPUS.n_texts))


def one_step(
    made: Batches,
    losses: Weighted,
    student: ToyStudent,
    *,
    widths: tuple[int, ...] = WIDTHS,
    micro_batch: int | None = None,
) -> tuple[StepLoss, Companion]:
    """The loss of step 1, differentiated into the student's gradients."""
    student.zero_grad()
    companion = Companion(student, losses.needs, MomentumSettings(queue=6))
    companion.begin_step(student)
    if companion.slow is not None:  # a slow copy that differs, and a queue that is half full
        with torch.no_grad():
            companion.slow.model.text_tower.add_(0.3)
        old = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
        companion.slow.images.add(old, torch.tensor([0, 1, 2]))
        companion.slow.texts.add(-old, torch.tensor([3, 4, 5]))
    settings = replace(SETTINGS, matryoshka=widths, micro_batch=micro_batch)
    phase = Phase(0, 12, made, losses, "m", followed=1)
    found = step_loss(student, made[1], phase, Accelerator(cpu=True), companion, settings=settings, measured=True)
    found.total.backward()
    found.encoded.finish()
    return found, companion


def by_hand(vectors: Tensor, width: int) -> Tensor:
    rows = []
    for vector in vectors:
        kept = vector[:width]
        rows.append(kept / sum(number * number for number in kept).sqrt())
    return torch.stack(rows)


def slow_scored(made: Batches, images: Tensor, texts: Tensor, scale: Tensor, direction: Direction) -> Scored:
    """Cell by cell, of vectors (N, d) and (M, d) of the step's items."""
    step = made[1]
    grid = step.grids[direction]
    asking, items = (images, texts) if direction == "i2t" else (texts, images)
    cells = [[(asking[row] * item).sum() for item in items] for row in grid.rows.tolist()]
    similarity = torch.stack([torch.stack(row) for row in cells])
    return Scored(similarity, grid.teacher, grid.positive, torch.ones_like(grid.positive), scale, grid.in_batch)


def gradients(student: ToyStudent) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}


def same_gradients(student: ToyStudent, expected: Tensor) -> None:
    """Of what the step left and of the expected loss."""
    found = gradients(student)
    student.zero_grad()
    expected.backward()
    assert found.keys() == gradients(student).keys()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert found["image_tower"].abs().max() > 0.01


def test_loss_and_gradient_equal_a_slow_loop_that_cuts_by_hand(stocked: Batches) -> None:
    losses, student = Weighted(ON_SCORES), ToyStudent()
    found, companion = one_step(stocked, losses, student)
    step, affine = stocked[1], torch.stack([student.log_scale.exp().detach(), torch.zeros(())])
    out = student(step.images, step.texts)
    totals = {}
    for width in (*WIDTHS, 8):
        images, texts = (by_hand(side, width) for side in (out.images, out.texts))
        total = torch.zeros(())
        for direction in DIRECTIONS:
            scored = replace(slow_scored(stocked, images, texts, out.scale, direction), extras={"affine": affine})
            for part in ON_SCORES:
                total = total + part.weight * part.loss(scored) / 2
        totals[width] = total
    assert {name: value.item() for name, value in found.widths.items()} == {
        f"width_{width}": pytest.approx(total.item(), rel=1e-5) for width, total in totals.items()
    }
    mean = sum(totals.values()) / 3
    assert found.total.item() == pytest.approx(mean.item(), rel=1e-5)
    assert found.total.item() == pytest.approx(sum(p.weight * found.parts[p.name].item() for p in ON_SCORES), rel=1e-5)
    same_gradients(student, mean)
    assert companion._affine.grad.abs().min() > 0


def test_losses_on_vectors_are_cut_where_that_means_something(stocked: Batches) -> None:
    losses, student = Weighted(ON_VECTORS), ToyStudent()
    found, companion = one_step(stocked, losses, student)
    step, slow = stocked[1], companion.slow
    out = student(step.images, step.texts)
    own = {side: step.grids[direction].rows for side, direction in zip(SIDES, DIRECTIONS, strict=True)}
    vectors = {"image": out.images, "text": out.texts}
    with torch.no_grad():
        slower = slow.model(step.images, step.texts)
    theirs = {"image": slower.images[own["image"]], "text": slower.texts[own["text"]]}
    old = {
        "image": torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    }
    old["text"] = -old["image"]
    totals = []
    for width in (*WIDTHS, 8):
        cut = {side: by_hand(vectors[side], width) for side in SIDES}
        total = torch.zeros(())
        for direction, query, item in (("i2t", "image", "text"), ("t2i", "text", "image")):
            scored = slow_scored(stocked, cut["image"], cut["text"], out.scale, direction)
            total = (
                total
                + Contrastive()(scored) / 2
                + 0.4
                * momentum(step, direction, cut[query][own[query]], theirs, own, old, query, item, width, out.scale)
                / 2
            )
            cosines = extras_of_direction(step, direction, losses, torch.device("cpu"))
            total = total + 0.7 * Affinity()(replace(scored, extras=cosines)) / 2
        followed = step.vectors[1]  # whole: the teacher's numbers have an order of their own
        for mine, teacher in zip((out.images, out.texts), followed, strict=True):
            total = total + 3.0 * (1 - torch.nn.functional.cosine_similarity(mine, teacher, dim=1)).mean() / 2
        total = total + 0.2 * Spread()(replace(scored, extras={f"student_{side}s": cut[side] for side in SIDES}))
        totals.append(total)
    assert [value.item() for value in found.widths.values()] == [pytest.approx(t.item(), rel=1e-5) for t in totals]
    same_gradients(student, sum(totals) / 3)


def momentum(step, direction, asking, theirs, own, old, query, item, width, scale):
    """Query and keys cut; the target is of whole vectors."""
    ids = {"image": step.image_ids[own["image"]], "text": step.text_ids[own["text"]]}
    keys = torch.cat([theirs[item], old[item]])
    key_ids = [*ids[item].tolist(), *({"image": [0, 1, 2], "text": [3, 4, 5]}[item])]
    values = []
    for row, vector in enumerate(asking):
        logits = torch.stack([(vector * key).sum() * scale for key in by_hand(keys, width)])
        soft = torch.softmax((theirs[query][row] @ keys.T) * scale.detach(), dim=0)
        me = int(ids[query][row])
        true = torch.tensor([float((key // 2 == me) if direction == "i2t" else (me // 2 == key)) for key in key_ids])
        target = 0.4 * soft + 0.6 * true / true.sum()
        values.append(-(target * logits.log_softmax(dim=0)).sum())
    return torch.stack(values).mean()


def test_vectors_that_are_remembered_are_cut_as_well_and_hold_no_gradient() -> None:
    student = ToyStudent()
    losses = Weighted((Part("contrastive", 1.0, Contrastive(negatives="all")), Part("kl", 0.5, KL())))
    made = remembering(ToyStudent(seed=4), memory=True)
    found, _ = one_step(made, losses, student)
    step = made[1]
    out = student(step.images, step.texts)
    whole = {}
    for side, encoded in (("image", out.images), ("text", out.texts)):
        places = {int(item): row for row, item in enumerate(step.encoded(side))}
        kept = vectors_of(ToyStudent(seed=4), side, step.ids(side))
        whole[side] = torch.stack(
            [
                encoded[places[int(item)]] if int(item) in places else kept[row]
                for row, item in enumerate(step.ids(side))
            ]
        )
    assert len(step.remembered["text"].rows) > 0
    total = torch.zeros(())
    for width in (*WIDTHS, 8):
        cut = [by_hand(whole[side], width) for side in SIDES]
        total = total + sum(losses(slow_scored(made, *cut, out.scale, direction)) for direction in DIRECTIONS) / 6
    assert found.total.item() == pytest.approx(total.item(), rel=1e-5)
    same_gradients(student, total)


def test_without_widths_the_loss_is_to_the_bit_what_it_was(stocked: Batches) -> None:
    student, losses = ToyStudent(), Weighted(ON_SCORES[:4])
    found, _ = one_step(stocked, losses, student, widths=())
    step = stocked[1]
    out = student(step.images, step.texts)
    parts = dict.fromkeys((part.name for part in losses.parts), None)
    for direction, grid in step.grids.items():
        asking, items = (out.images, out.texts) if direction == "i2t" else (out.texts, out.images)
        scored = Scored(
            asking[grid.rows] @ items.T,
            grid.teacher,
            grid.positive,
            torch.ones_like(grid.positive),
            out.scale,
            grid.in_batch,
        )
        for name, value in losses.parts_of(scored).items():
            parts[name] = value / 2 if parts[name] is None else parts[name] + value / 2
    assert found.widths == {}
    assert torch.equal(found.total, losses.total(parts) + 0 * out.scale)


@pytest.mark.parametrize("losses", [ON_SCORES, ON_VECTORS])
def test_in_pieces_it_is_as_in_one_pass(stocked: Batches, losses: tuple[Part, ...]) -> None:
    whole, pieces = ToyStudent(), ToyStudent()
    one, _ = one_step(stocked, Weighted(losses), whole)
    other, _ = one_step(stocked, Weighted(losses), pieces, micro_batch=2)
    assert other.total.item() == pytest.approx(one.total.item(), rel=1e-6)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(pieces)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_each_width_is_logged_and_their_mean_is_the_loss(tmp_path: Path) -> None:
    run(tmp_path / "whole", student=ToyStudent())
    run(tmp_path / "nested", student=ToyStudent(), settings=NESTED)
    for line in lines(tmp_path / "nested"):
        by_width = [line[f"loss/width_{width}"] for width in (2, 5, 8)]
        assert line["loss"] == pytest.approx(sum(by_width) / 3, rel=1e-5)
        assert line["loss"] == pytest.approx(line["loss/contrastive"] + 0.5 * line["loss/kl"], rel=1e-5)
    assert not any("width" in name for line in lines(tmp_path / "whole") for name in line)
    last = lines(tmp_path / "nested")[-1]
    assert last["loss/width_2"] < 0.8 * lines(tmp_path / "nested")[0]["loss/width_2"]
    assert lines(tmp_path / "whole")[-1]["loss"] < last["loss/width_2"]


def test_a_loss_that_is_not_finite_at_a_width_says_so(tmp_path: Path) -> None:
    def broken(scored: Scored) -> Tensor:
        alone = float(scored.student.detach().abs().min()) > 0.999  # one number a vector leaves cosines of 1 and -1
        return scored.student.sum() * (math.nan if alone else 1.0)

    settings = replace(SETTINGS, matryoshka=(1,))
    with pytest.raises(TrainingError, match=r"step 0, i2t at width 1: loss 'mine' is nan.*query ids \d+"):
        run(tmp_path, student=ToyStudent(), losses=Weighted((Part("mine", 1.0, broken),)), settings=settings)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[32, 16]", r"train.matryoshka: \[32, 16\]: give the widths in ascending order, each once, as in \[16, 32\]"),
        ("[16, 16]", r"each once, as in \[16\]"),
        ("[0, 16]", "greater than or equal to 1"),
        ("[-4]", "greater than or equal to 1"),
        ("[1.5]", "valid integer"),
    ],
)
def test_widths_that_mean_nothing_are_refused_with_words(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [f"train.matryoshka={value}"])


@pytest.mark.parametrize(
    ("value", "advice"),
    [("[16, 64]", "take [16]"), ("[64, 128]", "take [], which is to leave it out")],
)
def test_a_width_that_the_student_has_not_below_it_is_refused_before_any_work(
    tmp_path: Path, value: str, advice: str
) -> None:
    done = distill("run", "quickstart", folder=tmp_path, settings=[*SMALL, f"train.matryoshka={value}"])
    assert done.returncode == 2
    assert f"train.matryoshka: {value} holds widths that are not below the student's own, 64" in done.stderr
    assert advice in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def experiment(folder: Path, *more: str) -> Experiment:
    settings = [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", "train.trackers=[]", *more]
    recipe = load_recipe("quickstart", settings)
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def meaning(folder: Path, *more: str) -> str:
    x = experiment(folder, *more)
    stretch, parts, student = stretches(x)[0], x.recipe.shared_losses, x.fresh_student()
    losses = x.builders.losses(parts)
    return _phase(x, student, losses, stretch, folder=x.folder / SHARED, recipe_of_losses=parts).meaning


def test_a_recipe_without_it_reads_as_before_and_one_with_it_means_something_else(tmp_path: Path) -> None:
    assert "matryoshka" not in dump(load_recipe("quickstart", []))
    assert yaml.safe_load(dump(load_recipe("quickstart", ["train.matryoshka=[8, 16]"])))["train"]["matryoshka"] == [
        8,
        16,
    ]
    own = [meaning(tmp_path), *(meaning(tmp_path, f"train.matryoshka={value}") for value in ("[8, 16]", "[8]", "[]"))]
    assert own[0] == own[3]
    assert len(set(own)) == 3


@pytest.mark.slow
def test_a_run_by_the_command_trains_every_arm_at_every_width_and_is_not_gone_on_with_at_others(tmp_path: Path) -> None:
    nested = [*TINY, "train.trackers=[]", "train.matryoshka=[8, 24]"]
    done = distill("run", "quickstart", folder=tmp_path, settings=nested)
    assert done.returncode == 0, done.stderr
    for arm in ("plain", "distilled", "maps", "beside"):
        logged = [line for line in lines(tmp_path / "runs" / "quickstart" / "arms" / arm) if "loss" in line]
        assert logged
        for line in logged:
            by_width = [line[f"loss/width_{width}"] for width in (8, 24, 64)]
            assert len(set(by_width)) == 3
            assert line["loss"] == pytest.approx(sum(by_width) / 3, rel=1e-4)
    other = distill("run", "quickstart", "--resume", folder=tmp_path, settings=[*nested[:-1], "train.matryoshka=[8]"])
    assert other.returncode == 2
    assert "train.matryoshka: was [8, 24], now [8]" in other.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for count in (1, 2):
        ended(launch(tmp_path / str(count), count, "train.matryoshka=[8, 24]", "train.trackers=[]"))
    for arm in ("distilled", "beside"):
        one, two = (lines_of_run(tmp_path / str(count), f"arms/{arm}") for count in (1, 2))
        assert len(one) >= 3
        for ours, theirs in zip(two, one, strict=True):
            for name in ("loss", "loss/width_8", "loss/width_24", "loss/width_64", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (theirs["step"], name)


def test_an_arm_ends_with_other_weights_than_without(tmp_path: Path) -> None:
    student = {}
    for name, more in (("plain", ()), ("nested", ("train.matryoshka=[8]",))):
        x = experiment(tmp_path / name, "arms={plain: {losses: [{name: contrastive}]}}", *more)
        student[name] = x.saved_student(trained_arm(x, "plain")).state_dict()
    assert any(not torch.equal(value, student["nested"][name]) for name, value in student["plain"].items())
