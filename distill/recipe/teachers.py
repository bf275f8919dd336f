"""Schema of the teachers that are one model, one class a kind, and of how ``distill teach`` trains one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from distill.protocols import ScoreKind
from distill.recipe.basics import Count, Natural, Positive, Share, Strict, Target, TinyTower

Precision = Literal["float32", "bfloat16", "float16"]


_WITHOUT_SAYING = (("precision", "float32"), ("compile", False))


class Precise(Strict):
    """A teacher whose weights are cast once, when they are loaded. Each precision has scores of its own."""

    precision: Precision = "float32"

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was so before there was a choice goes without saying: older runs keep their meaning."""
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if (name, value) not in _WITHOUT_SAYING}


class Packed(Precise):
    """A teacher on the packed cross-attention kernel."""

    compile: bool = Field(default=False, description="dense blocks through torch.compile; slow to begin with")


class BlipTeacherRecipe(Packed):
    """BlipForImageTextRetrieval: a checkpoint, or random weights of a given shape that ``distill teach`` trains."""

    kind: Literal["blip"]
    checkpoint: str | None = None
    vision: TinyTower = TinyTower()
    text: TinyTower = TinyTower()
    image_size: Count = 48
    embed_dim: Count = 64
    vocabulary: Count = 1000
    score_kind: ScoreKind = "log_odds"
    cosine_weight: Positive = Field(default=1.0, description="of the cosine in logit+cosine; BLIP's evaluation has 1")
    enc_token: Literal["original", "cls"] | int = "original"
    max_text_length: Count = 35


class FusionTeacherRecipe(Packed):
    """A BLIP-style cross-encoder put together from a vision backbone and a BERT-family text encoder."""

    kind: Literal["fusion"]
    checkpoint: str | None = None
    vision: str | None = None
    text: str | None = None
    fusion_layers: Count = 2
    freeze_vision: bool = True
    frozen_text_layers: Natural = 0
    embed_dim: Count = 256
    dropout: Share = 0.1
    contrastive_text: Literal["deep", "shallow", "sentence"] = "deep"
    image_input_dropout: Share = 0.0
    text_input_dropout: Share = 0.0
    score_kind: ScoreKind = "log_odds"
    cosine_weight: Positive = Field(default=1.0, description="of the cosine in logit+cosine; BLIP's evaluation has 1")
    max_text_length: Count = 35

    @model_validator(mode="after")
    def _has_source(self) -> FusionTeacherRecipe:
        if self.checkpoint is None and (self.vision is None or self.text is None):
            raise ValueError("give either checkpoint, or both vision and text (hub ids or folders)")
        return self


class _Published(Precise):
    """What all teachers have in common that are loaded from a checkpoint and cannot be taught."""

    checkpoint: str = Field(description="hub id or folder, in safetensors")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub; its main when absent")
    prompt: str = Field(default="", description="put before every text")


class Blip2TeacherRecipe(_Published):
    """Blip2ForImageTextRetrieval: the matching head over the query tokens, or the largest cosine among them."""

    kind: Literal["blip2"]
    score_kind: Literal["log_odds", "logit", "logit+cosine", "cosine"] = "log_odds"
    cosine_weight: Positive = Field(default=1.0, description="of the cosine in logit+cosine")
    max_text_length: Count = 35


class ViltTeacherRecipe(_Published):
    """ViltForImageAndTextRetrieval: one rank logit a pair."""

    kind: Literal["vilt"]
    score_kind: Literal["logit"] = "logit"
    max_text_length: Count = 40


class BridgeTowerTeacherRecipe(_Published):
    """BridgeTowerForImageAndTextRetrieval."""

    kind: Literal["bridgetower"]
    score_kind: Literal["log_odds", "logit"] = "log_odds"
    max_text_length: Count = 50


class ClassifierTeacherRecipe(Target, _Published):
    """Any class that reads a pair and gives one or two logits; see ``teachers.classifier.ClassifierOptions``."""

    kind: Literal["classifier"]
    target: str = Field(description="module:Class, a torch module or a class of transformers")
    options: dict[str, Any] = Field(default={}, description="arguments of a class without from_pretrained")
    checkpoint: str = Field(description="hub id, folder with model.safetensors, or such a file")
    processor: str | None = Field(default=None, description="of images and texts; the checkpoint's own when absent")
    score_kind: Literal["log_odds", "logit"] = "log_odds"
    output: str = Field(default="logits", description="name of the logits where the model gives more than a tensor")
    match: Literal[0, 1] = Field(default=1, description="which of two logits means a match")
    image_inputs: Annotated[tuple[str, ...], Field(min_length=1)] = ("pixel_values",)
    text_inputs: Annotated[tuple[str, ...], Field(min_length=1)] = ("input_ids", "attention_mask")
    max_text_length: Count = 40


class RemoteTeacherRecipe(Strict):
    """A teacher behind one or more URLs, as ``distill serve teacher`` serves it; how it is asked changes no score."""

    kind: Literal["remote"]
    urls: Annotated[tuple[str, ...], Field(min_length=1, description="servers of one teacher, http://HOST:PORT")]
    identity: str | None = Field(
        default=None, description="that the teacher must have (see /info); that of the first answer when absent"
    )
    token_file: Path | None = Field(default=None, description="file with the service's token; or set DISTILL_TOKEN")
    pairs_per_request: Count = 512
    connections: Count = Field(default=4, description="requests at a time, for each server")
    deadline_s: Annotated[float, Field(gt=0, le=600)] = Field(default=120.0, description="for one request")
    patience_s: Positive = Field(default=600.0, description="without any answer, after which the command gives up")

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is no address of a service: give one such as http://127.0.0.1:8000")
            if parts.username or parts.password:
                raise ValueError("an address must not hold a password: give token_file, or set DISTILL_TOKEN")
        return value

    @property
    def checkpoint(self) -> None:
        """It has none here."""


class CustomTeacherRecipe(Target):
    """A class of the user's own that satisfies ``distill.protocols.Teacher``."""

    kind: Literal["custom"]
    checkpoint: str | None = None


# A new kind joins here; ``distill.recipe.ensemble`` adds those that are made of several models.
TeacherRecipe = Annotated[
    BlipTeacherRecipe
    | FusionTeacherRecipe
    | Blip2TeacherRecipe
    | ViltTeacherRecipe
    | BridgeTowerTeacherRecipe
    | ClassifierTeacherRecipe
    | RemoteTeacherRecipe
    | CustomTeacherRecipe,
    Field(discriminator="kind"),
]


class TeachRecipe(Strict):
    """How ``distill teach`` trains the teacher: contrastive (ITC) and matching (ITM) losses."""

    steps: Count = 1500
    batch_size: Annotated[int, Field(ge=2)] = 96
    itm_queries: Count | None = Field(default=None, description="pairs a step for the matching head; all when absent")
    lr: Positive = 1.5e-3
    pretrained_lr: Positive | None = Field(
        default=None, description="for layers that start from a checkpoint; lr when absent"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Share = 0.1
    grad_clip: Positive = 1.0
    random_negatives: Share = Field(
        default=1 / 6, description="share of the steps with random instead of hard negatives"
    )
    itm_weight: Positive = Field(default=1.0, description="of the loss of pairs; the contrastive one has 1")
    hinge_margin: Positive | None = Field(
        default=None,
        description="a teacher without matching head learns by this hinge on hard negatives instead of by InfoNCE",
    )
