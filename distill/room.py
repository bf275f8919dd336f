"""Whether what a run will write can be written: asked before anything else is done."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from distill.checkpoint import checkpoint_of
from distill.durable import size_of, writing
from distill.pipeline import DONE, SHARED, stretches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from distill.experiment import Experiment

log = logging.getLogger(__name__)


class NoRoomError(OSError):
    """A run whose checkpoints cannot fit on their device."""


def check_folders(x: Experiment) -> None:
    """Before anything is read: the run's folder can be written, and the cache, which may be another's, is noted if not.

    Raises:
        NotWrittenError: the run's folder cannot be written.
    """
    _try_writing(x.folder)
    try:
        _try_writing(x.cache)
    except OSError as error:
        log.warning("the cache can only be read, so that what it lacks ends the command: %s", error)


def _try_writing(folder: Path) -> None:
    """By a file without a name in the nearest folder there is: permissions alone do not tell, and nothing is left."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with writing(folder), tempfile.TemporaryFile(dir=there):
        pass


def check_room(*runs: Experiment, arms: Sequence[str] | None = None) -> None:
    """Refuse runs of one recipe whose checkpoints cannot fit. Counted are weights and optimizer, which is the least.

    Args:
        runs: what is to be trained; their student is the same.
        arms: of these, beside the shared steps; None = all.

    Raises:
        NoRoomError: with the bytes needed and free.
    """
    first = runs[0]
    parts = [part for x in runs for part in _parts_left(x, list(x.recipe.arms) if arms is None else arms)]
    teach = first.recipe.teach is not None and not (first.folder / "teacher" / DONE).is_file()
    there = next(path for path in (first.folder, *first.folder.absolute().parents) if path.is_dir())
    disk = shutil.disk_usage(there)
    if not (parts or teach) or not disk.total:  # some network file systems do not tell
        return
    student, checkpoint = _weights_and_checkpoint(first.builders.student(first.corpus)) if parts else (0, 0)
    keep = first.recipe.train.keep_checkpoints
    needed = [max(0, min(keep, left) * checkpoint - held) + final * student for left, held, final in parts]
    most = checkpoint if any(left for left, *_ in parts) else 0
    if teach:
        teacher, of_teaching = _weights_and_checkpoint(first.untaught_teacher())
        needed.append(max(0, of_teaching - _bytes_in(first.folder / "teach" / "checkpoints")) + teacher)
        most = max(most, of_teaching)
    total = sum(needed) + most  # the next checkpoint is written beside the last
    if total > disk.free:
        raise NoRoomError(
            f"checkpoints and models of what is left to train need at least {size_of(total)} at {there}, which has "
            f"{size_of(disk.free)} free ({size_of(most)} a checkpoint, one more while it is written; "
            f"train.keep_checkpoints is {keep}): make room, keep fewer, or choose another folder (--set runs=...)"
        )


def _parts_left(x: Experiment, arms: Sequence[str]) -> list[tuple[int, int, bool]]:
    """Of each training that is not done: checkpoints it makes yet at most, bytes it has, if a student comes of it."""
    shared, *rounds = stretches(x)
    parts = [(x.folder / "arms" / name, rounds[0].start, rounds[-1].stop, True) for name in arms]
    if shared.stop:
        parts.append((x.folder / SHARED, 0, shared.stop, False))
    found = []
    for folder, start, stop, final in parts:
        checkpoints = folder / "checkpoints"
        if not (folder / "student" / DONE).is_file():
            ended = checkpoint_of(checkpoints, stop).is_dir()
            left = 0 if ended else -(-(stop - start) // x.recipe.train.checkpoint_every)
            found.append((left, _bytes_in(checkpoints), final))
    return found


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _weights_and_checkpoint(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's weights, and of these with the optimizer's two moments."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return weights, weights + 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
