"""What experiment trackers are told of a training: every step once, in order, however often it is run.

TensorBoard and its like only take more: a step that is run again after a kill would stand there twice. The last step
that a killed training may have told of is kept in ``tracked.json``, the name of a run at W&B in ``wandb.json``.
"""

from __future__ import annotations

import json
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distill.durable import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from accelerate import Accelerator

WANDB = "wandb"


@contextmanager
def trackers_of(accelerator: Accelerator, folder: Path, *, config: Mapping[str, Any]) -> Iterator[None]:
    """The accelerator's trackers are open in here; those of a run that goes on add to what it told before.

    Args:
        accelerator: made with ``log_with``; nothing is opened where that is empty.
        folder: of the run; event files go to ``folder/cross2dual`` where it is the accelerator's project.
        config: what the trackers show as the run's settings; ``name`` is its name.
    """
    if accelerator.log_with:
        options = {}
        if accelerator.is_main_process and any(str(name) == WANDB for name in accelerator.log_with):
            options[WANDB] = {"name": config["name"], "id": _lasting_id(folder / "wandb.json"), "resume": "allow"}
        accelerator.init_trackers("cross2dual", config=dict(config), init_kwargs=options)
    yield
    for tracker in accelerator.trackers:
        tracker.finish()


def _lasting_id(path: Path) -> str:
    """One for all sessions of a run."""
    if not path.is_file():
        _keep(path, {"id": uuid.uuid4().hex[:16]})
    return str(json.loads(path.read_text())["id"])


def _keep(path: Path, facts: Mapping[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(facts).encode()))


class Tracking:
    """The trackers of an accelerator, and how far one training of theirs was told."""

    def __init__(self, accelerator: Accelerator, folder: Path, *, lost: int) -> None:
        """Of the training in ``folder``; ``lost``: the last step whose log line went because it is run again, or 0."""
        self._name, self._told = folder.name, 0
        self._trackers = list(accelerator.trackers) if accelerator.is_main_process else []
        for tracker in self._trackers:
            if tracker.name == WANDB:
                tracker.tracker.define_metric(f"{self._name}/*", step_metric=f"{self._name}/step")
        if self._trackers:
            mark = folder / "tracked.json"
            self._told = int(json.loads(mark.read_text())["step"]) if mark.is_file() else 0
            if lost > self._told:
                self._told = lost
                _keep(mark, {"step": lost})

    def log(self, line: Mapping[str, float], step: int) -> None:
        """What the log says after so many steps, under the training's name; nothing if it was said before."""
        if step <= self._told:
            return
        named = {f"{self._name}/{key}": value for key, value in line.items()}
        for tracker in self._trackers:
            if tracker.name == WANDB:  # its own step is one count for all trainings, and refuses to go back
                tracker.log({**named, f"{self._name}/step": step})
            else:
                tracker.log(named, step=step)
