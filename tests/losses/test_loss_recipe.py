"""What a recipe may say of losses, beside the losses themselves."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import TypeAdapter, ValidationError

import distill.losses
from distill.losses import Schedule
from distill.recipe.build import _CLASS_OF_LOSS, build_losses
from distill.recipe.loss_base import ScheduleRecipe
from distill.recipe.losses import LossPart

PART = TypeAdapter(LossPart)
NOT_LOSSES = {"NonFiniteLossError", "Part", "Schedule", "TeacherScoreError", "Weighted"}


def test_every_loss_can_be_named_and_every_name_is_built():
    classes = {name for name in distill.losses.__all__ if name[0].isupper()} - NOT_LOSSES
    assert len(classes) > 18
    assert set(_CLASS_OF_LOSS.values()) == classes
    for name, class_name in _CLASS_OF_LOSS.items():
        options = {"temperature": 2.0} if class_name == "KL" else {}
        (part,) = build_losses([PART.validate_python({"name": name, **options})]).parts
        assert part.name == name
        assert type(part.loss).__name__ == class_name
        assert all(getattr(part.loss, option) == value for option, value in options.items())


def test_a_recipes_defaults_are_the_losses():
    for name, class_name in _CLASS_OF_LOSS.items():
        given = PART.validate_python({"name": name}).given()
        fields = {field.name: field.default for field in dataclasses.fields(getattr(distill.losses, class_name))}
        assert all(fields[option] == value for option, value in given.items()), name


def test_what_older_recipes_said_is_written_as_it_was():
    """Checkpoints are known by what their losses' options say; an option that came later is silent until it is used."""
    older = {
        "contrastive": {"temperature", "train_scale", "positives", "negatives"},
        "margin_mse": {"negatives", "teacher_std", "temperature", "train_scale"},
        "m3se": {"same_index", "teacher_std", "temperature", "train_scale"},
        "kl": {
            *("temperature", "teacher_temperature", "symmetric", "zscore", "t_squared", "positive", "train_scale"),
        },
        "attention": set(),
    }
    for name, options in older.items():
        assert set(PART.validate_python({"name": name}).model_dump(mode="json")) == {"name", "weight", *options}
    used = {"name": "margin_mse", "pairs": "all", "over": "pairs", "schedule": {"shape": "cosine", "begin": 0.3}}
    written = PART.validate_python(used).model_dump(mode="json")
    assert (written["pairs"], written["over"], written["schedule"]["begin"]) == ("all", "pairs", 0.3)
    assert PART.validate_python(written).model_dump(mode="json") == written
    conventional = PART.validate_python(
        {"name": "kl", "convention": "tevatron", "temperature": 2, "teacher_temperature": 2}
    )
    assert conventional.model_dump(mode="json")["convention"] == "tevatron"
    assert conventional.given()["convention"] == "tevatron"


def test_a_recipes_schedule_has_the_options_of_the_schedule():
    assert ScheduleRecipe().model_dump() == dataclasses.asdict(Schedule())
    with pytest.raises(ValidationError, match=r"begin \(0.6\) must not come after end \(0.4\)"):
        ScheduleRecipe(begin=0.6, end=0.4)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"name": "listmle", "positive": "first"}, "positive"),
        ({"name": "softmax_ce", "teacher_std": "epoch"}, "teacher_std"),
        ({"name": "kl", "convention": "pylate"}, "convention"),
        ({"name": "affinity", "teacher_scales": [0.0]}, "teacher_scales"),
        ({"name": "rank_net"}, "ranknet"),
    ],
)
def test_a_wrong_part_is_refused_by_name(part, says):
    with pytest.raises(ValidationError, match=says):
        PART.validate_python(part)
