"""The processes of a run: which one this is, what share of the work is its own, and what they tell one another.

Every process knows every batch whole and computes the loss over all of it; what is shared out is the encoding. So
in-batch negatives are global, and candidates, masks and queues are the same in all of them, for any loss.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.inference import random_state, set_random_state
from distill.sampler import share_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

log = logging.getLogger(__name__)
T = TypeVar("T")


class Ranks:
    """Made of an accelerator; with one process everything here does nothing and costs nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._alone = 0

    @property
    def count(self) -> int:
        """Processes that share the work; 1 while the first works alone."""
        return 1 if self._alone else int(self._accelerator.num_processes)

    @property
    def index(self) -> int:
        """Which of them this is, from 0."""
        return 0 if self._alone else int(self._accelerator.process_index)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def share(self, n: int) -> slice:
        """This process's part of ``n`` items: contiguous, sizes differ by one at most."""
        return share_of(n, self.index, self.count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def work_alone(self, work: Callable[[], T]) -> T | None:
        """The first process does ``work`` and gets its result while the others wait; they get None."""
        found = None
        if self.first:
            with self._working_alone():
                found = work()
        self.wait()
        return found

    @contextmanager
    def _working_alone(self) -> Iterator[None]:
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def shares(self, n: int) -> list[slice]:
        """Every process's part of ``n`` items, in order."""
        return [share_of(n, index, self.count) for index in range(self.count)]

    def sizes(self, n: int) -> list[int]:
        """How many of ``n`` items each process has."""
        return [share.stop - share.start for share in self.shares(n)]

    def joined(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """All parts (sum of sizes, ...) in order, from each process's own; gradient goes to the own part.

        For a loss that every process computes over all of it, under gradients that are averaged over processes.

        Args:
            own: (sizes[index], ...).
            sizes: of every process's part.
        """
        if self.count == 1:
            return own
        joined: Tensor = _Joined.apply(own, tuple(sizes), self.index)  # type: ignore[no-untyped-call]
        return joined

    def joined_array(self, own: np.ndarray[Any, Any], total: int) -> np.ndarray[Any, Any]:
        """As ``joined``, of an array on the host that holds this process's share of ``total`` rows."""
        if self.count == 1:
            return own
        tensor = torch.from_numpy(np.ascontiguousarray(own)).to(self._accelerator.device)
        found: np.ndarray[Any, Any] = self.joined(tensor, self.sizes(total)).cpu().numpy()
        return found

    def most(self, number: int) -> int:
        """The largest number that one of them gives."""
        if self.count == 1:
            return number
        told = torch.tensor([number], device=self._accelerator.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return int(told.item())

    def told_by_all(self, value: T) -> list[T]:
        """What each process says, in order."""
        if self.count == 1:
            return [value]
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, value)
        return said


class RandomStates:
    """Each process's random state of torch, for the checkpoint that the first one writes."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        """``device``: this process's."""
        self._ranks, self._device = ranks, device
        self._held: list[list[Tensor]] = []

    def gather(self) -> None:
        """Before a checkpoint, in every process."""
        self._held = self._ranks.told_by_all(random_state(self._device)) if self._ranks.count > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """Empty where there is one process, whose state is the checkpoint's own."""
        return {"states": self._held} if self._held else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over this process's; where there were fewer or more processes, draw anew from here on."""
        held, ranks = state.get("states", []), self._ranks
        if len(held) == ranks.count > 1:
            set_random_state(held[ranks.index], self._device)
        elif max(1, len(held)) != ranks.count:
            log.warning(
                "the checkpoint is of %d processes, this run has %d: same batches, but dropout draws other numbers",
                max(1, len(held)),
                ranks.count,
            )
            torch.manual_seed(torch.initial_seed() + ranks.index)


class _Joined(torch.autograd.Function):
    """All-gather whose backward pass sends nothing: the loss is the same in every process."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: tuple[int, ...], index: int) -> Tensor:
        before = sum(sizes[:index])
        ctx.own, ctx.count = slice(before, before + sizes[index]), len(sizes)
        padded = own.new_zeros((max(sizes), *own.shape[1:]))  # all parts of one size, as the collective wants them
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        # only the own part's; the others have theirs, and the average over processes will divide by their number
        return gradient[ctx.own] * ctx.count, None, None
