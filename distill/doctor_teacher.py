"""``distill doctor teacher``: a handful of the user's own pairs, scored by the teacher and by the student beside it.

Three kinds of pairs are looked at: true ones, hard negatives (the most similar that do not match, as a student mines
them), and random ones. Nothing is written and the score store is not touched.

Shape key, besides that of ``distill.checkup.separation``: ``M`` captions of the sample's ``N`` pictures, ``P`` pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.checkup.sample import (
    Answers,
    Asked,
    Questions,
    Sample,
    Vectors,
    answer,
    draw_sample,
    hard_negatives,
    random_pairs,
)
from distill.checkup.separation import Values
from distill.embed import NoContrastiveHeadError, embed, embed_with_teacher, live_source
from distill.exact import similarity_rows
from distill.inference import batches_of, device_of, evaluating, joined, prefetched, threads_of, to_device
from distill.progress import Progress
from distill.protocols import SIDES, Ids, Side

if TYPE_CHECKING:
    from distill.data.corpus import Corpus
    from distill.experiment import Experiment

HARD = 8  # hard negatives a query, or as many as the recipe mines where that is fewer
AT_ONCE: dict[Side, int] = {"image": 16, "text": 256}
PAIRS_AT_ONCE = 512
TEACHERS_OWN = "teacher's own head"


@dataclass(frozen=True)
class StudentView:
    """What a student says of the sample."""

    label: str
    trained: bool
    comparable: bool  # False: its weights are random, so that it says nothing
    vectors: Vectors
    scale: float  # multiplies the cosine

    def asked(self, sample: Sample) -> Asked:
        """Its cosines."""

        def cosine(images: Ids, texts: Ids) -> Values:
            left = self.vectors["image"][np.searchsorted(sample.images, images)]
            right = self.vectors["text"][np.searchsorted(sample.texts, texts)]
            return similarity_rows(left, right[:, None])[:, 0]

        return cosine


@dataclass(frozen=True)
class Judge:
    """Who gives the teacher's scores: one teacher in memory, or an ensemble by way of its members' stores."""

    identity: str
    score_kind: str
    ask: Asked
    vectors: Callable[[Sample], Vectors]  # of the contrastive head

    @classmethod
    def of(cls, x: Experiment) -> Judge:
        """The recipe's own."""
        if x.builders.ensemble is None:
            return cls.one(x, x.teacher)
        several = x.scorer
        return cls(
            several.identity,
            several.score_kind,
            several.ask,
            lambda sample: several.vectors({side: sample.rows(side) for side in SIDES}),
        )

    @classmethod
    def one(cls, x: Experiment, teacher: Any) -> Judge:
        """A single teacher; nothing that it says is kept."""

        def vectors(sample: Sample) -> Vectors:
            return {
                side: embed_with_teacher(
                    teacher,
                    live_source(x.corpus, side, teacher),
                    sample.rows(side),
                    side,
                    batch_size=AT_ONCE[side],
                    device=x.accelerator.device,
                )
                for side in SIDES
            }

        return cls(teacher.identity, teacher.score_kind, lambda i, t: ask(teacher, x.corpus, i, t), vectors)


@dataclass(frozen=True, eq=False)
class Examination:
    """All that was measured; scorers are labelled, the recipe's teacher first, its student (if any) last."""

    sample: Sample
    questions: Questions
    teacher: str
    identity: str
    score_kind: str
    scorers: Mapping[str, Answers]
    student: StudentView
    mined_by: str  # whose hard negatives stand for those that training will see
    notes: tuple[str, ...]

    @property
    def answers(self) -> Answers:
        """The recipe's teacher's."""
        return self.scorers[self.teacher]

    @property
    def training_lists(self) -> Values:
        """(R, 1 + K) the teacher's scores of lists like those that training will see."""
        return self.answers.lists[self.mined_by]


