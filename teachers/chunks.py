"""A call of any number of pairs in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def over_chunks(score: Callable[[Tensor], Tensor], order: Tensor, pairs_per_chunk: int) -> Tensor:
    """Results (P, ...) of ``score`` over chunks of a permutation of the pairs, given back in the pairs' own order.

    Bounds the memory of a call of any size where no gradient is wanted.
    """
    starts = range(0, max(1, len(order)), max(1, pairs_per_chunk))
    parts = [score(order[start : start + pairs_per_chunk]) for start in starts]
    return torch.cat(parts)[order.argsort().to(parts[0].device)]
