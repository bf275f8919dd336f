"""From a recipe's experiment to a running engine; what cannot be served is refused before models are loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distill.protocols import SIDES
from distill.serving.app import distribution_version
from distill.serving.opening import ServingError, check_teacher
from distill.stopping import in_thread_of_its_own
from distill.teacher_service.engine import Engine
from distill.teacher_service.items import Items
from distill.teacher_service.schemas import CorpusInfo, Info, LimitsInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.experiment import Experiment
    from distill.protocols import Side
    from distill.teacher_service.engine import EngineSettings
    from distill.wire import Limits


def open_engine(
    x: Experiment, settings: EngineSettings, limits: Limits, *, say: Callable[[str], object]
) -> tuple[Engine, Info]:
    """Load the recipe's teacher with its corpus and its store.

    Args:
        x: of the recipe.
        settings: sizes of the engine.
        limits: of a request.
        say: told what is loaded.

    Raises:
        ServingError: the teacher is not yet taught, is several, or is itself a service.
    """
    check_served(x)
    # A thread that has computed keeps OpenMP workers while it lives. Were this one to load the models, there would be
    # more workers than cores beside those of the engine's own thread, and all would sleep between any two operations.
    return in_thread_of_its_own(lambda: _opened(x, settings, limits, say))


def _opened(
    x: Experiment, settings: EngineSettings, limits: Limits, say: Callable[[str], object]
) -> tuple[Engine, Info]:
    from distill.towers import width_of

    corpus = x.corpus
    say(f"corpus: {corpus.name}, {corpus.n_images} pictures, {corpus.n_texts} captions")
    teacher = x.teacher
    split = corpus.split(next(iter(corpus.splits)))
    dim = width_of(teacher, corpus, split.ids)
    say(f"teacher: {type(teacher).__name__}, {teacher.score_kind}, {teacher.identity}")
    items: dict[Side, Items] = {
        side: Items(
            side,
            teacher,
            corpus=corpus,
            source=x.source(teacher, side),
            max_pixels=limits.picture_pixels,
            max_pixels_together=limits.pixels,
        )
        for side in SIDES
    }
    store = x.store
    say(f"store: {store.stats().pairs} pairs in {store.folder}")
    engine = Engine(teacher, items, store, settings, x.accelerator.device)
    return engine, _info(teacher, dim, corpus, limits)


def check_served(x: Experiment) -> None:
    """Refuse what is no one taught model of this machine, before anything is loaded or asked.

    Raises:
        ServingError: with what to give in its place.
    """
    if x.recipe.teacher.kind == "remote":
        raise ServingError(
            f"the teacher of {x.recipe.name} is a service already: ask that one, or give a recipe with a checkpoint"
        )
    check_teacher(x)


def _info(teacher: Any, dim: int | None, corpus: Any, limits: Limits) -> Info:
    known = CorpusInfo(name=corpus.name, fingerprint=corpus.fingerprint, images=corpus.n_images, texts=corpus.n_texts)
    return Info(
        version=distribution_version(),
        teacher=type(teacher).__name__,
        identity=teacher.identity,
        score_kind=teacher.score_kind,
        dim=dim,
        corpus=known,
        limits=LimitsInfo(**asdict(limits)),
    )
