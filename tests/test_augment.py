"""Training pictures that are changed anew in each epoch: by whom, when, and never elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from distill.augment import Augmentation, AugmentedSource
from distill.batches import Batches
from distill.embed import live_source
from distill.experiment import Experiment, ExperimentError
from distill.loading import load
from distill.meter import Meter
from distill.pipeline import taught_teacher, trained_arm
from distill.preflight import check
from distill.recipe.build import builders
from distill.recipe.load import RecipeError, load_recipe
from distill.sampler import BatchSampler
from tests.test_groups import RUN, experiment
from tests.toys import toy_corpus

AUGMENT = "train.augment={crop: [0.4, 0.9], flip: 0.5}"


class Corners:
    """A student whose inputs are a picture's size and its first and last column."""

    def prepare_images(self, images) -> dict[str, torch.Tensor]:
        seen = [np.asarray(image.convert("L"), np.float32) for image in images]
        facts = [[*one.shape, one[0, 0], one[-1, -1]] for one in seen]
        return {"facts": torch.tensor(facts)}

    def prepare_texts(self, texts) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([len(text) for text in texts])}


class Ramps:
    """Pictures that differ from place to place: value = 10 x column + row, plus the picture's number."""

    def load_images(self, rows) -> list[PIL.Image.Image]:
        place = np.add.outer(np.arange(12), 10 * np.arange(16))
        return [PIL.Image.fromarray((place + row % 7).astype(np.uint8)) for row in rows]


def source(**options: Any) -> AugmentedSource:
    settings = {"crop": (0.4, 0.9), "flip": 0.5, "seed": 3} | options
    return AugmentedSource(Ramps().load_images, Corners().prepare_images, Augmentation(**settings))


ROWS = np.arange(200)


def test_a_picture_s_change_is_one_of_seed_epoch_and_picture() -> None:
    first = source().at(2, ROWS)["facts"]
    assert torch.equal(first, source().at(2, ROWS)["facts"])
    shuffled = np.random.default_rng(0).permutation(ROWS)
    assert torch.equal(first[shuffled], source().at(2, shuffled)["facts"])
    for other in (source().at(3, ROWS), source(seed=4).at(2, ROWS)):
        assert (first != other["facts"]).any(dim=1).float().mean() > 0.9


def test_crops_keep_the_share_that_was_asked_for_and_half_are_mirrored() -> None:
    facts = source().at(0, ROWS)["facts"].numpy()
    shares = facts[:, 0] * facts[:, 1] / (12 * 16)
    assert shares.min() > 0.33  # a whole number of rows and columns
    assert shares.max() < 1
    assert 0.58 < shares.mean() < 0.72
    mirrored = facts[:, 2] > facts[:, 3]  # values rise to the right
    assert 0.38 < mirrored.mean() < 0.62
    whole = source(crop=(1.0, 1.0), flip=0.0).at(0, ROWS)["facts"].numpy()
    assert (whole[:, :2] == (12, 16)).all()
    assert not (whole[:, 2] > whole[:, 3]).any()


def test_batches_draw_anew_each_epoch_whatever_the_workers_and_elsewhere_pictures_are_as_they_are() -> None:
    corpus = toy_corpus(24)
    of_ramps = source()
    texts = live_source(corpus, "text", Corners())  # type: ignore[arg-type]
    batches = Batches(BatchSampler(corpus.split_pairs("train"), 6, 0), of_ramps, texts, corpus.matches)
    epoch = batches.sampler.steps_per_epoch
    for workers in (0, 2):
        for batch, _ in load(batches, 0, 2 * epoch, workers):
            expected = of_ramps.at(batch.step // epoch, batch.image_ids)["facts"]
            assert torch.equal(batch.images["facts"], expected)
    plain = of_ramps(ROWS)["facts"]
    assert (plain[:, :2] == torch.tensor([12.0, 16.0])).all()


def test_a_run_that_died_ends_bit_equal_and_differs_from_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(folder: str, *own: str) -> bytes:
        x = experiment(tmp_path / folder, "train.candidates=encode", *own)
        return (trained_arm(x, "distilled") / "model.safetensors").read_bytes()

    whole, plain, own = weights("whole", AUGMENT), weights("plain"), Meter.step

    def dying(meter: Meter, batch: Any, *args: Any, **options: Any) -> Any:
        if batch.step == 13:
            raise RuntimeError("the end")
        return own(meter, batch, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "step", dying)
        with pytest.raises(RuntimeError, match="the end"):
            weights("died", AUGMENT)
    assert weights("died", AUGMENT) == whole != plain


@pytest.mark.parametrize(
    ("value", "message"),
    [("{crop: [0.9, 0.4]}", r"crop is \[0\.9, 0\.4\]: give the least and the most"), ("{}", "neither crop nor flip")],
)
def test_what_changes_nothing_or_cannot_be_is_refused(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [*RUN, f"train.augment={value}"])


def test_a_frozen_image_tower_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*RUN, AUGMENT, "student.freeze=[image]", f"runs={tmp_path}"])
    with pytest.raises(ExperimentError, match=r"train\.augment: the student's image tower is frozen"):
        check(Experiment(recipe, builders(recipe), taught=taught_teacher))
