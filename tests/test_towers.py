"""The vectors of the teacher's own towers: on disk, in a step, in a whole run, and what is refused about them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.batches import Batches
from distill.embed import NoContrastiveHeadError, embed, live_source
from distill.ensemble import Ensemble
from distill.extras import ExtrasError, extras_of_direction, extras_of_step
from distill.losses import Affinity, EmbeddingMatch, Part, Weighted
from distill.protocols import DIRECTIONS, Candidates
from distill.sampler import BatchSampler, CandidateSampler
from distill.student_teacher import StudentTeacher
from distill.towers import TowerVectors, width_of, write_towers
from tests.test_ensemble import CORPUS, SETTINGS, Counted
from tests.toys import FrozenToyStudent, ToyStudent, ToyTeacher

SPLIT = CORPUS.split("train")
ROWS = SPLIT.ids
CPU = torch.device("cpu")


class Headless(ToyTeacher):
    """A toy teacher without a contrastive head."""

    def __init__(self) -> None:
        super().__init__(name="headless")

    def encode_images(self, inputs):
        memory = super().encode_images(inputs)
        return {"number": memory["number"]}

    def encode_texts(self, inputs):
        super().encode_texts(inputs)
        return dict(inputs)


class ReadsAnything(ToyTeacher):
    """A toy teacher for texts that are not the toy corpus'."""

    def prepare_texts(self, texts):
        return super().prepare_texts([str(len(text)) for text in texts])


def ensemble(counted: Counted) -> Ensemble:
    made = [ToyTeacher, Headless, lambda: StudentTeacher(frozen_student())]
    return Ensemble([counted.member(make, str(place)) for place, make in enumerate(made)], SETTINGS, CORPUS)


def frozen_student() -> FrozenToyStudent:
    student = FrozenToyStudent()
    student.identity = "frozen toy"
    return student


def circle(numbers: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(numbers * 0.1), np.sin(numbers * 0.1)], axis=1).astype(np.float32)


def test_every_member_with_a_head_is_kept_and_read_without_a_model(tmp_path: Path) -> None:
    counted = Counted(tmp_path / "scores")  # which fails where two members are in memory
    first, second = write_towers(tmp_path / "vectors", ensemble(counted), ROWS, CORPUS)
    assert (first.member, second.member) == (0, 2)
    images, texts = np.array([5, 2]), np.array([3, 1, 0])
    found = first(images, texts)
    assert [vectors.dtype for vectors in found] == [torch.float32] * 2
    np.testing.assert_allclose(found[0], circle(images), atol=1e-6)
    np.testing.assert_allclose(found[1], circle(texts), atol=1e-6)
    student = frozen_student()
    for side, ids, vectors in zip(ROWS, (images, texts), second(images, texts), strict=True):
        np.testing.assert_allclose(vectors, embed(student, live_source(CORPUS, side, student), ids, side), atol=1e-6)

    again = Counted(tmp_path / "scores")
    reopened = write_towers(tmp_path / "vectors", ensemble(again), ROWS, CORPUS)
    assert again.loads == 3 + 1  # each once for its identity; the headless one again, to find that out
    copied = pickle.loads(pickle.dumps(reopened))
    assert all(torch.equal(a, b) for a, b in zip(copied[1](images, texts), second(images, texts), strict=True))


def test_vectors_of_another_teacher_or_corpus_are_not_taken(tmp_path: Path) -> None:
    counted = Counted(tmp_path / "scores")
    one = Ensemble([counted.member(ToyTeacher)], SETTINGS, CORPUS)
    other = Ensemble([counted.member(lambda: ToyTeacher(name="other"))], SETTINGS, CORPUS)
    (first,), (second,) = (write_towers(tmp_path / "vectors", made, ROWS, CORPUS) for made in (one, other))
    folders = {features.folder for tower in (first, second) for features in (tower.images, tower.texts)}
    assert len(folders) == 4


def test_a_teacher_without_any_head_is_refused(tmp_path: Path) -> None:
    headless = Ensemble([Counted(tmp_path / "scores").member(Headless)], SETTINGS, CORPUS)
    with pytest.raises(NoContrastiveHeadError, match="none of the 1 teachers"):
        write_towers(tmp_path / "vectors", headless, ROWS, CORPUS)
    assert width_of(Headless(), CORPUS, ROWS) is None
    assert width_of(ToyTeacher(), CORPUS, ROWS) == 2


