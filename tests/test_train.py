"""The training loop: a killed run resumed is the run that was not killed, and what is not finite stops it with ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill.batches import Batches, PairScores
from distill.checkpoint import latest_checkpoint, step_of
from distill.embed import live_source
from distill.losses import KL, Contrastive, Part, Weighted
from distill.protocols import Embeddings, Scored
from distill.sampler import BatchSampler
from distill.step_loss import TrainingError, similarity
from distill.train import Phase, TrainSettings, train
from tests.toys import ToyStudent, expected_scores, toy_corpus

SETTINGS = TrainSettings(
    steps=12,
    batch_size=6,
    lr=0.05,
    weight_decay=0.01,
    warmup=0.2,
    grad_clip=1.0,
    seed=0,
    log_every=2,
    checkpoint_every=3,
)
CORPUS = toy_corpus(24)
LOSSES = Weighted((Part("contrastive", 1.0, Contrastive()), Part("kl", 0.5, KL())))


class NoisyStudent(ToyStudent):
    """Uses torch's random state as dropout does."""

    def forward(self, images=None, texts=None, *, attention_pairs=None):
        out = super().forward(images, texts)
        if not self.training or out.images is None:
            return out
        noisy = torch.nn.functional.normalize(out.images + 0.05 * torch.randn_like(out.images), dim=-1)
        return replace(out, images=noisy)


def batches(student: ToyStudent, *, bad_score: float | None = None) -> Batches:
    pairs = CORPUS.split_pairs("train")
    images, texts = (axis.ravel() for axis in np.meshgrid(np.unique(pairs[:, 0]), np.unique(pairs[:, 1])))
    scores = expected_scores(images, texts)
    if bad_score is not None:
        scores[5] = bad_score
    known = PairScores.of(images, texts, scores, CORPUS.n_texts)
    live = [live_source(CORPUS, side, student) for side in ("image", "text")]
    return Batches(BatchSampler(pairs, 6, 0), *live, CORPUS.matches, known)


def run(
    folder: Path, stop: int = 12, *, student: ToyStudent | None = None, meaning: str = "m", **options
) -> ToyStudent:
    student = student or NoisyStudent()
    losses = options.pop("losses", LOSSES)
    start_from = options.pop("start_from", None)
    start = options.pop("start", 0)
    settings = options.pop("settings", SETTINGS)
    accelerator = options.pop("accelerator", None) or Accelerator(cpu=True)
    watched = {name: options.pop(name) for name in ("timings", "profiler") if name in options}
    phase = Phase(start, stop, batches(student, **options), losses, meaning)
    train(student, phase, settings, folder=folder, accelerator=accelerator, start_from=start_from, **watched)
    return student


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_logs_every_part(tmp_path: Path) -> None:
    run(tmp_path)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    for line in logged:
        assert line["loss"] == pytest.approx(line["loss/contrastive"] + 0.5 * line["loss/kl"], rel=1e-5)
        assert {"scale", "grad_norm", "items_per_second", "waiting_share", "lr"} <= set(line)
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]


def test_the_measured_deviation_of_the_teacher_is_logged(tmp_path: Path) -> None:
    losses = Weighted((Part("contrastive", 1.0, Contrastive()), Part("order", 0.5, KL(teacher_std="batch"))))
    run(tmp_path, losses=losses)
    deviations = [line["teacher_std/order"] for line in lines(tmp_path)]
    assert len(deviations) == 6
    assert all(0.1 < value < 10 for value in deviations)
    assert len(set(deviations)) > 1  # of what each step saw


class StoppedError(Exception):
    pass


@contextmanager
def dying_at(step: int) -> Iterator[None]:
    """Whatever trains in here dies when it asks for the batch of that step."""
    original = Batches.__getitem__

    def dying(self: Batches, asked: int):
        if asked == step:
            raise StoppedError
        return original(self, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", dying)
        with pytest.raises(StoppedError):
            yield


def test_a_run_that_died_goes_on_to_the_same_weights_and_losses(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with dying_at(8):
        run(tmp_path / "cut")
    found = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert found is not None
    assert step_of(found) == 6
    torch.manual_seed(99)  # whatever happened in between must not matter
    resumed = run(tmp_path / "cut", student=NoisyStudent(seed=5))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "cut")] == [
        (line["step"], line["loss"]) for line in lines(tmp_path / "whole")
    ]


