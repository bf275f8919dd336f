"""Recipes: what is refused and how, and what a resolved one means."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

import distill.losses
import teachers
from distill.recipe import losses as schema
from distill.recipe import teachers as teacher_schema
from distill.recipe.build import _CLASS_OF_LOSS, build_losses, builders
from distill.recipe.build_teachers import build_teacher
from distill.recipe.load import RecipeError, dump, load_recipe, parse, shipped_recipes
from distill.recipe.targets import BuildError
from tests.toys import toy_corpus

VARIABLES = ("FLICKR8K", "FLICKR30K", "COCO")


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path))


def test_every_shipped_recipe_loads_and_its_dump_means_the_same() -> None:
    shipped = shipped_recipes()
    assert {"quickstart", "flickr8k", "flickr30k-blip-clip", "coco-blip-clip"} <= set(shipped)
    for name in shipped:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert parse(yaml.safe_load(dump(recipe)), name) == recipe


def test_every_shipped_recipe_opens_with_its_command_and_its_hardware() -> None:
    shipped = shipped_recipes()
    assert shipped
    for name, path in shipped.items():
        head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert f"distill run {name}" in head
        assert "CPU" in head or "GPU" in head
        assert "R@1" in head or "not yet run" in head


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean lr?"),
        ("zzz=1", "zzz: unknown key; allowed: arms, cache, data"),
        ("teacher.visionn=3", "teacher.visionn: unknown key; did you mean vision?"),
        ("train.lr=abc", "train.lr: Input should be a valid number, unable to parse string as a number; found 'abc'"),
        ("train.trackers=wandb", "train.trackers: expected a list, such as [wandb]; found 'wandb'"),
        ("train.lr=-1", "train.lr: Input should be greater than 0; found -1"),
        ("teacher.vision.width=0", "teacher.vision.width: Input should be greater than or equal to 1; found 0"),
        ("data.source=foo", "does not match any of the expected tags: 'scenes', 'karpathy', 'manifest', 'hub'"),
        ("arms.plain.losses=[{name: klx}]", "arms.plain.losses.0: Input tag 'klx'"),
        ("mine.k=2", "train.candidates_per_query is 4 but mine.k is only 2: raise mine.k"),
        ("teach=null", "teacher.checkpoint: give a hub id or folder, or a teach: section"),
        ("student={kind: custom, target: nowhere:Student}", "no module named 'nowhere'"),
        ("student={kind: custom, target: nowhere}", "is not of the form module:Name"),
        ("teacher={kind: vilt}", "teacher.checkpoint: missing"),
        ("teacher={kind: vilt, checkpoint: x, score_kind: log_odds}", "teacher.score_kind: Input should be 'logit'"),
        ("teacher={kind: blip2, checkpoint: x, enc_token: cls}", "teacher.enc_token: unknown key"),
        ("teacher.precision=float64", "teacher.precision: Input should be 'float32', 'bfloat16' or 'float16'"),
        ("teacher={kind: classifier, checkpoint: x, target: nowhere:Model}", "no module named 'nowhere'"),
        (
            "teacher={kind: classifier, checkpoint: x, target: tests.toys:ToyTeacher, text_inputs: []}",
            "teacher.text_inputs: Tuple should have at least 1 item",
        ),
        ("train.lr", "expected key.path=value"),
        ("name.deeper=1", "has no keys of its own"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_change(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert message in str(caught.value)


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"nosuch: no such file.*quickstart"):
        load_recipe("nosuch")


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLICKR8K")
    with pytest.raises(RecipeError, match=r"data.annotations .*FLICKR8K is not set.*--set data.annotations"):
        load_recipe("flickr8k")


def test_an_override_reads_numbers_as_a_user_writes_them() -> None:
    assert load_recipe("quickstart", ["train.lr=1e-4"]).train.lr == 1e-4
    assert load_recipe("quickstart", ["train.trackers=[tensorboard]"]).train.trackers == ("tensorboard",)


@pytest.mark.parametrize("text", ["a: [1", "- 1", "\xff"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(str(path))


def test_the_schema_s_loss_options_are_those_of_the_losses() -> None:
    assert _CLASS_OF_LOSS
    of_part = {"name", "weight", "schedule"}
    for name, class_name in _CLASS_OF_LOSS.items():
        model = next(m for m in vars(schema).values() if getattr(m, "__name__", "").lower() == name.replace("_", ""))
        kept = model.model_fields.keys() - of_part - model.of_training
        options = {field: model.model_fields[field].default for field in kept}
        fields = dataclasses.fields(getattr(distill.losses, class_name))
        assert options == {field.name: field.default for field in fields}, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("blip", "BlipOptions"),
        ("fusion", "FusionOptions"),
        ("blip2", "Blip2Options"),
        ("vilt", "ViltOptions"),
        ("bridgetower", "BridgeTowerOptions"),
        ("classifier", "ClassifierOptions"),
    ],
)
def test_a_teacher_s_options_have_the_defaults_of_its_class(kind: str, options: str) -> None:
    name = next(name for name in vars(teacher_schema) if name.lower() == f"{kind}teacherrecipe")
    said = {field: info.default for field, info in getattr(teacher_schema, name).model_fields.items()}
    own = {field.name: field.default for field in dataclasses.fields(getattr(teachers, options))}
    shared = said.keys() & own.keys()
    assert {"score_kind", "max_text_length"} <= shared
    assert {field: said[field] for field in shared} == {field: own[field] for field in shared}
    # What bounds memory or speeds up is not part of a recipe's meaning; the older kinds have no prompt.
    assert own.keys() - shared <= {"pairs_per_chunk", "compile", "prompt"}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("blip2", "score_kind: cosine"),
        ("vilt", "prompt: 'w1 '"),
        ("bridgetower", "max_text_length: 20"),
        ("classifier", "target: tests.teachers.tiny_teachers:TinyClassifier, match: 0"),
    ],
)
def test_a_teacher_is_built_from_its_checkpoint_as_the_recipe_says(kind: str, extra: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.teachers import tiny_teachers as tiny

    made = getattr(tiny, kind)()
    if kind == "classifier":
        save_file(made.model.state_dict(), tmp_path / "model.safetensors")
        made.image_processor.save_pretrained(tmp_path)
        made.tokenizer.save_pretrained(tmp_path)
    else:
        tiny.save_checkpoint(made, tmp_path)
    text = f"teacher={{kind: {kind}, checkpoint: {tmp_path}, {extra}}}"
    corpus = toy_corpus()
    recipe = load_recipe("quickstart", [text, "teach=null"]).teacher
    built = build_teacher(recipe, corpus, seed=0)
    wanted = {"blip2": {"score_kind": "cosine"}, "vilt": {"prompt": "w1 "}, "bridgetower": {"max_text_length": 20}}
    assert type(built) is type(made)
    defaults = {"max_text_length": 40} if kind == "vilt" else {}
    assert built.options == dataclasses.replace(made.options, **{**defaults, **wanted.get(kind, {"match": 0})})
    half = build_teacher(recipe.model_copy(update={"precision": "bfloat16"}), corpus, seed=0)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.identity != built.identity


@pytest.mark.parametrize("kind", ["blip", "fusion"])
def test_a_saved_teacher_is_loaded_in_the_recipe_s_precision(kind: str, tmp_path: Path) -> None:
    from tests.teachers import tiny_teachers as tiny

    getattr(tiny, kind)().save_pretrained(tmp_path)
    text = f"teacher={{kind: {kind}, checkpoint: {tmp_path}, precision: bfloat16}}"
    built = build_teacher(load_recipe("quickstart", [text, "teach=null"]).teacher, toy_corpus(), seed=0)
    dtypes = {parameter.dtype for name, parameter in built.named_parameters() if name != "logit_scale"}
    assert dtypes == {torch.bfloat16}


def test_a_recipe_from_before_there_was_a_choice_of_precision_means_the_same() -> None:
    assert "precision" not in load_recipe("quickstart").model_dump(mode="json")["teacher"]
    half = load_recipe("quickstart", ["teacher.precision=float16"])
    assert half.model_dump(mode="json")["teacher"]["precision"] == "float16"
    assert parse(yaml.safe_load(dump(half)), "again") == half


@pytest.mark.parametrize("checkpoint", [None, "somewhere"])
def test_half_precision_is_refused_where_the_teacher_is_taught(checkpoint: str | None) -> None:
    recipe = load_recipe("quickstart", ["teacher.precision=bfloat16", f"teacher.checkpoint={checkpoint or 'null'}"])
    assert recipe.teach is not None
    with pytest.raises(BuildError, match=r"teacher.precision is bfloat16.*teach it in float32, then score with"):
        builders(recipe).teacher(toy_corpus(), None)


def test_losses_of_a_recipe_are_built_with_weights_and_names_of_their_own() -> None:
    parts = load_recipe(
        "quickstart", ["arms.plain.losses=[{name: kl, weight: 2}, {name: kl, teacher_temperature: 3.0}]"]
    ).arms["plain"]
    built = build_losses(parts.losses).parts
    assert [(part.name, part.weight) for part in built] == [("kl", 2.0), ("kl_2", 1.0)]
    assert built[1].loss.teacher_temperature == 3.0  # type: ignore[attr-defined]
