"""Losses over pairs of candidates that read the teacher's order alone: RankNet and LambdaRank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch.nn.functional import softplus

from distill.losses.conventions import Convention, check_convention, following
from distill.losses.numeric import check_choice, check_positive, mean_over, row_mean, student_logits, teacher_scores

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored

Gain = Literal["reciprocal", "sigmoid", "exponential"]
Over = Literal["rows", "pairs"]

RANKNET = {
    "sentence_transformers": Convention({"temperature": 1.0, "over": "pairs", "binary_log": True}),
    "lightning_ir": Convention({"over": "pairs"}, free=frozenset({"temperature"})),
}
LAMBDARANK = {
    "sentence_transformers": Convention(
        {"temperature": 1.0, "over": "pairs", "binary_log": True, "gain": "exponential"}
    ),
}


def pairs_above(scores: Tensor, there: Tensor) -> Tensor:
    """(B, K, K) bool: cells i and j are there and i is scored above j."""
    return there.unsqueeze(2) & there.unsqueeze(1) & (scores.unsqueeze(2) > scores.unsqueeze(1))


def ranks(scores: Tensor, there: Tensor) -> Tensor:
    """Rank (B, K) of each cell among those that are there, 1 = highest; equals share the mean of their ranks."""
    scores = scores.detach()
    higher = pairs_above(scores, there).sum(dim=1)  # (B, K) how many stand above column j
    equal = (there.unsqueeze(2) & there.unsqueeze(1) & (scores.unsqueeze(2) == scores.unsqueeze(1))).sum(dim=1)
    return torch.where(there, higher + (equal + 1) / 2, torch.ones_like(scores)).to(scores.dtype)


def gains(teacher: Tensor, there: Tensor, gain: Gain) -> Tensor:
    """Relevance (B, K) >= 0 for a discounted cumulative gain, up to one positive factor a row; 0 where nothing is.

    ``reciprocal``: 1 / the teacher's rank, which reads its order alone. ``sigmoid``: 2^p - 1 with p = sigmoid(t), right
    for log-odds. ``exponential``: 2^max(t, 0) - 1, as public toolkits compute it: a score at or below 0 is worth
    nothing and every unit doubles the gain, so that a row's best candidate is soon all that counts.
    """
    if gain == "reciprocal":
        found = 1 / ranks(teacher, there)
    elif gain == "sigmoid":
        found = torch.special.expm1(math.log(2) * teacher.sigmoid())
    else:
        exponent = torch.where(there, teacher.clamp(min=0), torch.zeros_like(teacher))
        top = exponent.amax(dim=1, keepdim=True)  # one factor a row, so that 2^t stays finite
        found = -torch.special.expm1(-math.log(2) * exponent) * torch.exp2(exponent - top)
    return torch.where(there, found, torch.zeros_like(found))


def ideal_sum(found: Tensor) -> Tensor:
    """Discounted sum (B, 1) of gains (B, K) in their best order; 1 where no gain is."""
    places = torch.arange(1, found.shape[1] + 1, device=found.device, dtype=found.dtype)
    best = (found.sort(dim=1, descending=True).values / torch.log2(1 + places)).sum(dim=1, keepdim=True)
    return torch.where(best > 0, best, torch.ones_like(best))


@dataclass(frozen=True, kw_only=True)
class RankNet:
    """RankNet (Burges et al., ICML 2005): mean of softplus(-(z_i - z_j)) over pairs with t_i > t_j, one direction.

    Reads the teacher's order alone, of easy negatives too, whose order hardly means anything. Pairs that the teacher
    does not tell apart teach nothing. A row needs one pair that it does.

    Attributes:
        over: ``rows``: the mean over rows of each row's mean; ``pairs``: one mean over all pairs of the call.
        binary_log: divide by log 2, which public toolkits take from LambdaLoss.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False: it would raise the scale to be surer of what is
            already right, and the contrastive loss owns it.
        convention: ``sentence_transformers``: RankNetLoss on raw scores, log 2, one mean over all pairs.
            ``lightning_ir``: one mean over all pairs; its "temperature" multiplies, so give 1 / theirs.
    """

    over: Over = "rows"
    binary_log: bool = False
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers", "lightning_ir"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("over", self.over, get_args(Over))
        check_convention(self, self.convention, RANKNET)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows (or pairs) that have a term; 0 when none has."""
        if following(self, self.convention, RANKNET).over == "pairs":
            return mean_over(*self._terms(scored))
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        values, pair = self._terms(scored)
        return row_mean(values, pair), pair.flatten(1).any(dim=1)

    def _terms(self, scored: Scored) -> tuple[Tensor, Tensor]:
        loss = following(self, self.convention, RANKNET)
        scored = scored.asked_only()
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        return _logistic(z, binary_log=loss.binary_log), pairs_above(teacher_scores(scored), scored.valid)


@dataclass(frozen=True, kw_only=True)
class LambdaRank:
    """RankNet with each pair weighted by how much NDCG its swap would change (Burges et al., NIPS 2006), one direction.

    Mean over pairs with t_i > t_j of |g_i - g_j| |1 / log2(1 + r_i) - 1 / log2(1 + r_j)| softplus(-(z_i - z_j)), with g
    the teacher's gains over their row's best discounted sum, and r the student's ranks, both without gradient. Pairs
    far down weigh little, so that the order among easy negatives fades. A row needs a pair that the teacher tells
    apart.

    Attributes:
        gain: what a teacher's score is worth, see ``gains``. ``reciprocal`` reads its order alone.
        over: as in ``RankNet``. The weights are small: about 1 / K^2 of the sum is a mean over pairs.
        binary_log: as in ``RankNet``.
        temperature: None multiplies the cosine by the student's learned scale; a number divides by it.
        train_scale: let this loss train the learned scale. False, for the reason given in ``RankNet``.
        convention: ``sentence_transformers``: LambdaLoss with its LambdaRank scheme on raw scores.
    """

    gain: Gain = "reciprocal"
    over: Over = "rows"
    binary_log: bool = False
    temperature: float | None = None
    train_scale: bool = False
    convention: Literal["own", "sentence_transformers"] = "own"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("gain", self.gain, get_args(Gain))
        check_choice("over", self.over, get_args(Over))
        check_convention(self, self.convention, LAMBDARANK)

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over the rows (or pairs) that have a term; 0 when none has."""
        if following(self, self.convention, LAMBDARANK).over == "pairs":
            return mean_over(*self._terms(scored))
        return mean_over(*self.per_row(scored))

    def per_row(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Values (B,) and which rows have a term (B,) bool."""
        values, pair = self._terms(scored)
        return row_mean(values, pair), pair.flatten(1).any(dim=1)

    def _terms(self, scored: Scored) -> tuple[Tensor, Tensor]:
        loss = following(self, self.convention, LAMBDARANK)
        scored = scored.asked_only()
        t = teacher_scores(scored)
        z = student_logits(scored, loss.temperature, train_scale=loss.train_scale)
        gain = gains(t, scored.valid, loss.gain)
        gain = gain / ideal_sum(gain)
        discount = 1 / torch.log2(1 + ranks(z, scored.valid))
        weight = (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
        return weight * _logistic(z, binary_log=loss.binary_log), pairs_above(t, scored.valid)


def _logistic(z: Tensor, *, binary_log: bool) -> Tensor:
    """(B, K, K) softplus(-(z_i - z_j))."""
    values = softplus(z.unsqueeze(1) - z.unsqueeze(2), threshold=50.0)
    return values / math.log(2) if binary_log else values
