"""Runs to export: a tiny CLIP on made scenes, and MobileNetV2 with MiniLM on real photographs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from distill.experiment import Experiment
from distill.pipeline import taught_teacher
from distill.recipe.build import builders
from distill.recipe.load import load_recipe

SHARED = Path(os.environ.get("CROSS2DUAL_SHARED") or Path(__file__).resolve().parents[3] / "shared")
SCENES = [
    "device=cpu",
    "data.train=40",
    "data.val=4",
    "data.test=40",
    "student.vision.layers=1",
    "student.text.layers=1",
]


def experiment(recipe_file: str | Path, settings: list[str]) -> Experiment:
    recipe = load_recipe(str(recipe_file), settings)
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def made_run(place: Path, name: str, settings: list[str], *, recipe: str = "quickstart") -> Experiment:
    """A run whose arm ``plain`` has a student that was never trained, with weights that differ from a fresh one's."""
    x = experiment(recipe, [*settings, f"runs={place / 'runs'}", f"cache={place / 'cache'}", f"name={name}"])
    torch.manual_seed(0)
    student = x.builders.student(x.corpus)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    student.save_pretrained(x.folder / "arms" / "plain" / "student")
    (x.folder / "recipe.yaml").write_text(yaml.safe_dump(x.recipe.model_dump(mode="json"), sort_keys=False))
    return x


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    """A run by name and settings beyond ``SCENES``, made once."""
    place, made = tmp_path_factory.mktemp("scenes"), {}

    def run(name: str, *settings: str) -> Experiment:
        if name not in made:
            made[name] = made_run(place, name, [*SCENES, *settings])
        return made[name]

    return run


@pytest.fixture(scope="session")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Real towers under VisionTextDualEncoder, on 60 test photographs and as many of training."""
    data, models = SHARED / "data" / "flickr8k-160", SHARED / "models"
    for needed in (data / "dataset_flickr8k.json", models / "mobilenet-v2-imagenet", models / "all-MiniLM-L6-v2"):
        if not needed.exists():
            pytest.skip(f"looked for {needed}, which is not there (set CROSS2DUAL_SHARED)")
    place = tmp_path_factory.mktemp("flickr")
    told = json.loads((data / "dataset_flickr8k.json").read_text())
    by_split = {name: [one for one in told["images"] if one["split"] == name] for name in ("train", "val", "test")}
    few = {**told, "images": by_split["train"][:60] + by_split["val"][:2] + by_split["test"][:60]}
    (place / "few.json").write_text(json.dumps(few))
    settings = [
        "device=cpu",
        f"data.annotations={place / 'few.json'}",
        f"data.images={data / 'images'}",
        f"student.vision={models / 'mobilenet-v2-imagenet'}",
        f"student.text={models / 'all-MiniLM-L6-v2'}",
        f"teacher.vision={models / 'mobilenet-v2-imagenet'}",
        f"teacher.text={models / 'all-MiniLM-L6-v2'}",
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLICKR8K", str(data))
        return made_run(place, "flickr", settings, recipe="flickr8k")
