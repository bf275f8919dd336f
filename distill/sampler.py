"""Which pairs a step trains on: a pure function of seed and step, whatever the workers and however often killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from distill.protocols import Candidates, Ids


class PairSampler(Protocol):
    """Says which labelled pairs a step trains on."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of one epoch."""

    def batch(self, step: int) -> Ids:
        """Pairs (batch_size, 2) of image and text, of a global step counted from 0."""


@dataclass(frozen=True)
class BatchSampler:
    """Every labelled pair once an epoch, in an order drawn from (seed, epoch); a short last batch is left out."""

    pairs: Ids  # (P, 2) image, text
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.pairs) < self.batch_size:
            raise ValueError(
                f"the training split has {len(self.pairs)} pairs but train.batch_size is {self.batch_size}: "
                f"lower train.batch_size to at most {len(self.pairs)}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of one epoch."""
        return len(self.pairs) // self.batch_size

    def batch(self, step: int) -> Ids:
        """Pairs (batch_size, 2) of a global step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.pairs))
        return self.pairs[order[index * self.batch_size : (index + 1) * self.batch_size]]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> Ids:
    """A permutation (count,) drawn from (seed, epoch); kept, since an epoch's steps all read it."""
    order: Ids = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class CandidateSampler:
    """Draws, for each query of a step, some of its scored candidates: a pure function of (seed, step, query)."""

    candidates: Candidates
    per_query: int
    seed: int
    later: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # (B, K) drawn only where a query has no others left

    def __post_init__(self) -> None:
        if np.any(np.diff(self.candidates.query_ids) <= 0):
            raise ValueError("candidates must have one row a query, sorted by query id")

    def draw(self, step: int, query_ids: Ids) -> Ids:
        """Item ids (Q, per_query) for the queries (Q,); -1 where a query has fewer candidates."""
        rows = np.searchsorted(self.candidates.query_ids, query_ids)
        found = np.minimum(rows, len(self.candidates.query_ids) - 1)
        unknown = query_ids[self.candidates.query_ids[found] != query_ids]
        if len(unknown):
            raise KeyError(
                f"no candidates were mined for {len(unknown)} {self.candidates.direction} queries: {_some(unknown)}"
            )
        items = self.candidates.item_ids[rows]  # (Q, K)
        # one key a cell, so that a query's draw does not depend on which other queries share its batch
        keys = hash_uniform((self.seed, step), query_ids, items.shape[1])
        if self.later is not None:
            keys[self.later[rows]] += 1.0
        keys[items < 0] = 2.0  # missing candidates come last
        chosen = np.argsort(keys, axis=1, kind="stable")[:, : self.per_query]
        return np.take_along_axis(items, chosen, axis=1)


def share_of(n: int, index: int, count: int) -> slice:
    """Part ``index`` of ``count`` of ``n`` items: contiguous, sizes differ by one at most."""
    return slice(n * index // count, n * (index + 1) // count)


def hash_uniform(draw: Sequence[int], ids: Ids, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform numbers (N, width) in [0, 1), each a function of (draw, id, column) alone: SplitMix64.

    ``draw`` names what is drawn for: seed and step, and a number of its own for each further purpose.
    """
    start = np.random.default_rng(list(draw)).integers(0, 2**64, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = start + ids.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.arange(width, dtype=np.uint64)[None, :] * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return np.asarray((x >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def _some(ids: Sequence[int] | Ids, most: int = 5) -> str:
    shown = ", ".join(str(int(item)) for item in ids[:most])
    return shown + (", ..." if len(ids) > most else "")
