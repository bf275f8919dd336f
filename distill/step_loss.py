"""The loss of one training step: its items encoded, both directions scored, at every width that is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.encoding import Encoded, encode, with_remembered
from distill.extras import extras_of_direction, extras_of_step
from distill.inference import to_device
from distill.losses.combine import NonFiniteLossError
from distill.matryoshka import cut_embeddings, narrowed, without_width
from distill.profiling import traced
from distill.protocols import SIDES, Direction, Embeddings, Scored

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from distill.batches import StepBatch
    from distill.companion import Companion
    from distill.losses.combine import Weighted
    from distill.train import Phase, TrainSettings


class TrainingError(RuntimeError):
    """Training that cannot go on, with the ids that caused it."""


@dataclass(frozen=True)
class StepLoss:
    """What a step gives: the total to be differentiated, and what is logged."""

    encoded: Encoded
    total: Tensor  # (), weighted, the mean of both directions
    parts: dict[str, Tensor]  # (), unweighted, the mean of all widths
    widths: dict[str, Tensor]  # (), the total at each width; empty where there is one
    values: dict[str, Tensor]  # (), what the log shows beside them


def step_loss(
    model: nn.Module,
    batch: StepBatch,
    phase: Phase,
    accelerator: Accelerator,
    companion: Companion,
    *,
    settings: TrainSettings,
    measured: bool,
) -> StepLoss:
    """The loss of a step; with ``measured``, its values tell what losses divide the teacher's scores by.

    Raises:
        TrainingError: a loss, embedding or teacher score is not finite; names step and ids.
    """
    device, losses = accelerator.device, phase.losses
    attention_pairs = None
    if "student_attention" in losses.needs:
        attention_pairs = (batch.pairs[0].to(device), batch.pairs[1].to(device))
    with traced("to device"):
        images, texts = to_device(batch.images, device), to_device(batch.texts, device)
    with traced("encode"):
        encoded = encode(
            model,
            images,
            texts,
            accelerator=accelerator,
            counts=(len(batch.encoded("image")), len(batch.encoded("text"))),
            micro_batch=settings.micro_batch,
            attention_pairs=attention_pairs,
        )
    out = encoded.embeddings
    if out.images is None or out.texts is None:
        raise TrainingError("the student gave no embeddings for one side")
    _check_embeddings(out, batch)
    extras = extras_of_step(out, batch, losses.needs, device, followed=phase.followed)
    out = with_remembered(out, batch)
    assert out.images is not None
    beside = companion.extras(out, batch, phase.batches.matches, accelerator)
    cut = {width: cut_embeddings(out, width) for width in settings.matryoshka}
    found: dict[int, dict[str, Tensor]] = {}  # parts by width
    values = {"scale": out.scale.detach()}
    for direction in batch.grids:
        scored = scored_of(similarity(out, batch, direction), batch, direction, out.scale)
        scored = replace(
            scored, extras=extras | beside[direction] | extras_of_direction(batch, direction, losses, device)
        )
        whole = _parts(losses, scored, batch, direction)
        known = {name: whole[name] for name in without_width(losses)}
        for width, view in cut.items():
            here = narrowed(scored, similarity(view, batch, direction), width)
            _add_half(found.setdefault(width, {}), _parts(losses, here, batch, direction, width=width, known=known))
        _add_half(found.setdefault(out.images.shape[1], {}), whole)
        units = losses.teacher_units(scored) if measured else {}
        _add_half(values, {f"teacher_std/{name}": unit for name, unit in units.items()})
    parts, progress = _mean(found.values()), settings.progress_at(batch.step)
    widths = {f"width_{width}": losses.total(those, progress).detach() for width, those in found.items()} if cut else {}
    # a gradient of 0 where no loss reads the scale: processes that average gradients wait for that of every weight
    return StepLoss(encoded, losses.total(parts, progress) + 0 * out.scale, parts, widths, values)


def _parts(
    losses: Weighted,
    scored: Scored,
    batch: StepBatch,
    direction: Direction,
    *,
    width: int | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Parts of one direction's loss at one width; those that are ``known`` are taken as they are."""
    try:
        return losses.parts_of(scored, known)
    except NonFiniteLossError as error:
        rows = batch.grids[direction].rows.numpy()
        queries = (batch.image_ids if direction == "i2t" else batch.text_ids)[rows]
        where = direction if width is None else f"{direction} at width {width}"
        raise TrainingError(f"step {batch.step}, {where}: {error}; query ids {some(queries)}") from error


def _add_half(sums: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Each direction counts half."""
    for name, value in found.items():
        sums[name] = sums[name] + value / 2 if name in sums else value / 2


def _mean(found: Collection[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *others = found
    return {name: sum((one[name] for one in others), value) / len(found) for name, value in first.items()}


def similarity(out: Embeddings, batch: StepBatch, direction: Direction) -> Tensor:
    """Cosines (Q, C) of a direction's queries with all items of the step; mined items ask nothing themselves."""
    assert out.images is not None
    assert out.texts is not None
    asking, items = (out.images, out.texts) if direction == "i2t" else (out.texts, out.images)
    rows = batch.grids[direction].rows.to(asking.device)
    return asking.float()[rows] @ items.float().T


def scored_of(student: Tensor, batch: StepBatch, direction: Direction, scale: Tensor) -> Scored:
    """``student``: cosines (Q, C) of the direction's grid."""
    grid, device = batch.grids[direction], student.device
    teacher = grid.teacher.to(device)
    infinite = torch.isinf(teacher).any(dim=1)
    if infinite.any():
        queries = (batch.image_ids if direction == "i2t" else batch.text_ids)[grid.rows[infinite.cpu()].numpy()]
        raise TrainingError(
            f"step {batch.step}, {direction}: the teacher's scores hold infinities, query ids {some(queries)}; delete "
            "the store of that teacher and score again"
        )
    return Scored(
        student=student,
        teacher=teacher,
        positive=grid.positive.to(device),
        valid=torch.ones_like(student, dtype=torch.bool) if grid.valid is None else grid.valid.to(device),
        scale=scale,
        in_batch=grid.in_batch.to(device),
    )


def _check_embeddings(out: Embeddings, batch: StepBatch) -> None:
    for side, vectors in zip(SIDES, (out.images, out.texts), strict=True):
        assert vectors is not None
        ids = batch.encoded(side)
        bad = ~torch.isfinite(vectors.detach()).all(dim=1)
        if bad.any():
            raise TrainingError(
                f"step {batch.step}: {int(bad.sum())} {side} embeddings are not finite, "
                f"ids {some(ids[bad.cpu().numpy()])};"
                " lower train.lr, or look at those items with `distill data`"
            )


def some(ids: np.ndarray[Any, Any], most: int = 8) -> str:
    """The first of these ids, for a message."""
    return ", ".join(str(int(item)) for item in ids[:most]) + (", ..." if len(ids) > most else "")
