"""The parts of one experiment, made from its recipe when first asked for: corpus, models, sources, store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.protocols import Ids, Inputs, Side
from distill.recipe.experiment import Recipe

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from distill.batches import Source
    from distill.data.corpus import Corpus
    from distill.features import Features
    from distill.losses.combine import Weighted
    from distill.store import ScoreStore
    from distill.teach import TeachSettings
    from distill.train import TrainSettings

ATTENTION_WIDTH = 64  # of the throw-away heads that read the student's tokens
# Items prepared, and run through a frozen tower, at a time. On a CPU, pictures by the hundred were measured ten times
# slower than by the dozen: the early layers' outputs no longer fit any cache.
PREPARED_AT_ONCE: dict[Side, int] = {"image": 32, "text": 256}


class ExperimentError(ValueError):
    """An experiment that cannot go on as asked; the message says what to change."""


@dataclass(frozen=True)
class Builders:
    """How the parts that a recipe names are made; handed in by the assembly, so that this module knows no model."""

    corpus: Callable[[], Corpus]
    teacher: Callable[[Corpus, Path | None], Any]  # from the folder where it was taught; None: as the recipe says
    student: Callable[[Corpus], Any]
    saved_student: Callable[[Path], Any]
    losses: Callable[[Sequence[Any]], Weighted]


@dataclass(frozen=True)
class PooledOnly:
    """A frozen tower's pooled outputs without its token states, which are a hundred times as large."""

    features: Features

    def __call__(self, rows: Ids) -> Inputs:
        """Pooled outputs of these rows."""
        return self.features.get(rows, fields=("pooled",))


class Experiment:
    """A recipe, its run folder, and the parts, each made once."""

    def __init__(self, recipe: Recipe, builders: Builders, *, taught: Callable[[Experiment], Path]) -> None:
        """``taught`` gives the folder of the taught teacher, teaching it first where that has not been done."""
        self.recipe, self.builders, self._taught = recipe, builders, taught
        self.folder, self.cache = recipe.folder, recipe.cache

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus, checked."""
        return self.builders.corpus()

    @cached_property
    def accelerator(self) -> Accelerator:
        """Device, precision and trackers."""
        from accelerate import Accelerator

        train = self.recipe.train
        made = Accelerator(
            cpu=self.recipe.device == "cpu",
            mixed_precision=train.precision,
            log_with=list(train.trackers) or None,
            project_dir=str(self.folder),
        )
        if train.trackers:
            made.init_trackers("cross2dual", config={"name": self.recipe.name, "seed": self.recipe.seed})
        return made

    def untaught_teacher(self) -> Any:
        """The teacher as the recipe gives it, before any teaching."""
        return self.builders.teacher(self.corpus, None).to(self.accelerator.device)

    @cached_property
    def teacher(self) -> Any:
        """The teacher that scores: taught first where the recipe says so, frozen, on the device."""
        import torch

        folder = self._taught(self) if self.recipe.teach is not None else None
        teacher = self.builders.teacher(self.corpus, folder)
        if isinstance(teacher, torch.nn.Module):
            teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        if hasattr(teacher, "fix_identity"):  # hashing every weight at each look-up would cost more than the look-up
            teacher.fix_identity()
        return teacher

    def fresh_student(self) -> Any:
        """The student before any training: the same weights at every call."""
        import torch

        torch.manual_seed(self.recipe.seed)
        student = self.builders.student(self.corpus)
        if self.recipe.needs_maps:  # in every arm, so that all arms start from the same weights and optimizer
            student.enable_attention(ATTENTION_WIDTH)
        return student.to(self.accelerator.device)

    def saved_student(self, folder: Path) -> Any:
        """A trained student, in eval mode on the device."""
        return self.builders.saved_student(folder).to(self.accelerator.device).eval()

    def source(self, model: Any, side: Side, *, tokens: bool = False) -> Source:
        """Inputs of the model for any rows of the corpus: frozen outputs or prepared inputs from disk, else made live.

        ``tokens``: the token states of a frozen tower too, where they are kept; only attention maps read them.
        """
        from distill.embed import item_source
        from distill.features import Features

        made = item_source(
            self.corpus,
            side,
            model,
            self.cache,
            batch_size=PREPARED_AT_ONCE[side],
            prepared_budget_bytes=int(self.recipe.prepared_gib * 2**30),
        )
        if not tokens and isinstance(made, Features) and "pooled" in made.fields:
            return PooledOnly(made)
        return made

    def embed(self, student: Any, side: Side, rows: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Unit vectors (N, D) of corpus rows."""
        from distill.embed import embed

        return embed(
            student,
            self.source(student, side),
            rows,
            side,
            batch_size=self.recipe.evaluate.batch_size,
            device=self.accelerator.device,
        )

    @cached_property
    def store(self) -> ScoreStore:
        """Where the teacher's scores are kept, shared by all runs with this teacher and corpus."""
        from distill.store import ScoreStore

        return ScoreStore(
            self.cache / "scores",
            teacher_identity=self.teacher.identity,
            corpus_fingerprint=self.corpus.fingerprint,
            score_kind=self.teacher.score_kind,
            n_images=self.corpus.n_images,
            n_texts=self.corpus.n_texts,
        )

    def ask(self, image_ids: Ids, text_ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The teacher's scores (P,) of pairs; only what the store lacks is computed."""
        from distill.score import ScoreOptions, score_pairs

        score_pairs(
            self.teacher,
            self.store,
            image_ids,
            text_ids,
            image_source=self.source(self.teacher, "image"),
            text_source=self.source(self.teacher, "text"),
            options=ScoreOptions(**self.recipe.score.model_dump()),
        )
        return self.store.require(image_ids, text_ids)

    def train_settings(self) -> TrainSettings:
        """Schedule and sizes of every student's training."""
        from distill.train import TrainSettings

        train = self.recipe.train
        names = set(TrainSettings.__dataclass_fields__) - {"seed"}
        return TrainSettings(seed=self.recipe.seed, **train.model_dump(include=names))

    def teach_settings(self) -> TeachSettings:
        """Schedule and sizes of the teaching."""
        from distill.teach import TeachSettings

        assert self.recipe.teach is not None
        return TeachSettings(seed=self.recipe.seed, **self.recipe.teach.model_dump())
