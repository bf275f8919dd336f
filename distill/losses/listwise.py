"""Losses over the whole order of a list: likelihood of the teacher's order, and smooth ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from distill.losses.conventions import Convention, check_convention, following
from distill.losses.numeric import (
    check_choice,
    check_positive,
    mean_over,
    row_mean,
    student_logits,
    teacher_order,
    teacher_scores,
    varies,
)
from distill.losses.pairwise import Gain, gains, ideal_sum, ranks
from distill.losses.ranking import plackett_luce

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

Normalise = Literal["mean", "sum"]
Discount = Literal["log2", "reciprocal", "none"]

LISTMLE = {"sentence_transformers": Convention({"temperature": 1.0, "normalise": "sum"})}
APPROX_NDCG = {"lightning_ir": Convention({"gain": "exponential"}, free=frozenset({"temperature"}))}
ADR_MSE = {
    "sentence_transformers": Convention({"over": "cells"}, free=frozenset({"temperature"})),
    "lightning_ir": Convention({"over": "cells"}, free=frozenset({"temperature", "discount"})),
}


@dataclass(frozen=True, kw_only=True)
class ListMLE:
    """ListMLE (Xia et al., ICML 2008): -log of the Plackett-Luce probability of the teacher's order, one direction.

    With pi the teacher's order: sum over j of log(sum over k >= j of e^z_pi(k)) - z_pi(j). Every position counts, so
    the order among easy negatives is learned too; ``CPRD`` cuts the list before it. A row needs two scored candidates.

    Attributes:
        normalise: ``mean`` over the positions of a row, so that a long list counts no more than a short one, or the
            paper's ``sum``.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False: it would raise the scale to be surer of the order,
            and the contrastive loss owns it.
        convention: ``sentence_transformers``: ListMLELoss on raw scores with its ``respect_input_order=False``.
    """

    normalise: Normalise = "mean"
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("normalise", self.normalise, get_args(Normalise))
        check_convention(self, self.convention, LISTMLE)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        loss = following(self, self.convention, LISTMLE)
        scored = scored.asked_only()
        there = scored.valid
        order = teacher_order(teacher_scores(scored), there, there)
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        total, count = plackett_luce(z, order, there, there)
        return (total / count.clamp(min=1) if loss.normalise == "mean" else total), count > 1


@dataclass(frozen=True, kw_only=True)
class RankDistil:
    """Coupled RankDistil (Reddi et al., AISTATS 2021, as in TensorFlow Ranking), one direction.

    The expectation, over orders pi drawn from the Plackett-Luce distribution of t / teacher_temperature, of -log of the
    probability of pi's first ``top`` places under the student. What comes below them is only pushed down. An order is
    drawn by sorting t / teacher_temperature plus Gumbel noise, from torch's random state. Labels are not read, and
    scores may have any sign. A row needs two scored candidates.

    The paper's RankDistil-B and -V are other surrogates, whose formulas are not public in code; this is neither.

    Attributes:
        samples: orders drawn for each row.
        top: places of an order that count; None is the whole list.
        teacher_temperature: divides the teacher's scores. Towards 0 every sample is the teacher's own order, and with
            ``top=None`` the loss is ListMLE.
        normalise: ``mean`` over the places that count, or the paper's ``sum``.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False, for the reason given in ``ListMLE``.
    """

    samples: int = 8
    top: int | None = None
    teacher_temperature: float = 1.0
    normalise: Normalise = "mean"
    temperature: float | None = None
    train_scale: bool = False

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("teacher_temperature", self.teacher_temperature)
        check_choice("normalise", self.normalise, get_args(Normalise))
        for name, value in (("samples", self.samples), ("top", self.top)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,), the mean over the samples, and which rows have a term (B,) bool."""
        scored = scored.asked_only()
        there = scored.valid
        t = teacher_scores(scored) / self.teacher_temperature
        z = student_logits(scored, self.temperature, train_scale=self.train_scale)
        values = torch.zeros_like(z[:, 0])
        for _ in range(self.samples):
            order = teacher_order(t + _gumbel(t), there, there)
            place = order.argsort(dim=1)  # (B, K) 0 = first of the sampled order
            total, count = plackett_luce(z, order, place < (self.top or z.shape[1]), there)
            values = values + (total / count.clamp(min=1) if self.normalise == "mean" else total)
        return values / self.samples, there.sum(dim=1) > 1


