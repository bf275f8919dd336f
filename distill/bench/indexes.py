"""What an approximate index saves and loses over the student's vectors: time, memory, recall."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill.bench.rounds import Cost, Ratio, Stage, Task, Timed, cost_of, costs, ratio_of, time_rounds
from distill.bench.tasks import TOP, search_task
from distill.index import VectorIndex

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.bench.rounds import State
    from distill.exact import Vectors
    from distill.protocols import Ids, Side

EXACT = "Flat"
BATCHES = (1, 32)
_A_LIST = 39  # vectors a list or a code that FAISS wants at least to train on
_CODES = 256  # of a product quantiser's byte


@dataclass(frozen=True)
class Factory:
    """A FAISS factory string and how many lists an IVF index looks into."""

    text: str
    nprobe: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        return self.text if self.nprobe is None else f"{self.text} nprobe {self.nprobe}"


@dataclass(frozen=True)
class IndexRow:
    """One index over one side's items.

    Attributes:
        items: What is searched.
        factory: FAISS's string, with nprobe.
        count: Items N.
        dim: Width D.
        build_s: Seconds to train and fill it, median.
        bytes: Of FAISS's own structure, as it is written.
        vectors_bytes: Of the vectors beside it, which put what it finds into exact order; 0 where it holds them.
        recall: Share of the exact 10 nearest that it finds.
        search: Cost of a query by the number of queries at once.
        ratio: To the exact index, by the same.
        calls: By the same.
    """

    items: Side
    factory: str
    count: int
    dim: int
    build_s: float
    bytes: int
    vectors_bytes: int
    recall: float
    search: Mapping[int, Cost]
    ratio: Mapping[int, Ratio]
    calls: Mapping[int, int]


def factories(count: int, dim: int) -> list[Factory]:
    """The exact index, then those that FAISS can train well on so many vectors."""
    found = [Factory(EXACT)]
    lists = 1 << max(0, min(count // _A_LIST, 4 * int(count**0.5)).bit_length() - 1)
    if lists >= 4:
        found += [Factory(f"IVF{lists},Flat", nprobe) for nprobe in (1, 4, 16) if nprobe < lists]
    found += [Factory("HNSW32"), Factory("SQ8")]
    if count >= _A_LIST * _CODES and dim % 8 == 0:
        found.append(Factory(f"PQ{dim // 8}"))
    return found


def index_rows(
    vectors: Vectors,
    ids: Ids,
    queries: Vectors,
    *,
    items: Side,
    seconds: float,
    chosen: Sequence[Factory] | None = None,
    seed: int = 0,
) -> list[IndexRow]:
    """Build each index over ``vectors`` (N, D) under ``ids`` (N,), and search it with ``queries`` (Q, D).

    Args:
        vectors: Of the items.
        ids: Theirs.
        queries: Of the other side.
        items: What the items are.
        seconds: Of timing for each index, in each of building, single queries, many.
        chosen: The indexes; ``factories`` where it is None. The first is the one that others are compared with.
        seed: Of the order in each round.
    """
    chosen = factories(*vectors.shape) if chosen is None else chosen
    built: dict[str, VectorIndex] = {}

    def build(one: Factory, state: State) -> None:
        built[one.label] = VectorIndex.build(vectors, ids, factory=one.text, nprobe=one.nprobe)

    building = [Task(one.label, (Stage("build", partial(build, one)),)) for one in chosen]
    took = time_rounds(building, seconds=seconds, seed=seed, label=f"building indexes of {items}s")
    base = chosen[0].label
    searched = {}
    for batch in BATCHES:
        tasks = [search_task(label, index, queries, batch=batch) for label, index in built.items()]
        label = f"searching {items}s, {batch} at a time"
        searched[batch] = time_rounds(tasks, base=base, seconds=seconds, seed=seed, label=label)
    return [_row(one.label, built[one.label], queries, items, took[one.label], searched, base) for one in chosen]


def _row(
    label: str,
    index: VectorIndex,
    queries: Vectors,
    items: Side,
    took: Timed,
    searched: Mapping[int, Mapping[str, Timed]],
    base: str,
) -> IndexRow:
    own, beside = index_bytes(index)
    return IndexRow(
        items,
        label,
        len(index),
        index.dim,
        cost_of(took.total, took.total).median / 1000,
        own,
        beside,
        index.recall_against_exact(queries, TOP),
        {batch: costs(timed[label])[0] for batch, timed in searched.items()},
        {batch: ratio_of(timed[label], timed[base]) for batch, timed in searched.items()},
        {batch: len(timed[label].rounds) for batch, timed in searched.items()},
    )


def index_bytes(index: VectorIndex) -> tuple[int, int]:
    """Bytes of FAISS's structure as it is written, and of the vectors beside it."""
    with tempfile.TemporaryDirectory(prefix="distill-bench-") as folder:
        index.save(Path(folder) / "index")
        beside = Path(folder) / "index" / "vectors.npy"
        size = (Path(folder) / "index" / "index.faiss").stat().st_size
        return size, beside.stat().st_size if beside.is_file() else 0
