"""The suspected false negatives of an experiment's round, and what its training makes of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.false_negatives import (
    Judged,
    Likeness,
    NearLabelled,
    Revision,
    SameContent,
    Suspects,
    judged,
    suspects,
)
from distill.meter import note_round

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from distill.batches import PairScores
    from distill.experiment import Experiment
    from distill.pipeline import Stretch
    from distill.protocols import Candidates, Direction

log = logging.getLogger(__name__)


class SuspectingError(ValueError):
    """A recipe asks for something that its teacher cannot give."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was looked at and what was found."""

    judged: dict[Direction, Judged]
    suspects: dict[Direction, Suspects]
    flat: int  # train pictures without a usable hash
    pictures: int  # train pictures


def find(
    x: Experiment, mined: Mapping[Direction, Candidates], known: PairScores, *, margin: float | None = None
) -> Found:
    """The suspects among a round's candidates, by the recipe's thresholds; ``margin`` replaces the recipe's."""
    return _found(x, _judged(x, mined, known), margin=margin)


def _judged(x: Experiment, mined: Mapping[Direction, Candidates], known: PairScores) -> dict[Direction, Judged]:
    return {direction: judged(found, known.lookup, x.corpus.matches) for direction, found in mined.items()}


def _found(x: Experiment, looked_at: dict[Direction, Judged], *, margin: float | None = None) -> Found:
    recipe, corpus = x.recipe.false_negatives, x.corpus
    same = SameContent(corpus.matches, corpus.image_fingerprints, corpus.texts)
    near = NearLabelled(corpus.matches, x.likeness)
    margin = recipe.margin if margin is None else margin
    found = {
        direction: suspects(those, direction, margin=margin, same=same, near=near)
        for direction, those in looked_at.items()
    }
    flat = 0 if x.likeness.hashes is None else int(x.likeness.hashes.flat.sum())
    return Found(looked_at, found, flat, len(corpus.split("train").images))


def likeness_of(x: Experiment) -> Likeness:
    """When two training pictures are near-duplicates; hashes come from the cache, vectors from the teacher.

    Raises:
        SuspectingError: vectors are wanted and the teacher has none.
    """
    from distill.data.hashes import corpus_hashes
    from distill.embed import NoContrastiveHeadError

    recipe, rows = x.recipe.false_negatives, x.corpus.split("train").images
    options: dict[str, Any] = {}
    if recipe.hash_distance is not None:
        options |= {"hashes": corpus_hashes(x.corpus, rows, x.cache), "hash_distance": recipe.hash_distance}
    if recipe.embedding_cosine is not None:
        try:
            vectors = x.scorer.vectors({"image": rows})["image"]
        except NoContrastiveHeadError as error:
            raise SuspectingError(
                "false_negatives.embedding_cosine compares pictures by the teacher's contrastive head, and this "
                "teacher has none: set it to null and tell near-duplicates by hash_distance"
            ) from error
        options |= {"vectors": vectors, "vector_rows": rows, "cosine": recipe.embedding_cosine}
    return Likeness(**options)


def revision_of(
    x: Experiment, mined: Mapping[Direction, Candidates], known: PairScores, stretch: Stretch, *, metrics: Path
) -> Revision | None:
    """What the recipe makes of the round's suspects; None, and nothing computed, where it keeps them all.

    How many there are is logged, and written to ``metrics`` as one line. In any case a line says what part of the
    candidates the teacher puts above the query's labelled match by more than ``false_negatives.margin``.
    """
    recipe = x.recipe.false_negatives
    looked_at = _judged(x, mined, known)
    x.ranks.work_alone(lambda: _note_rate(looked_at, recipe.margin, stretch, metrics))
    if not recipe.active:
        return None
    found = _found(x, looked_at)
    for direction, those in found.suspects.items():
        counts = ", ".join(
            f"{count} {kind} ({treatment})"
            for (kind, count), treatment in zip(those.counts().items(), recipe.treatments, strict=True)
        )
        log.info("false negatives, %s: of %d candidates %s", direction, those.candidates, counts)
    x.ranks.work_alone(lambda: _note(found, stretch, metrics))
    return Revision.of(
        list(found.suspects.values()),
        recipe.treatments,
        n_texts=x.corpus.n_texts,
        keep_share=recipe.keep_share,
        seed=x.recipe.seed,
    )


def _note_rate(looked_at: Mapping[Direction, Judged], margin: float, stretch: Stretch, metrics: Path) -> None:
    line: dict[str, float] = {}
    for direction, those in looked_at.items():
        above = those.scores > those.labelled + margin
        line[f"teacher/above_match/{direction}"] = float(above.mean()) if len(above) else 0.0
    note_round(metrics, step=stretch.start, number=stretch.number, values=line)


def _note(found: Found, stretch: Stretch, metrics: Path) -> None:
    line: dict[str, float] = {}
    for direction, those in found.suspects.items():
        line |= {f"false_negatives/{direction}/{kind}": count for kind, count in those.counts().items()}
        line[f"candidates/{direction}"] = those.candidates
    note_round(metrics, step=stretch.start, number=stretch.number, values=line)
