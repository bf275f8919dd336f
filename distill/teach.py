"""Teaching the teacher: a contrastive (ITC) loss on its vectors, and a pair loss on what it reads of pairs.

With a matching head (``TeachableTeacher``): Li et al., "Align before Fuse", NeurIPS 2021, section 3.2: for each image
one negative text, for each text one negative image, drawn in proportion to the softmax of the contrastive similarity,
matches masked. Training from scratch starts with random negatives: with hard ones from the first step the matching head
takes far longer to leave chance.

Without one (``ContrastiveTeachable``): InfoNCE over the similarities of all images and texts of the batch, every match
a positive; or, with ``hinge_margin``, the hinge of Faghri et al., "VSE++", BMVC 2018: at first the mean over negatives,
then the hardest.
"""

from __future__ import annotations

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

from distill import stopping
from distill.batches import Batches, StepBatch
from distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from distill.durable import append_line
from distill.inference import reproducible, to_device
from distill.losses.contrastive import Contrastive
from distill.profiling import UNPROFILED, Profiler, traced
from distill.progress import Progress
from distill.protocols import Scored, TeachableTeacher
from distill.timings import Timings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.protocols import Memory

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
    itm_weight: float  # of the pair loss, the contrastive one has 1
    seed: int
    log_every: int = 50
    checkpoint_every: int = 250
    hinge_margin: float | None = None  # of a teacher without matching head; None = InfoNCE

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
    timings: Timings | None = None,
    profiler: Profiler | None = None,
) -> None:
    """Train a teacher in place; goes on from the newest checkpoint in ``folder/checkpoints``.

    Args:
        teacher: a ``TeachableTeacher`` or a ``ContrastiveTeachable``; what offers ``pair_logits`` is taught by these.
        batches: labelled pairs of the training split, with inputs made by the teacher.
        settings: schedule and sizes.
        folder: for checkpoints and ``metrics.jsonl``.
        accelerator: one process.
        meaning: fingerprint of all that decides the result.
        timings: told what the stage in hand spends on waiting for data and on checkpoints, and what it gets through.
        profiler: records a window of the steps, if it has one.

    Raises:
        TeachingError: the loss is not finite, or the teacher ends where it began (it answers by chance).
    """
    timings, optimizer = timings or Timings(), _make_optimizer(teacher, settings)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    # one process teaches, whatever their number: the model is cast and placed, not spread over them
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    prepared = accelerator.prepare_optimizer(optimizer)
    model: Any = accelerator.unwrap_model(teacher)
    pair_loss = _matching if isinstance(model, TeachableTeacher) else _similarity
    start = 0
    set_seed(settings.seed)
    found = latest_checkpoint(folder / "checkpoints")
    if found is not None:
        start = load_checkpoint(found, model=model, optimizer=optimizer, meaning=meaning)
        log.info("teaching goes on from step %d", start)
    accuracy, began, since = 0.5, time.perf_counter(), start
    with (
        stopping.finishing(),
        reproducible(accelerator.device),
        Progress(settings.steps - start, "teach", unit="steps") as bar,
        (profiler or UNPROFILED).over(folder, start) as step_done,
    ):
        for step in range(start, settings.steps):
            asked = time.perf_counter()
            with traced("wait for data"):
                batch = batches[step]
            timings.spent("waiting for data", time.perf_counter() - asked)
            for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * settings.factor_at(step)
            model.train()
            with traced("loss"), accelerator.autocast():
                encoded = _encode(model, batch, accelerator.device)
                itc = _contrastive(encoded.cosine, encoded.positive, model.scale)
                pair, right = pair_loss(model, encoded, batch.step, settings)
            loss = itc + settings.itm_weight * pair
            if not torch.isfinite(loss):
                raise TeachingError(
                    f"step {step}: contrastive loss {itc.item()}, pair loss {pair.item()}; lower teach.lr"
                )
            with traced("backward"):
                accelerator.backward(loss)
            with traced("clip"):
                accelerator.clip_grad_norm_(model.parameters(), settings.grad_clip)
            with traced("optimizer"):
                prepared.step()
                prepared.zero_grad()
            accuracy += (right - accuracy) * 0.02  # running mean over about the last 50 steps
            bar.advance(1)
            timings.count(steps=1, items=len(batch.image_ids) + len(batch.text_ids))
            if (step + 1) % settings.log_every == 0:
                rate = (step + 1 - since) / (time.perf_counter() - began)
                _log_line(folder, step + 1, itc=itc.item(), pair=pair.item(), accuracy=accuracy, steps_per_second=rate)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stopping.told():
                with traced("checkpoint"), timings.stage("checkpoint"):
                    save_checkpoint(
                        folder / "checkpoints", step=step + 1, model=model, optimizer=optimizer, meaning=meaning
                    )
                stopping.heed()
            step_done()
    model.eval()
    if settings.steps - start >= 200 and accuracy < 0.55:
        raise TeachingError(
            f"the teacher answers by chance after {settings.steps} steps (share of negatives below their positive: "
            f"{accuracy:.2f}; chance 0.50): raise teach.steps or teach.random_negatives, or change teach.lr"
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


@dataclass(frozen=True)
class _Encoded:
    """One step's items. N images, M texts, P labelled pairs."""

    images: Memory
    texts: Memory
    cosine: Tensor  # (N, M) float32, with gradient
    positive: Tensor  # (N, M) bool
    rows: tuple[Tensor, Tensor]  # image rows (P,), text rows (P,)


def _encode(model: Any, batch: StepBatch, device: torch.device) -> _Encoded:
    with traced("to device"):
        image_inputs, text_inputs = to_device(batch.images, device), to_device(batch.texts, device)
    with traced("encode"):
        images, texts = model.encode_images(image_inputs), model.encode_texts(text_inputs)
    cosine = images["embedding"].float() @ texts["embedding"].float().T
    positive = batch.grids["i2t"].positive.to(device)  # every image and text of a teaching step is a query
    image_rows, text_rows = (rows.to(device) for rows in batch.pairs)
    return _Encoded(images, texts, cosine, positive, (image_rows, text_rows))


def _hard(step: int, settings: TeachSettings) -> bool:
    """Whether negatives are the hard ones by now."""
    return step >= settings.random_negatives * settings.steps


def _matching(model: Any, encoded: _Encoded, step: int, settings: TeachSettings) -> tuple[Tensor, float]:
    """Loss of the matching head, and the share of negatives that score below their positive."""
    cosine, positive = encoded.cosine, encoded.positive
    logits = (model.scale * cosine).detach() if _hard(step, settings) else torch.zeros_like(cosine)
    image_rows, text_rows = (rows[: settings.itm_queries] for rows in encoded.rows)
    generator = torch.Generator(device=cosine.device).manual_seed(settings.seed * 1_000_003 + step)
    other_texts = _draw(logits[image_rows], positive[image_rows], generator)
    other_images = _draw(logits.T[text_rows], positive.T[text_rows], generator)
    rows = torch.cat([image_rows, image_rows, other_images]), torch.cat([text_rows, other_texts, text_rows])
    score = model.pair_logits(encoded.images, encoded.texts, *rows)
    count = len(image_rows)
    labels = torch.zeros_like(score)
    labels[:count] = 1
    right = (score[:count].repeat(2) > score[count:]).float().mean().item()
    return F.binary_cross_entropy_with_logits(score, labels), right


def _similarity(model: Any, encoded: _Encoded, step: int, settings: TeachSettings) -> tuple[Tensor, float]:
    """Loss of the similarities of all pairs, and the share of an image's negatives that are below its positive."""
    similarity = model.pair_matrix(encoded.images, encoded.texts).float()  # (N, M)
    image_rows, text_rows = encoded.rows
    above = similarity[image_rows, text_rows].unsqueeze(1) > similarity[image_rows]  # (P, M)
    right = above[~encoded.positive[image_rows]].float().mean().item()
    if settings.hinge_margin is None:
        return _contrastive(similarity, encoded.positive, model.pair_scale), right
    hardest = _hard(step, settings)
    return hinge(similarity, encoded.positive, margin=settings.hinge_margin, hardest=hardest), right


def hinge(similarity: Tensor, positive: Tensor, *, margin: float, hardest: bool) -> Tensor:
    """-> (): mean over matches of [margin - s + negative]+, for the hardest negative or on average over all of them.

    Summed over both directions. Every match of the batch is a positive and none of them a negative. Training begins
    with the average: with the hardest from the first step all similarities can collapse into one value.

    Args:
        similarity: (N, M) of images and texts.
        positive: (N, M) bool.
        margin: In units of similarity; 0.2 in the paper.
        hardest: Which of the two.
    """
    total = torch.zeros_like(similarity[0, 0])
    for values, match in ((similarity, positive), (similarity.T, positive.T)):
        rows, columns = match.nonzero(as_tuple=True)  # (P,)
        negative = ~match[rows]  # (P, M)
        cost = (margin - values[rows, columns].unsqueeze(1) + values[rows]).clamp(min=0) * negative
        total = total + (cost.amax(dim=1) if hardest else cost.sum(dim=1) / negative.sum(dim=1).clamp(min=1)).mean()
    return total


def _contrastive(similarity: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE, the mean of both directions, over similarities (N, M)."""
    return (_one_way(similarity, positive, scale) + _one_way(similarity.T, positive.T, scale)) / 2


def _one_way(similarity: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    return Contrastive()(
        Scored(
            student=similarity,
            teacher=torch.full_like(similarity, float("nan")),
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
    append_line(folder / "metrics.jsonl", {"step": step, **values})
    log.info("teach step %d: contrastive %.3f, pair %.3f, accuracy %.3f", step, *list(values.values())[:3])
