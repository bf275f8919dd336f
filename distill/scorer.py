"""What says how well pairs match: one teacher beside its store here, several of them together in ``ensemble``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from distill.timings import Timings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from distill.features import Features
    from distill.protocols import Ids, Inputs, ScoreKind, Side
    from distill.ranks import Ranks
    from distill.score import ScoreOptions, ScoreReport, Scoring
    from distill.store import ScoreStore
    from distill.work import Work

Scores: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Elsewhere: TypeAlias = "Callable[[TeacherScorer, Ids, Ids], ScoreReport]"
Vectors: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class TowerSource:
    """One model that may have a contrastive head, in memory only once it is opened."""

    member: int  # place in teacher.members; 0 where the teacher is one model
    identity: str  # the model's
    open: Callable[[], TeacherScorer]


class Scorer(Protocol):
    """Gives raw scores of pairs of corpus rows, and never computes one twice."""

    @property
    def identity(self) -> str:
        """Changes when a score could."""

    @property
    def score_kind(self) -> ScoreKind: ...

    @property
    def where(self) -> str:
        """The folders that hold the scores, for people."""

    def ask(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores (P,) of the pairs (image_ids[p], text_ids[p]); computes those that are not kept."""

    def lookup(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Kept scores in the shape both ids broadcast to; NaN where there is none or an id is -1."""

    def seconds(self, queries: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Wall clock of each query's pairs (image ids, text ids), computed now from prepared inputs, no store used."""

    def vectors(self, rows: Mapping[Side, Ids]) -> dict[Side, Vectors]:
        """Unit vectors (N, D) of corpus rows by the contrastive head, for a shortlist.

        Raises:
            NoContrastiveHeadError: there is none.
        """

    def towers(self) -> tuple[TowerSource, ...]:
        """The models, each with what opens it; whether they have a contrastive head shows when they are asked."""


@dataclass(frozen=True)
class TeacherScorer:
    """One teacher, in memory, and the store of its scores. Satisfies ``Scorer``."""

    teacher: Any  # a Teacher, frozen, on its device
    store: ScoreStore
    source: Callable[[Side], Callable[[Ids], Inputs]]  # of the teacher's inputs
    options: ScoreOptions
    batch_size: int  # of embedding
    device: torch.device
    ranks: Ranks  # each asks for its share of the pairs
    timings: Timings = field(default_factory=Timings)  # told of pairs asked, and served from the store
    elsewhere: Elsewhere | None = None  # computes what the store lacks, in place of this process
    member: str = ""  # name among teacher.members; empty where the teacher is one model

    @property
    def identity(self) -> str:
        """The teacher's."""
        return self.store.origin.teacher_identity

    @property
    def score_kind(self) -> ScoreKind:
        """The teacher's."""
        return self.store.origin.score_kind

    @property
    def where(self) -> str:
        """The store's folder."""
        return str(self.store.folder)

    def ask(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores (P,); only what the store lacks is computed."""
        ask = self._ask_here if self.elsewhere is None else partial(self.elsewhere, self)
        report = ask(image_ids, text_ids)
        reports = self.ranks.told_by_all(report)
        self.timings.count(
            asked=sum(each.asked for each in reports) - report.asked,  # the others'
            served=report.served_from_store,  # each of them counts all
        )
        if self.ranks.count > 1 or self.elsewhere is not None:  # the others' units are news to this store
            self.store.refresh()
        return self.store.require(image_ids, text_ids)

    def _ask_here(self, image_ids: Ids, text_ids: Ids) -> ScoreReport:
        """This process's units: every so manyth of those that are missing."""
        from distill.work import work_of

        started = time.monotonic()
        self.ranks.wait()  # nobody asks while another still counts what is there
        work = work_of(self.store, image_ids, text_ids, self.options.pairs_per_unit)
        self.ranks.wait()
        own = range(self.ranks.index, len(work.units), self.ranks.count)
        return self.scoring(work).report(own, lambda pairs: self.timings.count(asked=pairs), started=started)

    def scoring(self, work: Work) -> Scoring:
        """The teacher at work on units that were cut for its store."""
        from distill.score import Scoring, check_same_teacher

        check_same_teacher(self.teacher, self.store)
        return Scoring(
            self.teacher,
            self.store,
            work,
            image_source=self.source("image"),
            text_source=self.source("text"),
            options=self.options,
        )

    def lookup(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores that the store holds by now, whoever has put them there."""
        self.store.refresh()
        return self.store.lookup(image_ids, text_ids)

    def seconds(self, queries: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Each query's distinct images and texts are encoded, then its pairs are scored."""
        from distill.inference import evaluating

        took = []
        with evaluating(self.teacher):
            for images, texts in queries:
                prepared = [self._prepared("image", images), self._prepared("text", texts)]
                began = time.perf_counter()
                memories = [encode(inputs) for encode, (inputs, _) in zip(self._encoders, prepared, strict=True)]
                self.teacher.score(*memories, *(rows for _, rows in prepared)).cpu()
                took.append(time.perf_counter() - began)
        return took

    @property
    def _encoders(self) -> tuple[Any, Any]:
        return self.teacher.encode_images, self.teacher.encode_texts

    def _prepared(self, side: Side, ids: Ids) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of the distinct items on the device, and the row of each id among them."""
        import torch

        from distill.inference import to_device

        distinct, rows = np.unique(ids, return_inverse=True)
        return to_device(self.source(side)(distinct), self.device), torch.from_numpy(rows).to(self.device)

    def vectors(self, rows: Mapping[Side, Ids]) -> dict[Side, Vectors]:
        """Of the teacher's own contrastive head."""
        from distill.embed import embed_with_teacher

        return {
            side: embed_with_teacher(
                self.teacher, self.source(side), of_side, side, batch_size=self.batch_size, device=self.device
            )
            for side, of_side in rows.items()
        }

    def towers(self) -> tuple[TowerSource, ...]:
        """Itself."""
        return (TowerSource(0, self.identity, lambda: self),)

    def write_vectors(self, folder: Path, identity: str, side: Side, rows: Ids) -> Features:
        """Unit vectors (N, D) float32 of ascending rows by the contrastive head, batch after batch onto disk.

        Raises:
            NoContrastiveHeadError: there is none.
        """
        from distill.embed import write_teacher_vectors

        return write_teacher_vectors(
            folder, identity, (self.teacher, self.source(side)), rows, side, batch_size=self.batch_size
        )
