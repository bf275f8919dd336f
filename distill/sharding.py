"""FSDP2, where Accelerate's own configuration asks for it: weights and optimizer state lie spread over the processes.

The training works on a copy of the student; the student itself stays whole, for all that runs it apart from the
training, in which processes do not keep step. Checkpoints hold everything whole, as one process writes it, so that a
run goes on in any number of processes, sharded or not.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch.optim import Optimizer

    from distill.ranks import Ranks

log = logging.getLogger(__name__)


class ShardingError(ValueError):
    """What Accelerate was configured to do cannot be done."""


def settle() -> None:
    """Before any process joins or loads: each reads its weights itself, since each needs teachers and students whole.

    Else transformers would leave the models of all but the first process empty.
    """
    if _asked_for():
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def check_sharding(accelerator: Accelerator, *, compiles: bool) -> None:
    """Raises ShardingError where FSDP was asked for in a way that cannot work."""
    if not _asked_for():
        return
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind != "FSDP":
        raise ShardingError(
            f"Accelerate was asked for FSDP, which it does not do here ({kind}: it shards over several GPUs or other "
            "accelerators): launch with as many processes as there are GPUs, or without --use_fsdp"
        )
    if not accelerator.is_fsdp2:
        raise ShardingError(
            "Accelerate was asked for FSDP of version 1, whose checkpoints no other run could go on with: add "
            "--fsdp_version 2 (in its configuration file: fsdp_version: 2)"
        )
    if accelerator.mixed_precision == "fp16":
        raise ShardingError("train.precision fp16 cannot be used under FSDP: take bf16, or launch without --use_fsdp")
    if compiles:
        raise ShardingError("train.compile cannot be used under FSDP: leave it out, or launch without --use_fsdp")


def _asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def trained_of(student: nn.Module, accelerator: Accelerator) -> nn.Module:
    """What is to be prepared by the accelerator and trained: the student, or a copy where weights will be spread.

    Scalars, such as the learned scale, cannot be cut: every process keeps them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return student
    log.info("FSDP: weights and optimizer state lie spread over %d processes", accelerator.num_processes)
    trained: Any = copy.deepcopy(student)
    student.to("cpu")
    plugin.ignored_modules = [nn.ParameterList(p for p in trained.parameters() if p.ndim == 0)]
    # bf16 by autocast, as where nothing is spread: Accelerate would cast all weights, and their gradients with them
    plugin.mixed_precision_policy = None
    if getattr(trained, "_no_split_modules", None) is None:  # where Accelerate looks for the layers to shard one by one
        names = {name for module in trained.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        trained._no_split_modules = sorted(names & {type(module).__name__ for module in trained.modules()})
    return trained  # type: ignore[no-any-return]


def give_back(trained: nn.Module, student: nn.Module, device: torch.device) -> None:
    """The student, whole on the device, gets the trained weights; every process takes part."""
    if trained is student:
        return
    weights = trained.state_dict()
    with torch.no_grad():
        for name, own in student.state_dict().items():
            own.copy_(whole(weights[name]))
    student.to(device)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is spread over the processes; then every process takes part."""
    spread: Any = tensor
    found: Tensor = spread.full_tensor() if _is_spread(tensor) else tensor
    return found


def average_scalars(trained: nn.Module, student: nn.Module, ranks: Ranks) -> None:
    """Gradients of what every process keeps for itself: the same in all but for rounding, and then the same."""
    for weight in trained.parameters() if trained is not student else ():
        if weight.grad is not None and not _is_spread(weight):
            dist.all_reduce(weight.grad)
            weight.grad /= ranks.count


class Whole:
    """Weights or optimizer state as one process would have them, whoever holds which part of them."""

    def __init__(self, part: nn.Module | Optimizer, ranks: Ranks) -> None:
        self._part, self._first = part, ranks.first
        self._gathered: Any = None

    def gather(self) -> None:
        """Before each ``state_dict``, in every process; what the first is alone to need, it alone keeps."""
        own = self._part.state_dict()
        spread = any(isinstance(leaf, Tensor) and _is_spread(leaf) for leaf in tree_leaves(own))
        self._gathered = tree_map(self._kept, own) if spread else None

    def state_dict(self) -> Any:
        """What ``gather`` found; of what is not spread, what there is now."""
        return self._part.state_dict() if self._gathered is None else self._gathered

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a whole state: each process its own part of it."""
        if isinstance(self._part, nn.Module):
            own = self._part.state_dict()
            self._part.load_state_dict({name: _spread_as(own.get(name), value) for name, value in state.items()})
            return
        weights = [weight for group in self._part.param_groups for weight in group["params"]]
        entries = {
            place: {name: _spread_as(weights[place], value) for name, value in entry.items()}
            for place, entry in state["state"].items()
        }
        self._part.load_state_dict({**state, "state": entries})

    def _kept(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        found = whole(leaf)
        return found.detach().cpu() if self._first else None


def _spread_as(own: Tensor | None, value: Any) -> Any:
    """A whole tensor cut as ``own`` is, without asking other processes; what is not of its shape stays whole."""
    if own is None or not _is_spread(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: Any = own
    return distribute_tensor(value.to(own.device), spread.device_mesh, spread.placements, src_data_rank=None)


def _is_spread(tensor: Tensor) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
