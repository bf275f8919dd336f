"""What a recipe may say. Unknown keys are errors, every default is here, and nothing here imports a model library.

Its parts: ``basics``, ``teachers``, ``losses``; data and students are below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.recipe.basics import Count, Grown, Name, Natural, Positive, Share, Strict, Target, TinyTower
from distill.recipe.teachers import (
    Blip2TeacherRecipe,
    BlipTeacherRecipe,
    BridgeTowerTeacherRecipe,
    ClassifierTeacherRecipe,
    CustomTeacherRecipe,
    FusionTeacherRecipe,
    RemoteTeacherRecipe,
    TeacherRecipe,
    TeachRecipe,
    ViltTeacherRecipe,
)

__all__ = [
    "BadItems",
    "Blip2TeacherRecipe",
    "BlipTeacherRecipe",
    "BridgeTowerTeacherRecipe",
    "CheckpointStudent",
    "ClassifierTeacherRecipe",
    "ConfigStudent",
    "Count",
    "CustomStudent",
    "CustomTeacherRecipe",
    "Data",
    "FusionTeacherRecipe",
    "HubData",
    "KarpathyData",
    "ManifestData",
    "Name",
    "Natural",
    "Positive",
    "RemoteTeacherRecipe",
    "ScenesData",
    "Share",
    "Strict",
    "StudentOptions",
    "StudentRecipe",
    "Target",
    "TeachRecipe",
    "TeacherRecipe",
    "TinyTower",
    "TowersStudent",
    "ViltTeacherRecipe",
]

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


class ScenesData(Grown):
    """Made pictures of coloured shapes with captions that bind attributes and relations; needs no download."""

    later: ClassVar[frozenset[str]] = frozenset({"matches", "vague"})

    source: Literal["scenes"]
    train: Count = 6000
    val: Count = 500
    test: Count = 500
    captions_per_image: Count = 2
    size: Annotated[int, Field(ge=24)] = 48
    seed: Natural = 0
    matches: Literal["all", "labelled"] = Field(
        default="all",
        description="every true pair is a match; or, as in found data, only a caption's own picture: other true pairs "
        "are then false negatives, in mining, training and evaluation alike",
    )
    vague: Share = Field(
        default=0.0, description="share of captions that leave out an attribute, so that they hold for more pictures"
    )


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


# --- students ---------------------------------------------------------------------------------------------------------


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
