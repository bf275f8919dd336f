"""The embedding stage: where a model's inputs come from, and the vectors of many items.

A source is any ``Callable[[Ids], Inputs]``. Three are made here, the cheapest that the model allows: outputs of a
frozen tower kept on disk, prepared inputs kept on disk, or decoding and preparing every time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import numpy as np

from distill.features import Features, write_features
from distill.frozen import FrozenTower, frozen_mark
from distill.inference import batches_of, bytes_of, device_of, evaluating, prefetched, threads_of, to_device
from distill.progress import Progress
from distill.protocols import Distant, Freezable, Ids, Inputs, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from distill.data.corpus import Corpus
    from distill.protocols import Image, Side, Student, Teacher

_LOG = logging.getLogger(__name__)
_NORM_TOLERANCE = 0.02  # half precision rounds a unit vector's length by up to half a percent
_SHOWN = 5
_KEPT_EVERY_S = 30
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Source = Callable[[Ids], Inputs]


class NoContrastiveHeadError(ValueError):
    """A teacher without vectors of its own was asked for them."""


class Preparing(Protocol):
    """What sources need of a model: students and teachers have it."""

    def prepare_images(self, images: Sequence[Image]) -> Inputs: ...

    def prepare_texts(self, texts: Sequence[str]) -> Inputs: ...


@runtime_checkable
class PreparesAlike(Protocol):
    """A model whose preparation is a fixed function of the item, so that prepared inputs can be kept on disk."""

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of everything that ``prepare_images`` or ``prepare_texts`` depends on."""


@dataclass(frozen=True)
class LiveSource:
    """Decodes and prepares items each time they are asked for. As picklable as the corpus and the model are."""

    corpus: Corpus
    side: Side
    model: Preparing

    def __call__(self, rows: Ids) -> Inputs:
        """Prepared inputs of these rows of the corpus, in this order."""
        if self.side == "image":
            return self.model.prepare_images(self.corpus.load_images(rows))
        return self.model.prepare_texts([self.corpus.texts[row] for row in rows.tolist()])

    @property
    def threads(self) -> int:
        """How many threads may prepare at once: decoding pictures takes several, a tokenizer bears one."""
        return min(4, os.cpu_count() or 1) if self.side == "image" else 1

    def lengths(self, rows: Ids) -> Ids:
        """How long each item is, for batches of like length: characters of a text; images are all alike."""
        if self.side == "image":
            return np.zeros(len(rows), np.int64)
        return np.asarray([len(self.corpus.texts[row]) for row in rows.tolist()], np.int64)


@dataclass(frozen=True)
class DistantSource:
    """What travels to a teacher elsewhere: rows of a corpus that is there too, else texts and files as they are."""

    corpus: Corpus
    side: Side
    model: Distant

    def __call__(self, rows: Ids) -> Inputs:
        """Inputs of these rows of the corpus, in this order.

        Raises:
            DataError: a picture is not what it was when the corpus was loaded.
        """
        if self.model.knows(self.corpus.fingerprint):
            return self.model.prepare_rows(self.side, rows)
        if self.side == "image":
            return self.model.prepare_files(self.corpus.pictures.encoded(rows))
        return cast("Teacher", self.model).prepare_texts([self.corpus.texts[row] for row in rows.tolist()])

    @property
    def images_at_once(self) -> int:
        """Images whose pairs make a call: fewer where their files travel."""
        known = self.model.knows(self.corpus.fingerprint)
        return self.model.images_at_once if known else self.model.files_at_once


def live_source(corpus: Corpus, side: Side, model: Preparing) -> LiveSource | DistantSource:
    """The source that keeps nothing: prepared items, or what a teacher elsewhere is sent (``Distant``)."""
    return DistantSource(corpus, side, model) if isinstance(model, Distant) else LiveSource(corpus, side, model)


