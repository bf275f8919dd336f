"""Every kind of recipe can be measured: what is trained on, where inputs come from, which teachers score."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.experiment import Experiment
from distill.pipeline import taught_teacher
from distill.planning.estimate import Estimator
from distill.planning.measure import measure
from distill.preflight import claim
from distill.recipe.build import builders
from distill.recipe.load import load_recipe
from tests.planning.test_plan_run import TINY

KL = "arms={kl: {losses: [{name: contrastive}, {name: kl}]}}"
CASES = {
    "memory": ["train.candidates=memory"],
    "in batch": ["train.candidates=in_batch", "train.group=8"],
    "live": ["prepared_gib=0", "train.augment={crop: [0.6, 1.0]}", "train.workers=1"],
    "IVF": ["mine.factory='IVF4,Flat'", "mine.nprobe=4"],
    "slow copy": ["arms={slow: {losses: [{name: contrastive}, {name: momentum}]}}"],
}


def opened(folder: Path, *changes: str) -> Experiment:
    recipe = load_recipe("quickstart", [*TINY, KL, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", *changes])
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_recipe_of_each_kind_is_measured(changes: list[str], tmp_path: Path) -> None:
    x = opened(tmp_path, *changes)
    found = measure(x, seconds=0.5)
    stages = {stage.name: stage for stage in Estimator(x.recipe, found.shape, found).stages()}
    assert stages[f"train {next(iter(x.recipe.arms))}"].wall.mid > 0
    if "prepared_gib=0" in changes:
        assert {source.kind for source in found.sources} == {"live"}
        assert "prepare" not in stages


@pytest.mark.slow
def test_an_ensemble_is_measured_member_by_member(tmp_path: Path) -> None:
    for name in ("one", "two"):
        x = opened(tmp_path, f"name={name}")
        claim(x, resume=False)
        taught_teacher(x)
    members = ", ".join(f"{{kind: blip, checkpoint: {tmp_path}/runs/{name}/teacher}}" for name in ("one", "two"))
    arms = "arms={both: {losses: [{name: contrastive}, {name: kl}, {name: affinity}]}}"
    x = opened(tmp_path, f"teacher={{kind: ensemble, members: [{members}]}}", "teach=null", arms)
    found = measure(x, seconds=0.5)
    assert len(found.teachers) == 2
    assert found.teaching is None
    one, both = (
        {stage.name: stage for stage in Estimator(x.recipe, found.shape, known).stages()}["score"].wall.mid
        for known in (found.model_copy(update={"teachers": found.teachers[:1]}), found)
    )
    assert both > one
