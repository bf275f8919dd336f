"""Which pairs a teacher's check-up looks at: true ones, hard negatives, random ones; and one scorer's scores of them.

Hard negatives are the most similar items that do not match, as a student mines them. Shape key, besides that of
``distill.checkup.separation``: ``M`` captions of the sample's ``N`` pictures, ``P`` pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from distill.checkup.separation import Values
from distill.index import VectorIndex
from distill.mine import MineSettings, mine
from distill.protocols import DIRECTIONS, Ids, Side, sides_of

if TYPE_CHECKING:
    from distill.data.corpus import Corpus

RANDOM = 4  # random pairs a picture
TRUE, RANDOM_PAIRS = "true pairs", "random pairs"
Asked: TypeAlias = "Callable[[Ids, Ids], Values]"
"""(image ids (P,), text ids (P,)) -> scores (P,)."""
Vectors: TypeAlias = "Mapping[Side, Values]"


class DoctorError(ValueError):
    """Data or a run that the doctor cannot look at; the message says what to change."""


@dataclass(frozen=True)
class Sample:
    """Some pictures of a split, one true pair each, and all of their captions."""

    split: str
    true: Ids  # (N, 2) image and text, images ascending
    texts: Ids  # (M,) ascending

    @property
    def images(self) -> Ids:
        """(N,) ascending."""
        return self.true[:, 0]

    def rows(self, side: Side) -> Ids:
        """The items of a side."""
        return self.images if side == "image" else self.texts


@dataclass(frozen=True)
class Questions:
    """The pairs to be scored."""

    true: Ids  # (N, 2)
    random: Ids  # (P, 2) that do not match
    hard: Mapping[str, Ids]  # who found them -> (R, K, 2), most similar first

    def random_of(self) -> Ids:
        """(P,) which of the N pictures each random pair belongs to."""
        return np.searchsorted(self.true[:, 0], self.random[:, 0])

    def pairs(self) -> Ids:
        """(P, 2) every distinct pair, by image, then text."""
        return np.unique(
            np.concatenate([self.true, self.random, *(h.reshape(-1, 2) for h in self.hard.values())]), axis=0
        )


@dataclass(frozen=True, eq=False)
class Answers:
    """One scorer's scores."""

    pairs: Values  # (P,) of Questions.pairs()
    true: Values  # (N,)
    random: Values  # (P,)
    lists: Mapping[str, Values]  # who found the negatives -> (R, 1 + K), the true pair first

    def together(self) -> Values:
        """(R, 1 + all K) the true pair and the hard negatives of every finder."""
        first, *others = self.lists.values()
        return np.concatenate([first, *(lists[:, 1:] for lists in others)], axis=1)

    def kinds(self) -> dict[str, Values]:
        """Scores by kind of pair."""
        hard = {hard_kind(finder): lists[:, 1:].ravel() for finder, lists in self.lists.items()}
        return {TRUE: self.true, **hard, RANDOM_PAIRS: self.random}


def draw_sample(corpus: Corpus, split: str, *, images: int, seed: int) -> Sample:
    """Pictures of a split at random, each with one of its captions at random; the same for the same seed."""
    pairs = corpus.split_pairs(split)
    generator = np.random.default_rng(seed)
    every = np.unique(pairs[:, 0])
    chosen = np.sort(generator.permutation(every)[:images])
    pairs = pairs[np.isin(pairs[:, 0], chosen)]
    shuffled = pairs[generator.permutation(len(pairs))]
    _, first = np.unique(shuffled[:, 0], return_index=True)
    return Sample(split, shuffled[first], np.unique(pairs[:, 1]))


def random_pairs(corpus: Corpus, sample: Sample, *, seed: int) -> Ids:
    """(P, 2) distinct pairs of the sample's items that do not match, ``RANDOM`` a picture or all there are."""
    matched = corpus.matches.is_match(sample.images[:, None], sample.texts)  # (N, M)
    image_rows, text_rows = np.nonzero(~matched)
    if not len(image_rows):
        raise DoctorError(
            f"the {len(sample.images)} picture(s) looked at match every caption looked at, so there is no negative: "
            "raise --images, or use a corpus with more pictures"
        )
    drawn = np.random.default_rng(seed).permutation(len(image_rows))[: RANDOM * len(sample.images)]
    return np.stack([sample.images[image_rows[drawn]], sample.texts[text_rows[drawn]]], axis=1)


def hard_negatives(corpus: Corpus, sample: Sample, vectors: Vectors, *, k: int) -> Ids:
    """(R, K, 2) the most similar captions of each picture, then pictures of each caption, that do not match it."""
    queries: dict[Side, Ids] = {"image": sample.images, "text": sample.true[:, 1]}
    apart = ~corpus.matches.is_match(sample.images[:, None], sample.texts)  # (N, M)
    of_captions = apart[:, np.searchsorted(sample.texts, queries["text"])]  # (N, N)
    k = min(k, int(apart.sum(axis=1).min()), int(of_captions.sum(axis=0).min()))
    if k < 1:
        raise DoctorError(
            f"an item of the sample matches all {len(sample.images)} picture(s) or all {len(sample.texts)} caption(s) "
            "of it, so it has no negative: raise --images, or use a corpus with more pictures"
        )
    found = []
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        places = np.searchsorted(sample.rows(query), queries[query])
        mined = mine(
            VectorIndex.build(vectors[item], sample.rows(item), device="cpu"),
            vectors[query][places],
            query_ids=queries[query],
            matches=corpus.matches,
            direction=direction,
            settings=MineSettings(k),
        )
        images, texts = mined.pairs()
        found.append(np.stack([images, texts], axis=1).reshape(-1, k, 2))
    return np.concatenate(found)


def answer(questions: Questions, asked: Asked) -> Answers:
    """Ask a scorer every pair once."""
    pairs = questions.pairs()
    scores = np.asarray(asked(pairs[:, 0], pairs[:, 1]), np.float32)
    width = int(pairs[:, 1].max()) + 1
    keys = pairs[:, 0] * width + pairs[:, 1]

    def of(some: Ids) -> Values:
        return scores[np.searchsorted(keys, some[..., 0] * width + some[..., 1])]

    both = np.concatenate([questions.true, questions.true])[:, None]  # (R, 1, 2)
    lists = {finder: of(np.concatenate([both, hard], axis=1)) for finder, hard in questions.hard.items()}
    return Answers(scores, of(questions.true), of(questions.random), lists)


def hard_kind(finder: str) -> str:
    """Name of the kind of pairs that someone found."""
    return f"hard, by {finder}"
