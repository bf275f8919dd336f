"""From a recipe's teacher to the model. Model libraries are imported only when one is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.recipe import schema
from distill.recipe.build_ensemble import build_fragment
from distill.recipe.ensemble import AnyTeacher, EnsembleTeacherRecipe
from distill.recipe.fragment import FragmentTeacherRecipe
from distill.recipe.targets import BuildError, import_target

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from distill.data.corpus import Corpus


def build_teacher(
    recipe: AnyTeacher, corpus: Corpus, *, seed: int, folder: Path | None = None, teaches: bool = False
) -> Any:
    """The teacher: from ``folder`` where it was taught, else from the recipe's checkpoint, else with random weights.

    ``teaches``: what is built here will be trained.

    Raises:
        BuildError: an ensemble, or half precision for a teacher that is to be trained.
    """
    import torch

    torch.manual_seed(seed)
    if isinstance(recipe, EnsembleTeacherRecipe):
        raise BuildError("teacher: an ensemble is no one model; its members are built one at a time")
    if isinstance(recipe, schema.RemoteTeacherRecipe):
        return _remote(recipe)
    source = str(folder) if folder is not None else recipe.checkpoint
    _check_precision(getattr(recipe, "precision", "float32"), trains=teaches or source is None)
    if isinstance(recipe, schema.BlipTeacherRecipe):
        return _blip(recipe, corpus, source)
    if isinstance(recipe, schema.FusionTeacherRecipe):
        return _fusion(recipe, source)
    if isinstance(recipe, FragmentTeacherRecipe):
        return build_fragment(recipe, source)
    if isinstance(recipe, schema.ClassifierTeacherRecipe):
        return _classifier(recipe)
    if isinstance(recipe, schema.CustomTeacherRecipe):
        made = import_target(recipe.target)
        return made.from_pretrained(source, **recipe.options) if source is not None else made(**recipe.options)
    return _published(recipe)


def _remote(recipe: schema.RemoteTeacherRecipe) -> Any:
    from distill import stopping
    from teachers.remote import RemoteTeacher, read_token
    from teachers.remote_servers import RemoteOptions

    return RemoteTeacher(
        recipe.urls,
        identity=recipe.identity,
        token=read_token(recipe.token_file),
        options=RemoteOptions(**recipe.model_dump(include=set(RemoteOptions.__dataclass_fields__))),
        heed=stopping.heed,
    )


def _check_precision(precision: str, *, trains: bool) -> None:
    if trains and precision != "float32":
        raise BuildError(
            f"teacher.precision is {precision}, but this teacher is to be taught, and most steps are too small for the "
            f"digits of {precision} weights: teach it in float32, then score with --set teacher.checkpoint=FOLDER "
            f"(where it was saved) --set teacher.precision={precision} --set teach=null"
        )


def _dtype(precision: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def _blip(recipe: schema.BlipTeacherRecipe, corpus: Corpus, source: str | None) -> Any:
    from teachers.blip import BlipTeacher
    from teachers.blip_options import BlipOptions

    options = BlipOptions(
        recipe.score_kind,
        recipe.enc_token,
        recipe.max_text_length,
        cosine_weight=recipe.cosine_weight,
        compile=recipe.compile,
    )
    if source is not None:
        return BlipTeacher.from_pretrained(source, options=options, dtype=_dtype(recipe.precision))
    text = {
        **recipe.text.sizes(),
        **_spread(recipe.text),
        "encoder_hidden_size": recipe.vision.width,
        "max_position_embeddings": max(64, recipe.max_text_length),
        "hidden_dropout_prob": recipe.text.dropout,
        "attention_probs_dropout_prob": recipe.text.dropout,
    }
    return BlipTeacher.from_config(
        vision={**recipe.vision.sizes(), **_spread(recipe.vision), "patch_size": recipe.vision.patch_size},
        text=text,
        embed_dim=recipe.embed_dim,
        image_size=recipe.image_size,
        tokenizer=learned_tokenizer(corpus, recipe.vocabulary),
        options=options,
    )


def _spread(tower: schema.TinyTower) -> dict[str, float]:
    """Spread of the random weights. The usual 0.02 suits 768 wide; at 96 wide it slows a BLIP several times."""
    return {"initializer_range": 0.6 * tower.width**-0.5}


def _fusion(recipe: schema.FusionTeacherRecipe, source: str | None) -> Any:
    from teachers.fusion import FusionTeacher
    from teachers.fusion_options import FusionDesign, FusionOptions

    options = FusionOptions(
        recipe.score_kind, recipe.max_text_length, cosine_weight=recipe.cosine_weight, compile=recipe.compile
    )
    if source is not None:
        return FusionTeacher.from_pretrained(source, options=options, dtype=_dtype(recipe.precision))
    design = FusionDesign(**recipe.model_dump(include=set(FusionDesign.__dataclass_fields__)))
    if recipe.vision is None or recipe.text is None:
        raise BuildError("teacher: give vision and text, or a checkpoint")
    return FusionTeacher.from_backbones(recipe.vision, recipe.text, design=design, options=options)


def _published(
    recipe: schema.Blip2TeacherRecipe | schema.ViltTeacherRecipe | schema.BridgeTowerTeacherRecipe,
) -> Any:
    length, prompt = recipe.max_text_length, recipe.prompt
    made: Any
    options: Any
    if isinstance(recipe, schema.Blip2TeacherRecipe):
        from teachers.blip2 import Blip2Options, Blip2Teacher

        made = Blip2Teacher
        options = Blip2Options(recipe.score_kind, length, prompt, cosine_weight=recipe.cosine_weight)
    elif isinstance(recipe, schema.ViltTeacherRecipe):
        from teachers.vilt import ViltOptions, ViltTeacher

        made, options = ViltTeacher, ViltOptions(recipe.score_kind, length, prompt)
    else:
        from teachers.bridgetower import BridgeTowerOptions, BridgeTowerTeacher

        made, options = BridgeTowerTeacher, BridgeTowerOptions(recipe.score_kind, length, prompt)
    return made.from_pretrained(
        recipe.checkpoint, options=options, dtype=_dtype(recipe.precision), revision=recipe.revision
    )


def _classifier(recipe: schema.ClassifierTeacherRecipe) -> Any:
    from teachers.classifier import ClassifierOptions, PairClassifierTeacher

    chosen = recipe.model_dump(include=set(ClassifierOptions.__dataclass_fields__))
    return PairClassifierTeacher.from_pretrained(
        recipe.checkpoint,
        classifier=import_target(recipe.target),
        arguments=recipe.options,
        processor=recipe.processor,
        options=ClassifierOptions(**chosen),
        dtype=_dtype(recipe.precision),
        revision=recipe.revision,
    )


def learned_tokenizer(corpus: Corpus, size: int) -> PreTrainedTokenizerBase:
    """A vocabulary learnt from the captions of the training split."""
    from distill.data.vocabulary import learn_tokenizer

    return learn_tokenizer([corpus.texts[row] for row in corpus.split("train").texts.tolist()], size=size)
