"""The whole recipe: data, models, losses, mining, training, evaluation, and where things go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from distill.recipe.basics import Grown
from distill.recipe.ensemble import AnyTeacher
from distill.recipe.false_negatives import FalseNegativesRecipe
from distill.recipe.losses import Contrastive, LossPart
from distill.recipe.schema import (
    Count,
    Data,
    Name,
    Natural,
    Positive,
    Share,
    Strict,
    StudentRecipe,
    TeachRecipe,
)


class SubsetRecipe(Strict):
    """Which part of a round's candidate pairs the teacher is asked about; the labelled pairs it is always asked."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(
        description="part of each direction's candidates; a pair that either direction draws is asked for both"
    )
    by: Literal["uniform", "hardness"] = Field(
        default="uniform",
        description="uniform: all with the same probability; hardness: the more probable, the nearer the student puts "
        "a candidate to the labelled match, or above it",
    )
    unit: Literal["pair", "query"] = Field(
        default="pair", description="pair: candidates one by one; query: all of a query's or none, for losses on lists"
    )
    floor: Annotated[float, Field(gt=0, le=1)] = Field(default=0.2, description="least probability, as a part of share")
    seed: Natural = Field(default=0, description="of the draw; not the run's, so that runs of other seeds share scores")


class MineRecipe(Grown):
    """Which items count as a query's hard candidates, and when they are mined anew."""

    later: ClassVar[frozenset[str]] = frozenset(
        {"every_epochs", "overlap_below", "recall_floor", "ahead", "subset", "shard_items"}
    )

    k: Count = Field(default=16, description="candidates a query that the teacher scores, in each direction")
    skip_top: Natural = Field(default=0, description="leave out the n most similar non-matches: likely false negatives")
    factory: str = Field(default="Flat", description="FAISS factory string, inner product")
    nprobe: Count | None = None
    recall_floor: Share = Field(
        default=0.9, description="an index that is not Flat must find at least this part of the true k candidates"
    )
    drop_above_positive: float | None = Field(
        default=None, description="drop candidates that the teacher scores above the positive by more than this margin"
    )
    every_epochs: Positive | None = Field(
        default=None, description="mine anew every so many epochs after the shared steps; in place of train.rounds"
    )
    overlap_below: Share | None = Field(
        default=None,
        description="in later rounds, take freshly mined candidates only where they have less than this part in common "
        "with those in use, which stay otherwise: then the teacher scores nothing new; null = always take them",
    )
    ahead: Natural = Field(
        default=0,
        description="a second process mines and scores for the next round while training goes on, by the student as it "
        "is this many steps before its round ends; 0 = when the round has ended, in the same process",
    )
    shard_items: Count | None = Field(
        default=None,
        description="vectors are written to disk while they are made, in shards of so many, and searched one shard at "
        "a time: the same candidates in the memory of one shard; null = all vectors and their index in memory",
    )
    subset: SubsetRecipe | None = Field(
        default=None, description="ask the teacher about a part of the candidates; null = about all"
    )


class ScoreRecipe(Strict):
    """How the teacher is asked."""

    pairs_per_unit: Count = Field(default=16_384, description="pairs of one work unit: what a kill can lose")
    pairs_per_chunk: Count = Field(default=1024, description="pairs of one call of the teacher")
    image_memory_bytes: Count = Field(default=1 << 30, description="most that is kept of images encoded together")
    text_memory_bytes: Count = Field(default=1 << 30, description="most that is kept of all texts together")


class AugmentRecipe(Strict):
    """How training pictures are changed anew in each epoch."""

    crop: tuple[Share, Share] = Field(default=(1.0, 1.0), description="least and most share of the area that is kept")
    flip: Share = Field(default=0.0, description="share that is mirrored; 0 where captions say left and right")

    @model_validator(mode="after")
    def _changes_something(self) -> AugmentRecipe:
        least, most = self.crop
        if not 0 < least <= most:
            raise ValueError(
                f"crop is {list(self.crop)}: give the least and the most share that is kept, as in [0.6, 1.0]"
            )
        if least == 1 and not self.flip:
            raise ValueError("neither crop nor flip changes a picture: give one of them, or leave augment out")
        return self


