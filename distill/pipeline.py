"""The stages of an experiment in order: teach, shared steps, then for each arm and round mine → score → train.

Every stage keeps its result in the run's folder and returns it from there when it is asked for again, so a run that was
killed goes on where it stopped.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import ahead, mined, mined_vectors
from distill.asking import (
    asked_cells,
    asked_of,
    note_what_is_asked,
    pair_maps,
    scores_of,
    unasked,
    wanted,
    warn_of_odd_scores,
)
from distill.batches import Batches, PairScores
from distill.durable import staged_folder
from distill.groups import GroupedSampler
from distill.meter import note_round
from distill.protocols import Candidates, Direction, fingerprint
from distill.sampler import BatchSampler, CandidateSampler, PairSampler
from distill.suspecting import revision_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distill.experiment import Experiment
    from distill.losses.combine import Weighted
    from distill.recipe.experiment import ArmRecipe, MineRecipe, TrainRecipe
    from distill.recipe.schema import TeachRecipe
    from distill.slow_copy import MomentumSettings
    from distill.towers import TowerVectors
    from distill.train import Phase

SHARED = "shared"
DONE = "done.json"


# --- teach ------------------------------------------------------------------------------------------------------------


def taught_teacher(x: Experiment) -> Path:
    """Folder of the taught teacher; where that has not been done, one process teaches it."""
    with x.timings.stage("teach"):
        x.ranks.work_alone(lambda: _teach(x))
    return x.folder / "teacher"


def _teach(x: Experiment) -> None:
    from distill.teach import TeachingError, teach

    assert x.recipe.teach is not None
    folder = x.folder / "teacher"
    meaning = fingerprint(
        x.corpus.fingerprint,
        x.recipe.teacher.model_dump(mode="json", exclude={"score_kind", "enc_token", "cosine_weight", "compile"}),
        _meaning_of_teaching(x.recipe.teach),
        x.recipe.seed,
    )
    if (folder / DONE).is_file():
        if json.loads((folder / DONE).read_text())["meaning"] != meaning:
            raise TeachingError(
                f"{folder} holds a teacher taught with other data or settings; give this run another name, delete "
                f"the folder, or use it as it is: --set teacher.checkpoint={folder} --set teach=null"
            )
        return
    teacher = x.untaught_teacher()
    work = x.folder / "teach"
    batches = Batches(
        BatchSampler(x.corpus.split_pairs("train"), x.recipe.teach.batch_size, x.recipe.seed),
        x.source(teacher, "image"),
        x.source(teacher, "text"),
        x.corpus.matches,
    )
    work.mkdir(parents=True, exist_ok=True)
    teach(
        teacher,
        batches,
        x.teach_settings(),
        folder=work,
        accelerator=x.accelerator,
        meaning=meaning,
        timings=x.timings,
        profiler=x.profiler,
    )
    with staged_folder(folder) as staged:
        teacher.save_pretrained(staged)
        (staged / DONE).write_text(json.dumps({"meaning": meaning}))


def _meaning_of_teaching(teach: TeachRecipe) -> dict[str, Any]:
    """What decides a teaching; a setting that came later counts only where it is used."""
    settings = teach.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name != "hinge_margin" or value is not None}


# --- shared steps and rounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Steps of one round."""

    number: int  # 0 = the shared steps
    start: int
    stop: int


def stretches(x: Experiment) -> list[Stretch]:
    """The shared steps, then the rounds: so many, evenly cut, or a new one every so many epochs."""
    return cut_into_rounds(x.recipe.train, x.recipe.mine, len(x.corpus.split_pairs("train")))


def cut_into_rounds(train: TrainRecipe, mine: MineRecipe, pairs: int) -> list[Stretch]:
    """As ``stretches``, of a training split with so many labelled pairs."""
    shared = round(train.shared * train.steps)
    if mine.every_epochs is None:
        cuts = [shared + round((train.steps - shared) * part / train.rounds) for part in range(train.rounds + 1)]
    else:
        length = max(1, round(mine.every_epochs * pairs / train.batch_size))
        begun = list(range(shared, train.steps, length)) or [shared]
        if len(begun) > 1 and train.steps - begun[-1] < length / 2:  # too short to be worth mining for
            begun.pop()
        cuts = [*begun, train.steps]
    return [Stretch(0, 0, shared), *(Stretch(n, *cut) for n, cut in enumerate(pairwise(cuts), start=1))]


def shared_checkpoint(x: Experiment) -> Path | None:
    """Checkpoint after the steps that all arms share; None when there are none."""
    stretch = stretches(x)[0]
    if stretch.stop == 0:
        return None
    folder = x.folder / SHARED
    student = x.fresh_student()
    losses = x.builders.losses(x.recipe.shared_losses)
    phase = _phase(x, student, losses, stretch, folder=folder, recipe_of_losses=x.recipe.shared_losses)
    return _unless_done(folder, stretch) or _train(x, student, phase, folder)


