"""What can be known to fail is refused before any work: sizes, what a loss needs, whose run folder this is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distill.data.changes import note_or_compare
from distill.durable import sweep_temporaries, write_atomically
from distill.preflight_training import check_means
from distill.protocols import DIRECTIONS, ContrastiveTeachable, MapsTeacher, TeachableTeacher
from distill.recipe.load import dump
from distill.teacher_note import TEACHER_NOTE, note_teacher, noted_teacher

if TYPE_CHECKING:
    from distill.experiment import Experiment

log = logging.getLogger(__name__)
# Keys whose value changes no result: a run may be gone on with under others.
_FREE = {
    "runs", "cache", "device", "prepared_gib", "score", "train.workers", "train.log_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.trackers", "evaluate.batch_size", "teacher.compile",
    "train.gradient_checkpointing", "train.compile", "mine.recall_floor", "teacher.urls", "teacher.token_file",
    "teacher.pairs_per_request", "teacher.connections", "teacher.deadline_s", "teacher.patience_s",
    "teacher.identity",  # of a remote one: the run's own note is what it is held to
}  # fmt: skip
CORPUS = "corpus.npz"  # in the run's folder: what data it was begun with


class PreflightError(ValueError):
    """A recipe that would fail later."""


def check(x: Experiment) -> None:
    """Refuse what cannot work, by sizes and by what the models can do.

    Raises:
        PreflightError: with the value, the limit and what to change.
        ExperimentError: a means of training that is not there.
    """
    _check_trackers(x)
    _check_sizes(x)
    _check_subset(x)
    _check_losses(x)
    check_means(x)
    reads_vectors = any(part.reads_vectors for part in x.recipe.shared_losses)
    if reads_vectors or any(arm.distils for arm in x.recipe.arms.values()) or x.recipe.teach is not None:
        teacher = x.untaught_teacher()
        if x.recipe.teach is not None and not isinstance(teacher, TeachableTeacher | ContrastiveTeachable):
            raise PreflightError(
                f"teach: {type(teacher).__name__} cannot be taught: it has no contrastive head beside a matching head "
                "(pair_logits) or similarities of pairs (pair_matrix) to train; "
                "leave out the teach: section and give teacher.checkpoint"
            )
        if x.recipe.needs_maps:
            _check_maps(x, teacher)
        _check_towers(x, teacher)


def _check_trackers(x: Experiment) -> None:
    from accelerate.tracking import get_available_trackers

    missing = set(x.recipe.train.trackers) - {str(name) for name in get_available_trackers()}
    if missing:  # accelerate passes over them in silence
        names = " and ".join(sorted(missing))
        raise PreflightError(f"train.trackers: {names} cannot be imported: pip install {names}, or leave it out")


def _check_sizes(x: Experiment) -> None:
    from distill.mine import check_k

    for name in {"train", x.recipe.evaluate.split}:
        x.corpus.split(name)
    train, matches = x.corpus.split("train"), x.corpus.matches
    pairs = len(x.corpus.split_pairs("train"))
    if pairs < x.recipe.train.batch_size:
        raise PreflightError(
            f"train.batch_size is {x.recipe.train.batch_size} but the training split has {pairs} pairs: "
            f"lower it to at most {pairs}"
        )
    if x.recipe.train.batch_size < x.ranks.count:
        raise PreflightError(
            f"train.batch_size is {x.recipe.train.batch_size} for {x.ranks.count} processes: each needs a pair at least"
        )
    if x.recipe.teach is not None and pairs < x.recipe.teach.batch_size:
        raise PreflightError(
            f"teach.batch_size is {x.recipe.teach.batch_size} but the training split has {pairs} pairs: "
            f"lower it to at most {pairs}"
        )
    if any(arm.uses_candidates for arm in x.recipe.arms.values()):
        for direction in DIRECTIONS:
            queries, items = (train.images, train.texts) if direction == "i2t" else (train.texts, train.images)
            offsets, _ = matches.of(direction, queries)
            most = int((offsets[1:] - offsets[:-1]).max())
            try:
                check_k(x.recipe.mine.k, len(items), most, skip_top=x.recipe.mine.skip_top)
            except ValueError as error:
                raise PreflightError(f"mine.k ({direction}): {error}") from None


def _check_subset(x: Experiment) -> None:
    """Not in the schema: ``distill compare`` gives a recipe its arms after it was read."""
    if x.recipe.mine.subset is not None and not any(arm.reads_scores for arm in x.recipe.arms.values()):
        raise PreflightError(
            "mine.subset says which part of the candidates the teacher is asked about, but no arm has a loss that "
            "reads its scores: add one, or leave it out"
        )


def _check_losses(x: Experiment) -> None:
    from distill.extras import EXTRAS

    kind = getattr(x.recipe.teacher, "score_kind", None)
    if x.recipe.teacher.kind == "remote" and any(arm.reads_scores for arm in x.recipe.arms.values()):
        kind = x.teacher.score_kind
    for name, arm in x.recipe.arms.items():
        for built in x.builders.losses(arm.losses).parts:
            if not built.needs <= EXTRAS:
                raise PreflightError(
                    f"arms.{name}: {built.name} needs {', '.join(sorted(built.needs - EXTRAS))}, which the training "
                    f"does not make; it makes {', '.join(sorted(EXTRAS))}: take another loss"
                )
        for part in arm.losses:
            if getattr(part, "gain", None) == "sigmoid" and kind not in (None, "log_odds"):
                raise PreflightError(
                    f"arms.{name}: {part.name} with gain: sigmoid reads log-odds, but teacher.score_kind is {kind}: "
                    "take another gain, or teacher.score_kind: log_odds"
                )
            if getattr(part, "accept", None) == "log_odds" and kind not in (None, "log_odds"):
                raise PreflightError(
                    f"arms.{name}: cprd accepts candidates by their log-odds, but teacher.score_kind is {kind}: "
                    "set accept: margin, top or fraction, or teacher.score_kind: log_odds"
                )


def _check_maps(x: Experiment, teacher: Any) -> None:
    arms = [name for name, arm in x.recipe.arms.items() if any(part.name == "attention" for part in arm.losses)]
    where = f"arms.{arms[0]}: the attention loss"
    if x.recipe.train.micro_batch is not None:
        raise PreflightError(
            f"{where} needs the token states of the whole batch, but train.micro_batch is "
            f"{x.recipe.train.micro_batch}: leave micro_batch out, or take another loss"
        )
    if x.ranks.count > 1:
        raise PreflightError(
            f"{where} needs the token states of the whole batch in one place, but there are {x.ranks.count} processes: "
            "start one, or take another loss"
        )
    if not isinstance(teacher, MapsTeacher):
        raise PreflightError(
            f"{where} reads the teacher's cross-attention, but {type(teacher).__name__} has no attention_maps: take "
            "another loss, or a teacher with cross-attention (blip, fusion)"
        )
    try:
        student = x.fresh_student()
        grid = student.grid
    except (ValueError, AttributeError) as error:
        raise PreflightError(f"{where} needs the student's image grid and token states: {error}") from None
    if tuple(grid) != tuple(teacher.grid):
        raise PreflightError(
            f"{where} compares maps cell by cell, but the teacher's image grid is {tuple(teacher.grid)} and the "
            f"student's {tuple(grid)}: give both the same image size and patch size, or take another loss"
        )
    sample = [x.corpus.texts[int(row)] for row in x.corpus.split("train").texts[:32]]
    theirs, ours = teacher.prepare_texts(sample)["input_ids"], student.prepare_texts(sample)["input_ids"]
    width = min(theirs.shape[1], ours.shape[1])
    if bool((theirs[:, :width] != ours[:, :width]).any()):
        raise PreflightError(
            f"{where} compares maps word by word, but teacher and student cut texts into different tokens: give both "
            "the same tokenizer, or take another loss"
        )


def _check_towers(x: Experiment, teacher: Any) -> None:
    """What losses on the vectors of the teacher's own towers need: that there are any, how many, and how wide."""
    reading = [
        (where, part)
        for where, parts in (("shared_losses", x.recipe.shared_losses), *_losses_of_arms(x))
        for part in parts
        if part.reads_vectors
    ]
    if not reading:
        return
    widths = _tower_widths(x, teacher)
    if not widths:
        where, part = reading[0]
        raise PreflightError(
            f"{where}: {part.name} reads the vectors of the teacher's own contrastive towers, but teacher.kind "
            f"{x.recipe.teacher.kind} has no contrastive head: take a loss on scores, or a teacher with such a head"
        )
    student_width = None
    for where, part in reading:
        if part.name == "affinity":
            _check_teacher_scales(where, part, widths)
        elif part.name == "embedding_match":
            student_width = student_width or x.fresh_student().dim
            _check_followed(where, part, widths, student_width)


