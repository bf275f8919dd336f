"""The parts of one experiment, made from its recipe when first asked for: corpus, models, sources, store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.protocols import Ids, Inputs, Side
from distill.recipe.experiment import Recipe
from distill.timings import Timings

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from distill.batches import Source
    from distill.data.corpus import Corpus
    from distill.ensemble import EnsembleParts
    from distill.false_negatives import Likeness
    from distill.features import Features
    from distill.losses.combine import Weighted
    from distill.profiling import Profiler
    from distill.ranks import Ranks
    from distill.scorer import Elsewhere, Scorer, TeacherScorer
    from distill.store import ScoreStore
    from distill.teach import TeachSettings
    from distill.towers import TowerVectors
    from distill.train import TrainSettings

PATIENCE = timedelta(days=2)  # of processes that wait while the first teaches or evaluates alone
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
    ensemble: Callable[[], EnsembleParts] | None = None  # where the recipe's teacher is several


@dataclass(frozen=True)
class PooledOnly:
    """A frozen tower's pooled outputs without its token states, which are a hundred times as large."""

    features: Features

    def __call__(self, rows: Ids) -> Inputs:
        """Pooled outputs of these rows."""
        return self.features.get(rows, fields=("pooled",))


class Experiment:
    """A recipe, its run folder, and the parts, each made once."""

    def __init__(
        self,
        recipe: Recipe,
        builders: Builders,
        *,
        taught: Callable[[Experiment], Path],
        timings: Timings | None = None,
    ) -> None:
        """The parts are made when first asked for.

        Args:
            recipe: what to make.
            builders: how its parts are made.
            taught: gives the folder of the taught teacher, teaching it first where that has not been done.
            timings: the session's clock, where it has begun before.
        """
        self.recipe, self.builders, self._taught = recipe, builders, taught
        self.folder, self.cache = recipe.folder, recipe.cache
        self.timings = timings or Timings()
        self.elsewhere: Elsewhere | None = None  # what scores in place of this process, where that was asked for
        self.profiler: Profiler | None = None  # what looks into its trainings, where that was asked for

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus, checked."""
        with self.timings.stage("read data"):
            return self.builders.corpus()

    @cached_property
    def accelerator(self) -> Accelerator:
        """Device and precision; ``tracking.trackers_of`` opens its trackers."""
        import torch
        from accelerate import Accelerator, InitProcessGroupKwargs

        from distill import sharding

        sharding.settle()
        train, launched = self.recipe.train, int(os.environ.get("WORLD_SIZE", "1"))
        made = Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            # said outright, since accelerate joins processes without a GPU only where it is asked for the CPU
            cpu=self.recipe.device == "cpu" or (launched > 1 and not torch.accelerator.is_available()),
            mixed_precision=train.precision,
            log_with=list(train.trackers) or None,
            project_dir=str(self.folder),
        )
        if made.num_processes != launched:
            raise ExperimentError(
                f"a launcher started {launched} processes, but {made.num_processes} found one another: start them with "
                "accelerate launch or torchrun on machines that reach each other, or run without a launcher"
            )
        return made

    def arm_named(self, name: str) -> str:
        """An arm of the recipe, the last where ``name`` is empty; raises ExperimentError where there is none such."""
        arms = list(self.recipe.arms)
        if name and name not in arms:
            raise ExperimentError(f"no arm {name!r} in this run; it has {', '.join(arms)}")
        return name or arms[-1]

    def use_cpu(self) -> None:
        """From here on, whatever the recipe says; before any model was made."""
        self.recipe = self.recipe.model_copy(
            update={"device": "cpu", "train": self.recipe.train.model_copy(update={"precision": "no"})}
        )

    @cached_property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        from distill.ranks import Ranks

        return Ranks(self.accelerator)

    def untaught_teacher(self) -> Any:
        """The teacher as the recipe gives it, before any teaching; an ensemble itself, whose members are taught.

        A teacher elsewhere is the one that scores, and connected to once.
        """
        if self.builders.ensemble is not None:
            return self.scorer
        if self.recipe.teacher.kind == "remote":
            return self.teacher
        return self.builders.teacher(self.corpus, None).to(self.accelerator.device)

    @cached_property
    def teacher(self) -> Any:
        """The one teacher that scores: taught first where the recipe says so, frozen, on the device.

        Raises:
            ExperimentError: the recipe's teacher is an ensemble; ``scorer`` is there in either case.
        """
        if self.builders.ensemble is not None:
            raise ExperimentError(
                "the teacher is an ensemble: its members are never in memory together, so there is no one model to "
                "look into; ask for scores, or give one member as the teacher"
            )
        folder = self._taught(self) if self.recipe.teach is not None else None
        return self._frozen(self.builders.teacher(self.corpus, folder))

    @cached_property
    def scorer(self) -> Scorer:
        """What gives scores: the teacher beside its store, or an ensemble, which loads its members one at a time."""
        if self.builders.ensemble is None:
            return self._scorer_of(self.teacher)
        from distill.ensemble import Ensemble, Member

        parts = self.builders.ensemble()
        members = [Member(name, partial(self._loaded, name, load), self.ranks) for name, load in parts.members.items()]
        return Ensemble(members, parts.settings, self.corpus)

    @cached_property
    def towers(self) -> tuple[TowerVectors, ...]:
        """Vectors of the training split by the teacher's own contrastive towers, from disk or computed once.

        Raises:
            NoContrastiveHeadError: it has none.
        """
        from distill.towers import write_towers

        split = self.corpus.split("train")
        scorer = self.scorer  # taught first, where it has to be
        with self.timings.stage("embed"):
            return write_towers(self.cache / "vectors", scorer, split.ids, self.corpus)

    def scorer_named(self, member: str) -> TeacherScorer:
        """The scorer of one model: a member of the ensemble by its name, or with no name the one teacher.

        Raises:
            ExperimentError: the recipe's teacher has no such member.
        """
        members = self.builders.ensemble().members if self.builders.ensemble is not None else {}
        if member in members:
            return self._loaded(member, members[member])
        if member or members:
            raise ExperimentError(f"the teacher has no member {member!r}; it has {', '.join(members) or 'none'}")
        return self._scorer_of(self.teacher)

    def _loaded(self, name: str, load: Callable[[Corpus], Any]) -> TeacherScorer:
        return self._scorer_of(self._frozen(load(self.corpus)), name)

    def _frozen(self, teacher: Any) -> Any:
        """The teacher on the device, its weights and identity fixed."""
        import torch

        if isinstance(teacher, torch.nn.Module):
            teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        if hasattr(teacher, "fix_identity"):  # hashing every weight at each look-up would cost more than the look-up
            teacher.fix_identity()
        return teacher

    def _scorer_of(self, teacher: Any, member: str = "") -> TeacherScorer:
        """A teacher beside the store of its scores, shared by all runs with this teacher and corpus."""
        from distill.score import ScoreOptions
        from distill.scorer import TeacherScorer
        from distill.store import ScoreStore

        store = ScoreStore(
            self.cache / "scores",
            teacher_identity=teacher.identity,
            corpus_fingerprint=self.corpus.fingerprint,
            score_kind=teacher.score_kind,
            n_images=self.corpus.n_images,
            n_texts=self.corpus.n_texts,
        )
        return TeacherScorer(
            teacher,
            store,
            partial(self.source, teacher),
            ScoreOptions(**self.recipe.score.model_dump()),
            self.recipe.evaluate.batch_size,
            self.accelerator.device,
            self.ranks,
            self.timings,
            self.elsewhere,
            member,
        )

    def fresh_student(self) -> Any:
        """The student before any training: the same weights at every call."""
        import torch

        torch.manual_seed(self.recipe.seed)
        student = self.builders.student(self.corpus)
        if self.recipe.needs_maps:  # in every arm, so that all arms start from the same weights and optimizer
            student.enable_attention(ATTENTION_WIDTH)
        if self.recipe.train.gradient_checkpointing:
            student.recompute_activations()
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

        with self.timings.stage("prepare"):
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

    def training_images(self, student: Any, *, tokens: bool) -> Source:
        """As ``source``, or pictures that are changed anew in each epoch where the recipe says so."""
        from distill.augment import Augmentation, AugmentedSource

        augment = self.recipe.train.augment
        if augment is None:
            return self.source(student, "image", tokens=tokens)
        changes = Augmentation(augment.crop, augment.flip, self.recipe.seed)
        return AugmentedSource(self.corpus.load_images, student.prepare_images, changes)

    def embed(self, student: Any, side: Side, rows: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Unit vectors (N, D) of corpus rows; each process embeds its share and has all."""
        from distill.embed import embed

        source = self.source(student, side)
        with self.timings.stage("embed"):
            self.timings.count(items=len(rows))
            own = embed(
                student,
                source,
                rows[self.ranks.share(len(rows))],
                side,
                batch_size=self.recipe.evaluate.batch_size,
                device=self.accelerator.device,
            )
            return self.ranks.joined_array(own, len(rows))

    @property
    def store(self) -> ScoreStore:
        """Where the one teacher's scores are kept.

        Raises:
            ExperimentError: the recipe's teacher is an ensemble, whose members have a store each.
        """
        from distill.scorer import TeacherScorer

        if isinstance(self.scorer, TeacherScorer):
            return self.scorer.store
        raise ExperimentError(f"an ensemble has no store of its own; its members' stores: {self.scorer.where}")

    def ask(self, image_ids: Ids, text_ids: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The scores (P,) of pairs, by the teacher or the ensemble; only what no store holds is computed."""
        scorer = self.scorer  # taught first, where it has to be
        with self.timings.stage("score"):
            return scorer.ask(image_ids, text_ids)

    @cached_property
    def likeness(self) -> Likeness:
        """When two training pictures are near-duplicates, by the recipe's thresholds."""
        from distill.suspecting import likeness_of

        return likeness_of(self)

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
