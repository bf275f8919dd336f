"""The steps of a query that every row has: preparation, tower, search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.bench.rounds import Stage, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.bench.rounds import State
    from distill.bench.sample import Queries
    from distill.bench.ways import Way
    from distill.exact import Vectors
    from distill.index import VectorIndex

TOP = 10
"""Items that a search gives."""


def query_tasks(queries: Queries, ways: Sequence[Way], index: VectorIndex, *, batch: int) -> list[Task]:
    """A task a way: prepare, encode, search."""
    return [
        Task(way.name, (*encoding(queries, way, batch=batch), searching(index, TOP)), queries=batch) for way in ways
    ]


def encoding(queries: Queries, way: Way, *, batch: int, of_first: int | None = None) -> tuple[Stage, ...]:
    """From the request (a text, an encoded picture) to vectors; ``of_first``: of so many queries in turn."""

    def decode(state: State) -> None:
        number = state["number"] if of_first is None else state["number"] % of_first
        state["items"] = queries.items(number, batch)

    def prepare(state: State) -> None:
        state["inputs"] = way.prepare(state["items"])

    def encode(state: State) -> None:
        state["vectors"] = way.tower(state["inputs"])

    return Stage("prepare", decode), Stage("prepare", prepare), Stage("tower", encode)


def searching(index: VectorIndex, k: int) -> Stage:
    """The ``k`` best of the index."""

    def search(state: State) -> None:
        state["found"] = index.search(state["vectors"], min(k, len(index)))[1]

    return Stage("search", search)


def search_task(name: str, index: VectorIndex, vectors: Vectors, *, batch: int) -> Task:
    """Search alone, of the next ``batch`` of the query vectors (Q, D)."""

    def search(state: State) -> None:
        start = state["number"] * batch
        rows = [(start + place) % len(vectors) for place in range(batch)]
        state["found"] = index.search(vectors[rows], min(TOP, len(index)))[1]

    return Task(name, (Stage("search", search),), queries=batch)
