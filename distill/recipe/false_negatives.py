"""What a recipe says of candidates that the teacher puts above the labelled match: how they are told, what is done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe.basics import Share, Strict

Treatment = Literal["keep", "mask", "down_weight", "promote"]


class FalseNegativesRecipe(Strict):
    """Candidates above the labelled match, by class; applies to arms whose losses read the teacher's scores.

    ``keep`` leaves the pair a negative; ``mask`` takes it out of every loss; ``down_weight`` takes it out of a share
    1 - keep_share of the steps; ``promote`` makes it a positive. It goes for the pair wherever a step holds it.
    """

    margin: Annotated[float, Field(allow_inf_nan=False)] = Field(
        default=0.0, description="in units of the raw score: suspect is what the teacher puts more than this above"
    )
    hash_distance: Annotated[int, Field(ge=0, le=32)] | None = Field(
        default=8, description="pictures are near-duplicates when so many of their 64 hash bits differ, or fewer"
    )
    embedding_cosine: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="or when the teacher's contrastive head puts their cosine at this or above"
    )
    same_image: Treatment = Field(
        default="keep", description="equal picture and caption are a labelled pair: another row of the same content"
    )
    near_duplicate: Treatment = Field(
        default="keep", description="the picture is a near-duplicate of one that the caption is labelled with"
    )
    disagreement: Treatment = Field(default="keep", description="all others: the teacher alone says so")
    keep_share: Share = Field(default=0.5, description="what a down-weighted negative still counts, on average")

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return any(treatment != "keep" for treatment in self.treatments)

    @property
    def treatments(self) -> tuple[Treatment, Treatment, Treatment]:
        """In the order of ``distill.false_negatives.KINDS``."""
        return self.same_image, self.near_duplicate, self.disagreement

    @model_validator(mode="after")
    def _near_can_be_told(self) -> FalseNegativesRecipe:
        if self.near_duplicate != "keep" and self.hash_distance is None and self.embedding_cosine is None:
            raise ValueError(
                f"near_duplicate is {self.near_duplicate}, but nothing says what is near: give hash_distance or "
                "embedding_cosine"
            )
        return self
