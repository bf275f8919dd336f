"""The batches of a training, made ahead by worker processes; and what to say when one of them fails or dies."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distill.profiling import traced

if TYPE_CHECKING:
    from distill.batches import Batches, StepBatch

_WORKER = "DataLoader worker (pid"  # torch's words for one that is gone


class LoadingError(RuntimeError):
    """A batch that cannot be made; the steps before it are sound."""


class LostWorkerError(RuntimeError):
    """A worker died while something else was done."""


def load(batches: Batches, start: int, stop: int, workers: int) -> Iterator[tuple[StepBatch, float]]:
    """Batches in step order, each with the seconds that the loop waited for it.

    Raises:
        LoadingError: a batch could not be made, or a worker was killed.
    """
    loader: Any = torch.utils.data.DataLoader(
        _Telling(batches),  # type: ignore[arg-type]  # map-style by __getitem__ alone
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        worker_init_fn=_outlive_sigterm,
        persistent_workers=False,
        generator=torch.Generator(),  # its own, so that starting a loader never moves the training's random state
        prefetch_factor=4 if workers else None,
    )
    others = set(multiprocessing.active_children())
    made = iter(loader)
    crew = set(multiprocessing.active_children()) - others
    atexit.register(_end_crew, crew)
    step = start
    try:
        while True:
            asked = time.perf_counter()
            with traced("wait for data"):
                batch = next(made, None)
            if batch is None:
                return
            if isinstance(batch, _Failure):
                raise LoadingError(batch.message) from RuntimeError(batch.trace)
            yield batch, time.perf_counter() - asked
            step = batch.step + 1
    except RuntimeError as error:
        if not str(error).startswith(_WORKER):
            raise
        raise LoadingError(f"step {step}: {_of_worker(error, crew)}") from error
    finally:
        del made  # an error keeps this frame, and would keep the workers


def _end_crew(crew: Iterable[Any]) -> None:
    """At the end of the process, where an error kept the loader: its workers outlive the SIGTERM that Python sends."""
    if any(one.is_alive() for one in crew):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each of them as lost
        for one in crew:
            one.kill()


def _of_worker(error: RuntimeError, crew: Iterable[Any]) -> str:
    """What to do about a worker that is gone."""
    ends = sorted({signal.Signals(-one.exitcode).name for one in crew if (one.exitcode or 0) < 0})
    how = f"ended by {', '.join(ends)}" if ends else str(error).splitlines()[0]
    return (
        f"a loader worker is gone ({how}). Most often memory ran out (SIGKILL; `dmesg` tells) or shared memory did "
        "(SIGBUS; /dev/shm, in a container its --shm-size): make room or lower train.workers, which changes no result "
        "(0 loads in the training process), then the same command goes on (run and train: with --resume)"
    )


@contextmanager
def worker_advice() -> Iterator[None]:
    """The death of a worker interrupts whatever is being done, as a signal does.

    Raises:
        LostWorkerError: what was being done is half done.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_WORKER):
            raise
        raise LostWorkerError(_of_worker(error, ())) from error


@dataclass(frozen=True)
class _Failure:
    """What went wrong, in words: torch would put the traceback of a worker into the message."""

    message: str
    trace: str


@dataclass(frozen=True)
class _Telling:
    """Batches for a loader, where an error that can be mended is a result like others."""

    batches: Batches

    def __getitem__(self, step: int) -> StepBatch | _Failure:
        try:
            return self.batches[step]
        except (ValueError, OSError, RuntimeError) as error:
            return _Failure(f"step {step}: {error}", traceback.format_exc())


def _outlive_sigterm(_: int) -> None:
    """A launcher signals the whole group: a worker that died of it would fail the step that is to be kept."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
