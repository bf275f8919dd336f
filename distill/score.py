"""The scoring stage: ask the teacher for every pair that the store lacks, in work units that survive any kill.

Each distinct image of a unit is encoded once, each distinct text once a run where the texts' memory fits a byte budget.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import stopping
from distill.inference import batches_of, bytes_of, device_of, evaluating, joined, prefetched, threads_of, to_device
from distill.progress import Progress
from distill.protocols import Distant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
    what is kept of all texts together; above it they are encoded again for each unit. ``shard`` = (index, count): only
    every count-th image. ``device`` defaults to the teacher's.
    """

    pairs_per_unit: int = 4096
    pairs_per_chunk: int = 1024
    images_per_batch: int = 16
    texts_per_batch: int = 256
    image_memory_bytes: int = 1 << 30
    text_memory_bytes: int = 1 << 30
    shard: tuple[int, int] = (0, 1)
    device: torch.device | str | None = None
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("pairs_per_unit", "pairs_per_chunk", "images_per_batch", "texts_per_batch", "image_memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard is (index, count) with 0 <= index < count, got {self.shard}")


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
    if options.device is None:
        options = replace(options, device=device_of(teacher))
    if isinstance(teacher, Distant):  # a call is as long as its requests take to overlap, and keeps no memories here
        many = teacher.images_at_once
        options = replace(options, images_per_batch=many, pairs_per_chunk=max(options.pairs_per_chunk, 64 * many))
    _check_same_teacher(teacher, store)
    store.refresh()
    started = time.monotonic()
    images, texts = _distinct(store, image_ids, text_ids, options.shard)
    missing = store.missing(images, texts)
    # Cut before leaving out what is there: a score's last digits depend on what it is computed beside, and so a run
    # that was killed computes its unfinished units as it would have.
    units = _missing_units(_unit_cuts(images, options.pairs_per_unit), missing)
    every_text = np.unique(texts)
    images, served, texts = images[missing], int((~missing).sum()), texts[missing]
    if len(images):
        run = _Run(teacher, text_source, options)
        with (
            evaluating(teacher),
            Progress(len(images), _label(served, len(images)), unit="pairs", show=options.show_progress) as progress,
        ):
            run.prepare_texts(every_text, needed=np.unique(texts))
            scored = run.score(images, texts, units, image_source)
            with stopping.finishing():
                for unit, scores in zip(units, scored, strict=True):
                    store.write_unit(images[unit], texts[unit], scores)
                    progress.advance(len(scores))
                    kept(len(scores))
                    stopping.heed()
    report = ScoreReport(len(images), served, time.monotonic() - started)
    _LOG.info("teacher: %d pairs asked, %d served from the store", report.asked, report.served_from_store)
    return report


def _label(served: int, asked: int) -> str:
    return f"scoring ({100 * served / (served + asked):.0f} % from the store)" if served else "scoring"


def teacher_scores(store: ScoreStore, image_ids: ArrayLike, text_ids: ArrayLike) -> Scores:
    """Scores of pairs that must all be there, in the shape both ids broadcast to; NaN only where an id is -1.

    Raises:
        MissingScoresError: with the count and the first pairs.
    """
    return store.require(image_ids, text_ids)


def _check_same_teacher(teacher: Teacher, store: ScoreStore) -> None:
    found, wanted = (teacher.identity, teacher.score_kind), (store.origin.teacher_identity, store.origin.score_kind)
    if found != wanted:
        raise ValueError(
            f"the teacher is {found[0]} ({found[1]}) but the store was made with {wanted[0]} ({wanted[1]}); scores of "
            f"different teachers are never mixed: open a store for this one"
        )


def _distinct(store: ScoreStore, image_ids: ArrayLike, text_ids: ArrayLike, shard: tuple[int, int]) -> tuple[Ids, Ids]:
    """Distinct pairs of this shard, by image, then text."""
    images, texts = (np.asarray(ids, np.int64).reshape(-1) for ids in (image_ids, text_ids))
    if len(images) != len(texts):
        raise ValueError(f"a pair is one image and one text; got {len(images)} images and {len(texts)} texts")
    n_images, n_texts = store.origin.n_images, store.origin.n_texts
    for name, ids, end in (("image", images, n_images), ("text", texts, n_texts)):
        if len(ids) and ids.max() >= end:
            raise ValueError(f"{name} id {ids.max()} is outside the corpus, which has {end} {name}s")
    there = (images >= 0) & (texts >= 0) & (images % shard[1] == shard[0])
    first, second = np.divmod(np.unique(images[there] * n_texts + texts[there]), n_texts)
    return first, second


