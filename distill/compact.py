"""What a student's vectors keep when they are made smaller: recall at each width and kind of code.

Ties count against the student, as in ``distill.metrics``: of items that tie at the end of a shortlist, those that help
least are in it. Items behind a shortlist keep the first stage's order. Products are those of ``distill.exact``, so that
equal codes tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.codes import KINDS, Kind, Quantiser, cut, signs, stored
from distill.evaluate import reranked_ranks
from distill.metrics import first_positive_ranks, summarise
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, Ids, Side, sides_of

if TYPE_CHECKING:
    from distill.data.corpus import Split
    from distill.data.matches import Matches
    from distill.exact import Mask, Vectors
    from distill.experiment import Experiment

TOP = 10  # of which a share is kept; recall looks no further
SAMPLE = 10_000  # training items a side that set the ranges of int8


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        metrics: as ``distill.metrics.Retrieval.as_dict``.
        rsum_change: against float32 at full width.
        top_kept: percent of the ten most similar items at full width in float32 that are still among the first ten,
            mean over queries, then over both directions.
    """

    width: int
    kind: str
    metrics: dict[str, float]
    rsum_change: float
    top_kept: float
    bytes_in_memory: int
    bytes_on_disk: int


@dataclass(frozen=True, eq=False)
class Way:
    """One direction: who asks, who answers, and what is true."""

    direction: Direction
    queries: Vectors  # (B, D)
    items: Vectors  # (N, D)
    query_ids: Ids  # (B,)
    true: Cells  # matches

    @property
    def item_side(self) -> Side:
        """The side that answers."""
        return sides_of(self.direction)[1]


@dataclass(frozen=True, eq=False)
class Cells:
    """Chosen cells of a (B, N) matrix that is too large to be kept."""

    rows: Ids  # (P,) ascending
    columns: Ids  # (P,)

    def of(self, part: slice, n_items: int) -> Mask:
        """(b, N) bool of a block of rows."""
        here = slice(*np.searchsorted(self.rows, [part.start, part.stop]))
        found = np.zeros((part.stop - part.start, n_items), np.bool_)
        found[self.rows[here] - part.start, self.columns[here]] = True
        return found


@dataclass(frozen=True)
class Table:
    """All lines of one student, and what they were measured on.

    Attributes:
        trained: widths below the full one that the student was trained at (``train.matryoshka``).
        items: of the split, by side.
        sample: training items by side that set the ranges of int8.
        shortlist: items that are rescored.
    """

    run: str
    arm: str
    corpus: str
    split: str
    dim: int
    trained: tuple[int, ...]
    items: dict[Side, int]
    sample: dict[Side, int]
    shortlist: int
    lines: tuple[Measured, ...]


def compact(x: Experiment, arm: str = "", *, widths: Sequence[int] = (), split: str = "", rescore: int = 4) -> Table:
    """Measure a run's trained student at several widths and kinds of code.

    Args:
        x: the run.
        arm: whose student; the last arm's when empty.
        widths: the full one is always there; when empty those that were trained, or powers of two from 16.
        split: whose items are embedded; the recipe's when empty.
        rescore: times ten items are in a shortlist.

    Raises:
        ValueError: no such arm, split or width, or the training split is asked for.
        FileNotFoundError: the arm has no trained student.
    """
    from distill.results import student_vectors

    arm = x.arm_named(arm)
    folder = x.folder / "arms" / arm / "student"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: finish the run first (distill run RECIPE --resume)")
    found = x.corpus.split(split or x.recipe.evaluate.split)
    if found.name == "train":
        raise ValueError("the ranges of int8 are set by the training split: measure on another one (--split test)")
    vectors = student_vectors(x, folder, found)
    dim, trained = vectors["image"].shape[1], x.recipe.train.matryoshka
    asked = _checked_widths(widths, dim) or trained or tuple(2**n for n in range(4, 16) if 2**n < dim)
    sample = _sample(x.corpus.split("train"), seed=x.recipe.seed)
    samples = student_vectors(x, folder, sample)
    with x.timings.stage("evaluate"):
        ways = both_ways(vectors, found.ids, x.corpus.matches)
        lines = tuple(measure(ways, samples, sorted({*asked, dim}), rescore=rescore))
    items, sampled = ({side: len(each.ids[side]) for side in SIDES} for each in (found, sample))
    shortlist = rescore * TOP
    return Table(x.recipe.name, arm, x.corpus.name, found.name, dim, trained, items, sampled, shortlist, lines)


