"""Attention distillation: the student's text-to-image attention follows the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distill.losses.numeric import full, mean_over

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored


@dataclass(frozen=True)
class Attention:
    """KL(teacher || student) over the image grid, for each text token of each pair, mean over the tokens that count.

    DiDE (Wang et al., EMNLP 2022, arXiv 2112.08723), adapted to teachers with cross-attention: they have only the
    text-to-image map, so only that one is matched, on true pairs, with the mean over heads taken before.

    Reads ``Scored.extras``: ``student_attention`` (P, L, G) log-probabilities with gradient, ``teacher_attention``
    (P, L, G) log-probabilities, ``attention_tokens`` (P, L) bool, True = a real token whose row counts. The scores
    themselves are not read.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"student_attention", "teacher_attention", "attention_tokens"})

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over real tokens; 0 when there is none.

        Raises:
            ValueError: an extra is missing, or the shapes do not agree.
        """
        student, teacher, tokens = _maps(scored)
        student, teacher = full(student), full(teacher.detach())
        # A probability of 0 is a log of -inf: it weighs nothing, and must not reach a product as 0 * inf. NaN stays.
        counts = tokens.unsqueeze(2) & (teacher != -torch.inf)  # (P, L, G)
        log_p = torch.where(counts, teacher, torch.zeros_like(teacher))
        log_q = torch.where(counts, student, torch.zeros_like(student))
        return mean_over((log_p.exp() * (log_p - log_q)).sum(dim=2), tokens)


def _maps(scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
    missing = sorted(Attention.needs - set(scored.extras))
    if missing:
        raise ValueError(
            f"attention needs {', '.join(missing)} in extras, got {sorted(scored.extras) or 'none'}: both the "
            "teacher and the student must give attention maps, or leave this loss out"
        )
    student, teacher = scored.extras["student_attention"], scored.extras["teacher_attention"]
    tokens = scored.extras["attention_tokens"]
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, tokens {tuple(tokens.shape)}"
    if student.dim() != 3 or teacher.dim() != 3:
        raise ValueError(f"attention maps must be (pairs, tokens, grid cells), got {shapes}")
    if student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"attention maps lie on different grids, {student.shape[2]} cells in the student and {teacher.shape[2]} in "
            f"the teacher: choose image and patch sizes that give one grid, or leave this loss out; got {shapes}"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention maps must cover the same pairs and the same tokens: both models need one "
            f"tokenizer; got {shapes}"
        )
    if tokens.shape != student.shape[:2] or tokens.dtype != torch.bool:
        raise ValueError(f"attention_tokens must be bool (pairs, tokens), got {tokens.dtype}; {shapes}")
    return student, teacher, tokens
