"""What all measurements share: the experiment, the sample, a temporary folder, and inputs made ready in there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill.embed import keeping, live_source
from distill.experiment import PREPARED_AT_ONCE, PooledOnly
from distill.features import Features, write_features
from distill.inference import bytes_of, evaluating
from distill.planning.measured import Source
from distill.planning.ranges import Range
from distill.planning.sample import Clocked, Sample, StandIn, settling

if TYPE_CHECKING:
    import torch

    from distill.batches import Source as Inputs
    from distill.experiment import Experiment
    from distill.planning.measured import Shape
    from distill.protocols import Side
    from distill.timings import Timings

User = Literal["teacher", "student"]
_LEAST_BATCHES = 6  # of which the first is left out
_PIECES = 5
_MOST = {"image": 512, "text": 4096}


@dataclass
class Probe:
    """One measurement at work."""

    x: Experiment
    shape: Shape  # that is planned for: what is kept on disk depends on it
    folder: Path
    by_processor: bool = False  # seconds are those of this process's processors, not on the clock
    sample: Sample = field(init=False)
    _made: dict[str, tuple[Source, StandIn]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sample = Sample.of(self.x.corpus, self.x.recipe.seed)

    @property
    def device(self) -> torch.device:
        """Where models are."""
        found: torch.device = self.x.accelerator.device
        return found

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, from some moment on."""
        return time.process_time if self.by_processor else time.perf_counter

    def so_far(self, timings: Timings, name: str) -> float:
        """Seconds of a stage, by that clock."""
        return timings.so_far(name, cpu=self.by_processor)

    @property
    def settle(self) -> Callable[[], object]:
        """Waits for it."""
        return settling(self.device)

    @property
    def looked_at(self) -> int:
        """Pictures whose inputs were made."""
        rows = [found.rows for source, found in self._made.values() if source.side == "image"]
        return len(np.unique(np.concatenate(rows)))

    @property
    def sources(self) -> tuple[Source, ...]:
        """What was measured of inputs so far; models that share some are named together."""
        return tuple(source for source, _ in self._made.values())

    def ready(self, model: Any, side: Side, user: User, *, seconds: float, tokens: bool = False) -> Inputs:
        """Inputs of any rows for the model, ready on disk; making them is measured where that was not done before."""
        items = self.shape.all_images if side == "image" else self.shape.all_texts
        budget = int(self.x.recipe.prepared_gib * 2**30)
        kept = keeping(self.x.corpus, side, model, items=items, prepared_budget_bytes=budget)
        mark = kept.mark or f"live-{user}-{side}"
        if mark not in self._made:
            self._made[mark] = self._measured(model, side, kept.kind, kept.after, seconds, mark)
        source, found = self._made[mark]
        users = tuple(dict.fromkeys((*source.users, user)))
        self._made[mark] = (source.model_copy(update={"users": users}), found)
        features = found.source
        if not tokens and isinstance(features, Features) and "pooled" in features.fields:
            return StandIn(PooledOnly(features), found.rows)
        return found

    def _measured(
        self, model: Any, side: Side, kind: Any, after: Any, seconds: float, mark: str
    ) -> tuple[Source, StandIn]:
        """The first batches tell how many fit into ``seconds``; these are then timed from one end to the next."""
        at_once = PREPARED_AT_ONCE[side]
        of_thread = time.thread_time if self.by_processor else time.perf_counter
        live, tower = live_source(self.x.corpus, side, model), after or (lambda inputs: inputs)
        tried = self.sample.rows(side, at_once, seed=1)
        with evaluating(model):
            inputs = live(tried)
            began = time.perf_counter()
            tower(live(tried))
            took = time.perf_counter() - began
            count = int(np.clip(seconds / took, _LEAST_BATCHES, _MOST[side] // at_once)) * at_once
            rows, folder = self.sample.rows(side, count, seed=2), self.folder / mark
            making, towering = Clocked(live, clock=of_thread), Clocked(tower, self.settle, of_thread)
            ends = Clocked(towering, clock=self.clock)
            features = write_features(folder, mark, rows, making, batch_size=at_once, after=ends)
        whole = len(rows) // at_once
        each = _each(ends.ended[:whole], at_once) if whole > 2 else [took / len(tried)]
        source = Source(
            users=(),
            side=side,
            kind=kind,
            wall=around_mean(each),
            host=Range.of([second / at_once for second in making.took[:whole] or [took]]),
            device=Range.of([second / at_once for second in towering.took[:whole] or [took]])
            if after
            else Range.exactly(0),
            bytes=0 if kind == "live" else _bytes_in(folder) / len(rows),
            input_bytes=bytes_of(inputs) / len(tried),
        )
        return source, StandIn(features, rows)


def _each(ends: list[float], at_once: int) -> list[float]:
    """Seconds an item from batch to batch, some batches together: what is prepared ahead ends in bursts."""
    step = max(1, (len(ends) - 1) // _PIECES)
    marks = ends[::step]
    return [(end - begin) / (step * at_once) for begin, end in pairwise(marks)]


def around_mean(samples: Sequence[float]) -> Range:
    """The mean, which sums are made of, within the middle half of the samples or beyond it."""
    half, mean = Range.of(samples), float(np.mean(samples))
    return Range(min(half.low, mean), mean, max(half.high, mean))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def repeated(
    work: Callable[[int], object], *, seconds: float, probe: Probe, least: int = 3, most: int = 40
) -> tuple[float, list[float]]:
    """Seconds of the first call, and of each one after it: so many as fit.

    Args:
        work: told the number of the call, from 0.
        seconds: for all calls after the first, about.
        probe: by whose clock; its device is waited for.
        least: calls after the first, however slow.
        most: at most so many.
    """
    took, until = list[float](), time.perf_counter() + seconds
    while len(took) <= least or (len(took) <= most and time.perf_counter() < until):
        began = probe.clock()
        work(len(took))
        probe.settle()
        took.append(probe.clock() - began)
    return took[0], took[1:]
