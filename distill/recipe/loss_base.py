"""What the schema of every loss shares: its weight, how the weight changes, and what is written of its options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.recipe.basics import Grown, Positive, Share, Strict

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TeacherStd = Positive | Literal["row", "batch"]
Gain = Literal["reciprocal", "sigmoid", "exponential"]


class ScheduleRecipe(Strict):
    """Factor of a part's weight over the training: from ``first`` to ``last`` between two shares of its steps."""

    shape: Literal["constant", "linear", "cosine"] = "linear"
    first: Weight = 0.0
    last: Weight = 1.0
    begin: Share = Field(default=0.0, description="share of all steps (shared ones too) at which it starts")
    end: Share = Field(default=1.0, description="share of all steps at which it has changed")

    @model_validator(mode="after")
    def _in_order(self) -> ScheduleRecipe:
        if self.begin > self.end:
            raise ValueError(f"begin ({self.begin}) must not come after end ({self.end})")
        return self


class LossBase(Grown):
    """One part of an arm's loss.

    Attributes:
        of_training: options that the training reads, and the loss does not know.
        reads_vectors: whether the loss reads the vectors of the teacher's own contrastive towers.
    """

    later: ClassVar[frozenset[str]] = frozenset({"schedule", "convention"})
    of_training: ClassVar[frozenset[str]] = frozenset()
    reads_vectors: ClassVar[bool] = False

    weight: Weight = 1.0
    schedule: ScheduleRecipe | None = Field(default=None, description="how the weight changes over the training")

    @property
    def reads_scores(self) -> bool:
        """Whether the loss reads the teacher's scores."""
        return True

    def given(self) -> dict[str, Any]:
        """Options to be passed to the loss."""
        return self.model_dump(exclude={"name", "weight", "schedule", *self.of_training})