def examine(x: Experiment, others: Mapping[str, Callable[[], Any]], *, label: str, images: int) -> Examination:
    """Score the sample's pairs by the recipe's teacher, by other ways to ask it, and by the student.

    Args:
        x: The experiment; a teacher that the recipe teaches must have been taught.
        others: Label -> what makes the teacher that is asked in another way.
        label: Of the recipe's own way.
        images: Pictures in the sample; all of the split where it has fewer.

    Raises:
        DoctorError: the sample has no two pictures that differ in their captions.
    """
    split = "val" if "val" in x.corpus.splits else x.recipe.evaluate.split
    sample = draw_sample(x.corpus, split, images=images, seed=x.recipe.seed)
    judge = Judge.of(x)
    student, notes = look_at_student(x, sample)
    finders, more = _finders(judge, sample, student)
    hard = {
        name: hard_negatives(x.corpus, sample, vectors, k=min(HARD, x.recipe.mine.k))
        for name, vectors in finders.items()
    }
    questions = Questions(sample.true, random_pairs(x.corpus, sample, seed=x.recipe.seed), hard)
    scorers = {label: answer(questions, judge.ask)}
    notes += more
    for name, make in others.items():
        try:
            scorers[name] = answer(questions, Judge.one(x, make()).ask)
        except ValueError as error:
            notes.append(f"{name} could not be tried: {error}")
    if student.comparable:
        scorers[student.label] = answer(questions, student.asked(sample))
    mined_by = student.label if student.trained else next(iter(hard))
    return Examination(
        sample, questions, label, judge.identity, judge.score_kind, scorers, student, mined_by, tuple(notes)
    )


def _finders(judge: Judge, sample: Sample, student: StudentView) -> tuple[dict[str, Vectors], list[str]]:
    """Whose vectors find hard negatives."""
    finders: dict[str, Vectors] = {}
    notes = []
    try:
        finders[TEACHERS_OWN] = judge.vectors(sample)
    except NoContrastiveHeadError:
        how = "" if student.comparable else ", whose weights are random: they are hardly harder than random ones"
        notes.append(f"the teacher has no contrastive head: hard negatives are those of the {student.label}{how}")
        finders[student.label] = student.vectors
    if student.trained:
        finders[student.label] = student.vectors
    return finders, notes


def look_at_student(x: Experiment, sample: Sample) -> tuple[StudentView, list[str]]:
    """The run's first trained student; where it has none, the one that training would start from."""
    from distill.pipeline import DONE

    for arm in x.recipe.arms:
        folder = x.folder / "arms" / arm / "student"
        if (folder / DONE).is_file():
            return _view(x, sample, x.saved_student(folder), f"student {arm}", trained=True, comparable=True), []
    pretrained = x.recipe.student.kind in ("checkpoint", "custom")
    note = (
        "the run has no trained student yet: the teacher is compared with the student that training starts from"
        if pretrained
        else "the run has no trained student yet, and an untrained one has random weights: no comparison with it; ask "
        "again once an arm is trained"
    )
    view = _view(x, sample, x.fresh_student(), "untrained student", trained=False, comparable=pretrained)
    return view, [note]


def _view(x: Experiment, sample: Sample, student: Any, label: str, *, trained: bool, comparable: bool) -> StudentView:
    device = x.accelerator.device
    vectors = {
        side: embed(
            student,
            live_source(x.corpus, side, student),
            sample.rows(side),
            side,
            batch_size=AT_ONCE[side],
            device=device,
        )
        for side in SIDES
    }
    with evaluating(student):
        one = student(None, to_device(student.prepare_texts([x.corpus.texts[int(sample.texts[0])]]), device))
    return StudentView(label, trained, comparable, vectors, float(one.scale))


def ask(teacher: Any, corpus: Corpus, image_ids: Ids, text_ids: Ids) -> Values:
    """The teacher's raw scores (P,) of pairs, whatever they are: NaN too. Each distinct item is encoded once."""
    import torch

    device = device_of(teacher)
    images, image_rows = np.unique(image_ids, return_inverse=True)
    texts, text_rows = np.unique(text_ids, return_inverse=True)
    text_source, image_source = (live_source(corpus, side, teacher) for side in ("text", "image"))
    scores = np.empty(len(image_ids), np.float32)
    with evaluating(teacher), Progress(len(image_ids), "teacher: pairs", unit="pairs") as progress:
        batches = (text_source(batch) for batch in batches_of(texts, AT_ONCE["text"]))
        memory = joined([teacher.encode_texts(to_device(inputs, device)) for inputs in batches])
        parts = batches_of(np.arange(len(images)), AT_ONCE["image"])
        prepared = prefetched(lambda rows: image_source(images[rows]), parts, threads=threads_of(image_source))
        for rows, inputs in prepared:
            seen = teacher.encode_images(to_device(inputs, device))
            here = np.flatnonzero((image_rows >= rows[0]) & (image_rows <= rows[-1]))
            for some in batches_of(here, PAIRS_AT_ONCE):
                first, second = (
                    torch.from_numpy(at).to(device) for at in (image_rows[some] - rows[0], text_rows[some])
                )
                scores[some] = teacher.score(seen, memory, first, second).float().cpu().numpy()
                progress.advance(len(some))
    return scores
