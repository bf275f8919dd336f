"""Several teachers as one: their stored scores, made comparable on a fixed set of pairs, then averaged.

A member is in memory only while it computes what its own store lacks, and never beside another. The ensemble keeps no
scores of its own: they follow from the members' stores, whose pairs are asked for once.

What makes scores comparable is *calibration*: labelled pairs of a split, drawn with a seed, and beside each the same
image with a text of that split that does not match it. Nothing else is read, so the score of a pair never depends on
which others are asked for.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from distill.protocols import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distill.data.corpus import Corpus
    from distill.protocols import Ids, ScoreKind, Side
    from distill.ranks import Ranks
    from distill.scorer import Scores, TeacherScorer, TowerSource, Vectors
    from distill.store import ScoreStore

VERSION = 1  # part of every identity; raise it when the same members would give other scores
Method = Literal["zscore", "rank"]


class EnsembleError(ValueError):
    """An ensemble that cannot be; the message says what to change."""


@dataclass(frozen=True)
class EnsembleSettings:
    """How members are put together.

    method: "zscore": mean over members of (score - mean) / standard deviation, both of the calibration scores. "rank":
        mean over members of the share of calibration scores that the score is above; see ``Calibrated.rank``.
    weights: one a member, for that mean; None = all alike.
    split: whose pairs calibrate.
    pairs: labelled pairs drawn for calibration, at most; as many that do not match come beside them.
    seed: of the draw.
    """

    method: Method = "zscore"
    weights: tuple[float, ...] | None = None
    split: str = "train"
    pairs: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise EnsembleError(f"method is {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.weights is not None and not (min(self.weights, default=0) >= 0 and sum(self.weights) > 0):
            raise EnsembleError(f"weights are {self.weights}; expected none below 0 and a sum above 0")
        if self.pairs < 2:
            raise EnsembleError(f"pairs is {self.pairs}; a deviation needs at least 2")


@dataclass(frozen=True)
class EnsembleParts:
    """What an ensemble is made of; handed in by the assembly, so that this module knows no model."""

    members: Mapping[str, Callable[[Corpus], Any]]  # name -> how its teacher is loaded
    settings: EnsembleSettings


class Member:
    """One teacher of an ensemble: its store stays open, the model is loaded for as long as a call needs it."""

    def __init__(self, name: str, load: Callable[[], TeacherScorer], ranks: Ranks) -> None:
        """``load`` makes the model anew at every call; ``name`` is for messages; ``ranks`` ask together."""
        self.name, self._load, self._ranks = name, load, ranks
        self._store: ScoreStore | None = None

    @property
    def store(self) -> ScoreStore:
        """The scores of this member; the first call loads the model, whose weights say which store it is."""
        return self._open().store if self._store is None else self._store

    def ask(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores (P,); the model is loaded only where the store lacks some."""
        lacks = self._store is None or bool(self._store.missing(image_ids, text_ids).any())
        if self._ranks.most(int(lacks)):
            return self._open().ask(image_ids, text_ids)
        return self.store.require(image_ids, text_ids)

    def vectors(self, rows: Mapping[Side, Ids]) -> dict[Side, Vectors] | None:
        """Unit vectors of its contrastive head; None where it has none."""
        from distill.embed import NoContrastiveHeadError

        try:
            return self._open().vectors(rows)
        except NoContrastiveHeadError:
            return None

    def seconds(self, queries: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Of this member alone, loading it apart."""
        return self._open().seconds(queries)

    def tower(self, place: int) -> TowerSource:
        """This member as a dual-encoder that is loaded when opened."""
        from distill.scorer import TowerSource

        return TowerSource(place, self.store.origin.teacher_identity, self._open)

    def _open(self) -> TeacherScorer:
        gc.collect()  # a model whose parts refer to one another outlives its last name until then
        scorer = self._load()
        self._store = scorer.store
        return scorer


@dataclass(frozen=True)
class Calibrated:
    """What calibration knows of one member."""

    scores: np.ndarray[Any, np.dtype[np.float64]]  # (C,) ascending
    mean: float
    std: float

    @classmethod
    def of(cls, scores: Scores, name: str) -> Calibrated:
        """From the member's scores (C,) of the calibration pairs; EnsembleError where they are all the same."""
        ordered = np.sort(scores.astype(np.float64))
        if not ordered[-1] > ordered[0]:
            raise EnsembleError(
                f"{name} gives all {len(scores)} calibration pairs the score {ordered[0]:g}: it tells nothing apart, "
                "leave it out"
            )
        return cls(ordered, float(ordered.mean()), float(ordered.std()))

    def zscore(self, scores: Scores) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Standard deviations above the mean."""
        return (scores.astype(np.float64) - self.mean) / self.std

    def rank(self, scores: Scores) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Share of the calibration scores below each score.

        Linear between two calibration scores, and beyond the last by one calibration score a standard deviation: the
        step function itself would tie all hard pairs, which lie close together at its end, and so lose the order that
        the member gives them.
        """
        values, first = np.unique(self.scores, return_index=True)
        count = len(self.scores)
        last = np.append(first[1:], count) - 1
        share = (first + last + 1) / 2 / count  # (V,) ties share the middle of their ranks
        exact = scores.astype(np.float64)
        outside = exact - np.clip(exact, values[0], values[-1])
        found: np.ndarray[Any, np.dtype[np.float64]] = np.interp(exact, values, share) + outside / self.std / count
        return found


class Ensemble:
    """Scores of several members combined. Satisfies ``Scorer``; no model: it has neither towers nor attention."""

    score_kind: ScoreKind = "logit"  # a raw number; its zero means nothing

    def __init__(self, members: Sequence[Member], settings: EnsembleSettings, corpus: Corpus) -> None:
        """EnsembleError where weights and members differ in number, or nothing can calibrate them."""
        if settings.weights is not None and len(settings.weights) != len(members):
            raise EnsembleError(f"{len(settings.weights)} weights are given for {len(members)} members")
        self.members, self.settings = tuple(members), settings
        weights = np.ones(len(members)) if settings.weights is None else np.asarray(settings.weights, np.float64)
        self.weights = weights / weights.sum()
        self._corpus, self._pairs = corpus.fingerprint, calibration_pairs(corpus, settings)
        self._calibrated: tuple[Calibrated, ...] | None = None

    @property
    def identity(self) -> str:
        """Fingerprint of the members, what combines them, and the calibration pairs."""
        members = [member.store.origin.teacher_identity for member in self.members]
        settings = {"method": self.settings.method, "weights": self.weights.tolist()}
        return fingerprint("ensemble", VERSION, members, settings, self._corpus, *self._pairs)

    @property
    def where(self) -> str:
        """The members' folders."""
        return ", ".join(str(member.store.folder) for member in self.members)

    def ask(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores (P,); one member after the other computes what its store lacks, calibration pairs included."""
        count = len(image_ids)
        images, texts = np.concatenate([image_ids, self._pairs[0]]), np.concatenate([text_ids, self._pairs[1]])
        asked = [member.ask(images, texts) for member in self.members]
        if self._calibrated is None:
            self._calibrated = tuple(
                Calibrated.of(scores[count:], member.name) for scores, member in zip(asked, self.members, strict=True)
            )
        return self._combined([scores[:count] for scores in asked])

    def lookup(self, image_ids: Ids, text_ids: Ids) -> Scores:
        """Scores in the shape both ids broadcast to; NaN where any member's store lacks the pair.

        Asks for nothing but the calibration pairs, the first time.
        """
        if self._calibrated is None:
            self.ask(self._pairs[0][:0], self._pairs[1][:0])
        for member in self.members:
            member.store.refresh()
        return self._combined([member.store.lookup(image_ids, text_ids) for member in self.members])

    def seconds(self, queries: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """The members' time together, were all of them in memory."""
        return [sum(took) for took in zip(*(member.seconds(queries) for member in self.members), strict=True)]

    def vectors(self, rows: Mapping[Side, Ids]) -> dict[Side, Vectors]:
        """Unit vectors whose inner product is the weighted mean of the cosines of all members with a contrastive head.

        Raises:
            NoContrastiveHeadError: no member of weight has one.
        """
        from distill.embed import NoContrastiveHeadError

        found = [
            (float(weight), vectors)
            for member, weight in zip(self.members, self.weights, strict=True)
            if weight > 0 and (vectors := member.vectors(rows)) is not None
        ]
        if not found:
            raise NoContrastiveHeadError("no member of this ensemble has a contrastive head")
        total = sum(weight for weight, _ in found)
        return {
            side: np.concatenate(
                [np.float32((weight / total) ** 0.5) * vectors[side] for weight, vectors in found], axis=1
            )
            for side in rows
        }

    def towers(self) -> tuple[TowerSource, ...]:
        """The members in their order, whatever their weight, which is of scores."""
        return tuple(member.tower(place) for place, member in enumerate(self.members))

    def _combined(self, scores: Sequence[Scores]) -> Scores:
        """Weighted mean of the members' scores, each made comparable; NaN where any is."""
        assert self._calibrated is not None
        parts = [
            weight * (known.zscore(found) if self.settings.method == "zscore" else known.rank(found))
            for weight, known, found in zip(self.weights, self._calibrated, scores, strict=True)
        ]
        return np.asarray(sum(parts), np.float32)


def calibration_pairs(corpus: Corpus, settings: EnsembleSettings) -> tuple[Ids, Ids]:
    """(image ids (C,), text ids (C,)): labelled pairs of the split, then their images with texts that do not match.

    EnsembleError where an image of the draw matches every text of the split.
    """
    split, labelled = corpus.split(settings.split), corpus.split_pairs(settings.split)
    draw = np.random.default_rng([settings.seed, len(labelled)])
    chosen = labelled[np.sort(draw.permutation(len(labelled))[: settings.pairs])]
    images, others = chosen[:, 0], draw.choice(split.texts, len(chosen))
    for _ in range(100):
        match = corpus.matches.is_match(images, others)
        if not match.any():
            return np.concatenate([images, images]), np.concatenate([chosen[:, 1], others])
        others[match] = draw.choice(split.texts, int(match.sum()))
    raise EnsembleError(
        f"image {int(images[match][0])} matches nearly every text of the {settings.split} split: there is nothing to "
        "calibrate on; name another split"
    )
