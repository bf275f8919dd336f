"""Schema of an ensemble: its members are any other teachers, taught before it, or trained students."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.protocols import ScoreKind
from distill.recipe.basics import Natural, Strict
from distill.recipe.fragment import FragmentTeacherRecipe
from distill.recipe.teachers import TeacherRecipe


class StudentMember(Strict):
    """A trained dual-encoder as a member: its cosine is its score."""

    kind: Literal["student"]
    checkpoint: str = Field(description="a student's folder, such as runs/flickr8k/arms/plain/student")


class CalibrationRecipe(Strict):
    """The pairs that make members' scores comparable: labelled ones, and as many that do not match."""

    split: str = "train"
    pairs: Annotated[int, Field(ge=2)] = 2000
    seed: Natural = 0


OneTeacher = Annotated[TeacherRecipe | FragmentTeacherRecipe, Field(discriminator="kind")]
Member = Annotated[OneTeacher | StudentMember, Field(discriminator="kind")]


class EnsembleTeacherRecipe(Strict):
    """The mean of several teachers' scores, each made comparable by a fixed set of pairs."""

    kind: Literal["ensemble"]
    members: Annotated[tuple[Member, ...], Field(min_length=1)]
    method: Literal["zscore", "rank"] = "zscore"
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = Field(
        default=None, description="one a member; all alike when absent"
    )
    calibration: CalibrationRecipe = CalibrationRecipe()

    @model_validator(mode="after")
    def _members_are_taught(self) -> EnsembleTeacherRecipe:
        for place, member in enumerate(self.members):
            if member.kind not in ("custom", "remote") and member.checkpoint is None:
                raise ValueError(
                    f"members.{place} ({member.kind}) has no checkpoint: teach it first by a recipe of its own "
                    "(distill teach RECIPE) and give the folder that it writes"
                )
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights are given for {len(self.members)} members")
        return self

    @property
    def score_kind(self) -> ScoreKind:
        """A raw number whose zero means nothing: losses must not read it as log-odds."""
        return "logit"


AnyTeacher = Annotated[OneTeacher | EnsembleTeacherRecipe, Field(discriminator="kind")]
