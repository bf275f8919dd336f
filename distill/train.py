"""The training loop, read top to bottom: one Accelerate loop for every student, loss and round."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from distill import stopping
from distill.batches import Batches, StepBatch
from distill.checkpoint import Others, checkpoint_of, latest_checkpoint, load_checkpoint, save_checkpoint, step_of
from distill.companion import Companion
from distill.compiling import compiled
from distill.inference import reproducible
from distill.loading import LoadingError, load, worker_advice
from distill.losses.combine import Weighted
from distill.meter import Meter
from distill.profiling import UNPROFILED, Profiler, traced
from distill.progress import Progress
from distill.protocols import SIDES
from distill.ranks import RandomStates, Ranks
from distill.sharding import Whole, average_scalars, give_back, trained_of
from distill.slow_copy import MomentumSettings
from distill.step_loss import TrainingError, some, step_loss
from distill.timings import Timings
from distill.tracking import Tracking

log = logging.getLogger(__name__)
_LEAST_SCALE = 2.0**-14  # of fp16's loss: 30 steps in a row left out from where it starts, and no good one of 2000


@dataclass(frozen=True)
class TrainSettings:
    """How a student is trained; the same for every arm of a run."""

    steps: int  # of the whole schedule, shared steps counted
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float  # share of the steps over which the rate rises
    grad_clip: float
    seed: int
    precision: str = "no"
    micro_batch: int | None = None  # most items of a side encoded at once, by gradient caching; None = all
    matryoshka: tuple[int, ...] = ()  # widths below the student's at which the loss is computed too, ascending
    compile: bool = False  # the student's forward and backward pass, by torch.compile
    workers: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 1

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear rise, then a cosine to 0. A function of the step alone: no state to lose."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def progress_at(self, step: int) -> float:
        """How far the whole training is at a step, 0 to 1: what schedules of loss weights read."""
        return step / max(1, self.steps - 1)


@dataclass(frozen=True)
class Phase:
    """One stretch of a training: from a step to a step, with one loss and one set of batches."""

    start: int
    stop: int
    batches: Batches
    losses: Weighted
    meaning: str  # fingerprint of all that decides what this stretch computes
    followed: int = 0  # which of the batches' towers a loss on embeddings follows
    momentum: MomentumSettings | None = None  # of the student's slow copy, where a loss reads one


def make_optimizer(student: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW without decay on vectors and scalars (biases, norms, the learned scale)."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)


def train(
    student: nn.Module,
    phase: Phase,
    settings: TrainSettings,
    *,
    folder: Path,
    accelerator: Accelerator,
    start_from: Path | None = None,
    timings: Timings | None = None,
    profiler: Profiler | None = None,
) -> Path:
    """Train up to ``phase.stop`` and return the last checkpoint.

    Goes on from the newest complete checkpoint in ``folder``; where there is none, from ``start_from`` (the end of an
    earlier phase: weights, optimizer and random state), or from step 0.

    Args:
        student: trained in place; ends with the weights of the last checkpoint.
        phase: what to run.
        settings: schedule and sizes.
        folder: checkpoints go to ``folder/checkpoints``, one line a log step to ``folder/metrics.jsonl``.
        accelerator: places the tensors, casts, tracks, and knows the other processes.
        start_from: checkpoint of the phase before.
        timings: told what the stage in hand spends on waiting for data and on checkpoints, and what it gets through.
        profiler: records a window of the steps, if it has one.

    Raises:
        TrainingError: a loss, embedding, gradient, weight or teacher score is not finite; names step and ids.
        LoadingError: a batch could not be made, or a worker was killed; the steps before are kept.
        NotWrittenError: no room for a checkpoint or the log; earlier checkpoints are whole.
    """
    ranks, timings = Ranks(accelerator), timings or Timings()
    checkpoints = folder / "checkpoints"
    companion = Companion(student, phase.losses.needs, phase.momentum)
    trained = trained_of(student, accelerator)
    optimizer = make_optimizer(trained, settings)
    model, prepared = accelerator.prepare(trained, optimizer)
    weights, moments = Whole(accelerator.unwrap_model(model), ranks), Whole(optimizer, ranks)
    meter = Meter(folder / "metrics.jsonl" if ranks.first else None, settings.log_every)
    randoms = RandomStates(ranks, accelerator.device)
    others = {
        "scaler": accelerator.scaler,
        "companion": None if companion.is_empty else companion,
        "meter": meter,
        "randoms": randoms,
    }
    done = latest_checkpoint(checkpoints)
    start = _restore([done, start_from], weights, moments, phase, others)
    tracking = Tracking(accelerator, folder, lost=meter.begin(start))
    if start == 0:
        # whatever was computed before, the first step finds the same random state, each process its own
        set_seed(settings.seed, device_specific=True)
    batches = replace(phase.batches, share=(ranks.index, ranks.count))
    plain, parameters = accelerator.unwrap_model(model), list(model.parameters())
    keeper = _Keeper(checkpoints, ranks, settings, phase.meaning, weights, moments, others, timings, kept=start)
    model.train()  # once: a walk through all modules in every step is not free
    with (
        stopping.finishing(),
        reproducible(accelerator.device),
        compiled(trained, wanted=settings.compile),
        worker_advice(),
        keeper.keeping_where_loading_fails(),
        Progress(phase.stop - start, f"train {folder.name}", unit="steps") as bar,
        (profiler or UNPROFILED).over(folder, start, writes=ranks.first) as step_done,
    ):
        for batch, waited in load(batches, start, phase.stop, settings.workers):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(batch.step)
            companion.begin_step(plain)
            with _memory_advice(batch, settings, ranks.count):
                with traced("loss"):
                    loss = step_loss(
                        model,
                        batch,
                        phase,
                        accelerator,
                        companion,
                        settings=settings,
                        measured=meter.due(batch.step),
                    )
                with traced("backward"):
                    accelerator.backward(loss.total)
                    loss.encoded.finish()
                    average_scalars(trained, student, ranks)
            with traced("clip"):
                norm = accelerator.clip_grad_norm_(parameters, settings.grad_clip)
                _check_gradient(norm, batch, accelerator)
            with traced("optimizer"):
                companion.step(settings.lr_at(batch.step) / settings.lr, accelerator.scaler)  # before fp16's scale
                prepared.step()
                _check_scale(prepared, accelerator.scaler, batch.step)
                prepared.zero_grad()
            values = {"lr": settings.lr_at(batch.step), **loss.values, **companion.logged()}
            line = meter.step(batch, loss.total, loss.parts | loss.widths, values=values, norm=norm, waited=waited)
            if line is not None:
                tracking.log(line, batch.step + 1)
            bar.advance(1)
            timings.spent("waiting for data", waited)
            timings.count(steps=1, items=len(batch.image_ids) + len(batch.text_ids))
            finished = keeper.finished = batch.step + 1
            told = ranks.most(stopping.told())
            if finished == phase.stop or finished % settings.checkpoint_every == 0 or told:
                done = keeper.keep()
                if told:  # by all together: a signal that came since then is told at the next step
                    stopping.heed(told)
            step_done()
        stopping.heed(ranks.most(stopping.told()))
    if done is None:
        raise TrainingError(f"{folder}: nothing to train: the phase ends at step {phase.stop} and starts at {start}")
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else the student would cast wherever it is called
    give_back(trained, student, accelerator.device)
    accelerator.free_memory()
    return done


@contextmanager
def _memory_advice(batch: StepBatch, settings: TrainSettings, processes: int) -> Iterator[None]:
    """One process that fails ends its launcher's others; what it says is what people read."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = -(-max(len(batch.encoded(side)) for side in SIDES) // processes)
        at_once = min(share, settings.micro_batch or share)
        raise TrainingError(
            f"step {batch.step}: the device is out of memory ({str(error).splitlines()[0]}) with {at_once} items of a "
            f"side encoded at once; begin again under another name (--set name=...) with train.micro_batch at most "
            f"{max(1, at_once // 2)}, which leaves the contrastive batch whole (not for attention losses), or with a "
            "lower train.candidates_per_query or train.batch_size"
        ) from error


