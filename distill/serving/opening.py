"""From a folder and what the user names beside it to an engine; everything that does not fit is refused here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.protocols import Distant
from distill.serving.catalog import Catalog, has_index
from distill.serving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from distill.data.corpus import Corpus
    from distill.experiment import Experiment
    from distill.export.layout import Precision
    from distill.export.runtime import OnnxStudent
    from distill.serving.pictures import PictureSource

_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_NEEDED |= {"python_multipart": "python-multipart", "onnxruntime": "onnxruntime"}


DISTANT_S = 10.0  # for a teacher elsewhere to re-rank, after which whoever searches hears that it does not answer


class ServingError(ValueError):
    """A service that cannot be started as asked; the message says what to change."""


class MissingServeError(ImportError):
    """A part of the ``serve`` extra is not installed."""


@dataclass(frozen=True)
class Beside:
    """What a student is served with."""

    teacher: Experiment | None = None
    data: Experiment | None = None
    pictures: Path | None = None
    rerank: int = 32


def check_installed(needed: Mapping[str, str] = _NEEDED) -> None:
    """Refuse before anything is loaded; ``needed``: modules and the packages that bring them.

    Raises:
        MissingServeError: naming what is missing.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingServeError(f'{", ".join(missing)} not installed: pip install "cross2dual[serve]"')


def open_engine(folder: Path, beside: Beside, *, precision: Precision, say: Callable[[str], object]) -> Engine:
    """Load the student, its index and, where asked for, pictures and a teacher.

    Args:
        folder: What ``distill export`` wrote.
        beside: What goes with it.
        precision: Of the student's towers.
        say: Told what is loaded.

    Raises:
        ServingError: the recipe's corpus is another one than the index was made of, or the teacher cannot re-rank.
        NotAnExportError: ``folder`` is none.
    """
    from distill.export.runtime import OnnxStudent

    if beside.teacher is not None:
        check_teacher(beside.teacher)
    student = OnnxStudent(folder, precision=precision)
    say(f"student: {student.report['student'].get('class', '')}, {_precisions(student)}")
    catalog = Catalog(folder, dim=student.dim) if has_index(folder) else None
    if catalog is None:
        if beside != Beside(rerank=beside.rerank):
            raise ServingError(
                f"{folder} was exported without an index, so there is nothing to show or re-rank: "
                "leave out --pictures, --data and --teacher, or export with an index"
            )
        say("no index in this folder: /embed works, /search does not")
        return Engine(student)
    say(f"index: {len(catalog.index['image'])} pictures, {len(catalog.index['text'])} captions")
    pictures = _pictures(student, catalog, beside)
    reranker = None
    if beside.teacher is not None:
        reranker = _reranker(beside.teacher, catalog, pictures, say)
    return Engine(student, catalog, pictures, reranker, rerank=beside.rerank)


def check_teacher(x: Experiment) -> None:
    """Refuse, before the minutes that loading takes, what is no one model or has not been taught.

    Raises:
        ServingError: with what to give in its place.
    """
    from distill.pipeline import DONE

    if x.builders.ensemble is not None:
        raise ServingError(
            f"the teacher of {x.recipe.name} is an ensemble, whose members are never in memory together, so it cannot "
            "be served: give a recipe with one of its members as the teacher"
        )
    if x.recipe.teach is not None and not (x.folder / "teacher" / DONE).is_file():
        raise ServingError(
            f"{x.folder} has no taught teacher yet, and the recipe's teacher is of no use before: distill teach RECIPE "
            "first, or give the folder of a run that has one"
        )


def _pictures(student: OnnxStudent, catalog: Catalog, beside: Beside) -> PictureSource | None:
    from distill.serving.pictures import FolderPictures

    corpora: list[Corpus] = []
    for x in (beside.data, beside.teacher):
        if x is not None:
            _check_corpus(student, x.corpus)
            corpora.append(x.corpus)
    if beside.pictures is not None:
        return FolderPictures(beside.pictures, catalog)
    return corpora[0].pictures if corpora else None


def _check_corpus(student: OnnxStudent, corpus: Corpus) -> None:
    told = student.report.get("corpus", {})
    if told.get("fingerprint") != corpus.fingerprint:
        raise ServingError(
            f"the index was made of corpus {told.get('name')!r} with fingerprint {told.get('fingerprint')}, but the "
            f"recipe's corpus {corpus.name!r} has {corpus.fingerprint}: rows would name other pictures. Give the "
            "recipe of the run that was exported, with its data as it was"
        )


def _reranker(x: Experiment, catalog: Catalog, pictures: PictureSource | None, say: Callable[[str], object]) -> Any:
    from distill.serving.rerank import Reranker

    assert pictures is not None  # a teacher comes with a corpus
    teacher = x.teacher
    say(f"teacher: {type(teacher).__name__}, {teacher.score_kind}")
    if isinstance(teacher, Distant):
        teacher.answer_within(DISTANT_S)
    return Reranker(teacher, {"image": pictures.load, "text": catalog.texts}, device=x.accelerator.device)


def _precisions(student: OnnxStudent) -> str:
    kinds = set(student.precisions.values())
    if len(kinds) == 1:
        return kinds.pop()
    return ", ".join(f"{side} tower {precision}" for side, precision in student.precisions.items())