def _checked_widths(widths: Sequence[int], dim: int) -> tuple[int, ...]:
    wrong = [width for width in widths if not 1 <= width <= dim]
    if wrong:
        raise ValueError(f"widths must be 1 to {dim}, the numbers of this student's vectors; got {wrong}")
    return tuple(widths)


def _sample(split: Split, *, seed: int) -> Split:
    """Some of a split's items, drawn at random, ascending."""
    draw = np.random.default_rng(seed)
    images, texts = (np.sort(draw.permutation(split.ids[side])[:SAMPLE]) for side in SIDES)
    return replace(split, images=images, texts=texts)


def both_ways(vectors: Mapping[Side, Vectors], ids: Mapping[Side, Ids], matches: Matches) -> tuple[Way, ...]:
    """Both directions of a split from its vectors (N, D) and ids (N,) by side.

    Raises:
        ValueError: vectors that are not finite.
    """
    for side in SIDES:
        bad = int((~np.isfinite(vectors[side])).any(axis=1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(vectors[side])} {side} vectors are not finite: train the student again")
    made = []
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        offsets, found = matches.of(direction, ids[query])
        order = np.argsort(ids[item], kind="stable")
        places = np.minimum(np.searchsorted(ids[item][order], found), len(order) - 1)
        inside = ids[item][order][places] == found
        rows = np.repeat(np.arange(len(ids[query])), np.diff(offsets))
        cells = Cells(rows[inside], order[places[inside]])
        made.append(Way(direction, vectors[query], vectors[item], ids[query], cells))
    return tuple(made)


def measure(
    ways: Sequence[Way],
    samples: Mapping[Side, Vectors],
    widths: Sequence[int],
    *,
    kinds: Sequence[Kind] = KINDS,
    rescore: int = 4,
) -> Iterator[Measured]:
    """The lines of the table, width by width; the first is float32 at full width, whether it is asked for or not.

    Args:
        ways: both directions.
        samples: (S, D) vectors of training items by side, which set the ranges of int8.
        widths: numbers that are kept, each at most D.
        kinds: how they are stored.
        rescore: times ten items are in a shortlist.
    """
    full, exactly = ways[0].queries.shape[1], Kind("float32")
    best = {way.direction: _most_similar(way) for way in ways}
    asked = [(width, kind) for width in sorted(widths, reverse=True) for kind in kinds]
    asked = [(full, exactly), *(one for one in asked if one != (full, exactly))]
    reference, quantisers = None, dict[tuple[int, Side], Quantiser]()
    for width, kind in asked:
        ranks, kept = {}, []
        for way in ways:
            here = width, way.item_side
            if "int8" in (kind.stored, kind.rescored) and here not in quantisers:
                quantisers[here] = Quantiser(cut(samples[way.item_side], width))
            stage = _Stages(way, width, kind, quantisers.get(here), shortlist=rescore * TOP)
            ranks[way.direction], share = stage.run(best[way.direction])
            kept.append(share)
        metrics = summarise(ranks["i2t"], ranks["t2i"]).as_dict()
        reference = metrics["rsum"] if reference is None else reference
        yield Measured(
            width,
            kind.name,
            metrics,
            metrics["rsum"] - reference,
            100 * float(np.mean(kept)),
            kind.bytes_in_memory(width),
            kind.bytes_on_disk(width),
        )


def _most_similar(way: Way) -> Cells:
    """The ten most similar items of each query, and all that are as similar as the tenth."""
    found = []
    top = min(TOP, len(way.items))
    for part in exact.blocks(len(way.queries), exact.QUERY_BLOCK):
        similarity = exact.similarity_matrix(way.queries[part], way.items)
        last = -np.partition(-similarity, top - 1, axis=1)[:, top - 1 : top]
        rows, columns = np.nonzero(similarity >= last)
        found.append((rows + part.start, columns))
    rows, columns = (np.concatenate(ids) for ids in zip(*found, strict=True))
    return Cells(rows, columns)


class _Stages:
    """One direction at one width in one kind: the search, and where there is one the rescoring."""

    def __init__(self, way: Way, width: int, kind: Kind, quantiser: Quantiser | None, *, shortlist: int) -> None:
        self.way, self.kind, self.shortlist = way, kind, min(shortlist, len(way.items))
        queries, items = cut(way.queries, width), cut(way.items, width)
        self.queries, self.items = (
            signs(queries) if kind.stored == "binary" else queries,
            stored(items, kind.stored, quantiser),
        )
        if kind.rescored is not None:
            self.finer = queries, stored(items, kind.rescored, quantiser)

    def run(self, best: Cells) -> tuple[Ids, float]:
        """Ranks (B,) of each query's first true item, and the share of the ``best`` items that is kept."""
        ranks, kept, top = np.empty(len(self.queries), np.int64), [], min(TOP, len(self.items))
        for part in exact.blocks(len(self.queries), exact.QUERY_BLOCK):
            similarity = exact.similarity_matrix(self.queries[part], self.items)
            true, wanted = (cells.of(part, len(self.items)) for cells in (self.way.true, best))
            ranks[part] = first_positive_ranks(similarity, true)
            if self.kind.rescored is not None:
                ranks[part] = self._rescored_ranks(part, similarity, true, ranks[part])
                columns, scores = self._rescored(part, similarity, wanted)
                wanted, similarity = np.take_along_axis(wanted, columns, axis=1), scores
            first = least_helpful(similarity, wanted, top)
            kept.append(np.take_along_axis(wanted, first, axis=1).mean(axis=1))
        return ranks, float(np.mean(np.concatenate(kept)))

    def _rescored(self, part: slice, similarity: Vectors, wanted: Mask) -> tuple[Ids, Vectors]:
        """Columns (b, S) of the shortlists, and their scores (b, S) by the finer vectors."""
        queries, items = self.finer
        columns = least_helpful(similarity, wanted, self.shortlist)
        scores = np.empty(columns.shape, np.float32)
        at_once = max(1, exact.CELLS // (columns.shape[1] * items.shape[1]))
        for rows in exact.blocks(len(columns), at_once):
            scores[rows] = exact.similarity_rows(queries[part][rows], items[columns[rows]])
        return columns, scores

    def _rescored_ranks(self, part: slice, similarity: Vectors, true: Mask, ranks: Ids) -> Ids:
        columns, scores = self._rescored(part, similarity, true)
        first = np.take_along_axis(similarity, columns, axis=1)
        positive = np.take_along_axis(true, columns, axis=1)
        listed = Candidates(self.way.direction, self.way.query_ids[part], columns, first, positive)
        return reranked_ranks(listed, scores=scores, first_ranks=ranks)


def least_helpful(similarity: Vectors, wanted: Mask, k: int) -> Ids:
    """Columns (B, k) of the k most similar of each row (B, N), ascending.

    Of those that tie for the last places, the ones that are not wanted (B, N) come first, then those further left.
    """
    last = -np.partition(-similarity, k - 1, axis=1)[:, k - 1 : k]
    above, tied = similarity > last, similarity == last
    free = k - above.sum(axis=1, keepdims=True)
    others, own = tied & ~wanted, tied & wanted
    others &= np.cumsum(others, axis=1) <= free
    own &= np.cumsum(own, axis=1) <= free - others.sum(axis=1, keepdims=True)
    found: np.ndarray[Any, np.dtype[np.int64]] = np.nonzero(above | others | own)[1].reshape(len(similarity), k)
    return found