def item_source(
    corpus: Corpus,
    side: Side,
    model: Preparing,
    cache_dir: str | Path,
    *,
    batch_size: int = 64,
    prepared_budget_bytes: int = 8 << 30,
    dtype: str | None = None,
) -> LiveSource | DistantSource | Features:
    """The cheapest source of a side's items for a model; what it computes is reused by every later run.

    What a teacher elsewhere is sent (``Distant``), else a frozen tower's outputs (``Freezable``), else prepared inputs
    where the model offers ``prepare_identity`` and the whole side fits ``prepared_budget_bytes``, else live. Files
    go to ``cache_dir/features``.

    Args:
        corpus: Where the items come from.
        side: "image" or "text".
        model: A student or a teacher.
        cache_dir: Folder that holds the caches of all models and corpora.
        batch_size: Items prepared, and run through a frozen tower, at a time.
        prepared_budget_bytes: Most bytes on disk for one side's prepared inputs; frozen outputs are not bounded by it.
        dtype: "float16" halves the bytes of a frozen tower's outputs, at half precision.
    """
    if isinstance(model, Distant):
        return live_source(corpus, side, model)
    rows = np.arange(corpus.n_images if side == "image" else corpus.n_texts, dtype=np.int64)
    kept = keeping(corpus, side, model, items=len(rows), prepared_budget_bytes=prepared_budget_bytes, dtype=dtype)
    live = live_source(corpus, side, model)
    if kept.kind == "live":
        _LOG.info("%ss are prepared anew each time they are needed", side)
        return live
    folder = Path(cache_dir) / "features" / f"{kept.kind}-{side}s-{kept.mark}"
    with evaluating(model):
        return write_features(folder, kept.mark, rows, live, batch_size=batch_size, dtype=kept.dtype, after=kept.after)


@dataclass(frozen=True)
class Keeping:
    """How a side's items are kept for a model: as outputs of its frozen tower, as prepared inputs, or not at all."""

    kind: Literal["frozen", "prepared", "live"]
    mark: str = ""  # fingerprint of what is kept
    after: Callable[[Inputs], Inputs] | None = None  # makes frozen outputs of prepared inputs
    dtype: str | None = None


def keeping(
    corpus: Corpus, side: Side, model: Preparing, *, items: int, prepared_budget_bytes: int, dtype: str | None = None
) -> Keeping:
    """How ``items`` of this side are kept for a model, see ``item_source``; one item is prepared to see how large."""
    if isinstance(model, Freezable) and (mark := frozen_mark(corpus, side, model, dtype=dtype)) is not None:
        return Keeping("frozen", mark, FrozenTower(model, side), dtype)
    if isinstance(model, PreparesAlike) and _fits(live_source(corpus, side, model), items, prepared_budget_bytes):
        return Keeping("prepared", fingerprint("prepared", side, model.prepare_identity(side), corpus.fingerprint))
    return Keeping("live")


def embed(
    student: Student,
    source: Source,
    rows: Ids,
    side: Side,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    show: bool | None = None,
) -> Vectors:
    """Unit vectors (N, D) of the rows by a student, in their order. ``device`` defaults to the student's.

    Items of like length go into one batch where the source knows lengths.

    Raises:
        ValueError: a vector is not finite or not of unit length; names the rows.
    """
    with evaluating(student):
        return _embedded(
            _student_encoder(student, side),
            source,
            rows,
            f"embedding {side}s",
            _Batching(batch_size, device or device_of(student), show),
        )


class Sink(Protocol):
    """Takes vectors in any order. ``distill.shard_writer.ShardWriter`` is one."""

    done: int  # calls of ``put`` that need not come again

    def put(self, rows: Ids, vectors: Vectors) -> None: ...

    def keep(self) -> None: ...


