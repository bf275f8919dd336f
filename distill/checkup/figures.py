"""What the doctor's sample says about a teacher, in figures: spread, separation, precision, and what losses need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill.checkup import separation
from distill.checkup.sample import RANDOM_PAIRS, hard_kind
from distill.checkup.separation import Difference, Interval, Saturation, Spread, Ties, Values

if TYPE_CHECKING:
    from distill.checkup.sample import Answers
    from distill.data.corpus import Corpus
    from distill.doctor_teacher import Examination
    from distill.protocols import Side

ALL_HARD = "hard, all"
DOUBTS = 5


@dataclass(frozen=True)
class Separation:
    """True pairs against one kind of negatives.

    Attributes:
        auc: Chance that a true pair scores above a negative of any query.
        d_prime: Distance of the means in pooled deviations; None where nothing varies.
        hits: Share of a query's own negatives that its true pair is above; None for random pairs, which have no query.
        firsts: Share of the queries whose true pair is above all of their own negatives; None likewise.
    """

    auc: Interval
    d_prime: float | None
    hits: Interval | None
    firsts: Interval | None


@dataclass(frozen=True)
class ScorerFigures:
    """One scorer. Without finite scores only the spreads are there."""

    spreads: dict[str, Spread]  # by kind of pair
    against: dict[str, Separation]  # by kind of negative
    saturation: dict[str, Saturation]  # by kind of pair; log-odds only
    ties: Ties | None


@dataclass(frozen=True)
class LossFigures:
    """What the losses need to know of the teacher's scores of lists like those that training will see.

    Attributes:
        entropy_at_one: Mean entropy of softmax(scores), as a share of the uniform list's.
        medium_temperature: At which that share is one half; None where there is none.
        margin_std: Deviation of the teacher's margins, true pair minus hard negative.
        student_margin_std: Of the student's cosine margins on the same lists; None without a student.
        student_scale: What multiplies the student's cosine in training; None without a student.
        accepted: Share of hard negatives with log-odds of at least 0; None for scores that are no log-odds.
        lists_accepting: Share of the lists that hold one; None likewise.
    """

    entropy_at_one: float
    medium_temperature: float | None
    margin_std: float
    student_margin_std: float | None
    student_scale: float | None
    accepted: float | None
    lists_accepting: float | None


@dataclass(frozen=True)
class Doubt:
    """A hard negative that the teacher puts above its query's true pair: the label is wrong, or the teacher is.

    Attributes:
        image: Name of the picture.
        text: The caption.
        score: The teacher's.
        query: ``image`` or ``text``: which of them was to be matched.
        true: What the label says instead: a caption for a picture, the name of a picture for a caption.
        true_score: The teacher's score of the true pair.
    """

    image: str
    text: str
    score: float
    query: Side
    true: str
    true_score: float


@dataclass(frozen=True)
class Figures:
    """All figures of an examination.

    Attributes:
        scorers: By label; the recipe's teacher first.
        constant: The recipe's teacher gives every pair the same score.
        variants: The recipe's way to ask the teacher minus each other way.
        student: Teacher minus student; None where the student says nothing.
        losses: None where the teacher's scores are constant or not finite.
        doubts: The ``DOUBTS`` hard negatives that the teacher puts furthest above their true pair.
    """

    scorers: dict[str, ScorerFigures]
    constant: bool
    variants: dict[str, Difference]
    student: Difference | None
    losses: LossFigures | None
    doubts: tuple[Doubt, ...]


def measure(e: Examination, corpus: Corpus, *, seed: int) -> Figures:
    """Reduce the scores to figures; ``seed`` is that of the resampling."""
    scorers = {
        label: _scorer(e, found, seed, log_odds=e.score_kind == "log_odds" and label != e.student.label)
        for label, found in e.scorers.items()
    }
    own = e.answers
    fine = bool(np.isfinite(own.pairs).all())
    constant = fine and bool(np.ptp(own.pairs) == 0)
    differences = {
        label: separation.difference(own.pairs, other.pairs, own.together(), other.together(), seed=seed)
        for label, other in e.scorers.items()
        if fine and label != e.teacher and np.isfinite(other.pairs).all()
    }
    student = differences.pop(e.student.label, None)
    usable = fine and not constant
    losses, doubts = (losses_of(e), doubts_of(e, corpus)) if usable else (None, ())
    return Figures(scorers, constant, differences, student, losses, doubts)


def _scorer(e: Examination, answers: Answers, seed: int, *, log_odds: bool) -> ScorerFigures:
    kinds = answers.kinds()
    spreads = {kind: separation.spread(scores) for kind, scores in kinds.items()}
    if not np.isfinite(answers.pairs).all():
        return ScorerFigures(spreads, {}, {}, None)
    lists = {hard_kind(finder): found for finder, found in answers.lists.items()}
    if len(lists) > 1:
        lists[ALL_HARD] = answers.together()
    against = {kind: _against_lists(answers, found, seed) for kind, found in lists.items()}
    random_auc = separation.auc_interval(answers.true, answers.random, e.questions.random_of(), seed=seed)
    against[RANDOM_PAIRS] = Separation(random_auc, separation.d_prime(answers.true, answers.random), None, None)
    saturated = {kind: separation.saturation(scores) for kind, scores in kinds.items()} if log_odds else {}
    return ScorerFigures(spreads, against, saturated, separation.ties(answers.lists[e.mined_by]))


def _against_lists(answers: Answers, lists: Values, seed: int) -> Separation:
    count, negatives = len(answers.true), lists[:, 1:]
    of_picture = np.repeat(np.arange(len(lists)) % count, negatives.shape[1])
    return Separation(
        separation.auc_interval(answers.true, negatives.ravel(), of_picture, seed=seed),
        separation.d_prime(answers.true, negatives.ravel()),
        separation.mean_interval(separation.per_image(separation.hits(lists)), seed=seed),
        separation.mean_interval(separation.per_image(separation.firsts(lists)), seed=seed),
    )


def losses_of(e: Examination) -> LossFigures:
    """What the losses need to know."""
    lists = e.training_lists
    student = e.scorers.get(e.student.label)
    odds = lists[:, 1:] >= 0 if e.score_kind == "log_odds" else None
    return LossFigures(
        entropy_at_one=float(separation.entropy(lists, 1.0).mean()),
        medium_temperature=separation.medium_temperature(lists),
        margin_std=float(separation.margins(lists).std(ddof=1)),
        student_margin_std=None
        if student is None
        else float(separation.margins(student.lists[e.mined_by]).std(ddof=1)),
        student_scale=None if student is None else e.student.scale,
        accepted=None if odds is None else float(odds.mean()),
        lists_accepting=None if odds is None else float(odds.any(axis=1).mean()),
    )


def doubts_of(e: Examination, corpus: Corpus) -> tuple[Doubt, ...]:
    """The hard negatives furthest above their true pair, each pair once."""
    lists, pairs = e.training_lists, e.questions.hard[e.mined_by]
    lead = separation.margins(lists)
    found: dict[tuple[int, int], Doubt] = {}
    for place in np.argsort(lead, axis=None, kind="stable").tolist():
        row, column = divmod(place, lead.shape[1])
        if lead[row, column] >= 0 or len(found) == DOUBTS:
            break
        image, text = pairs[row, column].tolist()
        by_image = row < len(e.sample.true)
        true_image, true_text = e.sample.true[row % len(e.sample.true)].tolist()
        found.setdefault(
            (image, text),
            Doubt(
                corpus.image_names[image],
                corpus.texts[text],
                float(lists[row, 1 + column]),
                "image" if by_image else "text",
                corpus.texts[true_text] if by_image else corpus.image_names[true_image],
                float(lists[row, 0]),
            ),
        )
    return tuple(found.values())
