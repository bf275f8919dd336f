"""What a run ends with: students and teacher evaluated, the summary, the table, the pictures, and search."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import write_atomically
from distill.evaluate import (
    Evaluation,
    evaluate_embeddings,
    evaluate_reranked,
    gap_closed,
    shortlist,
)
from distill.index import VectorIndex
from distill.pipeline import trained_arm
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, Side, sides_of
from distill.show import write_retrieval_sheet
from distill.teacher_note import note_teacher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.data.corpus import Split
    from distill.experiment import Experiment

log = logging.getLogger(__name__)
TEACHER = "teacher"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def finish(x: Experiment) -> dict[str, dict[str, float]]:
    """Train what is not trained, evaluate everything on the recipe's split, write and show the results.

    Of several processes the first evaluates; the others get an empty summary.
    """
    if any(arm.distils for arm in x.recipe.arms.values()):
        x.scorer  # noqa: B018  (taught first: what can go wrong there is known before the students' time is spent)
    students = {name: trained_arm(x, name) for name in x.recipe.arms}
    return x.ranks.work_alone(lambda: _results(x, students)) or {}


def _results(x: Experiment, students: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Of trained students."""
    from distill.report.table import results_table

    split = x.corpus.split(x.recipe.evaluate.split)
    x.scorer  # noqa: B018  (made, or taught, before the evaluation's time is taken)
    note_teacher(x.folder, x.scorer.identity, x.scorer.score_kind)
    vectors: dict[str, dict[Side, Vectors]] = {}
    with x.timings.stage("evaluate"):
        evaluations = {TEACHER: evaluate_teacher(x, split, fallback=next(iter(students.values())))}
        for name, folder in students.items():
            vectors[name] = _embed_student(x, folder, split)
            evaluations[name] = evaluate(x, vectors[name], split)
        for name, evaluation in evaluations.items():
            evaluation.save(x.folder / "evaluation" / name)
    summary = {name: evaluation.retrieval.as_dict() for name, evaluation in evaluations.items()}
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(x.folder / "summary.json", lambda file: file.write(text.encode()))
    results_table(summary, title=f"{x.recipe.name}: {x.corpus.name}, {split.name} split, percent")
    _report_gap(summary)
    sheet = x.folder / "retrieval.png"
    ranks = {name: evaluation.t2i_ranks for name, evaluation in evaluations.items()}
    with x.timings.stage("report"):
        write_retrieval_sheet(x, split, vectors, ranks, sheet)
    log.info("summary: %s, pictures: %s", x.folder / "summary.json", sheet)
    return summary


def evaluate_teacher(x: Experiment, split: Split, *, fallback: Path | None = None) -> Evaluation:
    """The teacher re-ranks the shortlist of its contrastive head; of the student in ``fallback`` where it has none.

    An ensemble's shortlist is that of the mean of its members' cosines.
    """
    return rerank_shortlists(x, split, fallback=fallback)[0]


def rerank_shortlists(
    x: Experiment, split: Split, *, fallback: Path | None = None
) -> tuple[Evaluation, dict[Direction, Candidates]]:
    """The teacher's evaluation, as ``evaluate_teacher`` gives it, and the shortlists, whose pairs are all scored."""
    from distill.embed import NoContrastiveHeadError

    rows = split.ids
    try:
        with x.timings.stage("embed"):
            first = x.scorer.vectors(rows)
        whose = "the teacher's contrastive head"
    except NoContrastiveHeadError:
        if fallback is None:
            raise
        log.info("the teacher has no contrastive head: it re-ranks the shortlist of %s", fallback)
        first = student_vectors(x, fallback, split)
        whose = str(fallback)
    before = evaluate(x, first, split)
    log.info("%s alone, before re-ranking: RSUM %.1f on %s", whose, before.retrieval.rsum, split.name)
    lists = _shortlists(x, first, split)
    images, texts = (np.concatenate(ids) for ids in zip(*(found.pairs() for found in lists.values()), strict=True))
    x.ask(images, texts)
    return evaluate_reranked(before, i2t=lists["i2t"], t2i=lists["t2i"], lookup=x.scorer.lookup), lists


def report_teacher(x: Experiment, *, split: str) -> None:
    """Evaluate the teacher on a split and show it."""
    from distill.report.table import results_table

    with x.timings.stage("evaluate"):
        found = evaluate_teacher(x, x.corpus.split(split))
    found.save(x.folder / "evaluation" / f"{TEACHER}-{split}")
    results_table(
        {TEACHER: found.retrieval.as_dict()}, title=f"{x.recipe.name}: teacher re-ranking, {split} split, percent"
    )


def _shortlists(x: Experiment, vectors: Mapping[Side, Vectors], split: Split) -> dict[Direction, Candidates]:
    rows = split.ids
    lists: dict[Direction, Candidates] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        lists[direction] = shortlist(
            VectorIndex.build(vectors[item], rows[item]),
            vectors[query],
            query_ids=rows[query],
            matches=x.corpus.matches,
            direction=direction,
            k=x.recipe.evaluate.rerank,
        )
    return lists


def student_vectors(x: Experiment, folder: Path, split: Split) -> dict[Side, Vectors]:
    """Vectors of the split's items by the student in ``folder``."""
    student = x.saved_student(folder)
    rows = split.ids
    return {side: x.embed(student, side, rows[side]) for side in SIDES}


def _embed_student(x: Experiment, folder: Path, split: Split) -> dict[Side, Vectors]:
    """Vectors of the split's items; their index is kept beside the student, for search."""
    vectors = student_vectors(x, folder, split)
    save_indexes(vectors, split, folder.parent / "index")
    return vectors


def save_indexes(vectors: Mapping[Side, Vectors], split: Split, folder: Path) -> None:
    """An index of each side of a split, in ``folder/image`` and ``folder/text``."""
    VectorIndex.build(vectors["image"], split.images).save(folder / "image")
    VectorIndex.build(vectors["text"], split.texts).save(folder / "text")


def evaluate(x: Experiment, vectors: Mapping[Side, Vectors], split: Split) -> Evaluation:
    """A student's evaluation from its vectors of the split's items."""
    return evaluate_embeddings(
        vectors["image"], vectors["text"], image_ids=split.images, text_ids=split.texts, matches=x.corpus.matches
    )


def _report_gap(summary: Mapping[str, Mapping[str, float]]) -> None:
    """How much of the way from the first, undistilled arm to the teacher each other arm covered."""
    teacher, (base, *others) = summary[TEACHER], [name for name in summary if name != TEACHER]
    for name in others:
        share = gap_closed(summary[base], summary[name], teacher)
        if share is None:
            log.info("%s: the teacher is not ahead of %s, so there is no gap to close", name, base)
        else:
            log.info("%s closes %.0f %% of the RSUM gap between %s and the teacher", name, share, base)
