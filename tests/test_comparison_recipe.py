"""From ``--loss`` and seeds to the recipes of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe.comparison import comparison_recipe, describe, seed_recipe
from distill.recipe.load import RecipeError, load_recipe


@pytest.fixture(scope="module")
def quickstart():
    return load_recipe("quickstart")


def arms(recipe, losses):
    made, plain = comparison_recipe(recipe, losses)
    return plain, {name: describe(arm) for name, arm in made.arms.items()}


def test_without_losses_all_arms_are_compared(quickstart):
    plain, found = arms(quickstart, [])
    assert plain == "plain"
    assert list(found) == list(quickstart.arms)


def test_an_arm_of_the_recipe_is_taken_as_it_stands_and_the_undistilled_one_joins_in_front(quickstart):
    plain, found = arms(quickstart, ["distilled"])
    assert plain == "plain"
    assert list(found) == ["plain", "distilled"]
    made, _ = comparison_recipe(quickstart, ["distilled"])
    assert made.arms["distilled"] == quickstart.arms["distilled"]


def test_short_forms(quickstart):
    given = [
        "kl",
        "half=kl:weight=0.5,teacher_temperature=1e1",
        "mix=kl:zscore=true+margin_mse:teacher_std=row",
        "hinge",
    ]
    _, found = arms(quickstart, given)
    assert found == {
        "plain": "contrastive",
        "kl": "contrastive + kl",
        "half": "contrastive + 0.5 × kl (teacher_temperature: 10.0)",
        "mix": "contrastive + kl (zscore: True) + margin_mse (teacher_std: row)",
        "hinge": "hinge",  # a retrieval loss of its own: no contrastive part joins
    }


def test_a_recipe_without_an_undistilled_arm_gets_one(quickstart):
    distilled = {"distilled": quickstart.arms["distilled"]}
    bare = quickstart.model_copy(update={"arms": distilled})
    assert arms(bare, [])[0] == "plain"
    assert list(arms(bare, [])[1]) == ["plain", "distilled"]
    taken = quickstart.model_copy(update={"arms": {"plain": quickstart.arms["distilled"]}})
    with pytest.raises(RecipeError, match="'plain' is distilled"):
        comparison_recipe(taken, [])


def test_options_make_the_label_where_none_is_given(quickstart):
    _, found = arms(quickstart, ["kl:weight=0.5", "kl:weight=2"])
    assert list(found) == ["plain", "kl-weight-0.5", "kl-weight-2"]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["kll"], "arms.kll.losses.1: Input tag 'kll' found"),
        (["kll"], "the recipe's own arms: plain, distilled"),
        (["kl:wait=3"], "wait: unknown key"),
        (["kl:weight"], r"expected \[LABEL=\]LOSS\[:KEY=VALUE,...\]"),
        (["kl", "kl"], "there are two arms 'kl'"),
        (["kl:weight=-1"], "greater than or equal to 0"),
    ],
)
def test_what_is_no_loss_is_refused_with_what_is_allowed(quickstart, losses, message):
    with pytest.raises(RecipeError, match=message):
        comparison_recipe(quickstart, losses)


def test_recipes_of_seeds_differ_in_seed_and_folder_alone(quickstart, tmp_path):
    first, second = (seed_recipe(quickstart, seed, folder=tmp_path, teacher=Path("t")) for seed in (0, 7))
    assert (first.folder, second.folder) == (tmp_path / "seed-0", tmp_path / "seed-7")
    assert (first.teach, first.teacher.checkpoint) == (None, "t")
    a, b = first.model_dump(), second.model_dump()
    assert {key for key in a if a[key] != b[key]} == {"seed", "name"}


def test_a_teacher_that_is_not_taught_stays_as_it_is(quickstart, tmp_path):
    made = seed_recipe(quickstart, 1, folder=tmp_path, teacher=None)
    assert (made.teacher, made.teach) == (quickstart.teacher, quickstart.teach)
