"""Running a model over many items: batches prepared ahead, evaluation mode that is put back, tensors on a device."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future

    import torch
    from torch import Tensor

    from distill.protocols import Ids

Job = TypeVar("Job")
Result = TypeVar("Result")


def prefetched(
    prepare: Callable[[Job], Result], jobs: Iterable[Job], *, threads: int = 1
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, prepare(job)) in order while the next ones are prepared in background threads.

    One thread unless more are allowed: tokenizers fail when two threads call the same one. An error in ``prepare`` is
    raised at its job's turn. Leaving the loop early drops what was not begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(prepare, job)))
            if len(waiting) > threads + 1:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def threads_of(source: object) -> int:
    """How many threads may call a source at once: its attribute ``threads``, else one."""
    return int(getattr(source, "threads", 1))


def batches_of(rows: Ids, batch_size: int) -> list[Ids]:
    """The rows in their order, cut into batches of ``batch_size`` and a rest."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a CPU, sums in a fixed order: threads that add gradients into one place do so in any order otherwise.

    On other devices nothing is changed: there it would cost speed, and no promise of equal bits is made.
    """
    import torch

    flags: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        flags.fill_uninitialized_memory = False  # a help for finding faults, and slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        flags.fill_uninitialized_memory = before[1]


def random_state(device: torch.device) -> list[Tensor]:
    """Of torch, as a model on ``device`` draws: the CPU's, and that of a GPU; ``set_random_state`` takes it back."""
    import torch

    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Go on drawing from ``state``; what it holds of a GPU counts on a GPU only."""
    import torch

    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """No gradients, and every submodule in evaluation mode; each one's own mode is put back afterwards."""
    import torch

    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def to_device(tensors: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
    """The same named tensors on ``device``; None leaves them where they are."""
    if device is None:
        return dict(tensors)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def bytes_of(memory: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in memory.values())


def device_of(model: object) -> torch.device | None:
    """Where the model's first parameter lies; None for a model without parameters."""
    import torch

    first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return None if first is None else first.device


def joined(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of named tensors as one, along the first dimension.

    Where a second dimension differs between batches (padding to each batch's longest), it is filled up with zeros,
    which a name ending in ``_mask`` marks as padding.

    Raises:
        ValueError: the batches differ in names or in a dimension that is no padding.
    """
    if len(parts) == 1:
        return dict(parts[0])
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        raise ValueError(f"batches of one model must hold the same tensors, got {sorted({*map(tuple, parts)})}")
    has_mask = any(name.endswith("_mask") for name in names)
    return {name: _joined_one(name, [part[name] for part in parts], has_mask) for name in names}


def _joined_one(name: str, tensors: list[Tensor], has_mask: bool) -> Tensor:
    import torch

    lengths = {tensor.shape[1:2] for tensor in tensors}
    if len(lengths) == 1:
        return torch.cat(tensors)
    if not has_mask:
        raise ValueError(
            f"'{name}' has second dimensions {sorted(length[0] for length in lengths)} in different batches and no "
            f"'..._mask' says which part is padding; give a mask or pad to a fixed length"
        )
    longest = max(tensor.shape[1] for tensor in tensors)
    whole = tensors[0].new_zeros((sum(map(len, tensors)), longest, *tensors[0].shape[2:]))
    start = 0
    for tensor in tensors:
        whole[start : start + len(tensor), : tensor.shape[1]] = tensor
        start += len(tensor)
    return whole
