"""What a measurement looks at: some pictures with their captions, and sources that answer any row with one of these.

A step or a search of the whole corpus can so be made on the sample's inputs: what it costs depends on how many items
there are and how large they are, not on which.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.inference import threads_of
from distill.profiling import Profiler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

    from distill.data.corpus import Corpus
    from distill.protocols import Ids, Inputs, Side

MOST_IMAGES = 1024


@dataclass(frozen=True)
class Sample:
    """Rows of the training split, ascending: pictures drawn with a seed, and captions of theirs."""

    images: Ids
    texts: Ids

    @classmethod
    def of(cls, corpus: Corpus, seed: int) -> Sample:
        """At most so many pictures as are ever looked at; captions of all of them."""
        images = corpus.split("train").images
        drawn = np.sort(np.random.default_rng([seed, len(images)]).permutation(images)[:MOST_IMAGES])
        pairs = corpus.split_pairs("train")
        return cls(drawn, np.unique(pairs[np.isin(pairs[:, 0], drawn), 1]))

    def rows(self, side: Side, count: int, seed: int = 0) -> Ids:
        """``count`` rows of a side, ascending; all where there are fewer."""
        whole = self.images if side == "image" else self.texts
        return np.sort(np.random.default_rng([seed, len(whole)]).permutation(whole)[:count])


@dataclass(frozen=True)
class StandIn:
    """A source that answers row r with the inputs of one of the rows it has."""

    source: Callable[[Ids], Inputs]
    rows: Ids

    def __call__(self, rows: Ids) -> Inputs:
        """Inputs of as many items."""
        return self.source(self.rows[np.asarray(rows, np.int64) % len(self.rows)])

    def lengths(self, rows: Ids) -> Ids:
        """As the source has them; zeros where it does not know."""
        lengths = getattr(self.source, "lengths", None)
        if lengths is None:
            return np.zeros(len(rows), np.int64)
        found: Ids = lengths(self.rows[np.asarray(rows, np.int64) % len(self.rows)])
        return found


@dataclass(frozen=True)
class Clocked:
    """A source, or what is done to its inputs, whose seconds are noted call by call."""

    work: Callable[[Any], Any]
    settle: Callable[[], object] = lambda: None  # waits for a device that works by itself
    clock: Callable[[], float] = time.perf_counter
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def __call__(self, given: Any) -> Any:
        """What ``work`` gives."""
        self.began.append(self.clock())
        found = self.work(given)
        self.settle()
        self.ended.append(self.clock())
        return found

    @property
    def threads(self) -> int:
        """As many as the source bears."""
        return threads_of(self.work)

    @property
    def took(self) -> list[float]:
        """Seconds of each call, in the order of their ends; of one thread."""
        return [end - begin for begin, end in zip(self.began, self.ended, strict=True)]


class StepClock(Profiler):
    """Notes when each step of a training has ended; records nothing else."""

    def __init__(self, settle: Callable[[], object], clock: Callable[[], float]) -> None:
        super().__init__(None)
        self.ended: list[float] = []
        self._settle, self._clock = settle, clock

    @contextmanager
    def over(self, folder: Path, start: int, *, writes: bool = True) -> Iterator[Callable[[], None]]:
        """A training; begins the notes anew."""
        self.ended = [self._clock()]
        yield self._note

    def _note(self) -> None:
        self._settle()
        self.ended.append(self._clock())

    def steps(self, checkpoint: float) -> tuple[float, list[float]]:
        """Seconds of the first step, and of each later one; the last wrote a checkpoint, which is not counted."""
        took = np.diff(self.ended).tolist()
        took[-1] = max(1e-9, took[-1] - checkpoint)
        return took[0], took[1:]


@dataclass(frozen=True)
class StandInVectors:
    """Unit vectors of any rows, all of one kind: for losses that read those of the teacher's towers."""

    dim: int

    def __call__(self, image_ids: Ids, text_ids: Ids) -> tuple[Tensor, Tensor]:
        """(N, D) and (M, D)."""
        return self.of(image_ids), self.of(text_ids)

    def of(self, rows: Ids) -> Tensor:
        """(N, D), the same for the same rows."""
        import torch

        turned = torch.from_numpy(np.asarray(rows, np.float32))[:, None] + torch.arange(self.dim)
        return torch.nn.functional.normalize(torch.sin(turned), dim=1)


def settling(device: torch.device) -> Callable[[], object]:
    """Waits for what the device has in hand."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
