"""Losses that match margins: the distance of a positive above a negative, in the student and in the teacher.

A shift of either score is free, scale is not. The cosine of unit vectors gives margins of at most 2, a matching head's
log-odds routinely 5 to 15, so as cosines the two cannot meet and the loss saturates. By default the student's margins
are multiplied by its learned scale (about 14 to 100), which brings them to the size of log-odds. The other way is to
bring both near 1: ``teacher_std`` divides the teacher's margins by a standard deviation, and a ``temperature`` of about
0.1 to 0.2 the student's. Log the student's scale either way: the gradient grows with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from distill.losses.conventions import Convention, check_convention, following
from distill.losses.numeric import check_choice, check_positive, mean_over, row_mean, student_logits, teacher_scores
from distill.losses.pairwise import pairs_above
from distill.losses.scale import TeacherStd, check_teacher_std, mean_unit, spread_of, unit, usable_rows

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

CONVENTIONS = {
    "sentence_transformers": Convention({"temperature": 1.0}),
    "lightning_ir": Convention({"temperature": 1.0, "pairs": "all", "over": "pairs"}),
}


def hardest_negative(scores: Tensor, negative: Tensor) -> Tensor:
    """Column (B, 1) of each row's best-scored negative, the first of equals; any column where there is none."""
    return scores.masked_fill(~negative, -torch.inf).argmax(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class MarginMSE:
    """Margin-MSE (Hofstätter et al., arXiv 2010.02666), one direction.

    Mean of ((z+ - z-) - (t+ - t-) / teacher_std)^2 over every labelled positive and negative of a row that the teacher
    scored, then over the rows that have such a pair, so that a long list counts no more than a short one. The paper's
    raw dot products are unbounded; see the module's note on unit vectors.

    Attributes:
        negatives: ``all``, or ``hardest``: only the one the teacher scores best.
        pairs: ``labelled``: a positive with a negative. ``all``: any two candidates that the teacher tells apart, the
            one it prefers first, whatever their labels (CL-DRD's form, up to its tied pairs, which are counted there).
        over: ``rows``: the mean over rows of each row's mean; ``pairs``: one mean over all pairs of the call, in which
            long lists count more.
        teacher_std: divides the teacher's margins: a number (best: their standard deviation over the training set),
            ``batch``: their standard deviation (n - 1) over this call's pairs, or ``row``: the standard deviation of
            each row's scores; rows with fewer than four of them, or all equal, are left out.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False: a squared error would set the scale to fit the
            teacher's arbitrary magnitude, and the contrastive loss owns it.
        convention: ``sentence_transformers``: MarginMSELoss, raw scores; ``lightning_ir``: SupervisedMarginMSE, raw
            scores, every two candidates, one mean over all pairs.
    """

    negatives: Literal["all", "hardest"] = "all"
    pairs: Literal["labelled", "all"] = "labelled"
    over: Literal["rows", "pairs"] = "rows"
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"

    def __post_init__(self) -> None:
        check_choice("negatives", self.negatives, ("all", "hardest"))
        check_choice("pairs", self.pairs, ("labelled", "all"))
        check_choice("over", self.over, ("rows", "pairs"))
        check_positive("temperature", self.temperature)
        check_teacher_std(self.teacher_std)
        check_convention(self, self.convention, CONVENTIONS)
        if self.pairs == "all" and self.negatives == "hardest":
            raise ValueError("negatives='hardest' picks among labelled pairs; with pairs='all' leave negatives out")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows (or pairs) that have a term; 0 when none has."""
        if following(self, self.convention, CONVENTIONS).over == "pairs":
            return mean_over(*self._terms(scored))
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        values, pair = self._terms(scored)
        return row_mean(values, pair), pair.flatten(1).any(dim=1)

    def _terms(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Squared gaps (B, K, K) and which pairs count."""
        loss = following(self, self.convention, CONVENTIONS)
        scored = scored.asked_only()
        t = teacher_scores(scored)
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        pair = loss._pairs(scored, t) & usable_rows(t, scored.valid, loss.teacher_std)[:, None, None]
        margin = t.unsqueeze(2) - t.unsqueeze(1)
        if loss.teacher_std == "row":
            margin = margin / unit(t, scored.valid, "row").unsqueeze(2)  # (B, 1, 1)
        else:
            margin = margin / (spread_of(margin, pair) if loss.teacher_std == "batch" else loss.teacher_std)
        return ((z.unsqueeze(2) - z.unsqueeze(1)) - margin).square(), pair

    def teacher_unit(self, scored: Scored) -> Tensor:
        """(), what the teacher's margins are divided by; a mean over rows with ``row``."""
        loss, scored = following(self, self.convention, CONVENTIONS), scored.asked_only()
        t = teacher_scores(scored)
        if loss.teacher_std == "batch":
            return spread_of(t.unsqueeze(2) - t.unsqueeze(1), loss._pairs(scored, t))
        return mean_unit(t, scored.valid, loss.teacher_std)

    def _pairs(self, scored: Scored, t: Tensor) -> Tensor:
        """(B, K, K) bool: i plays the positive, j the negative."""
        if self.pairs == "all":
            return pairs_above(t, scored.valid)
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        if self.negatives == "hardest":
            hardest = hardest_negative(t, negative)
            negative = torch.zeros_like(negative).scatter(1, hardest, True) & negative
        return positive.unsqueeze(2) & negative.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class M3SE:
    """Multi-margin MSE (Menon et al., ICML 2022, eq. 4), one direction.

    With j* the negative that the teacher scores best: the sum over positives i of ((t_i - t_j*) - (z_i - z_j*))^2, plus
    the sum over negatives j of relu(z_j - z_j*)^2. Only the hardest negative's margin is matched; every other negative
    merely has to score no higher, so the order among easy negatives teaches nothing. A row needs a positive and a
    negative that the teacher scored. The module's note on unit vectors holds here too.

    Attributes:
        same_index: True is eq. 4. False is another reading of "margin to the hardest negative": z_i - max_j z_j against
            t_i - max_j t_j, where the two maxima may be different items; no second term, which would then be zero.
        teacher_std: divides the teacher's margins, as in ``MarginMSE``; ``batch``: the standard deviation (n - 1) of
            this call's margins.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False, for the reason given in ``MarginMSE``.
    """

    same_index: bool = True
    teacher_std: TeacherStd = 1.0
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_teacher_std(self.teacher_std)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        has_term, hardest, dt = self._margins(scored)
        own = hardest if self.same_index else hardest_negative(z.detach(), negative)
        dz = z - z.gather(1, own)
        if self.teacher_std == "batch":
            dt = dt / spread_of(dt, positive & has_term.unsqueeze(1))
        else:
            dt = dt / unit(teacher_scores(scored), scored.valid, self.teacher_std)
        zero = torch.zeros_like(dz)
        values = torch.where(positive, (dt - dz).square(), zero).sum(dim=1)
        above = torch.where(negative, dz.relu().square(), zero).sum(dim=1)  # 0 where the student's own maximum is taken
        return values + above, has_term

    def teacher_unit(self, scored: Scored) -> Tensor:
        """(), what the teacher's margins are divided by; a mean over rows with ``row``."""
        scored = scored.asked_only()
        if self.teacher_std == "batch":
            has_term, _, dt = self._margins(scored)
            return spread_of(dt, scored.valid & scored.positive & has_term.unsqueeze(1))
        return mean_unit(teacher_scores(scored), scored.valid, self.teacher_std)

    def _margins(self, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that have a term (B,), the negative the teacher scores best (B, 1), its margins to each (B, K)."""
        t = teacher_scores(scored)
        positive, negative = scored.valid & scored.positive, scored.valid & ~scored.positive
        has_term = positive.any(dim=1) & negative.any(dim=1) & usable_rows(t, scored.valid, self.teacher_std)
        hardest = hardest_negative(t, negative)
        return has_term, hardest, t - t.gather(1, hardest)