def _losses_of_arms(x: Experiment) -> list[tuple[str, Any]]:
    return [(f"arms.{name}", arm.losses) for name, arm in x.recipe.arms.items()]


def _tower_widths(x: Experiment, teacher: Any) -> dict[int, int]:
    """Width of the vectors of each model with a contrastive head, by its place in teacher.members."""
    from distill.towers import width_of

    split = x.corpus.split("train")
    rows = split.ids
    if x.builders.ensemble is None:
        found = [width_of(teacher, x.corpus, rows)]
    else:
        found = [width_of(load(x.corpus), x.corpus, rows) for load in x.builders.ensemble().members.values()]
    return {place: width for place, width in enumerate(found) if width is not None}


def _check_teacher_scales(where: str, part: Any, widths: dict[int, int]) -> None:
    if len(part.teacher_scales) not in (1, len(widths)):
        raise PreflightError(
            f"{where}: affinity has {len(part.teacher_scales)} teacher_scales, but {len(widths)} of the teacher's "
            f"models have a contrastive head (place {', '.join(map(str, widths))} of teacher.members): give one for "
            "all, or one each, in this order"
        )


def _check_followed(where: str, part: Any, widths: dict[int, int], student_width: int) -> None:
    if part.member is None and len(widths) > 1:
        raise PreflightError(
            f"{where}: embedding_match follows one model, but {len(widths)} of teacher.members have a contrastive "
            f"head: say which by member: {' or '.join(map(str, widths))}, or use affinity for all of them"
        )
    if part.member is not None and part.member not in widths:
        raise PreflightError(
            f"{where}: embedding_match names member {part.member}, which has no contrastive head or does not exist; "
            f"members with one: {', '.join(map(str, widths))}"
        )
    width = next(iter(widths.values())) if part.member is None else widths[part.member]
    if width != student_width:
        raise PreflightError(
            f"{where}: embedding_match needs one width, but the student's vectors have {student_width} numbers and the "
            f"teacher's {width}: set student.projection_dim to {width}, or use affinity, which compares similarities"
        )