def _unit_cuts(images: Ids, pairs_per_unit: int) -> list[tuple[int, int]]:
    """Even slices of pairs sorted by image, moved to where an image ends if that is near."""
    n_units = -(-len(images) // pairs_per_unit)
    ideal = np.linspace(0, len(images), n_units + 1).round().astype(np.int64)
    borders = np.concatenate([[0], np.flatnonzero(np.diff(images)) + 1, [len(images)]])
    after = np.minimum(np.searchsorted(borders, ideal), len(borders) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(borders[after] - ideal <= ideal - borders[before], borders[after], borders[before])
    cuts = np.unique(np.where(np.abs(nearest - ideal) <= pairs_per_unit // 4, nearest, ideal)).tolist()
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _missing_units(cuts: list[tuple[int, int]], missing: np.ndarray[Any, np.dtype[np.bool_]]) -> list[slice]:
    """The units as slices of the missing pairs alone; those with none are left out."""
    before = np.concatenate([[0], np.cumsum(missing)])
    units = [slice(int(before[start]), int(before[stop])) for start, stop in cuts]
    return [unit for unit in units if unit.start < unit.stop]


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
    """One call's teacher, its text memory and the sizes that out-of-memory errors have left."""

    def __init__(self, teacher: Teacher, text_source: Callable[[Ids], Inputs], options: ScoreOptions) -> None:
        self._teacher, self._text_source, self._options = teacher, text_source, options
        self._images = _Pieces(options.images_per_batch, "images")
        self._pairs = _Pieces(options.pairs_per_chunk, "pairs")
        self._texts: tuple[Ids, Memory] | None = None  # ids ascending and their memory: all of the run, or none

    def prepare_texts(self, text_ids: Ids, *, needed: Ids) -> None:
        """Encode the needed texts now, with what shares their batches, if their memory fits the budget.

        Both ascending. Batches are cut over all of ``text_ids``, so that a text is always encoded beside the same ones.
        """
        memories: list[Mapping[str, Tensor]] = []
        batches = [
            batch for batch in batches_of(text_ids, self._options.texts_per_batch) if np.isin(batch, needed).any()
        ]
        text_ids = np.concatenate(batches)
        for memory in self._encoded_texts(batches):
            memories.append(memory)
            so_far = sum(bytes_of(part) for part in memories)
            seen = min(len(text_ids), len(memories) * self._options.texts_per_batch)
            if so_far / seen * len(text_ids) > self._options.text_memory_bytes:
                _LOG.info("the memory of %d texts is beyond the budget; texts are encoded unit by unit", len(text_ids))
                return
        self._texts = (text_ids, joined(memories))

    def score(
        self, images: Ids, texts: Ids, units: list[slice], image_source: Callable[[Ids], Inputs]
    ) -> Iterator[Scores]:
        """Scores (pairs of the unit,) of one unit after another; the next images are prepared meanwhile."""
        import torch

        blocks = [(n, block) for n, unit in enumerate(units) for block in self._blocks(images, unit)]
        last = {n: block for n, block in blocks}
        done: list[Tensor] = []
        text_ids, memory = self._texts or (texts[:0], {})
        prepared = prefetched(
            lambda job: image_source(np.unique(images[job[1]])), blocks, threads=threads_of(image_source)
        )
        for (n, block), inputs in prepared:
            if self._texts is None and not done:
                text_ids = np.unique(texts[units[n]])
                memory = joined(list(self._encoded_texts(batches_of(text_ids, self._options.texts_per_batch))))
            image_rows = np.unique(images[block], return_inverse=True)[1]
            done += self._score_block(inputs, memory, image_rows, np.searchsorted(text_ids, texts[block]))
            if block is last[n]:
                yield torch.cat(done).float().cpu().numpy()
                done = []

    def _blocks(self, images: Ids, unit: slice) -> Iterator[slice]:
        """Slices of the unit's pairs that hold ``images_per_batch`` images each."""
        starts = np.flatnonzero(np.diff(images[unit], prepend=-1))[:: self._options.images_per_batch] + unit.start
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), unit.stop], strict=True):
            yield slice(start, stop)

    def _encoded_texts(self, batches: list[Ids]) -> Iterator[Memory]:
        for _, inputs in prefetched(self._text_source, batches):
            yield self._teacher.encode_texts(to_device(inputs, self._options.device))

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
