"""What the teacher costs a query: over a student's shortlist, and over every item without a student.

Items it scores are encoded beforehand and kept, or on the spot. The query is always encoded on the spot, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill.bench.rounds import Stage, Task
from distill.bench.tasks import encoding, searching
from distill.inference import batches_of, bytes_of, joined, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from distill.bench.rounds import State
    from distill.bench.sample import Queries
    from distill.bench.ways import Way
    from distill.data.corpus import Corpus
    from distill.index import VectorIndex
    from distill.protocols import Ids, Memory, Side
    from distill.score import ScoreOptions

Items = Literal["beforehand", "on the spot"]
ITEMS: tuple[Items, ...] = ("beforehand", "on the spot")
ALONE_OF = 64
"""Items of the sample that the teacher alone is timed on."""
_QUERIES = 8  # that the teacher is timed with, so that their items can be kept


@dataclass(frozen=True)
class Setting:
    """A teacher on its device, and the corpus whose items it reads."""

    teacher: Any
    device: torch.device
    corpus: Corpus
    options: ScoreOptions

    def encoded(self, side: Side, items: Sequence[Any]) -> Memory:
        """The memory of texts or decoded pictures, as many at a time as scoring takes."""
        at_once = self.options.texts_per_batch if side == "text" else self.options.images_per_batch
        parts = []
        for places in batches_of(np.arange(len(items)), at_once):
            some = [items[place] for place in places.tolist()]
            if side == "text":
                parts.append(self.teacher.encode_texts(to_device(self.teacher.prepare_texts(some), self.device)))
            else:
                parts.append(self.teacher.encode_images(to_device(self.teacher.prepare_images(some), self.device)))
        return joined(parts)

    def loaded(self, side: Side, ids: Ids) -> Sequence[Any]:
        """Texts, or pictures read and decoded."""
        if side == "text":
            return [self.corpus.texts[row] for row in ids.tolist()]
        return self.corpus.load_images(ids)

    def scores(self, query: Memory, items: Memory, rows: torch.Tensor, *, side: Side) -> np.ndarray[Any, Any]:
        """Of one query of ``side`` with the items in ``rows`` of their memory."""
        import torch

        rows = rows.to(self.device)
        first = torch.zeros_like(rows)
        pair = (query, items, first, rows) if side == "image" else (items, query, rows, first)
        found: np.ndarray[Any, Any] = self.teacher.score(*pair).float().cpu().numpy()
        return found


@dataclass(frozen=True)
class Kept:
    """Items that the teacher has encoded: their ids ascending, and their memory."""

    ids: Ids
    memory: Memory

    @property
    def bytes_each(self) -> int:
        """Of one item."""
        return bytes_of(self.memory) // len(self.ids)

    def rows(self, ids: Ids) -> torch.Tensor:
        """Where items lie."""
        import torch

        return torch.from_numpy(np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1))


class TeacherTasks:
    """The teacher's tasks for queries of one side."""

    def __init__(
        self, setting: Setting, queries: Queries, way: Way, *, index: VectorIndex, depths: Sequence[int], seed: int
    ) -> None:
        """Encode what is kept: the items in the shortlists of a few queries, and a sample of all.

        Args:
            setting: The teacher.
            queries: Of one side.
            way: How the student encodes them.
            index: Of the student's vectors of all items, exact.
            depths: K of each shortlist.
            seed: Of the sample.
        """
        self._setting, self._queries, self._way, self._index = setting, queries, way, index
        self.item_side: Side = "image" if queries.side == "text" else "text"
        self.depths, self.count = tuple(depths), len(index)
        sampled = np.random.default_rng([seed, self.count]).permutation(index.ids)[:ALONE_OF]
        self._sample = self._kept(np.sort(sampled))
        self.timed = self._affordable(max(depths, default=1))
        lists = [self._found(place, max(depths, default=1)) for place in range(self.timed)]
        self._listed = self._kept(np.unique(np.concatenate(lists)))

    @property
    def bytes_each(self) -> int:
        """Of one item that is kept encoded."""
        return self._sample.bytes_each

    @property
    def sampled(self) -> int:
        """Items that the teacher alone is timed on."""
        return len(self._sample.ids)

    def reranking(self, k: int, items: Items) -> Task:
        """The student's first ``k`` in the teacher's order; the student's own steps included."""
        steps = [*encoding(self._queries, self._way, batch=1, of_first=self.timed), searching(self._index, k)]
        steps += [Stage("query", self._read_query)]
        if items == "on the spot":
            steps += [Stage("items", self._read_items), Stage("score", self._score_read)]
        else:
            steps += [Stage("score", self._score_kept)]
        return Task(name_of(k, items), tuple(steps))

    def alone(self, items: Items) -> Task:
        """Every item scored: timed on the sample, and what is done once an item multiplied out."""
        scale = self.count / self.sampled
        steps = [Stage("query", self._take_sample), Stage("query", self._read_query)]
        if items == "on the spot":
            steps += [Stage("items", self._read_items, scale), Stage("score", self._score_read, scale)]
        else:
            steps += [Stage("score", self._score_sample, scale)]
        return Task(name_of(None, items), tuple(steps))

    def _kept(self, ids: Ids) -> Kept:
        return Kept(ids, self._setting.encoded(self.item_side, self._setting.loaded(self.item_side, ids)))

    def _affordable(self, depth: int) -> int:
        """Queries whose shortlists' items can be kept in memory; one in any case."""
        options = self._setting.options
        room = options.image_memory_bytes if self.item_side == "image" else options.text_memory_bytes
        return int(np.clip(room // max(1, self.bytes_each * depth), 1, min(_QUERIES, len(self._queries.ids))))

    def _found(self, place: int, k: int) -> Ids:
        vectors = self._way.tower(self._way.prepare(self._queries.items(place, 1)))
        ids: Ids = self._index.search(vectors, k)[1][0]
        return ids[ids >= 0]

    def _take_sample(self, state: State) -> None:
        state["items"] = self._queries.items(state["number"] % self.timed, 1)
        state["found"] = self._sample.ids[None]

    def _read_query(self, state: State) -> None:
        state["query"] = self._setting.encoded(self._queries.side, state["items"])

    def _read_items(self, state: State) -> None:
        state["memory"] = self._setting.encoded(self.item_side, self._setting.loaded(self.item_side, state["found"][0]))

    def _score_read(self, state: State) -> None:
        import torch

        self._order(state, state["memory"], torch.arange(state["found"].shape[1]))

    def _score_kept(self, state: State) -> None:
        self._order(state, self._listed.memory, self._listed.rows(state["found"][0]))

    def _score_sample(self, state: State) -> None:
        self._order(state, self._sample.memory, self._sample.rows(state["found"][0]))

    def _order(self, state: State, memory: Memory, rows: torch.Tensor) -> None:
        scores = self._setting.scores(state["query"], memory, rows, side=self._queries.side)
        state["answer"] = state["found"][0][np.argsort(-scores, kind="stable")]


def name_of(k: int | None, items: Items) -> str:
    """Of a row: the teacher over the student's ``k`` best, or alone."""
    return f"teacher alone, items {items}" if k is None else f"re-ranked {k}, items {items}"
