"""Attention distillation: the student's text-to-image attention follows the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from distill.losses.maps import align_tokens, mean_heads, resample_map
from distill.losses.numeric import full, mean_over

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Scored


@dataclass(frozen=True)
class Attention:
    """KL(teacher || student) over the image grid, for each text token of each pair, mean over the tokens that count.

    DiDE (Wang et al., EMNLP 2022, arXiv 2112.08723), adapted to teachers with cross-attention: they have only the
    text-to-image map, so only that one is matched, on true pairs. With as many heads on both sides head is matched with
    head and the mean taken over them; otherwise each side's heads are averaged first.

    Reads ``Scored.extras``: ``student_attention`` (P, L, G) or (P, H, L, G) log-probabilities with gradient,
    ``teacher_attention`` likewise, ``attention_tokens`` (P, L) bool, True = a real token whose row counts. Where the
    models differ, also: ``student_grid`` and ``teacher_grid`` (2,), rows and columns of each image grid: the teacher's
    map is resampled; ``token_weights`` (P, L, L') of ``maps.token_overlap``: the teacher's rows are mixed into one for
    each of the student's tokens, and tokens without one do not count. The scores themselves are not read.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"student_attention", "teacher_attention", "attention_tokens"})
    reads_teacher: ClassVar[bool] = False  # its scores, that is

    def __call__(self, scored: Scored) -> Tensor:
        """-> (), mean over real tokens; 0 when there is none.

        Raises:
            ValueError: an extra is missing, or the shapes do not agree and nothing says how they should.
        """
        student, teacher, tokens = _maps(scored)
        # A probability of 0 is a log of -inf: it weighs nothing, and must not reach a product as 0 * inf. NaN stays.
        real = tokens.reshape(len(tokens), *(1,) * (student.dim() - 3), -1)  # (P, L) or (P, 1, L)
        counts = real.unsqueeze(-1) & (teacher != -torch.inf)
        log_p = torch.where(counts, teacher, torch.zeros_like(teacher))
        log_q = torch.where(counts, student, torch.zeros_like(student))
        values = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        return mean_over(values, real.expand_as(values))


def _maps(scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's map of one shape, in full precision, and the tokens that count."""
    missing = sorted(Attention.needs - set(scored.extras))
    if missing:
        raise ValueError(
            f"attention needs {', '.join(missing)} in extras, got {sorted(scored.extras) or 'none'}: both the "
            "teacher and the student must give attention maps, or leave this loss out"
        )
    student, teacher = full(scored.extras["student_attention"]), full(scored.extras["teacher_attention"].detach())
    tokens = scored.extras["attention_tokens"]
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, tokens {tuple(tokens.shape)}"
    if student.dim() not in (3, 4) or teacher.dim() not in (3, 4):
        raise ValueError(f"attention maps must be (pairs, tokens, grid cells), or with heads second, got {shapes}")
    if tokens.dim() != 2 or tokens.shape != (len(student), student.shape[-2]) or tokens.dtype != torch.bool:
        raise ValueError(f"attention_tokens must be bool (pairs, tokens), got {tokens.dtype}; {shapes}")
    if student.shape[:-2] != teacher.shape[:-2] and len(student) == len(teacher):  # unequal heads
        student, teacher = (mean_heads(each) if each.dim() == 4 else each for each in (student, teacher))
    teacher = _on_one_grid(student, teacher, scored, shapes)
    if "token_weights" in scored.extras:
        teacher, there = align_tokens(teacher, scored.extras["token_weights"])
        tokens = tokens & there
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention maps must cover the same pairs and the same tokens: use one tokenizer for both models, or give "
            f"token_weights in extras, from both tokenizers' offsets; got {shapes}"
        )
    return student, teacher, tokens


def _on_one_grid(student: Tensor, teacher: Tensor, scored: Scored, shapes: str) -> Tensor:
    """The teacher's map on the student's grid."""
    if {"student_grid", "teacher_grid"} <= set(scored.extras):
        own, theirs = (_grid(scored.extras[name]) for name in ("student_grid", "teacher_grid"))
        if own[0] * own[1] != student.shape[-1]:
            raise ValueError(f"student_grid is {own[0]} x {own[1]}, but its maps have other cells: {shapes}")
        return resample_map(teacher, theirs, own)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"attention maps lie on different grids, {student.shape[-1]} cells in the student and {teacher.shape[-1]} "
            "in the teacher: give student_grid and teacher_grid in extras, choose image and patch sizes that give one "
            f"grid, or leave this loss out; got {shapes}"
        )
    return teacher


def _grid(sides: Tensor) -> tuple[int, int]:
    if sides.shape != (2,):
        raise ValueError(f"an image grid is (rows, columns), got a tensor of shape {tuple(sides.shape)}")
    rows, columns = (int(side) for side in sides.tolist())
    return rows, columns