class TrainRecipe(Grown):
    """One student's training. Every arm gets the same steps, seed and batches."""

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch",
            "candidates",
            "group",
            "groupings",
            "gradient_checkpointing",
            "compile",
            "augment",
            "matryoshka",
        }
    )

    steps: Count = 1200
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Share = Field(
        default=0.05, description="share of the steps over which lr rises; then it follows a cosine to 0"
    )
    grad_clip: Positive = 1.0
    shared: Share = Field(
        default=0.3,
        description="share of the steps, contrastive only, that all arms have in common and that mines first",
    )
    rounds: Count = Field(default=1, description="rounds of mine -> score -> train after the shared steps")
    candidates_per_query: Count = Field(
        default=4, description="of the k scored candidates, how many a step draws for each query"
    )
    candidates: Literal["encode", "memory", "in_batch"] = Field(
        default="encode",
        description="encode: drawn candidates with gradient; memory: they keep the vectors that the round's "
        "mining found them by, which costs nothing and goes stale until the next round; in_batch: batches are put "
        "together of neighbours, so that a batch's own items are one another's candidates, with gradient",
    )
    group: Annotated[int, Field(ge=2)] = Field(
        default=16,
        description="in_batch: pairs of a group of neighbours, within which the teacher scores every image with every "
        "text; batch_size is a multiple of it",
    )
    groupings: Count = Field(
        default=2, description="in_batch: groupings that take turns by epoch; each is scored: group pairs for a pair"
    )
    precision: Literal["no", "bf16", "fp16"] = "no"
    micro_batch: Count | None = Field(
        default=None,
        description="most images, and texts, encoded at once: less memory at the price of encoding each item twice "
        "(gradient caching); the loss still sees the whole batch",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="trained towers keep each layer's input alone and run the layer again in the backward pass: less "
        "memory at the price of a second forward pass, the same gradients",
    )
    compile: bool = Field(
        default=False,
        description="the student through torch.compile while it trains; takes a compiler, and a minute to begin with",
    )
    augment: AugmentRecipe | None = Field(
        default=None,
        description="crop and mirror pictures in training, by a draw of seed, epoch and picture; they are then decoded "
        "in every step (see workers); for an image tower that trains",
    )
    matryoshka: tuple[Count, ...] = Field(
        default=(),
        description="widths, ascending and below the student's, at which the loss is computed too, on vectors that are "
        "cut to their first numbers: the student's vectors can then be cut when they are stored",
    )
    workers: Natural = Field(default=0, description="loader processes; 0 = in the main one")
    log_every: Count = 50
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 1
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @field_validator("matryoshka")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        ordered = tuple(sorted(set(value)))
        if value != ordered:
            raise ValueError(
                f"{list(value)}: give the widths in ascending order, each once, as in {list(ordered)}; the student's "
                "full width is always trained and not named"
            )
        return value

    @model_validator(mode="after")
    def _groups_fill_batches(self) -> TrainRecipe:
        if self.candidates == "in_batch" and self.batch_size % self.group:
            raise ValueError(
                f"candidates: in_batch makes batches of whole groups, but batch_size is {self.batch_size} and group "
                f"{self.group}: set batch_size to {max(1, self.batch_size // self.group) * self.group} or change group"
            )
        return self


class EvaluateRecipe(Strict):
    """On what the students and the teacher are judged."""

    split: str = "test"
    rerank: Count = Field(default=32, description="items of the first stage's shortlist that the teacher re-ranks")
    batch_size: Count = 256


def _share_what_is_one(losses: tuple[LossPart, ...]) -> tuple[LossPart, ...]:
    """A training has one student to follow a teacher, one slow copy of it, and one learned map of its scores."""
    members = {part.member for part in losses if part.name == "embedding_match"}
    if len(members) > 1:
        raise ValueError(
            f"embedding_match names several members ({', '.join(map(str, sorted(members, key=str)))}): a student has "
            "one space and can follow one of them; use affinity for several"
        )
    copies = {(part.decay, part.queue) for part in losses if part.name == "momentum"}
    if len(copies) > 1:
        raise ValueError(
            f"momentum parts differ in (decay, queue): {', '.join(map(str, sorted(copies)))}; there is one slow copy "
            "and one queue: give all parts the same"
        )
    if sum(part.name == "logit_mse" and part.affine == "learned" for part in losses) > 1:
        raise ValueError("only one part can have affine: learned: there is one map of the student's scores")
    return losses


Losses = Annotated[tuple[LossPart, ...], AfterValidator(_share_what_is_one)]


class ArmRecipe(Strict):
    """One student: what it is trained with after the shared steps."""

    losses: Losses

    @property
    def reads_scores(self) -> bool:
        """Whether any part reads the teacher's scores, so that candidates must be mined and scored."""
        return any(part.reads_scores for part in self.losses)

    @property
    def distils(self) -> bool:
        """Whether any part needs the teacher at all."""
        return self.reads_scores or any(part.name == "attention" or part.reads_vectors for part in self.losses)

    @property
    def uses_candidates(self) -> bool:
        """Whether mined candidates join the batches."""
        scopes = (getattr(part, option, None) for part in self.losses for option in ("negatives", "columns"))
        return self.reads_scores or "all" in scopes


