"""What goes with the student through a training: slow copy, queue, learned map; against loops and numbers by hand."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError

from distill.batches import Batches
from distill.checkpoint import latest_checkpoint
from distill.companion import AFFINE, KEYS, Companion
from distill.data.matches import Matches
from distill.losses import Contrastive, LogitMSE, Momentum, Part, Weighted
from distill.protocols import Scored
from distill.recipe.experiment import Losses
from distill.slow_copy import EMPTY, MomentumSettings, Queue, SlowCopy, positives
from distill.train import Phase, train
from tests.losses.batches import draw
from tests.test_towers import batches  # noqa: F401
from tests.test_train import SETTINGS, NoisyStudent, dying_at, lines, run
from tests.test_train import batches as toy_batches
from tests.toys import ToyStudent

# --- slow copy --------------------------------------------------------------------------------------------------------


def test_the_copy_follows_by_hand() -> None:
    student = ToyStudent()
    with torch.no_grad():
        student.log_scale.fill_(1.0)
    slow = SlowCopy(student, MomentumSettings(decay=0.75, queue=0))
    wanted = 1.0
    for value in (5.0, -3.0, 2.0):
        with torch.no_grad():
            student.log_scale.fill_(value)
        slow.follow(student)
        wanted = 0.75 * wanted + 0.25 * value
        assert slow.model.log_scale.item() == pytest.approx(wanted)
    assert not any(weight.requires_grad for weight in slow.parameters())
    assert student.log_scale.requires_grad


def test_frozen_weights_are_shared_and_not_kept_twice() -> None:
    student = ToyStudent()
    student.image_tower.requires_grad_(False)
    student.register_buffer("mean", torch.ones(2))
    slow = SlowCopy(student, MomentumSettings(queue=3))
    assert slow.model.image_tower.data_ptr() == student.image_tower.data_ptr()
    assert slow.model.text_tower.data_ptr() != student.text_tower.data_ptr()
    assert "model.image_tower" not in slow.state()
    student.mean.fill_(7.0)
    slow.follow(student)
    assert slow.state()["model.mean"].tolist() == [7, 7]


def test_a_state_of_another_queue_is_not_taken_over() -> None:
    slow = SlowCopy(ToyStudent(), MomentumSettings(queue=3))
    slow.images.add(torch.ones(2, 8), torch.tensor([4, 5]))
    same, longer = (SlowCopy(ToyStudent(seed=1), MomentumSettings(queue=length)) for length in (3, 4))
    assert same.load(slow.state())
    assert same.images.ids.tolist() == [4, 5, EMPTY]
    assert torch.equal(same.model.text_tower, slow.model.text_tower)
    before = longer.model.text_tower.clone()
    assert not longer.load(slow.state())
    assert torch.equal(longer.model.text_tower, before)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 5, 1, 4), (9, 2), (7, 7), (0, 4)])
def test_a_queue_holds_the_newest_whatever_comes(sizes: tuple[int, ...]) -> None:
    queue, wanted, start = Queue(7, 2), deque[tuple[int, float]](maxlen=7), 0
    for size in sizes:
        ids = torch.arange(start, start + size)
        queue.add(ids[:, None].float().expand(-1, 2) / 10, ids)
        wanted.extend((item, item / 10) for item in ids.tolist())
        start += size
        there = queue.ids != EMPTY
        held = sorted(zip(queue.ids[there].tolist(), queue.vectors[there][:, 0].tolist(), strict=True))
        assert held == [(item, pytest.approx(value)) for item, value in wanted]
    oldest = int(queue.at)  # the next one takes the place of the oldest
    assert queue.ids[oldest].item() in (EMPTY, wanted[0][0])


def test_no_queue_remembers_nothing() -> None:
    queue = Queue(0, 2)
    queue.add(torch.ones(3, 2), torch.arange(3))
    assert queue.ids.tolist() == []


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_positives_are_the_corpus_matches_whatever_the_image_of_a_caption(direction: str) -> None:
    rng = np.random.default_rng(0)
    matches = Matches(rng.integers(0, 9, 40), rng.integers(0, 12, 40), n_images=9, n_texts=12)  # texts of many images
    queries = np.array([3, 0, 8, 5])
    keys = np.array([2, EMPTY, 7, 2, 0, 5, 5, EMPTY, 8, 1])
    found = positives(matches, direction, queries, keys)
    for r, query in enumerate(queries):
        for c, key in enumerate(keys):
            image, text = (query, key) if direction == "i2t" else (key, query)
            assert bool(found[r, c]) == (key >= 0 and bool(matches.is_match(image, text))), (query, key)
    assert 3 < int(found.sum()) < 36
    assert torch.equal(found[:, 0], found[:, 3])  # one item twice


# --- keys of a step ---------------------------------------------------------------------------------------------------


def cells_of(extras: dict[str, torch.Tensor], row: int) -> list[tuple[float, ...]]:
    """(student, momentum, positive) of each key of a row that is there, sorted."""
    columns = extras["keys_valid"][row].nonzero().flatten().tolist()
    names = ("keys_student", "keys_momentum", "keys_positive")
    return sorted(tuple(float(extras[name][row, column].detach()) for name in names) for column in columns)


def moved(student: ToyStudent, seed: int) -> None:
    """A stand-in for an optimizer's step."""
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def test_keys_equal_a_loop_over_three_steps(batches: Batches) -> None:  # noqa: F811
    student = ToyStudent()
    companion = Companion(student, KEYS, MomentumSettings(decay=0.5, queue=6))
    slow = ToyStudent(seed=9)
    remembered = {"image": deque[tuple[int, list[float]]](maxlen=6), "text": deque[tuple[int, list[float]]](maxlen=6)}
    mined = 0
    for number in range(3):
        step = batches[number]
        moved(student, number)
        companion.begin_step(student)
        with torch.no_grad():
            for own, weight in zip(slow.parameters(), student.parameters(), strict=True):
                own.copy_(weight if number == 0 else 0.5 * own + 0.5 * weight)
        out = student(step.images, step.texts)
        found = companion.extras(out, step, batches.matches, Accelerator(cpu=True))
        theirs = slow(step.images, step.texts)
        own = {"image": step.grids["i2t"].rows.tolist(), "text": step.grids["t2i"].rows.tolist()}
        mined += len(step.image_ids) - len(own["image"])
        sides = {"image": (step.image_ids, out.images, theirs.images), "text": (step.text_ids, out.texts, theirs.texts)}
        for direction, query, item in (("i2t", "image", "text"), ("t2i", "text", "image")):
            ids, fast, slower = sides[query]
            keys = [(int(sides[item][0][row]), sides[item][2][row].tolist()) for row in own[item]]
            keys += list(remembered[item])
            extras = found[direction]
            valid = extras["keys_valid"]
            assert valid.shape == (len(own[query]), len(own[item]) + 6)
            assert (valid.sum(dim=1) == len(keys)).all()
            for r, row in enumerate(own[query]):
                wanted = []
                for key, vector in keys:
                    text, image = (key, ids[row]) if direction == "i2t" else (ids[row], key)
                    cosines = [float(side[row].detach() @ torch.tensor(vector)) for side in (fast, slower)]
                    wanted.append((*cosines, float(text // 2 == image)))
                assert np.allclose(cells_of(extras, r), sorted(wanted), atol=1e-5), (number, direction, r)
        for side in ("image", "text"):
            remembered[side].extend((int(sides[side][0][row]), sides[side][2][row].tolist()) for row in own[side])
    assert mined > 0, "the steps must hold items that are not the batch's own"
    loss = found["i2t"]["keys_student"].sum() + found["i2t"]["keys_momentum"].sum()
    loss.backward()
    assert student.image_tower.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in companion.slow.parameters())


# --- learned map ------------------------------------------------------------------------------------------------------


def test_logit_mse_with_a_learned_map_equals_a_loop() -> None:
    scored, affine = draw(3), torch.tensor([1.7, -0.4], dtype=torch.float64, requires_grad=True)
    loss = LogitMSE(affine="learned", teacher_std=2.5)
    rows = []
    for r in range(len(scored.student)):
        gaps = [
            (1.7 * float(scored.student[r, c]) - 0.4 - float(scored.teacher[r, c]) / 2.5) ** 2
            for c in range(scored.student.shape[1])
            if scored.asked[r, c]
        ]
        if gaps:
            rows.append(sum(gaps) / len(gaps))
    value = loss(replace(scored, extras={"affine": affine}))
    assert value.item() == pytest.approx(sum(rows) / len(rows))
    value.backward()
    assert affine.grad.abs().min() > 0
    with pytest.raises(ValueError, match="needs affine in extras"):
        loss(replace(scored, extras={}))
    with pytest.raises(ValueError, match="leave temperature and train_scale out"):
        LogitMSE(affine="learned", temperature=0.1)
    assert LogitMSE().needs == frozenset()


def test_the_learned_map_finds_the_teachers_scale_and_shift_and_is_shared_by_both_directions(batches: Batches) -> None:  # noqa: F811
    companion = Companion(ToyStudent(), AFFINE, None)
    g = torch.Generator().manual_seed(0)
    student = torch.rand(64, 9, generator=g) * 2 - 1
    there = torch.ones_like(student, dtype=torch.bool)
    scored = Scored(student, 12 * student - 5, there & False, there, torch.tensor(1.0))
    out = ToyStudent()(batches[0].images, batches[0].texts)
    start = companion.extras(out, batches[0], batches.matches, Accelerator(cpu=True))
    assert start["i2t"]["affine"] is start["t2i"]["affine"]
    assert start["i2t"]["affine"].tolist() == pytest.approx([out.scale.item(), 0.0])  # the student's own logit
    for _ in range(1500):
        extras = companion.extras(out, batches[0], batches.matches, Accelerator(cpu=True))["i2t"]
        LogitMSE(affine="learned")(replace(scored, extras=extras)).backward()
        companion.step(1.0, None)
    assert companion.logged() == {"affine_a": pytest.approx(12, abs=0.05), "affine_b": pytest.approx(-5, abs=0.05)}


# --- in a training ----------------------------------------------------------------------------------------------------

EXTRA_LOSSES = Weighted(
    (
        Part("contrastive", 1.0, Contrastive()),
        Part("momentum", 0.5, Momentum()),
        Part("logit_mse", 0.01, LogitMSE(affine="learned")),
    )
)


def run_extras(folder: Path, stop: int = 12, *, student: ToyStudent | None = None, **options) -> ToyStudent:
    from accelerate import Accelerator

    student = student or NoisyStudent()
    momentum = MomentumSettings(decay=0.8, queue=options.pop("queue", 20))
    phase = Phase(options.pop("start", 0), stop, toy_batches(student), EXTRA_LOSSES, "m", momentum=momentum)
    train(student, phase, SETTINGS, folder=folder, accelerator=Accelerator(cpu=True), **options)
    return student


def test_a_run_with_queue_and_map_that_died_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = run_extras(tmp_path / "whole")
    with dying_at(8):
        run_extras(tmp_path / "cut")
    resumed = run_extras(tmp_path / "cut", student=NoisyStudent(seed=5))
    assert whole.state_dict().keys() == ToyStudent().state_dict().keys()  # nothing of the companion is exported
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    shown = [
        [(line["step"], line["loss"], line["affine_a"], line["affine_b"]) for line in lines(tmp_path / name)]
        for name in ("cut", "whole")
    ]
    assert shown[0] == shown[1]
    assert len({a for _, _, a, _ in shown[0]}) == len({b for _, _, _, b in shown[0]}) == 6
    assert all(line["loss/momentum"] > 0 for line in lines(tmp_path / "whole"))


def test_two_rounds_equal_one_and_a_phase_after_others_begins_anew(tmp_path: Path) -> None:
    whole = run_extras(tmp_path / "whole")
    run_extras(tmp_path / "two", stop=6)
    middle = latest_checkpoint(tmp_path / "two" / "checkpoints")
    second = run_extras(tmp_path / "two", student=NoisyStudent(seed=3), start=6, start_from=middle)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())

    run(tmp_path / "shared", stop=6)  # no companion there
    shared = latest_checkpoint(tmp_path / "shared" / "checkpoints")
    first = run_extras(tmp_path / "arm", student=NoisyStudent(seed=3), start=6, start_from=shared)
    again = run_extras(tmp_path / "arm2", student=NoisyStudent(seed=4), start=6, start_from=shared)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    run_extras(tmp_path / "first", stop=6)
    middle = latest_checkpoint(tmp_path / "first" / "checkpoints")
    other = run_extras(tmp_path / "arm3", student=NoisyStudent(seed=4), start=6, start_from=middle, queue=9)
    assert not torch.equal(other.text_tower, second.text_tower)


def test_an_arm_without_them_has_the_checkpoint_it_always_had(tmp_path: Path) -> None:
    run(tmp_path / "plain", stop=3)
    run_extras(tmp_path / "extras", stop=3)
    plain, extras = (
        torch.load(latest_checkpoint(tmp_path / name / "checkpoints") / "trainer.pt", weights_only=True)
        for name in ("plain", "extras")
    )
    assert set(extras) - set(plain) == {"companion"}
    assert set(extras["companion"]) == {"affine", "optimizer", "slow"}


# --- recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([{"name": "momentum", "queue": 8}, {"name": "momentum", "alpha": 1.0}], r"\(0.995, 8\), \(0.995, 4096\)"),
        ([{"name": "logit_mse", "affine": "learned"}] * 2, "only one part can have affine: learned"),
        ([{"name": "momentum", "decay": 1.5}], "decay"),
        ([{"name": "logit_mse", "affine": "fitted"}], "affine"),
    ],
)
def test_what_a_training_has_once_cannot_be_said_twice(parts: list[dict[str, object]], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Losses).validate_python(parts)


def test_what_belongs_to_the_training_is_not_given_to_the_loss_and_older_parts_are_written_as_they_were() -> None:
    ramp = [{"name": "momentum", "alpha": 0.0, "queue": 8}, {"name": "momentum", "alpha": 1.0, "queue": 8}]
    for part in TypeAdapter(Losses).validate_python(ramp):
        assert set(part.given()) == {"alpha", "temperature", "train_scale"}
        assert part.model_dump(mode="json")["queue"] == 8
    (older,) = TypeAdapter(Losses).validate_python([{"name": "logit_mse"}])
    assert set(older.model_dump()) == {"name", "weight", "teacher_std", "temperature", "train_scale"}
