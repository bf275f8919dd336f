"""Mined items that keep the vectors they were found by: what is encoded, what the loss sees, where gradient goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill.batches import Batches, PairScores
from distill.companion import KEYS, Companion
from distill.embed import live_source
from distill.encoding import with_remembered
from distill.experiment import Experiment
from distill.extras import extras_of_step
from distill.losses import KL, Contrastive, EmbeddingMatch, Part, Weighted
from distill.pipeline import taught_teacher, trained_arm
from distill.protocols import SIDES, Candidates, Embeddings
from distill.recipe.build import builders
from distill.recipe.load import load_recipe
from distill.sampler import BatchSampler, CandidateSampler
from distill.slow_copy import MomentumSettings
from distill.train import Phase, train
from tests.test_run import TINY
from tests.test_train import SETTINGS, lines
from tests.toys import ToyStudent, expected_scores, toy_corpus

CORPUS = toy_corpus(24)
TRAIN = CORPUS.split("train").ids


def vectors_of(student: ToyStudent, side, rows) -> torch.Tensor:
    inputs = live_source(CORPUS, side, student)(np.asarray(rows))
    with torch.no_grad():
        out = student(inputs, None) if side == "image" else student(None, inputs)
    return out.images if side == "image" else out.texts


def batches(student: ToyStudent, *, memory: bool) -> Batches:
    """Each query has three candidates, two of them drawn."""
    pairs = CORPUS.split_pairs("train")
    rng = np.random.default_rng(0)
    found = []
    for direction, queries, items in (
        ("i2t", TRAIN["image"], TRAIN["text"]),
        ("t2i", TRAIN["text"], TRAIN["image"]),
    ):
        ids = np.array([np.sort(rng.choice(items, 3, replace=False)) for _ in queries])
        found.append(Candidates(direction, queries, ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)))
    asked = [those.pairs() for those in found] + [(pairs[:, 0], pairs[:, 1])]
    images, texts = (np.concatenate(side) for side in zip(*asked, strict=True))
    return Batches(
        BatchSampler(pairs, 4, 0),
        *(live_source(CORPUS, side, student) for side in SIDES),
        CORPUS.matches,
        PairScores.of(images, texts, expected_scores(images, texts), CORPUS.n_texts),
        tuple(CandidateSampler(those, 2, 0) for those in found),
        memory={side: lambda rows, side=side: vectors_of(student, side, rows) for side in SIDES} if memory else {},
    )


def test_only_the_batch_s_own_items_are_encoded_and_the_rest_of_the_step_is_the_same() -> None:
    student = ToyStudent()
    whole, kept = batches(student, memory=False)[3], batches(student, memory=True)[3]
    own = [np.unique(column) for column in batches(student, memory=True).sampler.batch(3).T]
    assert [kept.encoded(side).tolist() for side in SIDES] == [ids.tolist() for ids in own]
    assert [whole.encoded(side).tolist() for side in SIDES] == [whole.image_ids.tolist(), whole.text_ids.tolist()]
    assert len(kept.images["shade"]) == len(own[0]) < len(whole.images["shade"])
    assert len(kept.texts["input_ids"]) == len(own[1]) < len(whole.texts["input_ids"])
    assert kept.image_ids.tolist() == whole.image_ids.tolist()
    for direction, grid in kept.grids.items():
        assert torch.equal(grid.rows, whole.grids[direction].rows)
        torch.testing.assert_close(grid.teacher, whole.grids[direction].teacher, equal_nan=True)
    pairs = batches(student, memory=True).sampler.batch(3)
    assert kept.encoded("image")[kept.pairs[0].numpy()].tolist() == pairs[:, 0].tolist()
    assert kept.encoded("text")[kept.pairs[1].numpy()].tolist() == pairs[:, 1].tolist()


def test_vectors_stand_at_their_items_places_and_gradient_reaches_the_encoded_ones_alone() -> None:
    student = ToyStudent()
    step = batches(student, memory=True)[1]
    encoded = {side: vectors_of(student, side, step.encoded(side)).requires_grad_() for side in SIDES}
    out = with_remembered(Embeddings(encoded["image"], encoded["text"], torch.tensor(1.0)), step)
    assert torch.equal(out.images.detach(), vectors_of(student, "image", step.image_ids))
    assert torch.equal(out.texts.detach(), vectors_of(student, "text", step.text_ids))
    weights = torch.arange(1.0, out.texts.numel() + 1).reshape(out.texts.shape)
    (out.texts * weights).sum().backward()
    rows = np.searchsorted(step.text_ids, step.encoded("text"))
    assert torch.equal(encoded["text"].grad, weights[rows])


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_first_loss_is_that_of_encoding_and_later_ones_go_stale(tmp_path: Path, micro_batch: int | None) -> None:
    losses = Weighted((Part("contrastive", 1.0, Contrastive(negatives="all")), Part("kl", 0.5, KL())))
    settings = replace(SETTINGS, batch_size=4, log_every=1, micro_batch=micro_batch)
    shown = {}
    for memory in (False, True):
        student, mined = ToyStudent(), ToyStudent()  # the one that mined stays as it was
        made = batches(mined, memory=memory)
        folder = tmp_path / str(memory)
        train(student, Phase(0, 6, made, losses, "m"), settings, folder=folder, accelerator=Accelerator(cpu=True))
        shown[memory] = [line["loss"] for line in lines(folder)]
    assert shown[True][0] == pytest.approx(shown[False][0], rel=1e-6)
    assert shown[True][1:] != pytest.approx(shown[False][1:], rel=1e-4)


def test_what_else_reads_the_student_s_vectors_sees_the_encoded_ones() -> None:
    student = ToyStudent()
    step = batches(student, memory=True)[2]
    towers = ((torch.randn(len(step.image_ids), 8), torch.randn(len(step.text_ids), 8)),)
    step = replace(step, vectors=towers)
    out = student(step.images, step.texts)
    needs = EmbeddingMatch().needs
    extras = extras_of_step(out, step, needs, torch.device("cpu"))
    assert extras["student_texts"].shape == extras["teacher_texts"].shape
    rows = np.searchsorted(step.text_ids, step.encoded("text"))
    assert torch.equal(extras["teacher_texts"], towers[0][1][rows])
    companion = Companion(student, KEYS, MomentumSettings(queue=0))
    companion.begin_step(student)
    keys = companion.extras(with_remembered(out, step), step, CORPUS.matches, Accelerator(cpu=True))
    own = vectors_of(student, "text", step.encoded("text"))
    images = vectors_of(student, "image", step.encoded("image"))
    torch.testing.assert_close(keys["i2t"]["keys_student"].detach(), images @ own.T)


def test_a_recipe_trains_with_it_and_keeps_the_vectors_beside_the_candidates(tmp_path: Path) -> None:
    settings = [item for item in TINY if not item.startswith(("arms.maps", "arms.beside", "train.trackers"))]
    own = ["train.candidates=memory", f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}"]
    recipe = load_recipe("quickstart", [*settings, *own])
    x = Experiment(recipe, builders(recipe), taught=taught_teacher)
    assert (trained_arm(x, "distilled") / "model.safetensors").is_file()
    for number, home in ((1, x.folder / "shared"), (2, x.folder / "arms" / "distilled")):
        for side in SIDES:
            assert (home / f"vectors-{number}-{side}" / "vectors.npy").is_file()
