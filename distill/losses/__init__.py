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
    from distill.losses.logits import KL
    from distill.losses.margin import M3SE, MarginMSE
    from distill.losses.ranking import CPRD, plackett_luce

__all__ = [
    "CPRD",
    "KL",
    "M3SE",
    "Attention",
    "Contrastive",
    "MarginMSE",
    "NonFiniteLossError",
    "Part",
    "TeacherScoreError",
    "Weighted",
    "check_teacher_scores",
    "plackett_luce",
]

_MODULE_OF = {
    "Attention": "attention",
    "TeacherScoreError": "checks",
    "check_teacher_scores": "checks",
    "NonFiniteLossError": "combine",
    "Part": "combine",
    "Weighted": "combine",
    "Contrastive": "contrastive",
    "KL": "logits",
    "M3SE": "margin",
    "MarginMSE": "margin",
    "CPRD": "ranking",
    "plackett_luce": "ranking",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_MODULE_OF))}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