def trained_arm(x: Experiment, name: str) -> Path:
    """Folder of an arm's trained student."""
    from distill.checkpoint import load_weights

    arm, folder = x.recipe.arms[name], x.folder / "arms" / name
    final = folder / "student"
    if (final / DONE).is_file():
        return final
    losses = x.builders.losses(arm.losses)
    checkpoint = shared_checkpoint(x)
    student = x.fresh_student()
    for stretch in stretches(x)[1:]:
        reached = _unless_done(folder, stretch)
        if reached is None:
            found = _candidates(x, arm, stretch.number, folder, student, checkpoint)
            x.ranks.work_alone(partial(ahead.forget_snapshot, _round(x, stretch.number, folder)))
            if checkpoint is not None:
                load_weights(checkpoint, student)
            phase = _phase(
                x,
                student,
                losses,
                stretch,
                folder=folder,
                recipe_of_losses=arm.losses,
                found=found,
                scores=arm.reads_scores,
            )
            with _next_round(x, name, stretch.number + 1, student, phase, checkpoint):
                reached = _train(x, student, phase, folder, start_from=checkpoint)
        checkpoint = reached
    assert checkpoint is not None
    load_weights(checkpoint, student)
    x.ranks.work_alone(lambda: _save_student(student, final, name))
    return final


def _candidates(
    x: Experiment, arm: ArmRecipe, number: int, folder: Path, student: Any, checkpoint: Path | None
) -> mined.Both:
    """Of a round, mined by the student of the checkpoint, or by an earlier one that was kept for that."""
    from distill.checkpoint import load_weights

    if not arm.uses_candidates:
        return {}
    of = _round(x, number, folder)
    miner = ahead.snapshot(of) if ahead.snapshot(of).is_dir() else checkpoint
    if miner is not None:
        load_weights(miner, student)
    return mined.candidates(x, of, student=student, before=_round(x, number - 1, folder) if number > 1 else None)


@contextmanager
def _next_round(
    x: Experiment, name: str, number: int, student: Any, phase: Phase, start_from: Path | None
) -> Iterator[None]:
    """Where the recipe has candidates mined ahead, those of round ``number`` are, while the phase before ends in here.

    The training comes to the step at which that begins first.
    """
    if not x.recipe.mine.ahead or number >= len(stretches(x)) or not x.recipe.arms[name].uses_candidates:
        yield
        return
    folder = x.folder / "arms" / name
    of = _round(x, number, folder)
    if not ahead.snapshot(of).is_dir():
        begin = max(phase.start, phase.stop - x.recipe.mine.ahead)
        if begin > phase.start:
            _train(x, student, replace(phase, stop=begin), folder, start_from=start_from)
        ahead.keep_snapshot(of, student)
    with ahead.preparing(x, of, arm=name):
        yield


def mine_ahead(x: Experiment, name: str, number: int) -> None:
    """Mine and score a round of an arm by the student that was kept for it: what the second process does.

    Raises:
        FileNotFoundError: no student was kept.
    """
    arm, folder = x.recipe.arms[name], x.folder / "arms" / name
    of = _round(x, number, folder)
    if not ahead.snapshot(of).is_dir():
        raise FileNotFoundError(f"{ahead.snapshot(of)} is not there: only a training with mine.ahead leaves it")
    with ahead.alone(of):
        found = _candidates(x, arm, number, folder, x.fresh_student(), None)
        if arm.reads_scores:
            pairs = x.corpus.split_pairs("train")
            mined.note(of, {"teacher/asked_ahead": unasked(x, *wanted(x, pairs, found))[0]})
            scores_of(x, pairs, found)


def _train(x: Experiment, student: Any, phase: Phase, folder: Path, start_from: Path | None = None) -> Path:
    from distill.train import train

    with x.timings.stage(f"train {folder.name}"):
        return train(
            student,
            phase,
            x.train_settings(),
            folder=folder,
            accelerator=x.accelerator,
            start_from=start_from,
            timings=x.timings,
            profiler=x.profiler,
        )


def _save_student(student: Any, final: Path, arm: str) -> None:
    with staged_folder(final) as staged:
        student.save_pretrained(staged)
        (staged / DONE).write_text(json.dumps({"arm": arm}))


def _unless_done(folder: Path, stretch: Stretch) -> Path | None:
    """The newest checkpoint where it is at or past the end of the stretch."""
    from distill.checkpoint import latest_checkpoint, step_of

    newest = latest_checkpoint(folder / "checkpoints")
    return newest if newest is not None and step_of(newest) >= stretch.stop else None


