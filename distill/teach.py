"""Teaching the teacher: contrastive (ITC) and matching (ITM) losses, hard negatives sampled inside the batch.

Li et al., "Align before Fuse", NeurIPS 2021, section 3.2: for each image one negative text, for each text one negative
image, drawn in proportion to the softmax of the contrastive similarity, matches masked. Training from scratch starts
with random negatives: with hard ones from the first step the matching head takes far longer to leave chance.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed

from distill.batches import Batches, StepBatch
from distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from distill.inference import reproducible
from distill.losses.contrastive import Contrastive
from distill.progress import Progress
from distill.protocols import Scored

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)


class TeachingError(RuntimeError):
    """Teaching that cannot go on."""


@dataclass(frozen=True)
class TeachSettings:
    """How a teacher is taught."""

    steps: int
    batch_size: int
    itm_queries: int | None  # pairs a step that go through the matching head; None = all
    lr: float
    pretrained_lr: float | None
    weight_decay: float
    warmup: float
    grad_clip: float
    random_negatives: float  # share of the steps with random instead of hard negatives
    itm_weight: float
    seed: int
    log_every: int = 50
    checkpoint_every: int = 250

    def factor_at(self, step: int) -> float:
        """Share of the learning rate at a step: linear rise, then a cosine to 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


def teach(
    teacher: nn.Module,
    batches: Batches,
    settings: TeachSettings,
    *,
    folder: Path,
    accelerator: Accelerator,
    meaning: str,
) -> None:
    """Train a ``TeachableTeacher`` in place; goes on from the newest checkpoint in ``folder/checkpoints``.

    Args:
        teacher: with contrastive and matching heads.
        batches: labelled pairs of the training split, with inputs made by the teacher.
        settings: schedule and sizes.
        folder: for checkpoints and ``metrics.jsonl``.
        accelerator: one process.
        meaning: fingerprint of all that decides the result.

    Raises:
        TeachingError: the loss is not finite, or the matching head ends where it began (it answers by chance).
    """
    optimizer = _make_optimizer(teacher, settings)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    teacher, prepared = accelerator.prepare(teacher, optimizer)
    model: Any = accelerator.unwrap_model(teacher)
    start = 0
    set_seed(settings.seed)
    found = latest_checkpoint(folder / "checkpoints")
    if found is not None:
        start = load_checkpoint(found, model=model, optimizer=optimizer, meaning=meaning)
        log.info("teaching goes on from step %d", start)
    accuracy, began, since = 0.5, time.perf_counter(), start
    with reproducible(accelerator.device), Progress(settings.steps - start, "teach", unit="steps") as bar:
        for step in range(start, settings.steps):
            batch = batches[step]
            for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * settings.factor_at(step)
            model.train()
            with accelerator.autocast():
                itc, itm, right = _step(model, batch, settings, accelerator.device)
            loss = itc + settings.itm_weight * itm
            if not torch.isfinite(loss):
                raise TeachingError(
                    f"step {step}: contrastive loss {itc.item()}, matching loss {itm.item()}; lower teach.lr"
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), settings.grad_clip)
            prepared.step()
            prepared.zero_grad()
            accuracy += (right - accuracy) * 0.02  # running mean over about the last 50 steps
            bar.advance(1)
            if (step + 1) % settings.log_every == 0:
                rate = (step + 1 - since) / (time.perf_counter() - began)
                _log_line(folder, step + 1, itc=itc.item(), itm=itm.item(), accuracy=accuracy, steps_per_second=rate)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                save_checkpoint(
                    folder / "checkpoints", step=step + 1, model=model, optimizer=optimizer, meaning=meaning
                )
    model.eval()
    if settings.steps - start >= 200 and accuracy < 0.55:
        raise TeachingError(
            f"the matching head answers by chance after {settings.steps} steps (accuracy {accuracy:.2f}; "
            "chance 0.50): raise teach.steps or teach.random_negatives, or change teach.lr"
        )


def _make_optimizer(teacher: nn.Module, settings: TeachSettings) -> torch.optim.AdamW:
    pretrained = {id(p) for p in getattr(teacher, "pretrained_parameters", lambda: ())()}
    groups = []
    for old in (True, False):
        lr = settings.pretrained_lr if old and settings.pretrained_lr is not None else settings.lr
        mine = [p for p in teacher.parameters() if p.requires_grad and (id(p) in pretrained) is old]
        groups.append({"params": [p for p in mine if p.ndim >= 2], "lr": lr, "weight_decay": settings.weight_decay})
        groups.append({"params": [p for p in mine if p.ndim < 2], "lr": lr, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _step(model: Any, batch: StepBatch, settings: TeachSettings, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Contrastive loss, matching loss, and the share of negatives that score below their positive."""
    images = model.encode_images({name: tensor.to(device) for name, tensor in batch.images.items()})
    texts = model.encode_texts({name: tensor.to(device) for name, tensor in batch.texts.items()})
    cosine = images["embedding"].float() @ texts["embedding"].float().T  # (N, M)
    positive = batch.grids["i2t"].positive.to(device)  # every image and text of a teaching step is a query
    itc = (_contrastive(cosine, positive, model.scale) + _contrastive(cosine.T, positive.T, model.scale)) / 2
    hard = batch.step >= settings.random_negatives * settings.steps
    logits = (model.scale * cosine).detach() if hard else torch.zeros_like(cosine)
    image_rows, text_rows = (rows[: settings.itm_queries].to(device) for rows in batch.pairs)
    generator = torch.Generator(device=device).manual_seed(settings.seed * 1_000_003 + batch.step)
    other_texts = _draw(logits[image_rows], positive[image_rows], generator)
    other_images = _draw(logits.T[text_rows], positive.T[text_rows], generator)
    score = model.pair_logits(
        images, texts, torch.cat([image_rows, image_rows, other_images]), torch.cat([text_rows, other_texts, text_rows])
    )
    count = len(image_rows)
    labels = torch.zeros_like(score)
    labels[:count] = 1
    itm = F.binary_cross_entropy_with_logits(score, labels)
    right = (score[:count].repeat(2) > score[count:]).float().mean().item()
    return itc, itm, right


def _contrastive(cosine: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    return Contrastive()(
        Scored(
            student=cosine,
            teacher=torch.full_like(cosine, float("nan")),
            positive=positive,
            valid=torch.ones_like(positive),
            scale=scale,
        )
    )


def _draw(logits: Tensor, positive: Tensor, generator: torch.Generator) -> Tensor:
    """(Q,) one non-matching column a row, in proportion to the softmax."""
    if bool(positive.all(dim=1).any()):
        raise TeachingError("a batch holds an item that matches every other: raise teach.batch_size")
    chances = logits.masked_fill(positive, -math.inf).softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def _log_line(folder: Path, step: int, **values: float) -> None:
    line = {"step": step, **values}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.info("teach step %d: contrastive %.3f, matching %.3f, accuracy %.3f", step, *list(values.values())[:3])
