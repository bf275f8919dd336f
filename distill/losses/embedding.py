"""Losses with a dual-encoder teacher: its embeddings, or its in-batch similarities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch.nn.functional import cosine_similarity

from distill.losses.contrastive import Negatives, in_scope
from distill.losses.numeric import check_choice, check_positive, full, log_softmax_over, mean_over, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

Distance = Literal["cosine", "mse", "l2"]
Sides = Literal["both", "images", "texts"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingMatch:
    """The student's embeddings follow those of a CLIP-like teacher's towers, item by item.

    CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732) found it the strongest single loss with a dual-encoder teacher.
    A cross-encoder has no such embedding. Both must have one width: where they differ, project the teacher's once (PCA)
    or use ``Affinity``, which compares similarities and needs no common width.

    Reads ``Scored.extras``: ``student_images`` (N, D) and ``student_texts`` (M, D) with gradient, ``teacher_images``
    (N, D) and ``teacher_texts`` (M, D). The scores are not read; both directions give the same value.

    Attributes:
        distance: ``cosine``: 1 - cosine. ``mse``: mean over the D squared differences, as CLIP-KD, which gives it a
            weight of 2000 for unit vectors; about 2 / D of ``cosine``. ``l2``: Euclidean.
        sides: which towers are matched. ``both`` is the mean of the two.
    """

    reads_teacher: ClassVar[bool] = False  # its scores, that is

    distance: Distance = "cosine"
    sides: Sides = "both"

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, get_args(Distance))
        check_choice("sides", self.sides, get_args(Sides))

    @property
    def needs(self) -> frozenset[str]:
        """Names of the extras that are read."""
        return frozenset(f"{who}_{side}" for who in ("student", "teacher") for side in self._sides)

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("images", "texts") if self.sides == "both" else (self.sides,)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over items, then over sides.

        Raises:
            ValueError: an extra is missing, or the shapes do not agree.
        """
        need(scored.extras, self.needs, "the embedding loss")
        return torch.stack([self._of(side, scored.extras) for side in self._sides]).mean()

    def _of(self, side: str, extras: Mapping[str, Tensor]) -> Tensor:
        student, teacher = extras[f"student_{side}"], extras[f"teacher_{side}"]
        if student.dim() != 2 or student.shape != teacher.shape:
            raise ValueError(
                f"{side}: the student's embeddings are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}, "
                "but both must be (items, width) of one width: project the teacher's once, or use affinity, which "
                "compares similarities"
            )
        student, teacher = full(student), full(teacher.detach())
        if self.distance == "cosine":
            return (1 - cosine_similarity(student, teacher, dim=1)).mean()
        squares = (student - teacher).square()
        if self.distance == "mse":
            return squares.mean()
        return squares.sum(dim=1).clamp(min=1e-24).sqrt().mean()  # the clamp keeps the gradient of the root finite


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """The softmax of the student's in-batch similarities follows that of dual-encoder teachers, one direction.

    -sum over columns of p log softmax(z), p = mean over teachers m of softmax(c_m a_m), a_m the teacher's cosines: the
    average is taken after the softmax (MobileCLIP, CVPR 2024, arXiv 2311.17049). One teacher: affinity mimicking of
    TinyCLIP (ICCV 2023, arXiv 2309.12314), open_clip's ``DistillClipLoss``; less the teacher's entropy, CLIP-KD's CRD
    (``value="kl"``). MobileCLIP mixes it with the contrastive loss, (1 - l) contrastive + l affinity with l 0.75 or 1:
    two parts of a weighted sum. A row needs two columns that every teacher scored.

    Reads ``Scored.extras``: ``teacher_affinity`` (M, B, K), cosines of M teachers for this direction's cells, NaN = not
    known. ``Scored.teacher`` is not read.

    Attributes:
        teacher_scales: c_m, one for each teacher, or one for all. MobileCLIP: 100; MobileCLIP2: 70 and 60, tuned.
        value: ``cross_entropy``, or ``kl``, which is 0 at agreement; the gradient is the same.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it (TinyCLIP: 0.02).
        train_scale: let this loss train the learned scale. False: set it True where no contrastive loss is in the sum
            (MobileCLIP with l = 1), or the scale stays where it starts.
        columns: ``in_batch``: only the batch's own items; ``all``: mined columns too.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_affinity"})
    reads_teacher: ClassVar[bool] = False

    teacher_scales: tuple[float, ...] = (100.0,)
    value: Literal["cross_entropy", "kl"] = "cross_entropy"
    temperature: float | None = None
    train_scale: bool = False
    columns: Negatives = "in_batch"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("value", self.value, ("cross_entropy", "kl"))
        check_choice("columns", self.columns, get_args(Negatives))
        if not self.teacher_scales or not all(math.isfinite(scale) and scale > 0 for scale in self.teacher_scales):
            raise ValueError(f"teacher_scales must be positive numbers, one a teacher, got {self.teacher_scales!r}")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has.

        Raises:
            ValueError: the teachers' cosines are missing or do not fit.
        """
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        teachers = self._teachers(scored)
        if self.columns == "in_batch" and scored.in_batch is not None:
            own = scored.in_batch.any(dim=0).nonzero().flatten()  # a step has several mined columns for each of these
            scored, teachers = _only_columns(scored, own), teachers.index_select(2, own)
        positive, negative = in_scope(scored, self.columns)
        there = (positive | negative) & teachers.isfinite().all(dim=0)
        teachers = torch.where(there, teachers, torch.zeros_like(teachers))
        scales = teachers.new_tensor(self.teacher_scales).reshape(-1, 1, 1)
        logits = (teachers * scales).masked_fill(~there, -torch.inf)
        logits = torch.where(there.any(dim=1, keepdim=True), logits, torch.zeros_like(logits))
        p = logits.softmax(dim=2).mean(dim=0)  # (B, K)
        log_q = log_softmax_over(student_logits(scored, self.temperature, train_scale=self.train_scale), there)
        own = torch.special.entr(p) if self.value == "kl" else torch.zeros_like(p)
        values = torch.where(there, -p * log_q - own, torch.zeros_like(p)).sum(dim=1)
        return values, there.sum(dim=1) > 1

    def _teachers(self, scored: Scored) -> Tensor:
        """(M, B, K), detached."""
        need(scored.extras, self.needs, "affinity")
        teachers = full(scored.extras["teacher_affinity"].detach())
        if teachers.dim() != 3 or teachers.shape[1:] != scored.student.shape:
            raise ValueError(
                f"teacher_affinity must be (teachers, {', '.join(map(str, scored.student.shape))}) as the student's "
                f"similarities, got {tuple(teachers.shape)}"
            )
        if len(self.teacher_scales) not in (1, teachers.shape[0]):
            raise ValueError(
                f"{teachers.shape[0]} teachers, but {len(self.teacher_scales)} teacher_scales: give one each"
            )
        return teachers


def _only_columns(scored: Scored, columns: Tensor) -> Scored:
    """The same rows with these columns (C,)."""
    return replace(
        scored,
        student=scored.student.index_select(1, columns),
        teacher=scored.teacher.index_select(1, columns),
        positive=scored.positive.index_select(1, columns),
        valid=scored.valid.index_select(1, columns),
        in_batch=None if scored.in_batch is None else scored.in_batch.index_select(1, columns),
    )


def need(extras: Mapping[str, Tensor], names: frozenset[str], who: str) -> None:
    """Raise ValueError unless every name is there."""
    missing = sorted(names - set(extras))
    if missing:
        raise ValueError(
            f"{who} needs {', '.join(missing)} in extras, got {sorted(extras) or 'none'}: what feeds the training must "
            "give them, or leave this loss out"
        )
