"""Losses that match a softmax over each row's candidates, and its correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from distill.losses.conventions import Convention, check_convention, following
from distill.losses.numeric import (
    check_choice,
    check_positive,
    full,
    log_softmax_over,
    mean_over,
    row_mean,
    standardise,
    student_logits,
    teacher_scores,
    varies,
)
from distill.losses.scale import ENOUGH, TeacherStd, check_teacher_std, mean_unit, unit, usable_rows

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

TEMPERATURES = frozenset({"temperature", "teacher_temperature"})
KL_CONVENTIONS = {
    "sentence_transformers": Convention({"t_squared": True}, free=TEMPERATURES),
    "tevatron": Convention({}, free=TEMPERATURES),
    "lightning_ir": Convention({"temperature": 1.0}),
}
CE_CONVENTIONS = {
    "sentence_transformers": Convention({"temperature": 1.0}),
    "flag_embedding": Convention({}, free=frozenset({"temperature"})),
}


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL(softmax(t / teacher_temperature) || softmax(z)) over each row's scored candidates, one direction.

    The two temperatures are separate because the two scores live on different ranges: a matching head's log-odds are
    peaked, a cosine is not. The reference is LoopITR (arXiv 2203.05465) and, for text, CADET and SimLM. A row has a
    term where at least two candidates were scored.

    Attributes:
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it (0.02 to 0.05 is
            usual for a cosine).
        teacher_temperature: divides the teacher's raw scores. Too small a value leaves one candidate with all the mass.
        teacher_std: divides them before that, see ``distill.losses.scale``: with ``row`` the temperature is in standard
            deviations of each row's scores (rows with fewer than four, or all equal, are left out).
        symmetric: half the sum of both directions of KL (Jeffreys divergence over 2).
        zscore: standardise each row of teacher and of student first (Sun et al., CVPR 2024, arXiv 2403.01427), which
            makes the loss blind to any positive affine map of either. Needs a ``temperature`` (theirs: 2 for both),
            since the learned scale means nothing for standardised scores. Rows with fewer than four scores, or whose
            scores are all equal on either side, have no usable deviation and are left out.
        t_squared: multiply by the student's temperature squared (1 / scale^2 with the learned scale), which keeps the
            gradient's size when the temperature changes. Conventions differ between toolkits; off here.
        positive: ``keep`` labelled positives in the list, or ``drop`` them and distil the negatives alone.
        train_scale: let this loss train the learned scale. False: it could match a flat teacher by lowering the scale
            instead of learning from it, and the contrastive loss owns it.
        convention: ``sentence_transformers``: DistillKLDivLoss, times the student's temperature squared; ``tevatron``:
            one temperature for both, not squared; ``lightning_ir``: no temperature at all.
    """

    temperature: float | None = None
    teacher_temperature: float = 1.0
    teacher_std: TeacherStd = 1.0
    symmetric: bool = False
    zscore: bool = False
    t_squared: bool = False
    positive: Literal["keep", "drop"] = "keep"
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "tevatron", "lightning_ir"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("teacher_temperature", self.teacher_temperature)
        check_teacher_std(self.teacher_std)
        check_choice("positive", self.positive, ("keep", "drop"))
        check_convention(self, self.convention, KL_CONVENTIONS)
        if self.convention == "tevatron" and self.teacher_temperature != self.temperature:
            raise ValueError(
                f"convention='tevatron' has one temperature for both: set teacher_temperature to {self.temperature}"
            )
        if self.zscore and self.temperature is None:
            raise ValueError(
                "zscore standardises the student's scores, so its learned scale has no meaning for them: give a number "
                "for temperature (2.0, with teacher_temperature 2.0, is the published setting)"
            )
        if self.zscore and self.teacher_std != 1.0:
            raise ValueError(f"zscore standardises the teacher's scores: leave teacher_std={self.teacher_std!r} out")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        loss = following(self, self.convention, KL_CONVENTIONS)
        scored = scored.asked_only()
        there = loss._there(scored)
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        t = teacher_scores(scored)
        has_term = (there.sum(dim=1) > 1) & usable_rows(t, there, loss.teacher_std)
        if loss.zscore:
            has_term = (there.sum(dim=1) >= ENOUGH) & varies(t, there) & varies(full(scored.student), there)
            z, t = standardise(full(scored.student), there) / (loss.temperature or 1.0), standardise(t, there)
        log_q = log_softmax_over(z, there)
        log_p = log_softmax_over(t / unit(t, there, loss.teacher_std) / loss.teacher_temperature, there)
        weight = (log_p.exp() - log_q.exp()) / 2 if loss.symmetric else log_p.exp()
        values = torch.where(there, weight * (log_p - log_q), torch.zeros_like(z)).sum(dim=1)
        return (values * loss._temperature_squared(scored) if loss.t_squared else values), has_term

    def teacher_unit(self, scored: Scored) -> Tensor:
        """(), what the teacher's scores are divided by before the temperature; a mean over rows with ``row``."""
        loss, scored = following(self, self.convention, KL_CONVENTIONS), scored.asked_only()
        return mean_unit(teacher_scores(scored), loss._there(scored), loss.teacher_std)

    def _there(self, scored: Scored) -> Tensor:
        return scored.valid if self.positive == "keep" else scored.valid & ~scored.positive

    def _temperature_squared(self, scored: Scored) -> Tensor | float:
        if self.temperature is not None:
            return self.temperature**2
        return 1 / full(scored.scale.detach()).square()