def test_in_pieces_it_trains_as_in_one_pass_and_goes_on_after_a_death(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", student=ToyStudent())
    settings = replace(SETTINGS, micro_batch=2)
    pieces = run(tmp_path / "pieces", student=ToyStudent(), settings=settings)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)
    noisy = run(tmp_path / "noisy", settings=settings)
    with dying_at(8):
        run(tmp_path / "cut", settings=settings)
    resumed = run(tmp_path / "cut", student=NoisyStudent(seed=5), settings=settings)
    for name, value in noisy.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_two_phases_equal_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "first", stop=5)
    middle = latest_checkpoint(tmp_path / "first" / "checkpoints")
    second = run(tmp_path / "second", student=NoisyStudent(seed=3), start_from=middle)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_second_phase_in_the_same_folder_may_mean_something_else(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "two", stop=5, meaning="first")
    middle = latest_checkpoint(tmp_path / "two" / "checkpoints")
    student = NoisyStudent(seed=3)
    second = run(tmp_path / "two", student=student, start=5, start_from=middle, meaning="second")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(RuntimeError, match="another name"):
        run(tmp_path / "two", start=5, start_from=middle, meaning="third")


def test_a_run_that_means_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, stop=6)
    with pytest.raises(RuntimeError, match="another name"):
        run(tmp_path, meaning="other")


def test_an_infinite_teacher_score_stops_before_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="teacher's scores hold infinities"):
        run(tmp_path, bad_score=math.inf)


def test_a_loss_that_is_not_finite_names_part_and_queries(tmp_path: Path) -> None:
    def broken(scored: Scored) -> torch.Tensor:
        return scored.student.sum() * math.nan

    with pytest.raises(TrainingError, match=r"step 0, i2t: loss 'mine' is nan.*query ids \d+"):
        run(tmp_path, losses=Weighted((Part("mine", 1.0, broken),)))


def test_embeddings_that_are_not_finite_are_named(tmp_path: Path) -> None:
    student = ToyStudent()
    with torch.no_grad():
        student.text_tower[3] = math.nan  # word 3, which stands in some captions only
    with pytest.raises(TrainingError, match=r"step \d: \d+ text embeddings are not finite, ids \d+"):
        run(tmp_path, student=student)


class HungryStudent(ToyStudent):
    """Fits in memory up to so many items at once."""

    def forward(self, images=None, texts=None, *, attention_pairs=None):
        if images is not None and len(images["shade"]) > 2:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB\nand more")
        return super().forward(images, texts)


def test_out_of_memory_says_what_to_lower_and_that_helps(tmp_path: Path) -> None:
    says = r"step 0: .*out of memory \(tried to allocate 2.00 GiB\) with 6 items .* train.micro_batch at most 3"
    with pytest.raises(TrainingError, match=says):
        run(tmp_path / "whole", student=HungryStudent())
    run(tmp_path / "pieces", student=HungryStudent(), settings=replace(SETTINGS, micro_batch=2))
    assert lines(tmp_path / "pieces")[-1]["step"] == 12


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [SETTINGS.lr_at(step) for step in range(13)]
    assert rates[0] == pytest.approx(0.025)
    assert rates[1] == rates[2] == pytest.approx(0.05)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
    assert rates[12] == pytest.approx(0.0)


def test_similarities_are_those_of_the_grid_s_queries_with_every_item_of_the_step() -> None:
    step = batches(ToyStudent())[0]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(step.image_ids), 3, generator=generator)
    texts = torch.randn(len(step.text_ids), 3, generator=generator)
    out = Embeddings(images, texts, torch.ones(()))
    for direction, asking, items in (("i2t", images, texts), ("t2i", texts, images)):
        found = similarity(out, step, direction)
        assert found.shape == step.grids[direction].teacher.shape
        for place, row in enumerate(step.grids[direction].rows.tolist()):
            for column in range(len(items)):
                assert found[place, column].item() == pytest.approx(float(asking[row] @ items[column]), abs=1e-5)
