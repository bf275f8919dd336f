"""From a recipe to corpus, teacher, student and losses. Model libraries are imported only when a part is built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.experiment import Builders
from distill.recipe import schema
from distill.recipe.build_ensemble import ensemble_parts
from distill.recipe.build_teachers import build_teacher, learned_tokenizer
from distill.recipe.ensemble import EnsembleTeacherRecipe
from distill.recipe.losses import CustomLoss, LossPart
from distill.recipe.targets import import_target

if TYPE_CHECKING:
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
    "softmax_ce": "SoftmaxCE",
    "pearson": "Pearson",
    "logit_mse": "LogitMSE",
    "listmle": "ListMLE",
    "rankdistil": "RankDistil",
    "ranknet": "RankNet",
    "lambdarank": "LambdaRank",
    "approx_ndcg": "ApproxNDCG",
    "adr_mse": "ADRMSE",
    "siglip": "SigLIP",
    "hinge": "Hinge",
    "momentum": "Momentum",
    "embedding_match": "EmbeddingMatch",
    "affinity": "Affinity",
    "attention": "Attention",
}


def builders(recipe: Recipe) -> Builders:
    """How the recipe's parts are made."""
    several = recipe.teacher if isinstance(recipe.teacher, EnsembleTeacherRecipe) else None
    return Builders(
        corpus=partial(build_corpus, recipe.data, recipe.cache),
        teacher=lambda corpus, folder: build_teacher(
            recipe.teacher,
            corpus,
            seed=recipe.seed,
            folder=folder,
            teaches=recipe.teach is not None and folder is None,
        ),
        student=lambda corpus: build_student(recipe.student, corpus, tokens=recipe.needs_maps),
        saved_student=partial(load_student, recipe.student),
        losses=build_losses,
        ensemble=None
        if several is None
        else partial(ensemble_parts, several, partial(build_teacher, seed=recipe.seed)),
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
    from distill.data.scenes import SceneMix, make_scenes

    return make_scenes(
        images=data.train,
        val=data.val,
        test=data.test,
        seed=data.seed,
        captions_per_image=data.captions_per_image,
        size=data.size,
        mix=SceneMix(vague=data.vague),
        labelled_only=data.matches == "labelled",
    )


def _read_options(data: schema.BadItems, cache: Path) -> ReadOptions:
    from distill.data.reading import ReadOptions

    return ReadOptions(
        on_bad_item=data.on_bad_item,
        max_skip_rate=data.max_skip_rate,
        max_pixels=data.max_pixels,
        copies_match=data.copies_match,
        cache=cache / "files",
    )


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
        vision={**recipe.vision.sizes(), "patch_size": recipe.vision.patch_size},
        text={**recipe.text.sizes(), "max_position_embeddings": max(8, recipe.max_text_length or 64)},
        projection_dim=recipe.projection_dim,
        tokenizer=learned_tokenizer(corpus, recipe.vocabulary),
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
    from distill.losses.schedule import Schedule

    made, seen = [], dict[str, int]()
    for part in parts:
        if isinstance(part, CustomLoss):
            found = import_target(part.target)
            loss, name = (found(**part.options) if isinstance(found, type) or part.options else found), part.label
        else:
            loss, name = getattr(distill.losses, _CLASS_OF_LOSS[part.name])(**part.given()), part.name
        seen[name] = seen.get(name, 0) + 1
        schedule = None if part.schedule is None else Schedule(**part.schedule.model_dump())
        made.append(Part(name if seen[name] == 1 else f"{name}_{seen[name]}", part.weight, loss, schedule))
    return Weighted(tuple(made))
