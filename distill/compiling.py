"""A student through ``torch.compile`` while it trains: one graph for batches of any size, nothing else about it new."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental import _config as symbols

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

# The random numbers of dropout are those of the student as it is: steps, pieces and resumed runs draw the same ones.
_OPTIONS = {"fallback_random": True}


@contextmanager
def compiled(student: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Inside, calls of ``student`` run compiled; its weights, their names and what wraps it stay as they are.

    Sizes are symbols: the number of items and the length of texts compile nothing anew, but for a single item. Left
    before anything is embedded: vectors must not depend on whether a process trained before or read a checkpoint.
    """
    if not wanted:
        yield
        return
    student.compile(dynamic=True, options=_OPTIONS)
    try:
        # as many images as texts in the first batch need not be as many in the next
        with symbols.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield
    finally:
        student._compiled_call_impl = None  # as it was; torch has no word for it


def check_compiler(device: torch.device) -> None:
    """Compile a trifle. Raises RuntimeError with the compiler's words where that cannot be done here."""
    unseen = 1 + random.SystemRandom().random()  # else an earlier one is found among kept ones, compiler or not

    def trifle(numbers: Tensor) -> Tensor:
        return (numbers * unseen).sin()

    try:
        torch.compile(trifle)(torch.ones(4, device=device))
    except Exception as error:  # of torch, of triton or of the system: whatever it is, nothing can be compiled
        raise RuntimeError(f"torch.compile cannot be used here: {_gist(error)}") from error


def _gist(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
