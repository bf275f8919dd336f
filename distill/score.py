"""The scoring stage: ask the teacher for every pair that the store lacks, in work units that survive any kill.

Each distinct image of a unit is encoded once, each distinct text once a run where the texts' memory fits a byte budget.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from distill import stopping
from distill.inference import bytes_of, device_of, evaluating, prefetched, threads_of, to_device
from distill.progress import Progress
from distill.protocols import Distant
from distill.textmemory import TextMemory
from distill.work import Work, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    from distill.pairtable import Scores
    from distill.protocols import Ids, Inputs, Memory, Teacher
    from distill.store import ScoreStore

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreOptions:
    """How scoring is cut up. None of it changes a score.

    ``pairs_per_unit`` is what a kill can lose; ``pairs_per_chunk`` go to one teacher call and are halved when the
    device runs out of memory, as ``images_per_batch`` are. ``image_memory_bytes`` bounds what is kept of the images
    encoded together: a large teacher's keys and values take tens of megabytes an image. ``text_memory_bytes`` bounds
    what is kept of all texts together; above it they are encoded again for each unit. ``device`` defaults to the
    teacher's.
    """

    pairs_per_unit: int = 4096
    pairs_per_chunk: int = 1024
    images_per_batch: int = 16
    texts_per_batch: int = 256
    image_memory_bytes: int = 1 << 30
    text_memory_bytes: int = 1 << 30
    device: torch.device | str | None = None
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("pairs_per_unit", "pairs_per_chunk", "images_per_batch", "texts_per_batch", "image_memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ScoreReport:
    """What a call of ``score_pairs`` did. Pairs are distinct (image, text) pairs."""

    asked: int  # of the teacher
    served_from_store: int
    seconds: float

    @property
    def pairs_per_second(self) -> float:
        """Rate of the asked pairs, encoding and writing included."""
        return self.asked / self.seconds if self.seconds > 0 else 0.0


def score_pairs(
    teacher: Teacher,
    store: ScoreStore,
    image_ids: ArrayLike,
    text_ids: ArrayLike,
    *,
    image_source: Callable[[Ids], Inputs],
    text_source: Callable[[Ids], Inputs],
    options: ScoreOptions | None = None,
    kept: Callable[[int], object] = lambda pairs: None,
) -> ScoreReport:
    """Put a score of every pair (image_ids[p], text_ids[p]) into the store; pairs with an id of -1 are passed over.

    A pair given twice, or there already, is not asked. What is finished is kept whenever the process ends, and ``kept``
    is told how many pairs a finished unit has.

    Raises:
        NonFiniteScoresError: naming the pairs; their unit is not kept, earlier ones are.
        ValueError: the store belongs to another teacher, or the teacher gives another number of scores than pairs.
        torch.OutOfMemoryError: when a single pair of a single image does not fit.
    """
    options = options or ScoreOptions()
    check_same_teacher(teacher, store)
    started = time.monotonic()
    work = work_of(store, image_ids, text_ids, options.pairs_per_unit)
    scoring = Scoring(teacher, store, work, image_source=image_source, text_source=text_source, options=options)
    return scoring.report(range(len(work.units)), kept, started=started)


class Scoring:
    """A teacher at work on units, some at a time; what it holds of texts stays for the next."""

    def __init__(
        self,
        teacher: Teacher,
        store: ScoreStore,
        work: Work,
        *,
        image_source: Callable[[Ids], Inputs],
        text_source: Callable[[Ids], Inputs],
        options: ScoreOptions,
    ) -> None:
        """The store is the teacher's (``check_same_teacher``) and the work was cut for it."""
        if options.device is None:
            options = replace(options, device=device_of(teacher))
        if isinstance(teacher, Distant):  # calls as long as their requests take to overlap; no memories are kept here
            many = getattr(image_source, "images_at_once", teacher.images_at_once)
            options = replace(options, images_per_batch=many, pairs_per_chunk=max(options.pairs_per_chunk, 64 * many))
        self._teacher, self._store, self._work, self._options = teacher, store, work, options
        self._run = _Run(teacher, text_source, options, work.every_text)
        self._image_source = image_source

    def do(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Score these units and write each into the store; yields (number, pairs) of each once its file is there.

        A signal that comes meanwhile is heeded after each unit.

        Raises:
            NonFiniteScoresError: naming the pairs; their unit is not kept, earlier ones are.
        """
        work = self._work
        units = [work.units[number] for number in numbers]
        with evaluating(self._teacher):
            self._run.hold_texts(work.texts, units)
            scored = self._run.score(work.images, work.texts, units, self._image_source)
            with stopping.finishing():
                for number, unit, scores in zip(numbers, units, scored, strict=True):
                    self._store.write_unit(work.images[unit], work.texts[unit], scores)
                    yield number, len(scores)
                    stopping.heed()

    def report(self, numbers: Sequence[int], kept: Callable[[int], object], *, started: float) -> ScoreReport:
        """As ``do`` with progress shown; ``kept`` is told of each unit's pairs. ``started``: on the monotonic clock."""
        asked, served = sum(_length(self._work.units[number]) for number in numbers), self._work.served
        if asked:
            with Progress(asked, _label(served, asked), unit="pairs", show=self._options.show_progress) as progress:
                for _, pairs in self.do(numbers):
                    progress.advance(pairs)
                    kept(pairs)
        report = ScoreReport(asked, served, time.monotonic() - started)
        _LOG.info("teacher: %d pairs asked, %d served from the store", report.asked, report.served_from_store)
        return report


def _length(unit: slice) -> int:
    return int(unit.stop - unit.start)


def _label(served: int, asked: int) -> str:
    return f"scoring ({100 * served / (served + asked):.0f} % from the store)" if served else "scoring"


def teacher_scores(store: ScoreStore, image_ids: ArrayLike, text_ids: ArrayLike) -> Scores:
    """Scores of pairs that must all be there, in the shape both ids broadcast to; NaN only where an id is -1.

    Raises:
        MissingScoresError: with the count and the first pairs.
    """
    return store.require(image_ids, text_ids)


def check_same_teacher(teacher: Teacher, store: ScoreStore) -> None:
    """Raises ValueError where the store is of another teacher."""
    found, wanted = (teacher.identity, teacher.score_kind), (store.origin.teacher_identity, store.origin.score_kind)
    if found != wanted:
        raise ValueError(
            f"the teacher is {found[0]} ({found[1]}) but the store was made with {wanted[0]} ({wanted[1]}); scores of "
            f"different teachers are never mixed: open a store for this one"
        )


class _Pieces:
    """Does work on ranges of at most ``size``, and halves ``size`` when the device runs out of memory."""

    def __init__(self, size: int, what: str) -> None:
        self.size, self._what = size, what

    def run(self, n: int, work: Callable[[int, int], Tensor]) -> list[Tensor]:
        import torch

        done, start = [], 0
        while start < n:
            stop = min(n, start + self.size)
            piece = None
            try:
                piece = work(start, stop)
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
            if piece is None:  # outside the handler, so that the failed call's tensors are free
                self.size = (stop - start) // 2
                _LOG.warning(
                    "device out of memory at %d %s in one go; going on with %d", stop - start, self._what, self.size
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            done.append(piece)
            start = stop
        return done


class _Run:
    """A teacher, its text memory and the sizes that out-of-memory errors have left."""

    def __init__(
        self, teacher: Teacher, text_source: Callable[[Ids], Inputs], options: ScoreOptions, every_text: Ids
    ) -> None:
        self._teacher, self._options = teacher, options
        self._images = _Pieces(options.images_per_batch, "images")
        self._pairs = _Pieces(options.pairs_per_chunk, "pairs")
        self._texts = TextMemory(teacher, text_source, options, every_text)

    def hold_texts(self, texts: Ids, units: list[slice]) -> None:
        """Encode the texts of these units that are not held yet, where all texts fit the budget."""
        self._texts.hold([np.unique(texts[unit]) for unit in units])

    def score(
        self, images: Ids, texts: Ids, units: list[slice], image_source: Callable[[Ids], Inputs]
    ) -> Iterator[Scores]:
        """Scores (pairs of the unit,) of one unit after another; the next images are prepared meanwhile."""
        import torch

        blocks = [(n, block) for n, unit in enumerate(units) for block in self._blocks(images, unit)]
        last = {n: block for n, block in blocks}
        done: list[Tensor] = []
        memory, rows = self._texts.held
        prepared = prefetched(
            lambda job: image_source(np.unique(images[job[1]])), blocks, threads=threads_of(image_source)
        )
        for (n, block), inputs in prepared:
            if memory is None or (self._texts.beyond and not done):
                memory, rows = self._texts.encoded(np.unique(texts[units[n]]))
            image_rows = np.unique(images[block], return_inverse=True)[1]
            done += self._score_block(inputs, memory, image_rows, rows(texts[block]))
            if block is last[n]:
                yield torch.cat(done).float().cpu().numpy()
                done = []

    def _blocks(self, images: Ids, unit: slice) -> Iterator[slice]:
        """Slices of the unit's pairs that hold ``images_per_batch`` images each."""
        starts = np.flatnonzero(np.diff(images[unit], prepend=-1))[:: self._options.images_per_batch] + unit.start
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), unit.stop], strict=True):
            yield slice(start, stop)

    def _score_block(self, inputs: Inputs, texts: Memory, image_rows: Ids, text_rows: Ids) -> list[Tensor]:
        """Scores of pairs ascending in ``image_rows``, which index the images of ``inputs``."""

        def encode_and_score(start: int, stop: int) -> Tensor:
            import torch

            part = {name: tensor[start:stop] for name, tensor in inputs.items()}
            memory = self._teacher.encode_images(to_device(part, self._options.device))
            self._fit_images(bytes_of(memory) // (stop - start))
            first, end = np.searchsorted(image_rows, [start, stop])
            return torch.cat(self._score_rows(memory, texts, image_rows[first:end] - start, text_rows[first:end]))

        return self._images.run(int(image_rows[-1]) + 1, encode_and_score)

    def _fit_images(self, bytes_per_image: int) -> None:
        """From the next batch on, encode no more images together than the budget holds."""
        most = max(1, self._options.image_memory_bytes // max(1, bytes_per_image))
        if most < self._images.size:
            _LOG.info("an image's memory takes %d bytes: %d images at a time from here on", bytes_per_image, most)
            self._images.size = most

    def _score_rows(self, images: Memory, texts: Memory, image_rows: Ids, text_rows: Ids) -> list[Tensor]:
        import torch

        rows = [torch.from_numpy(ids.astype(np.int64)).to(self._options.device) for ids in (image_rows, text_rows)]

        def score(start: int, stop: int) -> Tensor:
            scores = self._teacher.score(images, texts, rows[0][start:stop], rows[1][start:stop])
            if scores.shape != (stop - start,):
                raise ValueError(
                    f"the teacher must give ({stop - start},) scores of as many pairs, got {tuple(scores.shape)}"
                )
            return scores

        return self._pairs.run(len(image_rows), score)
