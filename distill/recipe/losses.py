"""Schema of the losses a recipe may name. Options and defaults are those of the classes in ``distill.losses``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.recipe.basics import Count, Natural, Positive, Share, Target
from distill.recipe.loss_base import Gain, LossBase, TeacherStd


class Contrastive(LossBase):
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


class Cprd(LossBase):
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


class MarginMse(LossBase):
    """Margin-MSE (arXiv 2010.02666)."""

    later: ClassVar[frozenset[str]] = LossBase.later | {"pairs", "over"}

    name: Literal["margin_mse"]
    negatives: Literal["all", "hardest"] = "all"
    pairs: Literal["labelled", "all"] = "labelled"
    over: Literal["rows", "pairs"] = "rows"
    teacher_std: TeacherStd = 1.0
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"


class M3se(LossBase):
    """Multi-margin MSE (ICML 2022)."""

    name: Literal["m3se"]
    same_index: bool = True
    teacher_std: TeacherStd = 1.0
    temperature: Positive | None = None
    train_scale: bool = False


class Kl(LossBase):
    """KL divergence on candidate lists."""

    later: ClassVar[frozenset[str]] = LossBase.later | {"teacher_std"}

    name: Literal["kl"]
    temperature: Positive | None = None
    teacher_temperature: Positive = 1.0
    teacher_std: TeacherStd = 1.0
    symmetric: bool = False
    zscore: bool = False
    t_squared: bool = False
    positive: Literal["keep", "drop"] = "keep"
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "tevatron", "lightning_ir"] = "own"


class SoftmaxCe(LossBase):
    """Listwise softmax cross-entropy (ListNet, ICML 2007), against the teacher's softmax or the labels."""

    name: Literal["softmax_ce"]
    target: Literal["teacher", "labels"] = "teacher"
    teacher_temperature: Positive = 1.0
    teacher_std: TeacherStd = 1.0
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "flag_embedding"] = "own"


class Pearson(LossBase):
    """1 - correlation of scores, or of their softmaxes (CVPR 2024)."""

    name: Literal["pearson"]
    of: Literal["scores", "softmax"] = "scores"
    temperature: Positive | None = None
    teacher_temperature: Positive = 1.0
    train_scale: bool = False


class LogitMse(LossBase):
    """Squared error of logits: a baseline that is expected to lose."""

    later: ClassVar[frozenset[str]] = LossBase.later | {"affine"}

    name: Literal["logit_mse"]
    affine: Literal["none", "learned"] = "none"
    teacher_std: TeacherStd = 1.0
    temperature: Positive | None = None
    train_scale: bool = False


class ListMle(LossBase):
    """ListMLE (ICML 2008)."""

    name: Literal["listmle"]
    normalise: Literal["mean", "sum"] = "mean"
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers"] = "own"


class RankDistil(LossBase):
    """Coupled RankDistil with sampled orders (AISTATS 2021)."""

    name: Literal["rankdistil"]
    samples: Count = 8
    top: Count | None = None
    teacher_temperature: Positive = 1.0
    normalise: Literal["mean", "sum"] = "mean"
    temperature: Positive | None = None
    train_scale: bool = False


class RankNet(LossBase):
    """RankNet (ICML 2005)."""

    name: Literal["ranknet"]
    over: Literal["rows", "pairs"] = "rows"
    binary_log: bool = False
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"


class LambdaRank(LossBase):
    """RankNet weighted by the change of NDCG (NIPS 2006)."""

    name: Literal["lambdarank"]
    gain: Gain = "reciprocal"
    over: Literal["rows", "pairs"] = "rows"
    binary_log: bool = False
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers"] = "own"


class ApproxNdcg(LossBase):
    """1 - NDCG with smooth ranks."""

    name: Literal["approx_ndcg"]
    gain: Gain = "reciprocal"
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "lightning_ir"] = "own"


class AdrMse(LossBase):
    """Squared error of smooth ranks (ECIR 2025)."""

    name: Literal["adr_mse"]
    discount: Literal["log2", "reciprocal", "none"] = "log2"
    over: Literal["rows", "cells"] = "rows"
    temperature: Positive | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"


class _NoScores(LossBase):
    @property
    def reads_scores(self) -> bool:
        """It reads no teacher scores."""
        return False


class Siglip(_NoScores):
    """Sigmoid loss (ICCV 2023), no teacher."""

    name: Literal["siglip"]
    bias: float = -10.0
    temperature: Positive | None = None
    train_scale: bool = True
    negatives: Literal["in_batch", "all"] = "in_batch"


class Hinge(_NoScores):
    """Triplet hinge: the hardest negative (VSE++), or the sum over all; no teacher."""

    name: Literal["hinge"]
    margin: Positive = 0.2
    hardest: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    negatives: Literal["in_batch", "all"] = "in_batch"


class Momentum(_NoScores):
    """Momentum distillation over batch and queue (ALBEF, NeurIPS 2021), no teacher."""

    of_training: ClassVar[frozenset[str]] = frozenset({"decay", "queue"})

    name: Literal["momentum"]
    alpha: Share = 0.4
    decay: Share = Field(default=0.995, description="share of the slow copy's weights that a step keeps")
    queue: Natural = Field(default=4096, description="older items of each side to compare with; 0 = the batch alone")
    temperature: Positive | None = None
    train_scale: bool = True


class EmbeddingMatch(_NoScores):
    """Embeddings of a dual-encoder teacher's towers (CLIP-KD, CVPR 2024)."""

    of_training: ClassVar[frozenset[str]] = frozenset({"member"})
    reads_vectors: ClassVar[bool] = True

    name: Literal["embedding_match"]
    member: Natural | None = Field(
        default=None, description="of an ensemble: which of teacher.members, from 0; none needed where one has vectors"
    )
    distance: Literal["cosine", "mse", "l2"] = "cosine"
    sides: Literal["both", "images", "texts"] = "both"


class Affinity(_NoScores):
    """In-batch similarities of dual-encoder teachers, averaged after their softmax (TinyCLIP, MobileCLIP)."""

    reads_vectors: ClassVar[bool] = True

    name: Literal["affinity"]
    teacher_scales: tuple[Positive, ...] = (100.0,)
    value: Literal["cross_entropy", "kl"] = "cross_entropy"
    temperature: Positive | None = None
    train_scale: bool = False
    columns: Literal["in_batch", "all"] = "in_batch"


class Attention(LossBase):
    """Attention distillation (EMNLP 2022), text→image map."""

    name: Literal["attention"]

    @property
    def reads_scores(self) -> bool:
        """It reads the teacher's maps of labelled pairs, and no scores."""
        return False


class CustomLoss(LossBase, Target):
    """A function of the user's own, ``Scored`` to a scalar, by import path; a class is made with ``options`` first."""

    name: Literal["custom"]
    label: str = "custom"
    teacher: bool = Field(default=True, description="whether it reads the teacher's scores")

    @property
    def reads_scores(self) -> bool:
        """As the recipe says."""
        return self.teacher


LossPart = Annotated[
    Contrastive
    | Cprd
    | MarginMse
    | M3se
    | Kl
    | SoftmaxCe
    | Pearson
    | LogitMse
    | ListMle
    | RankDistil
    | RankNet
    | LambdaRank
    | ApproxNdcg
    | AdrMse
    | Siglip
    | Hinge
    | Momentum
    | EmbeddingMatch
    | Affinity
    | Attention
    | CustomLoss,
    Field(discriminator="name"),
]
"""One part of an arm's loss; the name decides which."""
