"""Schema of the losses a recipe may name. Options and defaults are those of the classes in ``distill.losses``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distill.recipe.schema import Count, Positive, Share, Strict, Target

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(Strict):
    weight: Weight = 1.0

    @property
    def reads_scores(self) -> bool:
        """Whether the loss reads the teacher's scores."""
        return True

    def given(self) -> dict[str, Any]:
        """Options to be passed to the loss."""
        return self.model_dump(exclude={"name", "weight"})


class Contrastive(_Part):
    """InfoNCE with every true match a positive."""

    name: Literal["contrastive"]
    temperature: Positive | None = None
    train_scale: bool = True
    positives: Literal["softmax_all", "shared"] = "softmax_all"
    negatives: Literal["in_batch", "all"] = "in_batch"

    @property
    def reads_scores(self) -> bool:
        """It needs no teacher."""
        return False


class Cprd(_Part):
    """Contrastive partial ranking distillation (CVPR 2024)."""

    name: Literal["cprd"]
    accept: Literal["log_odds", "margin", "top", "fraction"] = "log_odds"
    threshold: float | None = None
    margin: float | None = None
    top: Count | None = None
    fraction: Share | None = None
    positive: Literal["out", "first"] = "out"
    normalise: Literal["mean", "sum"] = "mean"
    temperature: Positive | None = None
    train_scale: bool = False


class MarginMse(_Part):
    """Margin-MSE (arXiv 2010.02666)."""

    name: Literal["margin_mse"]
    negatives: Literal["all", "hardest"] = "all"
    teacher_std: Positive | Literal["batch"] = 1.0
    temperature: Positive | None = None
    train_scale: bool = False


class M3se(_Part):
    """Multi-margin MSE (ICML 2022)."""

    name: Literal["m3se"]
    same_index: bool = True
    teacher_std: Positive | Literal["batch"] = 1.0
    temperature: Positive | None = None
    train_scale: bool = False


class Kl(_Part):
    """KL divergence on candidate lists."""

    name: Literal["kl"]
    temperature: Positive | None = None
    teacher_temperature: Positive = 1.0
    symmetric: bool = False
    zscore: bool = False
    t_squared: bool = False
    positive: Literal["keep", "drop"] = "keep"
    train_scale: bool = False


class Attention(_Part):
    """Attention distillation (EMNLP 2022), text→image map."""

    name: Literal["attention"]

    @property
    def reads_scores(self) -> bool:
        """It reads the teacher's maps of labelled pairs, and no scores."""
        return False


class CustomLoss(_Part, Target):
    """A function of the user's own, ``Scored`` to a scalar, by import path; a class is made with ``options`` first."""

    name: Literal["custom"]
    label: str = "custom"
    teacher: bool = Field(default=True, description="whether it reads the teacher's scores")

    @property
    def reads_scores(self) -> bool:
        """As the recipe says."""
        return self.teacher


LossPart = Annotated[Contrastive | Cprd | MarginMse | M3se | Kl | Attention | CustomLoss, Field(discriminator="name")]
