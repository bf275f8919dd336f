"""From a recipe to corpus, teacher, student and losses. Model libraries are imported only when a part is built."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.experiment import Builders
from distill.recipe import schema
from distill.recipe.losses import CustomLoss, LossPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.data.corpus import Corpus
    from distill.data.reading import ReadOptions
    from distill.losses.combine import Weighted
    from distill.recipe.experiment import Recipe

_CLASS_OF_LOSS = {
    "contrastive": "Contrastive",
    "cprd": "CPRD",
    "margin_mse": "MarginMSE",
    "m3se": "M3SE",
    "kl": "KL",
    "attention": "Attention",
}


class BuildError(ValueError):
    """A part of the recipe that cannot be built; the message says what to change."""


def builders(recipe: Recipe) -> Builders:
    """How the recipe's parts are made."""
    return Builders(
        corpus=partial(build_corpus, recipe.data, recipe.cache),
        teacher=lambda corpus, folder: build_teacher(recipe.teacher, corpus, folder=folder, seed=recipe.seed),
        student=lambda corpus: build_student(recipe.student, corpus, tokens=recipe.needs_maps),
        saved_student=partial(load_student, recipe.student),
        losses=build_losses,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def build_corpus(data: schema.Data, cache: Path) -> Corpus:
    """Read and check the corpus that a recipe names; file checks are kept under ``cache``."""
    if isinstance(data, schema.ScenesData):
        return _scenes(data)
    options = _read_options(data, cache)
    if isinstance(data, schema.KarpathyData):
        from distill.data.karpathy import load_karpathy

        return load_karpathy(data.annotations, data.images, options=options, merge_restval=data.restval_is_train)
    from distill.data.columns import Columns

    columns = Columns(
        image=data.image_column, caption=data.caption_column, split=data.split_column, image_id=data.id_column
    )
    if isinstance(data, schema.ManifestData):
        from distill.data.manifest import load_manifest

        return load_manifest(data.file, data.images, columns=columns, options=options)
    from distill.data.hub import load_hub

    return load_hub(
        data.dataset,
        columns=columns,
        image_root=data.images,
        config=data.config,
        revision=data.revision,
        options=options,
    )


def _scenes(data: schema.ScenesData) -> Corpus:
    from distill.data.scenes import make_scenes

    return make_scenes(
        images=data.train,
        val=data.val,
        test=data.test,
        seed=data.seed,
        captions_per_image=data.captions_per_image,
        size=data.size,
    )


def _read_options(data: schema.BadItems, cache: Path) -> ReadOptions:
    from distill.data.reading import ReadOptions

    return ReadOptions(
        on_bad_item=data.on_bad_item,
        max_skip_rate=data.max_skip_rate,
        max_pixels=data.max_pixels,
        cache=cache / "files",
    )


# --- teachers ---------------------------------------------------------------------------------------------------------


def build_teacher(recipe: schema.TeacherRecipe, corpus: Corpus, *, folder: Path | None, seed: int) -> Any:
    """The teacher: from ``folder`` where it was taught, else from the recipe's checkpoint, else with random weights."""
    import torch

    torch.manual_seed(seed)
    source = str(folder) if folder is not None else recipe.checkpoint
    if isinstance(recipe, schema.BlipTeacherRecipe):
        return _blip(recipe, corpus, source)
    if isinstance(recipe, schema.FusionTeacherRecipe):
        return _fusion(recipe, source)
    made = import_target(recipe.target)
    return made.from_pretrained(source, **recipe.options) if source is not None else made(**recipe.options)


def _blip(recipe: schema.BlipTeacherRecipe, corpus: Corpus, source: str | None) -> Any:
    from teachers.blip import BlipTeacher
    from teachers.blip_options import BlipOptions

    options = BlipOptions(
        recipe.score_kind, recipe.enc_token, recipe.max_text_length, cosine_weight=recipe.cosine_weight
    )
    if source is not None:
        return BlipTeacher.from_pretrained(source, options=options)
    text = {
        **_tower(recipe.text),
        **_spread(recipe.text),
        "encoder_hidden_size": recipe.vision.width,
        "max_position_embeddings": max(64, recipe.max_text_length),
        "hidden_dropout_prob": recipe.text.dropout,
        "attention_probs_dropout_prob": recipe.text.dropout,
    }
    return BlipTeacher.from_config(
        vision={**_tower(recipe.vision), **_spread(recipe.vision), "patch_size": recipe.vision.patch_size},
        text=text,
        embed_dim=recipe.embed_dim,
        image_size=recipe.image_size,
        tokenizer=_vocabulary(corpus, recipe.vocabulary),
        options=options,
    )


def _fusion(recipe: schema.FusionTeacherRecipe, source: str | None) -> Any:
    from teachers.fusion import FusionTeacher
    from teachers.fusion_options import FusionDesign, FusionOptions

    options = FusionOptions(recipe.score_kind, recipe.max_text_length, cosine_weight=recipe.cosine_weight)
    if source is not None:
        return FusionTeacher.from_pretrained(source, options=options)
    design = FusionDesign(**recipe.model_dump(include=set(FusionDesign.__dataclass_fields__)))
    if recipe.vision is None or recipe.text is None:
        raise BuildError("teacher: give vision and text, or a checkpoint")
    return FusionTeacher.from_backbones(recipe.vision, recipe.text, design=design, options=options)


def _tower(tower: schema.TinyTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width or 4 * tower.width,
    }


def _spread(tower: schema.TinyTower) -> dict[str, float]:
    """Spread of the random weights. The usual 0.02 suits 768 wide; at 96 wide it slows a BLIP several times."""
    return {"initializer_range": 0.6 * tower.width**-0.5}


def _vocabulary(corpus: Corpus, size: int) -> PreTrainedTokenizerBase:
    from distill.data.vocabulary import learn_tokenizer

    return learn_tokenizer([corpus.texts[row] for row in corpus.split("train").texts.tolist()], size=size)


# --- students ---------------------------------------------------------------------------------------------------------


def build_student(recipe: schema.StudentRecipe, corpus: Corpus, *, tokens: bool) -> Any:
    """A student before training; ``tokens``: frozen towers hand out token states too, which attention maps need."""
    if isinstance(recipe, schema.CustomStudent):
        return import_target(recipe.target)(**recipe.options)
    from students.dual import DualEncoder
    from students.options import DualOptions

    options = DualOptions(**recipe.model_dump(include=set(DualOptions.__dataclass_fields__)), tokens=tokens)
    if isinstance(recipe, schema.CheckpointStudent):
        return DualEncoder.from_pretrained(recipe.checkpoint, options=options)
    if isinstance(recipe, schema.TowersStudent):
        return DualEncoder.from_towers(
            recipe.vision, recipe.text, projection_dim=recipe.projection_dim, options=options
        )
    return DualEncoder.from_config(
        vision={**_tower(recipe.vision), "patch_size": recipe.vision.patch_size},
        text={**_tower(recipe.text), "max_position_embeddings": max(8, recipe.max_text_length or 64)},
        projection_dim=recipe.projection_dim,
        tokenizer=_vocabulary(corpus, recipe.vocabulary),
        image_size=recipe.image_size,
        family=recipe.family,
        options=options,
    )


def load_student(recipe: schema.StudentRecipe, folder: Path) -> Any:
    """A student that a run saved."""
    if isinstance(recipe, schema.CustomStudent):
        return import_target(recipe.target).from_pretrained(folder)
    from students.dual import DualEncoder

    return DualEncoder.load(folder)


# --- losses -----------------------------------------------------------------------------------------------------------


def build_losses(parts: Sequence[LossPart]) -> Weighted:
    """The weighted sum of a recipe's parts; two parts of one name are numbered."""
    import distill.losses
    from distill.losses.combine import Part, Weighted

    made, seen = [], dict[str, int]()
    for part in parts:
        if isinstance(part, CustomLoss):
            found = import_target(part.target)
            loss, name = (found(**part.options) if isinstance(found, type) or part.options else found), part.label
        else:
            loss, name = getattr(distill.losses, _CLASS_OF_LOSS[part.name])(**part.given()), part.name
        seen[name] = seen.get(name, 0) + 1
        made.append(Part(name if seen[name] == 1 else f"{name}_{seen[name]}", part.weight, loss))
    return Weighted(tuple(made))


def import_target(target: str) -> Any:
    """The object that ``module:Name`` names.

    Raises:
        BuildError: the module cannot be imported or has no such name.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BuildError(f"{target}: {error}") from error