def embed_into(
    sink: Sink,
    student: Student,
    source: Source,
    rows: Ids,
    side: Side,
    *,
    share: slice,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> None:
    """As ``embed``, of a share of the rows, batch after batch into ``sink``: never all of it in memory.

    What is put is told to be kept every half minute; batches that were kept before are not made again.
    """
    encode, kept = _student_encoder(student, side), time.monotonic()
    batching = _Batching(batch_size, device or device_of(student), None)
    with evaluating(student):
        for places, found in _batches(encode, source, rows[share], f"embedding {side}s", batching, skip=sink.done):
            sink.put(places + share.start, found)
            if time.monotonic() - kept > _KEPT_EVERY_S:
                sink.keep()
                kept = time.monotonic()
    sink.keep()


def _student_encoder(student: Student, side: Side) -> Callable[[Inputs], Tensor]:
    def encode(inputs: Inputs) -> Tensor:
        found = student(inputs, None).images if side == "image" else student(None, inputs).texts
        if found is None:
            raise ValueError(f"the student gave no {side} embeddings for {side} inputs")
        return found

    return encode


def embed_with_teacher(
    teacher: Teacher,
    source: Source,
    rows: Ids,
    side: Side,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    show: bool | None = None,
) -> Vectors:
    """Unit vectors (N, D) of the teacher's own contrastive head, as ``embed``.

    Asked by ``teacher.embed(side, inputs)`` where there is such a method: it can leave out what only pairs need. Else
    the ``embedding`` of the teacher's memory.

    Raises:
        NoContrastiveHeadError: the teacher's memory has no ``embedding``.
        ValueError: a vector is faulty.
    """
    with evaluating(teacher):
        encode = teacher_encoder(teacher, side)
        how = _Batching(batch_size, device or device_of(teacher), show)
        return _embedded(encode, source, rows, f"teacher: {side}s", how)


def write_teacher_vectors(
    folder: Path,
    identity: str,
    asked: tuple[Teacher, Source],
    rows: Ids,
    side: Side,
    *,
    batch_size: int = 64,
) -> Features:
    """What ``embed_with_teacher`` gives, as the array ``vectors`` of a feature folder: never all of it in memory.

    Args:
        folder: Where it goes; opened as it is where it is complete.
        identity: Fingerprint of teacher, corpus and side.
        asked: The teacher and the source of its inputs.
        rows: Ascending.
        side: "image" or "text".
        batch_size: Items a call.

    Raises:
        NoContrastiveHeadError: the teacher's memory has no ``embedding``.
        ValueError: a vector is faulty.
    """
    teacher, source = asked
    encode, device = teacher_encoder(teacher, side), device_of(teacher)

    def after(inputs: Inputs) -> Inputs:
        found = encode(to_device(inputs, device)).float().cpu()
        longest = float((found.norm(dim=1) - 1).abs().max())  # NaN passes: the writer names such rows
        if longest > _NORM_TOLERANCE:
            raise ValueError(f"teacher: {side} vectors are not of unit length: one is off by {longest:.3g}")
        return {"vectors": found}

    with evaluating(teacher):
        return write_features(folder, identity, rows, source, batch_size=batch_size, after=after)


def teacher_encoder(teacher: Teacher, side: Side) -> Callable[[Inputs], Tensor]:
    """Prepared inputs to unit vectors by the teacher's ``embed``, else by the ``embedding`` of its memory."""
    run = teacher.encode_images if side == "image" else teacher.encode_texts
    own: Callable[[Side, Inputs], Tensor] | None = getattr(teacher, "embed", None)

    def encode(inputs: Inputs) -> Tensor:
        if own is not None:
            return own(side, inputs)
        memory = run(inputs)
        if "embedding" not in memory:
            raise NoContrastiveHeadError(
                f"this teacher has no contrastive head: its {side} memory holds {sorted(memory)}, no 'embedding'"
            )
        return memory["embedding"]

    return encode


@dataclass(frozen=True)
class _Batching:
    """Items a call, where, and whether progress is shown."""

    size: int
    device: torch.device | str | None
    show: bool | None


def _embedded(
    encode: Callable[[Inputs], Tensor],
    source: Source,
    rows: Ids,
    label: str,
    batching: _Batching,
) -> Vectors:
    vectors: Vectors | None = None
    for places, found in _batches(encode, source, rows, label, batching):
        if vectors is None:
            vectors = np.empty((len(rows), found.shape[1]), np.float32)
        vectors[places] = found
    return np.empty((0, 0), np.float32) if vectors is None else vectors


def _batches(
    encode: Callable[[Inputs], Tensor],
    source: Source,
    rows: Ids,
    label: str,
    batching: _Batching,
    *,
    skip: int = 0,
) -> Iterator[tuple[Ids, Vectors]]:
    """Places among the rows, and their vectors, of one batch after another; not of the first ``skip``."""
    rows = np.asarray(rows, np.int64)
    lengths = getattr(source, "lengths", None)
    order = np.arange(len(rows)) if lengths is None else np.argsort(lengths(rows), kind="stable")
    batches = batches_of(order, batching.size)[skip:]
    prepared = prefetched(lambda at: source(rows[at]), batches, threads=threads_of(source))
    with Progress(sum(map(len, batches)), label, show=batching.show) as progress:
        for places, inputs in prepared:
            found = encode(to_device(inputs, batching.device)).float().cpu().numpy()
            _check_vectors(found, rows[places], label)
            yield places, found
            progress.advance(len(places))


def _check_vectors(vectors: Vectors, rows: Ids, label: str) -> None:
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(f"{label}: expected ({len(rows)}, D) vectors, got {vectors.shape}")
    faulty = ~np.isfinite(vectors).all(axis=1)
    fault = "are not finite"
    if not faulty.any():
        faulty = np.abs(np.linalg.norm(vectors, axis=1) - 1) > _NORM_TOLERANCE
        fault = "are not of unit length"
    if faulty.any():
        raise ValueError(
            f"{label}: {int(faulty.sum())} of {len(rows)} vectors {fault}, the first rows: "
            f"{rows[faulty][:_SHOWN].tolist()}"
        )


def _fits(live: Callable[[Ids], Inputs], items: int, budget_bytes: int) -> bool:
    """Whether the prepared inputs of so many items would fit, judged by the first one."""
    return bool(items) and bytes_of(live(np.zeros(1, np.int64))) * items <= budget_bytes