def test_vectors_of_no_unit_length_are_refused(tmp_path: Path) -> None:
    class Long(ToyTeacher):
        def embed(self, side, inputs):
            return 3 * self.encode_images(inputs)["embedding"]

    scorer = Counted(tmp_path / "scores").scorer(Long())
    with pytest.raises(ValueError, match="image vectors are not of unit length: one is off by 2"):
        scorer.write_vectors(tmp_path / "vectors", "x", "image", ROWS["image"])


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """With mined candidates, so that a step has items that are not the batch's own, and with two towers."""
    folder = tmp_path_factory.mktemp("towers")
    towers = write_towers(folder / "vectors", ensemble(Counted(folder / "scores")), ROWS, CORPUS)
    student = ToyStudent()
    rng = np.random.default_rng(0)
    mined = []
    for direction, queries, items in (("i2t", SPLIT.images, SPLIT.texts), ("t2i", SPLIT.texts, SPLIT.images)):
        ids = np.stack([rng.choice(items, 3, replace=False) for _ in queries])
        mined.append(Candidates(direction, queries, ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)))
    return Batches(
        BatchSampler(CORPUS.split_pairs("train"), 4, 0),
        live_source(CORPUS, "image", student),
        live_source(CORPUS, "text", student),
        CORPUS.matches,
        candidates=tuple(CandidateSampler(found, 1, 0) for found in mined),
        towers=towers,
    )


@pytest.mark.parametrize("columns", ["in_batch", "all"])
def test_affinity_equals_a_loop_over_cells(batches: Batches, columns: str) -> None:
    losses = Weighted((Part("affinity", 1.0, Affinity(columns=columns)),))
    student, unknown = frozen_student(), 0
    for direction in DIRECTIONS:
        step = batches[1]
        grid = step.grids[direction]
        found = extras_of_direction(step, direction, losses, CPU)["teacher_affinity"]
        sides = (step.image_ids, step.text_ids) if direction == "i2t" else (step.text_ids, step.image_ids)
        names = ("image", "text") if direction == "i2t" else ("text", "image")
        theirs = [embed(student, live_source(CORPUS, s, student), ids, s) for s, ids in zip(names, sides, strict=True)]
        assert found.shape == (2, len(grid.rows), len(sides[1]))
        for r, row in enumerate(grid.rows.tolist()):
            for c, item in enumerate(sides[1]):
                if columns == "in_batch" and not grid.in_batch[r, c]:
                    assert found[:, r, c].isnan().all()
                    unknown += 1
                    continue
                angle = (float(sides[0][row]) - float(item)) * 0.1
                assert found[0, r, c].item() == pytest.approx(np.cos(angle), abs=1e-5)
                assert found[1, r, c].item() == pytest.approx(float(theirs[0][row] @ theirs[1][c]), abs=1e-5)
    assert (unknown > 20) == (columns == "in_batch")


def test_a_cell_that_is_not_computed_is_one_that_the_loss_does_not_read(batches: Batches) -> None:
    values = {}
    for columns in ("in_batch", "all"):
        losses = Weighted((Part("affinity", 1.0, Affinity(columns=columns)),))
        step = batches[0]
        extras = extras_of_direction(step, "i2t", losses, CPU)
        values[columns] = scored_of(step, extras)
    whole = replace(values["in_batch"], extras=values["all"].extras)
    assert Affinity()(values["in_batch"]).item() == pytest.approx(Affinity()(whole).item(), rel=1e-6)
    assert Affinity(columns="all")(values["all"]).item() != pytest.approx(Affinity()(whole).item(), rel=1e-3)


def scored_of(step, extras):
    from distill.step_loss import scored_of as seen

    student = ToyStudent()(step.images, step.texts)
    cosines = (student.images @ student.texts.T)[step.grids["i2t"].rows]
    return replace(seen(cosines, step, "i2t", student.scale), extras=extras)


def test_embeddings_are_those_of_the_steps_items_and_the_students_carry_gradient(batches: Batches) -> None:
    step, student = batches[2], ToyStudent()
    out = student(step.images, step.texts)
    extras = extras_of_step(out, step, EmbeddingMatch().needs, CPU, followed=0)
    np.testing.assert_allclose(extras["teacher_images"], circle(step.image_ids), atol=1e-6)
    np.testing.assert_allclose(extras["teacher_texts"], circle(step.text_ids), atol=1e-6)
    assert extras["student_images"].requires_grad
    assert torch.equal(extras["student_texts"], out.texts)
    assert extras_of_step(out, step, EmbeddingMatch().needs, CPU, followed=1)["teacher_images"].shape[1] == 8
    assert extras_of_step(out, step, frozenset(), CPU) == {}
    with pytest.raises(ExtrasError, match="give Batches towers"):
        extras_of_step(out, replace(step, vectors=()), EmbeddingMatch().needs, CPU)


def test_towers_satisfy_what_batches_ask(batches: Batches) -> None:
    assert all(isinstance(tower, TowerVectors) for tower in batches.towers)
    assert pickle.loads(pickle.dumps(batches.towers[0])).member == 0