def check_data(x: Experiment) -> None:
    """Refuse to read a run beside other data than it was begun with.

    Raises:
        ChangedDataError: with what differs.
    """
    if (x.folder / CORPUS).is_file():
        note_or_compare(x.corpus, x.folder / CORPUS)


def claim(x: Experiment, *, resume: bool) -> None:
    """Take the run's folder: a new one, or with ``resume`` one that was begun with the same recipe and data.

    What killed processes left half written in it goes.

    Raises:
        PreflightError: the folder holds a run already, or one that means something else (with the differing keys).
        ChangedDataError: the run was begun with other data (with what differs).
    """
    path = x.folder / "recipe.yaml"
    text = dump(x.recipe)
    if path.is_file():
        if not resume:
            raise PreflightError(
                f"{x.folder} already holds a run: add --resume to go on with it, another name by --set name=..., "
                "or delete the folder"
            )
        _check_same(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text), path)
        note_or_compare(x.corpus, x.folder / CORPUS)
        log.info("resuming %s: finished stages are taken from there", x.folder)
        for folder in [x.folder, *(path for path in x.folder.rglob("*") if path.is_dir())]:
            sweep_temporaries(folder)
    else:
        for noted in (CORPUS, TEACHER_NOTE):
            (x.folder / noted).unlink(missing_ok=True)  # of a run that was killed before it had begun
        note_or_compare(x.corpus, x.folder / CORPUS)
    if x.recipe.teacher.kind == "remote":
        _note_or_compare_teacher(x)
    write_atomically(path, lambda file: file.write(text.encode()))


def _note_or_compare_teacher(x: Experiment) -> None:
    """The recipe says where the teacher is and not which: a run goes on with the one that it began with."""
    known, teacher = noted_teacher(x.folder), x.teacher
    if known is not None and known["identity"] != teacher.identity:
        raise PreflightError(
            f"{teacher} is the teacher {teacher.identity}, but {x.folder} was begun with {known['identity']}: serve "
            "that one again, or give this run another name with --set name=..."
        )
    note_teacher(x.folder, teacher.identity, teacher.score_kind)


def _check_same(old: Any, new: Any, path: Path) -> None:
    before, after = _flat(old), _flat(new)
    arms = set(old.get("arms", {}))
    free = {*_FREE, "mine.shard_items"} if after.get("mine.factory") == "Flat" else _FREE  # exact in shards, too
    differing = [
        key
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key)
        and not any(key == one or key.startswith(f"{one}.") for one in free)
        and not (key.startswith("arms.") and key.split(".")[1] not in arms)  # a new arm joins the others
    ]
    if differing:
        listed = "\n".join(f"  {key}: was {before.get(key)!r}, now {after.get(key)!r}" for key in differing[:12])
        raise PreflightError(
            f"{path} was begun with another recipe; a resumed run must mean the same:\n{listed}\n"
            "put these back, or give this run another name with --set name=..."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs: dict[str, Any] = {}
        for key, item in value.items():
            pairs |= _flat(item, f"{prefix}{key}.")
        return pairs
    if isinstance(value, list):
        return {prefix.rstrip("."): value}
    return {prefix.rstrip("."): value}