def _restore(restored: list[Path | None], model: Whole, optimizer: Whole, phase: Phase, others: Others) -> int:
    """Steps done: from this phase's own newest checkpoint, else from the end of the phase before, else 0."""
    own, before = restored
    if own is not None and step_of(own) > phase.start:  # else it is the end of the phase before
        step = load_checkpoint(own, model=model, optimizer=optimizer, meaning=phase.meaning, others=others)
        log.info("goes on from %s: weights, optimizer and random state after step %d", own, step)
        return step
    if before is not None:
        of_any_phase = {name: other for name, other in others.items() if name != "meter"}
        return load_checkpoint(before, model=model, optimizer=optimizer, meaning=None, others=of_any_phase)
    return 0


@dataclass
class _Keeper:
    """Makes the checkpoints of a training; all processes call it together."""

    folder: Path
    ranks: Ranks
    settings: TrainSettings
    meaning: str
    weights: Whole
    moments: Whole
    others: dict[str, Any]  # with the random states of the processes
    timings: Timings
    kept: int  # step of the last checkpoint
    finished: int = 0  # steps done

    def keep(self) -> Path:
        """A checkpoint of the finished steps."""
        for gathered in (self.weights, self.moments, self.others["randoms"]):
            gathered.gather()
        if self.ranks.first:
            _check_weights(self.weights.state_dict(), self.finished - 1)
            with traced("checkpoint"), self.timings.stage("checkpoint"):
                save_checkpoint(
                    self.folder,
                    step=self.finished,
                    model=self.weights,
                    optimizer=self.moments,
                    meaning=self.meaning,
                    others=self.others,
                    keep=self.settings.keep_checkpoints,
                )
        self.ranks.wait()
        self.kept = self.finished
        return checkpoint_of(self.folder, self.finished)

    @contextmanager
    def keeping_where_loading_fails(self) -> Iterator[None]:
        """What fails between two steps costs none; of several processes the others are in the midst of one."""
        try:
            yield
        except LoadingError:
            try:
                if self.finished > self.kept and self.ranks.count == 1:
                    self.keep()
            except OSError as error:
                log.warning("%s", error)
            raise


def _check_gradient(norm: Any, batch: StepBatch, accelerator: Accelerator) -> None:
    if accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
        raise TrainingError(
            f"step {batch.step}: the gradient is not finite; image ids {some(batch.image_ids)}, text ids "
            f"{some(batch.text_ids)}; lower train.lr or a loss's weight"
        )


def _check_scale(optimizer: Any, scaler: Any, step: int) -> None:
    """fp16 leaves out a step whose gradient is not finite and halves its scale: that ends well, or never."""
    if scaler is not None and optimizer.step_was_skipped and scaler.get_scale() < _LEAST_SCALE:
        raise TrainingError(
            f"step {step}: with fp16 the gradient is not finite however small the loss is scaled (below "
            f"{_LEAST_SCALE:g} by now), so that no step is taken any more; begin again under another name "
            "(--set name=...) with a lower train.lr, or with train.precision bf16 or no"
        )


def _check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Before they go into a checkpoint: one that is not finite could never be trained on."""
    bad = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if bad:
        raise TrainingError(
            f"step {step}: {len(bad)} of the student's weights are not finite after it ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}); they were not kept, the checkpoint before is as it was; begin again "
            "under another name (--set name=...) with a lower train.lr"
        )
