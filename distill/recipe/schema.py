"""What a recipe may say. Unknown keys are errors, every default is here, and nothing here imports a model library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distill.protocols import ScoreKind

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Every part of a recipe: extra keys forbidden, values fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Target(Strict):
    """A class or function of the user's own, by import path, with its options."""

    target: str = Field(description="module:Name, importable where the command runs")
    options: dict[str, Any] = {}

    @field_validator("target")
    @classmethod
    def _importable(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"{value!r} is not of the form module:Name")
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{value!r}: {error}; is its folder on PYTHONPATH?") from None
        if found is None:
            raise ValueError(f"{value!r}: no module named {module!r}; is its folder on PYTHONPATH?")
        return value


# --- data -------------------------------------------------------------------------------------------------------------


class BadItems(Strict):
    """What to do with items that cannot be used, and with copies."""

    on_bad_item: Literal["fail", "skip"] = "fail"
    max_skip_rate: Share = 0.01
    max_pixels: Count = 50_000_000
    copies_match: bool = Field(
        default=True,
        description="byte-equal pictures and equal captions share their matches; false = labelled pairs alone",
    )


class ScenesData(Strict):
    """Made pictures of coloured shapes with captions that bind attributes and relations; needs no download."""

    source: Literal["scenes"]
    train: Count = 6000
    val: Count = 500
    test: Count = 500
    captions_per_image: Count = 2
    size: Annotated[int, Field(ge=24)] = 48
    seed: Natural = 0


class KarpathyData(BadItems):
    """A file in the layout of Karpathy's splits beside a folder of images."""

    source: Literal["karpathy"]
    annotations: Path
    images: Path
    restval_is_train: bool = True


class ManifestData(BadItems):
    """A JSONL or CSV file of image path, caption, optional split and image id."""

    source: Literal["manifest"]
    file: Path
    images: Path | None = Field(default=None, description="the manifest's own folder when absent")
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str = "split"
    id_column: str = "image_id"


class HubData(BadItems):
    """A ``datasets`` hub id or ``save_to_disk`` folder with an image column and one of captions (text or lists)."""

    source: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    images: Path | None = Field(default=None, description="folder of the images where the data set holds only paths")
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str = "split"
    id_column: str = "image_id"


Data = Annotated[ScenesData | KarpathyData | ManifestData | HubData, Field(discriminator="source")]


# --- models -----------------------------------------------------------------------------------------------------------


class TinyTower(Strict):
    """Shape of a tower that starts from random weights."""

    layers: Count = 3
    width: Count = 96
    heads: Count = 4
    mlp_width: Count | None = Field(default=None, description="4 x width when absent")
    patch_size: Count = 16
    dropout: Share = 0.0


class BlipTeacherRecipe(Strict):
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


class FusionTeacherRecipe(Strict):
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


class CustomTeacherRecipe(Target):
    """A class of the user's own that satisfies ``distill.protocols.Teacher``."""

    kind: Literal["custom"]
    checkpoint: str | None = None


TeacherRecipe = Annotated[BlipTeacherRecipe | FusionTeacherRecipe | CustomTeacherRecipe, Field(discriminator="kind")]


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
    itm_weight: Positive = 1.0


class StudentOptions(Strict):
    """What can be chosen about any dual-encoder; see ``students.options.DualOptions``."""

    freeze: tuple[Literal["image", "text"], ...] = ()
    image_pooling: Literal["pooler", "mean"] = "pooler"
    text_pooling: Literal["pooler", "mean", "cls"] = "pooler"
    image_head: Literal["linear", "mlp"] = "linear"
    text_head: Literal["linear", "mlp"] = "linear"
    head_width: Count = 512
    dropout: Share = 0.0
    image_input_dropout: Share = 0.0
    text_input_dropout: Share = 0.0
    train_pooler: bool = False
    max_text_length: Annotated[int, Field(ge=3)] | None = None
    init_scale: Positive | None = None


class CheckpointStudent(StudentOptions):
    """CLIP, SigLIP or VisionTextDualEncoder from a hub id or folder."""

    kind: Literal["checkpoint"]
    checkpoint: str


class TowersStudent(StudentOptions):
    """VisionTextDualEncoderModel over any two towers."""

    kind: Literal["towers"]
    vision: str
    text: str
    projection_dim: Count = 256


class ConfigStudent(StudentOptions):
    """A small CLIP or SigLIP with random weights; its vocabulary is learnt from the captions."""

    kind: Literal["config"]
    family: Literal["clip", "siglip"] = "clip"
    vision: TinyTower = TinyTower()
    text: TinyTower = TinyTower()
    image_size: Count = 48
    projection_dim: Count = 64
    vocabulary: Count = 1000


class CustomStudent(Target):
    """A class of the user's own that satisfies ``distill.protocols.Student``."""

    kind: Literal["custom"]


StudentRecipe = Annotated[
    CheckpointStudent | TowersStudent | ConfigStudent | CustomStudent, Field(discriminator="kind")
]
