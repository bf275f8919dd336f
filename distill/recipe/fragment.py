"""Schema of the fragment teacher. Options and defaults are those of ``teachers.fragment_options``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe.basics import Count, Positive, Share, Strict
from distill.recipe.teachers import Precise


class ScanDirection(Strict):
    """One direction of stacked cross attention; see ``teachers.fragment_pipeline.DirectionDesign``."""

    clip: Literal["leaky", "relu"] = "leaky"
    attention_scale: Positive = Field(default=9.0, description="lambda 1: multiplies affinities before their softmax")
    pooling: Literal["avg", "lse"] = "avg"
    pooling_scale: Positive = Field(default=6.0, description="lambda 2 of lse: how near it comes to the maximum")


class ScanRecipe(Strict):
    """Stacked cross attention (SCAN, ECCV 2018) in both directions, with the published settings."""

    i2t: ScanDirection = ScanDirection(attention_scale=4.0, pooling_scale=5.0)
    t2i: ScanDirection = ScanDirection()
    i2t_share: Share = Field(default=0.5, description="weight of image->text; the rest is text->image's")


class FragmentTeacherRecipe(Precise):
    """Grid cells against words over a vision backbone and a BERT-family text encoder; taught by contrast."""

    kind: Literal["fragment"]
    checkpoint: str | None = None
    vision: str | None = None
    text: str | None = None
    fragment_dim: Count = 256
    embed_dim: Count = 256
    freeze_vision: bool = True
    freeze_text: bool = True
    special_words: bool = Field(default=False, description="whether the tokenizer's marks count as words")
    dropout: Share = 0.1
    image_input_dropout: Share = 0.0
    text_input_dropout: Share = 0.0
    scan: ScanRecipe = ScanRecipe()
    score_kind: Literal["logit", "logit+cosine", "cosine"] = "logit"
    cosine_weight: Positive = Field(default=1.0, description="of the contrastive head's cosine in logit+cosine")
    max_text_length: Annotated[int, Field(ge=3)] = 35

    @model_validator(mode="after")
    def _has_source(self) -> FragmentTeacherRecipe:
        if self.checkpoint is None and (self.vision is None or self.text is None):
            raise ValueError("give either checkpoint, or both vision and text (hub ids or folders)")
        return self
