"""An ensemble as the teacher of a whole run on made pictures, and what a recipe may not ask of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distill.ensemble import EnsembleError
from distill.experiment import Experiment, ExperimentError
from distill.pipeline import first_candidates, taught_teacher
from distill.preflight import PreflightError, check, claim
from distill.recipe.build import builders
from distill.recipe.load import RecipeError, load_recipe
from distill.results import finish

TINY = [
    "device=cpu",
    "data.train=60",
    "data.val=16",
    "data.test=20",
    "teach.steps=6",
    "teach.batch_size=16",
    "train.steps=8",
    "train.batch_size=16",
    "train.shared=0.5",
    "teacher.vision.layers=1",
    "teacher.text.layers=1",
    "student.vision.layers=1",
    "student.text.layers=1",
    "mine.k=6",
    "evaluate.rerank=8",
    "arms={plain: {losses: [{name: contrastive}]}, cprd: {losses: [{name: cprd, accept: top, top: 2}]}}",
]


def opened(folder: Path, *changes: str) -> Experiment:
    recipe = load_recipe("quickstart", [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", *changes])
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def ensemble_of(*members: str, method: str = "zscore") -> list[str]:
    teacher = f"teacher={{kind: ensemble, method: {method}, members: [{', '.join(members)}]}}"
    return ["name=together", "teach=null", teacher]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two taught teachers, and a student trained without any."""
    folder = tmp_path_factory.mktemp("ensemble")
    for name, seed in (("one", 0), ("two", 1)):
        x = opened(folder, f"name={name}", f"seed={seed}", "arms={plain: {losses: [{name: contrastive}]}}")
        check(x)
        claim(x, resume=False)
        taught_teacher(x)
    finish(x)
    return folder


def members_in(folder: Path) -> list[str]:
    blips = [f"{{kind: blip, checkpoint: {folder}/runs/{name}/teacher}}" for name in ("one", "two")]
    return [*blips, f"{{kind: student, checkpoint: {folder}/runs/two/arms/plain/student}}"]


def test_a_run_with_an_ensemble_for_a_teacher(folder: Path) -> None:
    x = opened(folder, *ensemble_of(*members_in(folder)))
    check(x)
    claim(x, resume=False)
    summary = finish(x)
    assert set(summary) == {"teacher", "plain", "cprd"}
    assert json.loads((x.folder / "summary.json").read_text()) == summary
    assert summary["teacher"] != summary["plain"]
    stores = {member.store.folder for member in x.scorer.members}
    assert len(stores) == 3
    asked = first_candidates(x)["i2t"].pairs()
    by_members = [member.store.lookup(*asked) for member in x.scorer.members]
    assert not np.isnan(by_members).any()
    np.testing.assert_array_equal(x.scorer.lookup(*asked), x.ask(*asked))
    again = opened(folder, *ensemble_of(*members_in(folder)))
    np.testing.assert_array_equal(again.ask(*asked), x.ask(*asked))
    assert again.scorer.identity == x.scorer.identity
    with pytest.raises(ExperimentError, match="no one model"):
        _ = x.teacher
    with pytest.raises(ExperimentError, match="no store of its own"):
        _ = x.store


def test_a_single_teacher_scores_as_its_store_says(folder: Path) -> None:
    x = opened(folder, "name=two", "seed=1")
    images, texts = np.arange(5), np.arange(5)
    np.testing.assert_array_equal(x.ask(images, texts), x.store.require(images, texts))
    assert x.scorer.identity == x.teacher.identity
    assert x.scorer.score_kind == x.teacher.score_kind == "log_odds"


def test_losses_that_an_ensemble_cannot_teach_are_refused(folder: Path) -> None:
    members = members_in(folder)
    attention = "arms={a: {losses: [{name: attention}]}}"
    with pytest.raises(PreflightError, match="attention loss reads the teacher's cross-attention, but Ensemble has no"):
        check(opened(folder, *ensemble_of(*members), attention))
    log_odds = "arms={a: {losses: [{name: cprd}]}}"
    with pytest.raises(PreflightError, match="accepts candidates by their log-odds, but teacher.score_kind is logit"):
        check(opened(folder, *ensemble_of(*members), log_odds))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("{kind: fusion, checkpoint: runs/flickr8k/teacher}", "distill teach flickr8k "),
        ("{kind: fragment, checkpoint: runs/my-words/teacher}", "distill teach my-words "),
        ("{kind: fragment, checkpoint: elsewhere}", "distill teach RECIPE "),
        ("{kind: student, checkpoint: runs/flickr8k/arms/plain/student}", "distill run flickr8k "),
        ("{kind: student, checkpoint: elsewhere}", "distill run RECIPE "),
    ],
)
def test_a_member_that_is_not_taught_is_refused_with_the_command_that_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnsembleError, match=message) as refusal:
        check(opened(tmp_path, *ensemble_of("{kind: custom, target: 'tests.toys:ToyTeacher'}", member)))
    assert "teacher.members.1" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ensemble_of("{kind: blip}"), r"members.0 \(blip\) has no checkpoint: teach it first"),
        (ensemble_of("{kind: fragment}"), "give either checkpoint, or both vision and text"),
        (ensemble_of("{kind: student}"), "checkpoint: missing"),
        (ensemble_of("{kind: ensemble, members: []}"), "teacher.members.0"),
        (ensemble_of(), "at least 1 item"),
        (ensemble_of("{kind: blip, checkpoint: x, zzz: 1}"), "teacher.members.0.zzz: unknown key"),
        ([*ensemble_of("{kind: blip, checkpoint: x}"), "teacher.weights=[1, 2]"], "2 weights are given for 1 members"),
        ([*ensemble_of("{kind: blip, checkpoint: x}"), "teach={steps: 3}"], "an ensemble is not taught"),
    ],
)
def test_a_recipe_that_names_no_ensemble_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path, *changes)


def test_a_fragment_teacher_is_built_as_its_recipe_says() -> None:
    from distill.recipe.fragment import FragmentTeacherRecipe
    from teachers.fragment_options import FragmentDesign, FragmentOptions

    recipe = FragmentTeacherRecipe(kind="fragment", vision="a", text="b")
    assert FragmentDesign.from_json(recipe.model_dump(include=set(FragmentDesign.__dataclass_fields__))) == (
        FragmentDesign()
    ), "the recipe's defaults are the teacher's"
    options = FragmentOptions()
    assert (recipe.score_kind, recipe.max_text_length, recipe.cosine_weight) == (
        options.score_kind,
        options.max_text_length,
        options.cosine_weight,
    )
