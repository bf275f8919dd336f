"""Losses on the vectors of the teacher's own towers, from a recipe through a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.preflight import PreflightError, check, claim
from distill.recipe.load import RecipeError
from distill.results import finish
from tests.test_ensemble_run import ensemble_of, folder, members_in, opened

__all__ = ["folder"]

AFFINITY = "a: {losses: [{name: contrastive}, {name: affinity, teacher_scales: [20]}]}"
PLAIN = "plain: {losses: [{name: contrastive}]}"
MATCH = "m: {losses: [{name: contrastive}, {name: embedding_match, distance: mse, weight: 100}]}"


def test_affinity_and_embeddings_train_a_student_of_one_teacher(folder: Path) -> None:
    arms = f"arms={{{PLAIN}, {AFFINITY}, {MATCH}, all: {{losses: [{{name: affinity, columns: all}}]}}}}"
    x = opened(folder, "name=vectors", "student.projection_dim=64", "train.log_every=2", arms)
    check(x)
    claim(x, resume=False)
    finish(x)
    weights = {(x.folder / "arms" / arm / "student" / "model.safetensors").read_bytes() for arm in x.recipe.arms}
    assert len(weights) == 4
    losses = {"a": "affinity", "m": "embedding_match", "all": "affinity"}
    for arm, loss in losses.items():
        last = json.loads((x.folder / "arms" / arm / "metrics.jsonl").read_text().splitlines()[-1])
        assert last[f"loss/{loss}"] > 0
    assert [tower.member for tower in x.towers] == [0]
    assert sorted(path.name for path in (x.folder / "shared").glob("candidates-*")) == [
        "candidates-1-i2t.npz",  # affinity over all columns takes mined ones
        "candidates-1-t2i.npz",
    ]


def test_every_member_of_an_ensemble_teaches_by_affinity_and_one_by_its_embeddings(folder: Path) -> None:
    members = members_in(folder)
    both = "{name: affinity, teacher_scales: [20, 30, 40]}, {name: embedding_match, member: 2}"
    x = opened(folder, *ensemble_of(*members), "name=both", f"arms={{b: {{losses: [{{name: contrastive}}, {both}]}}}}")
    check(x)
    claim(x, resume=False)
    finish(x)
    assert [tower.member for tower in x.towers] == [0, 1, 2]
    assert (x.folder / "arms" / "b" / "student" / "done.json").is_file()


CUSTOM = ["teach=null", "teacher={kind: custom, target: 'tests.test_towers:Headless'}"]
TOY = ["teach=null", "teacher={kind: custom, target: 'tests.test_towers:ReadsAnything'}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([*CUSTOM, f"arms={{{AFFINITY}}}"], "arms.a: affinity reads the vectors .* custom has no contrastive head"),
        (
            [*TOY, f"arms={{{MATCH}}}"],
            "vectors have 64 numbers and the teacher's 2: set student.projection_dim",
        ),
        (
            [*TOY, "arms={a: {losses: [{name: affinity, teacher_scales: [1, 2]}]}}"],
            r"arms.a: affinity has 2 teacher_scales, but 1 of the teacher's models",
        ),
        ([*TOY, "arms={a: {losses: [{name: embedding_match, member: 1}]}}"], "names member 1, which has no"),
        ([*TOY, "shared_losses=[{name: embedding_match}]"], "shared_losses: embedding_match needs one width"),
    ],
)
def test_what_the_teachers_towers_cannot_give_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        check(opened(tmp_path, *changes))


def test_of_an_ensemble_it_must_be_said_which_member_is_followed(folder: Path) -> None:
    x = opened(folder, *ensemble_of(*members_in(folder)), f"arms={{{MATCH}}}")
    with pytest.raises(PreflightError, match="say which by member: 0 or 1 or 2"):
        check(x)
    with pytest.raises(RecipeError, match="a student has one space"):
        opened(folder, "arms={m: {losses: [{name: embedding_match, member: 0}, {name: embedding_match}]}}")


def test_such_arms_distil_and_others_pay_nothing(tmp_path: Path) -> None:
    arms = opened(tmp_path, f"arms={{{PLAIN}, {AFFINITY}, {MATCH}}}").recipe.arms
    assert {name: arm.distils for name, arm in arms.items()} == {"plain": False, "a": True, "m": True}
    assert not any(arm.reads_scores or arm.uses_candidates for arm in arms.values())