def _gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise."""
    exponential = torch.empty_like(like).exponential_()
    return -exponential.clamp(min=torch.finfo(like.dtype).tiny).log()


@dataclass(frozen=True, kw_only=True)
class ApproxNDCG:
    """1 - NDCG with smooth ranks (Qin et al., Information Retrieval 2010), one direction.

    r_i = 1 + sum over j != i of sigmoid(z_j - z_i) stands for the student's rank; the loss is 1 - (sum over i of
    g_i / log2(1 + r_i)) / (the same sum in the order of the gains). Flat where the student is far off: a swap that is
    almost certain has no gradient left, so start from a student that ranks already, or with a larger temperature. A row
    needs two scored candidates and gains that are not all equal.

    Attributes:
        gain: what a teacher's score is worth, see ``gains`` in ``pairwise``. ``reciprocal`` reads its order alone.
        temperature: of the smooth ranks: None multiplies the cosine by the student's learned scale; a number divides.
        train_scale: let this loss train the learned scale. False, for the reason given in ``ListMLE``.
        convention: ``lightning_ir``: ApproxNDCG with scaled gains on raw scores (its temperature is 1 by default). A
            row without any gain counts as 1 there and has no term here.
    """

    gain: Gain = "reciprocal"
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "lightning_ir"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("gain", self.gain, get_args(Gain))
        check_convention(self, self.convention, APPROX_NDCG)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows that have a term; 0 when none has."""
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        loss = following(self, self.convention, APPROX_NDCG)
        scored = scored.asked_only()
        there = scored.valid
        t = teacher_scores(scored)
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        gain = gains(t, there, loss.gain)
        found = (gain / torch.log2(1 + smooth_ranks(z, there))).sum(dim=1)
        return 1 - found / ideal_sum(gain).squeeze(1), varies(gain, there)


@dataclass(frozen=True, kw_only=True)
class ADRMSE:
    """Squared error of smooth ranks (Schlatt et al., Rank-DistiLLM, ECIR 2025, arXiv 2405.07920), one direction.

    Mean over a row's scored candidates of w(q_i) (r_i - q_i)^2, with r_i the student's smooth rank (see
    ``ApproxNDCG``) and q_i the teacher's rank, where equals share the mean of theirs. Reads the teacher's order alone.
    A row needs two scored candidates.

    Attributes:
        discount: w: ``log2``: 1 / log2(1 + q); ``reciprocal``: 1 / q; ``none``: 1.
        over: ``rows``: the mean over rows of each row's mean; ``cells``: one mean over all candidates of the call.
        temperature: of the smooth ranks: None multiplies the cosine by the student's learned scale; a number divides.
        train_scale: let this loss train the learned scale. False, for the reason given in ``ListMLE``.
        convention: ``sentence_transformers``: ADRMSELoss on raw scores, its alpha is 1 / temperature;
            ``lightning_ir``: ApproxRankMSE, whose discount is ``none`` by default. Both take one mean over all cells.
    """

    discount: Discount = "log2"
    over: Literal["rows", "cells"] = "rows"
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("discount", self.discount, get_args(Discount))
        check_choice("over", self.over, ("rows", "cells"))
        check_convention(self, self.convention, ADR_MSE)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows (or cells) that have a term; 0 when none has."""
        if following(self, self.convention, ADR_MSE).over == "cells":
            return mean_over(*self._terms(scored))
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        values, there = self._terms(scored)
        return row_mean(values, there), there.any(dim=1)

    def _terms(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Weighted squared errors (B, K) and which cells count."""
        loss = following(self, self.convention, ADR_MSE)
        scored = scored.asked_only()
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        wanted = ranks(teacher_scores(scored), scored.valid)
        error = (smooth_ranks(z, scored.valid) - wanted).square()
        divisor = {"log2": torch.log2(1 + wanted), "reciprocal": wanted, "none": torch.ones_like(wanted)}[loss.discount]
        return error / divisor, scored.valid & (scored.valid.sum(dim=1, keepdim=True) > 1)


def smooth_ranks(z: Tensor, there: Tensor) -> Tensor:
    """1 + sum over the others j of sigmoid(z_j - z_i) (B, K); 1 where nothing is."""
    above = torch.sigmoid(z.unsqueeze(1) - z.unsqueeze(2))  # (B, K, K) [b, i, j]: j above i
    both = there.unsqueeze(2) & there.unsqueeze(1)
    both = both & ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    return 1 + torch.where(both, above, torch.zeros_like(above)).sum(dim=2)
