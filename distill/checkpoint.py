"""Checkpoints that are whole or absent: staged, flushed, marked complete, renamed; old ones pruned only after."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from distill.durable import sha256_of, staged_folder, sweep_temporaries

if TYPE_CHECKING:
    from collections.abc import Mapping


log = logging.getLogger(__name__)
_NAME = re.compile(r"^step-(\d{9})$")
_MARKER = "complete.json"


class Stateful(Protocol):
    """What a checkpoint can hold beside model and optimizer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


Others: TypeAlias = "Mapping[str, Stateful | None]"


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit what it is loaded into."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Stateful,
    optimizer: Stateful,
    meaning: str,
    others: Others | None = None,
    keep: int = 1,
) -> Path:
    """Write ``folder/step-N`` whole, then prune to the newest ``keep``.

    Args:
        folder: where the run's checkpoints live.
        step: steps done; the next one to run has this number.
        model: all that trains, with its throw-away heads.
        optimizer: its optimizer.
        meaning: fingerprint of everything that decides the rest of the training; checked on load.
        others: what else has a state, by name: fp16's gradient scaler, what goes with the student; None is passed over.
        keep: complete checkpoints left when done, this one counted.

    Raises:
        NotWrittenError: no room, or not writable; earlier checkpoints are whole.
    """
    sweep_temporaries(folder)
    final = checkpoint_of(folder, step)
    with staged_folder(final) as staged:
        _write(staged, model, optimizer, others or {})
        hashes = {path.name: sha256_of(path) for path in sorted(staged.iterdir())}
        (staged / _MARKER).write_text(json.dumps({"step": step, "meaning": meaning, "sha256": hashes}, indent=1))
    _prune(folder, keep, step)
    return final


def _write(staged: Path, model: Stateful, optimizer: Stateful, others: Others) -> None:
    import torch

    save_weights(staged, model)
    state = {
        "optimizer": optimizer.state_dict(),
        **{name: other.state_dict() for name, other in others.items() if other is not None},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with (staged / "trainer.pt").open("wb") as file:  # given a path, torch does not say why it could not write
        torch.save(state, file)
    (staged / "rng.json").write_text(json.dumps({"python": random.getstate(), "numpy": _numpy_state()}))


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"step-{step:09d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; staged ones are passed over, and torn ones with a warning."""
    if not folder.is_dir():
        return None
    for path in sorted((path for path in folder.iterdir() if _NAME.match(path.name)), reverse=True):
        if _is_complete(path):
            return path
        log.warning("%s is damaged: its files are not those that were written; an earlier one is taken", path)
    return None


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint."""
    return int(json.loads((checkpoint / _MARKER).read_text())["step"])


def load_checkpoint(
    checkpoint: Path, *, model: Stateful, optimizer: Stateful, meaning: str | None, others: Others | None = None
) -> int:
    """Restore everything a checkpoint holds; returns the steps done.

    Args:
        checkpoint: a folder from ``latest_checkpoint``.
        model: as it was saved.
        optimizer: as it was saved.
        meaning: what the run means now; None takes a checkpoint of another run as a starting point.
        others: as they were saved; one that the checkpoint knows nothing of stays as it is.

    Raises:
        CheckpointError: the run means something else than when the checkpoint was made.
    """
    import torch

    marker = json.loads((checkpoint / _MARKER).read_text())
    if meaning is not None and marker["meaning"] != meaning:
        raise CheckpointError(
            f"{checkpoint} was made by a run with other data, losses, scores or training settings; "
            "give this run another name, or delete the folder to start again"
        )
    load_weights(checkpoint, model)
    state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    _restore_host_rng(json.loads((checkpoint / "rng.json").read_text()))
    for name, other in (others or {}).items():  # after the random state: one of several processes has its own
        if other is not None and state.get(name) is not None:
            other.load_state_dict(state[name])
    return int(marker["step"])


def save_weights(folder: Path, model: Stateful) -> None:
    """The weights alone into a folder that is there; ``load_weights`` reads them."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in _named(model)}, folder / "model.safetensors")


def load_weights(checkpoint: Path, model: Stateful) -> None:
    """The weights alone, for a model that is to be used rather than trained on."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def _named(model: Stateful) -> list[tuple[str, Any]]:
    """Weights by name, shared storage written once a name (safetensors refuses aliases)."""
    return [(name, tensor.detach().cpu().clone()) for name, tensor in model.state_dict().items()]


def _numpy_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {"kind": kind, "keys": [int(key) for key in keys], "rest": [int(position), int(has_gauss), float(cached)]}


def _restore_host_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    np.random.set_state((saved["kind"], np.array(saved["keys"], dtype=np.uint32), *saved["rest"]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        marker = json.loads((checkpoint / _MARKER).read_text())
        return all(sha256_of(checkpoint / name) == expected for name, expected in marker["sha256"].items())
    except (OSError, ValueError, KeyError):
        return False


def _prune(folder: Path, keep: int, step: int) -> None:
    """Later ones than ``step``, which has just been written, were found damaged: they count for nothing."""
    newest = checkpoint_of(folder, step).name
    complete = sorted((p for p in folder.iterdir() if _NAME.match(p.name) and p.name <= newest), reverse=True)
    for path in complete[max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)
