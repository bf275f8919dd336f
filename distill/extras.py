"""What losses read beside scores, made for each step: attention maps, embeddings, the teacher's own cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.companion import AFFINE, KEYS
from distill.protocols import SIDES

if TYPE_CHECKING:
    from distill.batches import StepBatch
    from distill.losses.combine import Weighted
    from distill.protocols import Direction, Embeddings

ATTENTION = frozenset({"student_attention", "teacher_attention", "attention_tokens"})
OWN_VECTORS = frozenset({"student_images", "student_texts"})
FOLLOWED = frozenset({"teacher_images", "teacher_texts"})
AFFINITY = frozenset({"teacher_affinity"})
TOWERS = FOLLOWED | AFFINITY  # made of the vectors of the teacher's contrastive towers
EXTRAS = ATTENTION | OWN_VECTORS | TOWERS | KEYS | AFFINE  # all that the training can make


class ExtrasError(RuntimeError):
    """What a loss needs cannot be made of what the step has."""


def extras_of_step(
    out: Embeddings, batch: StepBatch, needs: frozenset[str], device: torch.device, *, followed: int = 0
) -> dict[str, Tensor]:
    """What both directions share, and nothing that is not needed.

    Args:
        out: the student's, with maps where attention is needed.
        batch: with the teacher's maps, or the vectors of its towers.
        needs: names of extras that the losses read.
        device: where they go.
        followed: which of the batch's towers the student's embeddings follow.
    """
    assert out.images is not None
    assert out.texts is not None
    made = _attention(out, batch, device) if needs & ATTENTION else {}
    if needs & OWN_VECTORS:
        made |= {"student_images": out.images, "student_texts": out.texts}
    if needs & FOLLOWED:
        for side, vectors in zip(SIDES, _vectors(batch)[followed], strict=True):
            made[f"teacher_{side}s"] = vectors[torch.from_numpy(batch.encoded_rows(side))].to(device)
    return made


def extras_of_direction(
    batch: StepBatch, direction: Direction, losses: Weighted, device: torch.device
) -> dict[str, Tensor]:
    """What belongs to one direction's grid: ``teacher_affinity`` (M, B, K), the cosines of M dual-encoders.

    NaN, not known, in columns that no loss reads: mined ones, unless a loss takes every column.
    """
    if not losses.needs & AFFINITY:
        return {}
    grid = batch.grids[direction]
    rows = grid.rows.to(device)
    readers = [part.loss for part in losses.parts if part.needs & AFFINITY]
    columns = None
    if all(getattr(loss, "columns", "all") == "in_batch" for loss in readers):
        columns = grid.in_batch.any(dim=0).nonzero().flatten().to(device)  # (C,)
    found = []
    for images, texts in _vectors(batch):
        queries, items = (images, texts) if direction == "i2t" else (texts, images)
        queries, items = queries.to(device)[rows], items.to(device)
        if columns is None:
            found.append(queries @ items.T)
            continue
        cosines = queries.new_full((len(rows), len(items)), torch.nan)
        cosines[:, columns] = queries @ items[columns].T
        found.append(cosines)
    return {"teacher_affinity": torch.stack(found)}


def _vectors(batch: StepBatch) -> tuple[tuple[Tensor, Tensor], ...]:
    if not batch.vectors:
        raise ExtrasError(
            "a loss reads the vectors of the teacher's own towers, but the batches hold none: give Batches towers"
        )
    return batch.vectors


def _attention(out: Embeddings, batch: StepBatch, device: torch.device) -> dict[str, Tensor]:
    """Both maps of the batch's labelled pairs, cut to the tokens that both sides have."""
    if batch.maps is None or out.attention is None:
        raise ExtrasError("the attention loss needs the teacher's maps and the student's; one of them is missing")
    teacher, tokens = batch.maps  # (P, L, G), (P, L)
    own = batch.texts["attention_mask"][batch.pairs[1]].bool()  # (P, L')
    width = min(teacher.shape[1], own.shape[1])
    return {
        "student_attention": out.attention[:, :width],
        "teacher_attention": teacher[:, :width].to(device),
        "attention_tokens": (tokens[:, :width] & own[:, :width]).to(device),
    }
