"""What a comparison of losses is made of: the cells that were trained, what they share, and what is shown of them.

An *arm* is a student with its losses, a *cell* one training of an arm with one seed. Nothing here knows how a cell was
trained; ``distill.analysis`` turns a ``Comparison`` into figures, ``distill.report.compare_page`` into a page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill.evaluate import Agreement, Evaluation
    from distill.protocols import Direction, Ids, ScoreKind
    from distill.timings import Summary


@dataclass(frozen=True, eq=False)
class Cell:
    """One trained and evaluated student.

    Attributes:
        arm: Name of the arm.
        seed: Of this training; cells of one seed share initial weights, candidates and batch order.
        evaluation: Ranks of every query, both ways.
        agreement: With the teacher on the same candidate lists as every other cell; None without a teacher.
        seconds: Of training, wall clock; NaN where it is not known.
        peak_bytes: Most memory in use at once; 0 where it is not known.
        asked: Pairs the teacher scored for this cell.
        served: Pairs whose scores the store held already.
        curve: Lines of the cell's ``metrics.jsonl``: ``step``, ``loss``, ``loss/<part>``, ``scale``, ...
    """

    arm: str
    seed: int
    evaluation: Evaluation
    agreement: Mapping[Direction, Agreement] | None = None
    seconds: float = float("nan")
    peak_bytes: int = 0
    asked: int = 0
    served: int = 0
    curve: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class FailedCell:
    """A cell that ended without a student, and why."""

    arm: str
    seed: int
    reason: str


@dataclass(frozen=True)
class GapPoint:
    """One way to answer a query: the student alone, the teacher over the student's ``k`` best, or the teacher.

    Attributes:
        label: ``student``, ``teacher over K = 16``, ``teacher``, ...
        k: Items that the teacher re-ranks; None where it re-ranks none or all that it can.
        metrics: As :meth:`distill.metrics.Retrieval.as_dict`.
        ms_per_query: Milliseconds of one query, by direction, its encoding included.
    """

    label: str
    k: int | None
    metrics: Mapping[str, float]
    ms_per_query: Mapping[Direction, float]


@dataclass(frozen=True)
class Item:
    """An image or a text as the page shows it.

    Attributes:
        id: Row of the corpus.
        text: The caption; of a picture its name, which a page reader speaks in its place.
        picture: PNG, JPEG, GIF or WebP; None for a text.
    """

    id: int
    text: str
    picture: bytes | None = None


@dataclass(frozen=True)
class Found:
    """What one arm answers to a query.

    Attributes:
        best: The item that it puts first.
        correct: Whether that is a true one.
        rank: Of the first true item, pessimistic.
    """

    best: Item
    correct: bool
    rank: int


@dataclass(frozen=True)
class Example:
    """A query on which arms differ.

    Attributes:
        direction: Which side asks.
        query: What is asked.
        true: The items that are right, the labelled one first.
        found: By arm, all of one seed.
        seed: That seed.
    """

    direction: Direction
    query: Item
    true: Sequence[Item]
    found: Mapping[str, Found]
    seed: int


@dataclass(frozen=True)
class CorpusFacts:
    """What the students are evaluated on; counts are those of the split."""

    name: str
    split: str
    fingerprint: str
    images: int
    texts: int


@dataclass(frozen=True)
class TeacherFacts:
    """Who taught, and its own recall: it re-ranks the ``shortlist`` best items of each query."""

    identity: str
    score_kind: ScoreKind
    metrics: Mapping[str, float]
    shortlist: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that was trained and measured, before any statistics.

    Attributes:
        title: Of the page.
        command: What to type to get it again.
        corpus: What the students are evaluated on.
        teacher: Who taught; None where no arm has a teacher.
        arms: Name -> one line that says its losses with their resolved options; in the order of the recipe.
        plain: Name of the undistilled arm.
        seeds: That every arm was to be trained with.
        cells: Those that were.
        failed: Those that were not.
        image_ids: (N,) queries of ``i2t``, as in every cell's evaluation.
        text_ids: (M,) queries of ``t2i``, likewise.
        text_images: (M,) the image that each text was labelled with: the two are resampled together.
        same: What all cells of a seed have in common, by name: steps, batch, candidates, ...
        gap: Arm -> points from the student alone to the teacher, fastest first.
        examples: Queries on which arms differ.
        environment: Versions, device, cores, threads, by name.
        time: Where the time of the cells' processes went, all seeds together; None where it is not known.
    """

    title: str
    command: str
    corpus: CorpusFacts
    teacher: TeacherFacts | None
    arms: Mapping[str, str]
    plain: str
    seeds: Sequence[int]
    cells: Sequence[Cell]
    image_ids: Ids
    text_ids: Ids
    text_images: Ids
    failed: Sequence[FailedCell] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    gap: Mapping[str, Sequence[GapPoint]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    time: Summary | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            ValueError: The undistilled arm is not among the arms; a cell, failure or gap report is of an arm or seed
                that is not listed; a cell is there twice; cells are evaluated on other queries than the comparison's.
        """
        if self.plain not in self.arms:
            raise ValueError(f"the undistilled arm {self.plain!r} is not among the arms {', '.join(self.arms)}")
        if len(self.text_images) != len(self.text_ids):
            raise ValueError(f"one labelled image a text is needed: {len(self.text_images)} for {len(self.text_ids)}")
        if not len(self.image_ids) or not len(self.text_ids):
            raise ValueError("a comparison needs at least one image and one text to ask with")
        self._check_names()
        for cell in self.cells:
            self._check_queries(cell)

    def _check_names(self) -> None:
        named = [(cell.arm, cell.seed) for cell in self.cells] + [(cell.arm, cell.seed) for cell in self.failed]
        for (arm, seed), count in Counter(named).items():
            if arm not in self.arms or seed not in self.seeds:
                raise ValueError(
                    f"cell {arm!r} seed {seed} is not of the comparison: arms {', '.join(self.arms)}; seeds "
                    f"{', '.join(map(str, self.seeds))}"
                )
            if count > 1:
                raise ValueError(f"cell {arm!r} seed {seed} is there {count} times; expected one cell an arm and seed")
        for arm in (*self.gap, *(arm for example in self.examples for arm in example.found)):
            if arm not in self.arms:
                raise ValueError(
                    f"gap report or example of {arm!r}, which is not among the arms {', '.join(self.arms)}"
                )

    def _check_queries(self, cell: Cell) -> None:
        ours = {"images": self.image_ids, "texts": self.text_ids}
        theirs = {"images": cell.evaluation.image_ids, "texts": cell.evaluation.text_ids}
        for side, ids in ours.items():
            if not np.array_equal(ids, theirs[side]):
                raise ValueError(
                    f"cell {cell.arm!r} seed {cell.seed} is evaluated on {len(theirs[side])} {side}, the comparison is "
                    f"over {len(ids)}, in its order: evaluate all cells on the same split"
                )

    def cells_of(self, arm: str) -> dict[int, Cell]:
        """Seed -> cell of one arm, in the order of the seeds."""
        there = {cell.seed: cell for cell in self.cells if cell.arm == arm}
        return {seed: there[seed] for seed in self.seeds if seed in there}


def disagreements(ranks: Mapping[str, Ids], *, groups: Ids, count: int) -> Ids:
    """Which queries show best how arms differ: positions, those with the widest spread of ranks first.

    Only queries that at least one arm answers rightly and another does not; spread is the deviation of the logarithm of
    ranks, so that 1 against 10 weighs as much as 10 against 100. This is a choice of contrasts, not a fair sample.

    Args:
        ranks: (B,) rank of the first true item, by arm, all of one seed and direction.
        groups: (B,) what a query shares with others, such as its image: at most one query a group.
        count: How many, at most.
    """
    matrix = np.stack(list(ranks.values())).astype(np.float64)  # (arms, B)
    split = (matrix == 1).any(axis=0) & (matrix > 1).any(axis=0)
    order = np.argsort(-np.log(matrix).std(axis=0), kind="stable")
    order = order[split[order]]
    _, first = np.unique(np.asarray(groups)[order], return_index=True)
    return np.asarray(order[np.sort(first)[:count]], np.int64)
