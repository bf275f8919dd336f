"""The baseline that is expected to lose: each score on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distill.losses.embedding import need
from distill.losses.numeric import (
    check_choice,
    check_positive,
    full,
    mean_over,
    row_mean,
    student_logits,
    teacher_scores,
)
from distill.losses.scale import TeacherStd, check_teacher_std, mean_unit, standardised, usable_rows

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored


@dataclass(frozen=True, kw_only=True)
class LogitMSE:
    """Mean of (z - t / teacher_std)^2 over each row's scored candidates, one direction. A bad baseline, kept as one.

    It was worse than no distillation at all on MS MARCO (MRR .289 against .310; Menon et al., ICML 2022): two
    architectures live on different ranges, and a squared error spends the student on the teacher's arbitrary shift and
    scale. ``MarginMSE`` is free of the shift, ``KL`` of most of both. With ``teacher_std`` ``row`` or ``batch`` the
    scores' mean is taken away too, a z-score, which helps with the shift only as far as the student's scores centre.

    ``affine="learned"`` is ALADIN's (arXiv 2207.14757): mean of (a s + b - t / teacher_std)^2 with s the cosine, and a
    and b learned beside the student: they absorb the teacher's scale and shift. They go with the student's scores, not
    with the teacher's: a factor on what is aimed at could shrink both to nothing.

    Reads ``Scored.extras`` where they are learned: ``affine`` (2,), a and b with gradient.

    Attributes:
        affine: ``none``, or ``learned``, which takes the place of ``temperature`` and of the student's learned scale.
        teacher_std: a number divides the teacher's scores; ``batch`` makes them a z-score over this call, ``row`` over
            each row (rows with fewer than four, or all equal, are left out).
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False: it would set the scale to fit the teacher's, and the
            contrastive loss owns it.
    """

    affine: Literal["none", "learned"] = "none"
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_teacher_std(self.teacher_std)
        check_choice("affine", self.affine, ("none", "learned"))
        if self.affine == "learned" and (self.temperature is not None or self.train_scale):
            raise ValueError("affine='learned' learns the scale itself: leave temperature and train_scale out")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the extras that are read."""
        return frozenset({"affine"}) if self.affine == "learned" else frozenset()

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool: one scored candidate is enough."""
        scored = scored.asked_only()
        t = teacher_scores(scored)
        z = self._logits(scored)
        wanted = standardised(t, scored.valid, self.teacher_std)
        has_term = scored.valid.any(dim=1) & usable_rows(t, scored.valid, self.teacher_std)
        return row_mean((z - wanted).square(), scored.valid), has_term

    def teacher_unit(self, scored: Scored) -> Tensor:
        """(), what the teacher's scores are divided by; a mean over rows with ``row``."""
        scored = scored.asked_only()
        return mean_unit(teacher_scores(scored), scored.valid, self.teacher_std)

    def _logits(self, scored: Scored) -> Tensor:
        if self.affine == "none":
            return student_logits(scored, self.temperature, train_scale=self.train_scale)
        need(scored.extras, self.needs, "logit_mse with affine='learned'")
        a, b = full(scored.extras["affine"])
        z: Tensor = a * student_logits(scored, 1.0, train_scale=False) + b
        return z
