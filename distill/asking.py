"""What a round asks of the teacher: the scores and maps of its pairs, and a line that says how many were new."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.batches import PairScores
from distill.maps import PairMaps, write_maps
from distill.meter import is_noted, note_round
from distill.protocols import Candidates, Direction, Ids
from distill.subset import Subset, drawn_cells, only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.exact import Mask
    from distill.experiment import Experiment
    from distill.losses.combine import Weighted
    from distill.pipeline import Stretch

log = logging.getLogger(__name__)


def scores_of(x: Experiment, pairs: Any, mined: Mapping[Direction, Candidates]) -> PairScores:
    """The teacher's scores of the labelled pairs and of the candidates that it is asked about (``asked_of``).

    Only what the store lacks is computed.
    """
    image_ids, text_ids = wanted(x, pairs, mined)
    return PairScores.of(image_ids, text_ids, x.ask(image_ids, text_ids), x.corpus.n_texts)


def asked_of(x: Experiment, mined: Mapping[Direction, Candidates]) -> dict[Direction, Candidates]:
    """Of a round's candidates those that the teacher is asked about: all, or those that ``mine.subset`` draws.

    Hardest first, as wide as they were, filled up with -1.
    """
    if x.recipe.mine.subset is None:
        return dict(mined)
    return {direction: only(mined[direction], asked) for direction, asked in asked_cells(x, mined).items()}


def asked_cells(x: Experiment, mined: Mapping[Direction, Candidates]) -> dict[Direction, Mask]:
    """Which cells (B, K) of a round's candidates these are."""
    recipe = x.recipe.mine.subset
    if recipe is None:
        return {direction: found.item_ids >= 0 for direction, found in mined.items()}
    return drawn_cells(Subset(**recipe.model_dump()), mined, x.corpus.n_texts)


def wanted(x: Experiment, pairs: Any, mined: Mapping[Direction, Candidates]) -> tuple[Ids, Ids]:
    """Image ids and text ids of what a round asks of the teacher; a pair may come more than once.

    These are the labelled pairs, which every loss compares with, and the candidates of ``asked_of``.
    """
    return pairs_of_all(pairs, asked_of(x, mined))


def pairs_of_all(pairs: Any, mined: Mapping[Direction, Candidates]) -> tuple[Ids, Ids]:
    """Image ids and text ids of the labelled pairs and of every candidate; a pair may come more than once."""
    of_candidates = [found.pairs() for found in mined.values()]
    images = [pairs[:, 0], *(image_ids for image_ids, _ in of_candidates)]
    texts = [pairs[:, 1], *(text_ids for _, text_ids in of_candidates)]
    return np.concatenate(images), np.concatenate(texts)


def note_what_is_asked(
    x: Experiment,
    pairs: Any,
    mined: Mapping[Direction, Candidates],
    stretch: Stretch,
    metrics: Path,
) -> None:
    """One line in the metrics: how many distinct pairs the round asks the teacher, and how many the store serves."""
    begun = is_noted(metrics, number=stretch.number, first="teacher/asked")
    if x.ranks.most(int(begun)):
        return  # the round was begun before, and asked then
    asked, distinct = unasked(x, *wanted(x, pairs, mined))  # in every process: it may teach or calibrate
    x.ranks.wait()
    if x.ranks.first:
        line = {"teacher/asked": asked, "teacher/served_from_store": distinct - asked}
        if x.recipe.mine.subset is not None:
            line["teacher/left_out"] = _distinct(x, *pairs_of_all(pairs, mined)) - distinct
        note_round(metrics, step=stretch.start, number=stretch.number, values=line)


def unasked(x: Experiment, image_ids: Ids, text_ids: Ids) -> tuple[int, int]:
    """How many distinct ones of the pairs no store holds, and how many there are; a pair may come more than once."""
    images, texts = np.divmod(np.unique(image_ids * x.corpus.n_texts + text_ids), x.corpus.n_texts)
    return int(np.isnan(x.scorer.lookup(images, texts)).sum()), len(images)


def _distinct(x: Experiment, image_ids: Ids, text_ids: Ids) -> int:
    return len(np.unique(image_ids * x.corpus.n_texts + text_ids))


def warn_of_odd_scores(pairs: Any, known: PairScores, mined: Mapping[Direction, Candidates], losses: Weighted) -> None:
    """Log what is odd about the scores that are about to be trained on; refuse those that are not finite."""
    from distill.losses import check_teacher_scores

    for direction, found in mined.items():
        own = labelled_match(pairs, direction, found.query_ids)  # (B,)
        lists = np.concatenate([own[:, None], found.item_ids], axis=1)  # (B, 1 + K)
        queries = found.query_ids[:, None]
        scores = known.lookup(queries, lists) if direction == "i2t" else known.lookup(lists, queries)
        positive = np.zeros(scores.shape, np.bool_)
        positive[:, 0] = True
        parts = {part.name: part.loss for part in losses.parts}
        for warning in check_teacher_scores(scores, ~np.isnan(scores), positive, losses=parts):
            log.warning("teacher scores, %s: %s", direction, warning)


def labelled_match(pairs: Any, direction: Direction, query_ids: Ids) -> Ids:
    """The first item (B,) that each query is labelled with in ``pairs`` (P, 2); every query must be in one.

    Not any match: items that match by being copies of a labelled one need not have been scored.
    """
    queries, items = (pairs[:, 0], pairs[:, 1]) if direction == "i2t" else (pairs[:, 1], pairs[:, 0])
    order = np.argsort(queries, kind="stable")
    first: Ids = items[order[np.searchsorted(queries[order], query_ids)]]
    return first


def pair_maps(x: Experiment, pairs: Any) -> PairMaps:
    """The teacher's text→image attention on the labelled pairs, computed once and kept."""
    teacher = x.teacher  # taught first, where it has to be
    with x.timings.stage("maps"):
        return write_maps(
            x.cache / "maps",
            teacher,
            pairs,
            images=x.source(teacher, "image"),
            texts=x.source(teacher, "text"),
            corpus=x.corpus,
            device=x.accelerator.device,
        )