def _phase(
    x: Experiment,
    student: Any,
    losses: Weighted,
    stretch: Stretch,
    *,
    folder: Path,
    recipe_of_losses: Sequence[Any],
    found: Mapping[Direction, Candidates] | None = None,
    scores: bool = False,
) -> Phase:
    from distill.extras import TOWERS
    from distill.train import Phase

    found, of = dict(found or {}), _round(x, stretch.number, folder)
    if found and x.ranks.first and (values := mined.about(of)):
        note_round(folder / "metrics.jsonl", step=stretch.start, number=stretch.number, values=values)
    pairs = x.corpus.split_pairs("train")
    known = revision = None
    if scores:
        note_what_is_asked(x, pairs, found, stretch, folder / "metrics.jsonl")
        known, asked = scores_of(x, pairs, found), asked_of(x, found)
        warn_of_odd_scores(pairs, known, asked, losses)
        revision = revision_of(x, asked, known, stretch, metrics=folder / "metrics.jsonl")
    seed = x.recipe.seed
    wants_maps = "student_attention" in losses.needs
    towers = x.towers if losses.needs & TOWERS else ()
    kind = x.recipe.train.candidates if found else None
    sampler: PairSampler = BatchSampler(pairs, x.recipe.train.batch_size, seed)
    if kind == "in_batch":
        sampler = mined.groups(x, of)
    batches = Batches(
        sampler,
        x.training_images(student, tokens=wants_maps),
        x.source(student, "text", tokens=wants_maps),
        x.corpus.matches,
        known,
        () if kind == "in_batch" else _samplers(x, found, recipe_of_losses, scores=scores),
        pair_maps(x, pairs) if wants_maps else None,
        towers,
        revision,
        memory=mined_vectors.memory(x, of) if kind == "memory" else {},
    )
    meaning = fingerprint(
        x.corpus.fingerprint,
        x.recipe.student.model_dump(mode="json"),
        x.recipe.train.model_dump(mode="json", include=_MEANING_OF_TRAIN),
        [part.model_dump(mode="json") for part in recipe_of_losses],
        [seed, stretch.number, stretch.start, stretch.stop],
        *(array for those in found.values() for array in (those.query_ids, those.item_ids)),
        *((known.keys, known.scores) if known is not None else ()),
        *(tower.identity for tower in towers),
        *((*revision.arrays, revision.keep_share) if revision is not None else ()),
        *((sampler.groupings,) if isinstance(sampler, GroupedSampler) else ()),
    )
    return Phase(stretch.start, stretch.stop, batches, losses, meaning, *_of_training(towers, recipe_of_losses))


def _samplers(x: Experiment, found: mined.Both, parts: Sequence[Any], *, scores: bool) -> tuple[CandidateSampler, ...]:
    """What draws a step's candidates. Those that the teacher is not asked about come last.

    Where no loss reads candidates without a score they do not come at all: they would be encoded for nothing.
    """
    per_query, seed = x.recipe.train.candidates_per_query, x.recipe.seed
    later: Mapping[Direction, Any] = {}
    if scores and x.recipe.mine.subset is not None:
        if any("all" in (getattr(part, "negatives", None), getattr(part, "columns", None)) for part in parts):
            later = {direction: ~asked for direction, asked in asked_cells(x, found).items()}
        else:
            found = asked_of(x, found)
    return tuple(CandidateSampler(those, per_query, seed, later.get(direction)) for direction, those in found.items())


def _of_training(towers: Sequence[TowerVectors], parts: Sequence[Any]) -> tuple[int, MomentumSettings | None]:
    """Place among the towers of the one that ``embedding_match`` follows, and how the student's slow copy is kept."""
    from distill.slow_copy import MomentumSettings

    member = next((part.member for part in parts if part.name == "embedding_match"), None)
    followed = next((place for place, tower in enumerate(towers) if tower.member == member), 0)
    return followed, next((MomentumSettings(p.decay, p.queue) for p in parts if p.name == "momentum"), None)


_MEANING_OF_TRAIN = {
    "steps",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup",
    "grad_clip",
    "shared",
    "rounds",
    "candidates_per_query",
    "candidates",
    "group",
    "groupings",
    "precision",
    "micro_batch",
    "augment",
    "matryoshka",
}


# --- mine, score ------------------------------------------------------------------------------------------------------


def _round(x: Experiment, number: int, folder: Path) -> mined.Round:
    """Where a round's candidates are kept: the first round's are those of all arms."""
    return mined.Round(number, x.folder / SHARED if number == 1 else folder)


def first_candidates(x: Experiment) -> dict[Direction, Candidates]:
    """The first round's candidates, which all arms have in common."""
    from distill.checkpoint import load_weights

    student, checkpoint = x.fresh_student(), shared_checkpoint(x)
    if checkpoint is not None:
        load_weights(checkpoint, student)
    return mined.candidates(x, _round(x, 1, x.folder), student=student)


def mined_before(x: Experiment) -> dict[Direction, Candidates]:
    """The first round's candidates as the run's folder holds them; FileNotFoundError where they were never mined."""
    found = mined.kept(_round(x, 1, x.folder))
    if found is None:
        raise FileNotFoundError(f"{x.folder} has no mined candidates yet: distill run RECIPE --resume first")
    return found


def first_scores(x: Experiment) -> PairScores:
    """The teacher's scores of the first round."""
    return scores_of(x, x.corpus.split_pairs("train"), first_candidates(x))
