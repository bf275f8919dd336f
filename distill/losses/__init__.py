"""What a student learns from: each loss takes a ``Scored`` and gives one number.

The names below load their module on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.losses.attention import Attention
    from distill.losses.checks import TeacherScoreError, check_teacher_scores
    from distill.losses.combine import NonFiniteLossError, Part, Weighted
    from distill.losses.contrastive import Contrastive
    from distill.losses.embedding import Affinity, EmbeddingMatch
    from distill.losses.listwise import ADRMSE, ApproxNDCG, ListMLE, RankDistil
    from distill.losses.logits import KL, Pearson, SoftmaxCE
    from distill.losses.maps import align_tokens, mean_heads, resample_map, token_overlap
    from distill.losses.margin import M3SE, MarginMSE
    from distill.losses.momentum import Momentum, same_item
    from distill.losses.pairwise import LambdaRank, RankNet
    from distill.losses.pointwise import LogitMSE
    from distill.losses.ranking import CPRD, plackett_luce
    from distill.losses.retrieval import Hinge, SigLIP
    from distill.losses.schedule import Schedule

__all__ = [
    "ADRMSE",
    "CPRD",
    "KL",
    "M3SE",
    "Affinity",
    "ApproxNDCG",
    "Attention",
    "Contrastive",
    "EmbeddingMatch",
    "Hinge",
    "LambdaRank",
    "ListMLE",
    "LogitMSE",
    "MarginMSE",
    "Momentum",
    "NonFiniteLossError",
    "Part",
    "Pearson",
    "RankDistil",
    "RankNet",
    "Schedule",
    "SigLIP",
    "SoftmaxCE",
    "TeacherScoreError",
    "Weighted",
    "align_tokens",
    "check_teacher_scores",
    "mean_heads",
    "plackett_luce",
    "resample_map",
    "same_item",
    "token_overlap",
]

_NAMES_OF = {
    "attention": ("Attention",),
    "checks": ("TeacherScoreError", "check_teacher_scores"),
    "combine": ("NonFiniteLossError", "Part", "Weighted"),
    "contrastive": ("Contrastive",),
    "embedding": ("Affinity", "EmbeddingMatch"),
    "listwise": ("ADRMSE", "ApproxNDCG", "ListMLE", "RankDistil"),
    "logits": ("KL", "Pearson", "SoftmaxCE"),
    "maps": ("align_tokens", "mean_heads", "resample_map", "token_overlap"),
    "margin": ("M3SE", "MarginMSE"),
    "momentum": ("Momentum", "same_item"),
    "pairwise": ("LambdaRank", "RankNet"),
    "pointwise": ("LogitMSE",),
    "ranking": ("CPRD", "plackett_luce"),
    "retrieval": ("Hinge", "SigLIP"),
    "schedule": ("Schedule",),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_MODULE_OF))}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