class Recipe(Grown):
    """One experiment."""

    later: ClassVar[frozenset[str]] = frozenset({"false_negatives"})

    name: Name
    seed: Natural = 0
    runs: Path = Path("runs")
    cache: Path = Field(
        default=Path("~/.cache/cross2dual"),
        validate_default=True,
        description="scores, frozen outputs and file checks that runs share",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prepared_gib: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="decoded and preprocessed pictures are kept on disk when they fit in this many GiB"
    )
    data: Data
    teacher: AnyTeacher
    teach: TeachRecipe | None = None
    student: StudentRecipe
    shared_losses: Losses = (Contrastive(name="contrastive"),)
    arms: Annotated[dict[Name, ArmRecipe], Field(min_length=1)]
    mine: MineRecipe = MineRecipe()
    false_negatives: FalseNegativesRecipe = FalseNegativesRecipe()
    score: ScoreRecipe = ScoreRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()

    @field_validator("runs", "cache")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _teacher_comes_from_somewhere(self) -> Recipe:
        if self.teacher.kind == "ensemble":
            if self.teach is not None:
                raise ValueError("teach: an ensemble is not taught, its members are: each by a recipe of its own")
        elif self.teacher.kind == "remote":
            if self.teach is not None:
                raise ValueError(
                    "teach: a teacher behind a URL is taught where it is served; leave teach out, or teach it there"
                )
        elif self.teach is None and self.teacher.kind != "custom" and self.teacher.checkpoint is None:
            raise ValueError("teacher.checkpoint: give a hub id or folder, or a teach: section that trains the teacher")
        return self

    @model_validator(mode="after")
    def _candidates_fit(self) -> Recipe:
        if self.train.candidates_per_query > self.mine.k:
            raise ValueError(
                f"train.candidates_per_query is {self.train.candidates_per_query} but mine.k is only {self.mine.k}: "
                "raise mine.k or lower train.candidates_per_query"
            )
        return self

    @model_validator(mode="after")
    def _rounds_mine_something(self) -> Recipe:
        keys = [key for key in ("every_epochs", "overlap_below", "ahead") if getattr(self.mine, key)]
        if keys and not any(arm.uses_candidates for arm in self.arms.values()):
            raise ValueError(
                f"mine.{keys[0]} says when candidates are mined anew, but no arm has a loss that reads candidates (one "
                "on the teacher's scores, or contrastive with negatives: all): add one, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_part_can_be_asked(self) -> Recipe:
        if self.mine.subset is not None and self.mine.drop_above_positive is not None:
            raise ValueError(
                "mine.drop_above_positive asks the teacher about every candidate while mining, mine.subset about a "
                "part of them: leave one out; false_negatives treats what is found among the part"
            )
        return self

    @model_validator(mode="after")
    def _rounds_are_said_once(self) -> Recipe:
        if self.mine.every_epochs is not None and self.train.rounds != 1:
            raise ValueError(
                f"mine.every_epochs is {self.mine.every_epochs:g} and train.rounds {self.train.rounds}: both say when "
                "candidates are mined anew; leave one out"
            )
        if self.mine.overlap_below is not None and self.mine.every_epochs is None and self.train.rounds == 1:
            raise ValueError(
                "mine.overlap_below compares candidates of a round with those of the round before, but there is only "
                "one round: set mine.every_epochs or train.rounds"
            )
        if self.mine.ahead and self.mine.every_epochs is None and self.train.rounds == 1:
            raise ValueError(
                "mine.ahead is for rounds after the first, but there is only one: set mine.every_epochs or train.rounds"
            )
        return self

    @model_validator(mode="after")
    def _false_negatives_can_be_found(self) -> Recipe:
        if not self.false_negatives.active:
            return self
        if not any(arm.reads_scores for arm in self.arms.values()):
            raise ValueError(
                "false_negatives: they are found by the teacher's scores, but no arm has a loss that reads them: add "
                "such a loss, or keep all three classes"
            )
        dropped, margin = self.mine.drop_above_positive, self.false_negatives.margin
        if dropped is not None and dropped <= margin:
            raise ValueError(
                f"mine.drop_above_positive is {dropped} and false_negatives.margin {margin}: mining leaves out all "
                "that could be found; remove mine.drop_above_positive, or keep all three classes of false_negatives"
            )
        return self

    @property
    def needs_maps(self) -> bool:
        """Whether any arm compares attention maps."""
        return any(part.name == "attention" for arm in self.arms.values() for part in arm.losses)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name