@dataclass(frozen=True, kw_only=True)
class SoftmaxCE:
    """Listwise softmax cross-entropy (ListNet's top-one form, Cao et al., ICML 2007), one direction.

    -sum over i of p_i log softmax(z)_i. With ``target="teacher"``, p is softmax(t / teacher_temperature): the value is
    that of ``KL`` plus the teacher's entropy, the gradient is the same; Qwen3-VL-Embedding, RocketQAv2 and "Thinking
    Fast and Slow" train on this form. With ``target="labels"``, p is spread evenly over the scored positives: what a
    student learns from the same lists without a teacher. A row needs two scored candidates, and a positive with labels.

    Attributes:
        target: where p comes from.
        teacher_temperature: divides the teacher's scores; not read with labels.
        teacher_std: divides them before that, as in ``KL``; not read with labels.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False, for the reason given in ``KL``.
        convention: ``sentence_transformers``: ListNetLoss, raw scores on both sides. ``flag_embedding``: its
            ``kl_div``, raw teacher scores; it adds a contrastive loss of the same temperature at weight 1.
    """

    target: Literal["teacher", "labels"] = "teacher"
    teacher_temperature: float = 1.0
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "flag_embedding"] = "own"

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("teacher", "labels"))
        check_positive("temperature", self.temperature)
        check_positive("teacher_temperature", self.teacher_temperature)
        check_teacher_std(self.teacher_std)
        check_convention(self, self.convention, CE_CONVENTIONS)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        loss = following(self, self.convention, CE_CONVENTIONS)
        scored = scored.asked_only()
        there = scored.valid
        log_q = log_softmax_over(student_logits(scored, loss.temperature, train_scale=loss.train_scale), there)
        if loss.target == "labels":
            positive = there & scored.positive
            return row_mean(-log_q, positive), (there.sum(dim=1) > 1) & positive.any(dim=1)
        t = teacher_scores(scored)
        p = log_softmax_over(t / unit(t, there, loss.teacher_std) / loss.teacher_temperature, there).exp()
        values = -torch.where(there, p * log_q, torch.zeros_like(p)).sum(dim=1)
        return values, (there.sum(dim=1) > 1) & usable_rows(t, there, loss.teacher_std)

    def teacher_unit(self, scored: Scored) -> Tensor:
        """(), what the teacher's scores are divided by before the temperature; a mean over rows with ``row``."""
        loss, scored = following(self, self.convention, CE_CONVENTIONS), scored.asked_only()
        return mean_unit(teacher_scores(scored), scored.valid, loss.teacher_std)


@dataclass(frozen=True, kw_only=True)
class Pearson:
    """1 - correlation of student and teacher over each row's scored candidates, one direction.

    Of the raw scores, which makes it blind to any shift and positive scale of either side; or of their softmaxes, as
    TeachCLIP (CVPR 2024) does with one temperature for both. A row needs three scored candidates that are not all equal
    on either side: any two correlate perfectly.

    Attributes:
        of: ``scores`` or ``softmax``.
        temperature: of the student's softmax: None multiplies the cosine by its learned scale; a number divides by it.
            Raw scores do not need it.
        teacher_temperature: of the teacher's softmax; not read with scores.
        train_scale: let this loss train the learned scale. False, for the reason given in ``KL``.
    """

    of: Literal["scores", "softmax"] = "scores"
    temperature: float | None = None
    teacher_temperature: float = 1.0
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_choice("of", self.of, ("scores", "softmax"))
        check_positive("temperature", self.temperature)
        check_positive("teacher_temperature", self.teacher_temperature)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        there = scored.valid
        t = teacher_scores(scored)
        has_term = (there.sum(dim=1) > 2) & varies(t, there) & varies(full(scored.student), there)
        if self.of == "scores":
            z = student_logits(scored, 1.0, train_scale=False)  # a factor would change nothing
        else:
            z = student_logits(scored, self.temperature, train_scale=self.train_scale)
            z, t = log_softmax_over(z, there).exp(), log_softmax_over(t / self.teacher_temperature, there).exp()
        z, t = _centred(z, there), _centred(t, there)
        # the clamp keeps the gradient of the root finite in rows that have no term
        size = (z.square().sum(dim=1) * t.square().sum(dim=1)).clamp(min=1e-30).sqrt()
        return 1 - (z * t).sum(dim=1) / size, has_term


def _centred(values: Tensor, there: Tensor) -> Tensor:
    """Values around their row's mean; 0 where nothing is."""
    values = torch.where(there, values, torch.zeros_like(values))
    mean = values.sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(there, values - mean, torch.zeros_like(values))
