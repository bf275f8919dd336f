"""What a round's mining leaves in the run's folder: candidates of both directions, and what goes with them.

Candidates are ``candidates-N-i2t.npz`` and ``candidates-N-t2i.npz``. Where the training reads mined items' vectors in
place of encoding them (``train.candidates: memory``), ``vectors-N-image`` and ``vectors-N-text`` lie beside them; where
its batches are made of neighbours (``in_batch``), ``groups-N.npz``, and the candidates are what the groups hold.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import write_atomically
from distill.groups import GroupedSampler, dense_candidates, grouped
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, fingerprint, sides_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from distill.exact import Vectors
    from distill.experiment import Experiment
    from distill.features import Features
    from distill.protocols import Ids, Inputs, Side
    from distill.ranks import Ranks

log = logging.getLogger(__name__)


def candidates(x: Experiment, number: int, *, home: Path, student: Any) -> dict[Direction, Candidates]:
    """Hard candidates of round ``number`` in both directions: as ``home`` holds them, else mined by the student."""
    found = kept(number, home=home)
    if found is None:
        rows = x.corpus.split("train").ids
        vectors = {side: x.embed(student, side, rows[side]) for side in SIDES}
        if x.recipe.train.candidates == "memory":  # first: candidates that are there have their vectors
            x.ranks.work_alone(partial(_remember, x, number, home, vectors))
        found = _mine(x, vectors)
        if x.recipe.train.candidates == "in_batch":
            found = _grouped(x, number, home, found, {side: (rows[side], vectors[side]) for side in SIDES})
        x.ranks.work_alone(partial(_keep, number, home, found))
    return found


def kept(number: int, *, home: Path) -> dict[Direction, Candidates] | None:
    """Of round ``number``, where both directions are there."""
    paths = {direction: _path(number, home, direction) for direction in DIRECTIONS}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {direction: _load(path, direction) for direction, path in paths.items()}


def groups(x: Experiment, number: int, *, home: Path) -> GroupedSampler:
    """Batches of neighbours, as round ``number`` has put them together."""
    train = x.recipe.train
    with np.load(_groups_path(number, home), allow_pickle=False) as arrays:
        groupings = arrays["groupings"]
    return GroupedSampler(x.corpus.split_pairs("train"), groupings, train.group, train.batch_size, x.recipe.seed)


def memory(x: Experiment, number: int, *, home: Path) -> dict[Side, RememberedVectors]:
    """Vectors of the training items by the student that mined round ``number``."""
    from distill.features import Features

    return {
        side: RememberedVectors(Features.open(home / f"vectors-{number}-{side}", _mark(x, number, side)))
        for side in SIDES
    }


@dataclass(frozen=True)
class RememberedVectors:
    """Vectors of corpus rows from disk. Pickles as a path."""

    features: Features

    def __call__(self, rows: Ids) -> Tensor:
        """(N, D) unit."""
        return self.features.get(rows)["vectors"]


def _grouped(
    x: Experiment,
    number: int,
    home: Path,
    found: Mapping[Direction, Candidates],
    vectors: Mapping[Side, tuple[Ids, Vectors]],
) -> dict[Direction, Candidates]:
    """Puts the training pairs into groups of neighbours, keeps these, and returns the candidates that they hold."""
    train, pairs = x.recipe.train, x.corpus.split_pairs("train")
    groupings = grouped(pairs, found, group=train.group, count=train.groupings, seed=[x.recipe.seed, number])
    x.ranks.work_alone(lambda: write_atomically(_groups_path(number, home), partial(np.savez, groupings=groupings)))
    dense = dense_candidates(pairs, groupings, train.group, x.corpus.matches, vectors)
    for direction, those in dense.items():
        log.info(
            "batches of neighbours, %s: %.1f candidates a query in %d groupings, mean similarity %.3f (mined: %.3f)",
            direction,
            (those.item_ids >= 0).sum(axis=1).mean(),
            train.groupings,
            *(each.similarity[each.item_ids >= 0].mean() for each in (those, found[direction])),
        )
    return dense


def _remember(x: Experiment, number: int, home: Path, vectors: Mapping[Side, Vectors]) -> None:
    import torch

    from distill.features import write_features

    for side, rows in x.corpus.split("train").ids.items():
        whole = vectors[side]

        def of_rows(wanted: Ids, rows: Ids = rows, whole: Vectors = whole) -> Inputs:
            return {"vectors": torch.from_numpy(whole[np.searchsorted(rows, wanted)])}

        write_features(home / f"vectors-{number}-{side}", _mark(x, number, side), rows, of_rows)


def _mark(x: Experiment, number: int, side: Side) -> str:
    return fingerprint("remembered", x.corpus.fingerprint, x.recipe.seed, number, side)


def _mine(x: Experiment, vectors: Mapping[Side, Vectors]) -> dict[Direction, Candidates]:
    from distill.filters import TeacherMargin
    from distill.index import VectorIndex
    from distill.mine import MineSettings, mine

    split, recipe = x.corpus.split("train"), x.recipe.mine
    ids = split.ids
    found: dict[Direction, Candidates] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        margin, queries = recipe.drop_above_positive, len(ids[query])
        # dropping asks the teacher, which all processes do together: then each mines all
        share = x.ranks.share(queries) if margin is None else slice(None)
        own = mine(
            VectorIndex.build(vectors[item], ids[item], factory=recipe.factory, nprobe=recipe.nprobe),
            vectors[query][share],
            query_ids=ids[query][share],
            matches=x.corpus.matches,
            direction=direction,
            settings=MineSettings(recipe.k, skip_top=recipe.skip_top),
            drop=None if margin is None else TeacherMargin(margin, x.ask, x.corpus.matches, direction),
        )
        found[direction] = own if margin is not None else _joined(own, x.ranks, queries)
    return found


def _joined(own: Candidates, ranks: Ranks, queries: int) -> Candidates:
    """What all processes have mined, in the order of the queries."""
    arrays = (own.query_ids, own.item_ids, own.similarity, own.positive)
    return Candidates(own.direction, *(ranks.joined_array(array, queries) for array in arrays))


def _path(number: int, home: Path, direction: Direction) -> Path:
    return home / f"candidates-{number}-{direction}.npz"


def _groups_path(number: int, home: Path) -> Path:
    return home / f"groups-{number}.npz"


def _keep(number: int, home: Path, found: Mapping[Direction, Candidates]) -> None:
    for direction, those in found.items():
        write_atomically(_path(number, home, direction), partial(_save, those))


def _save(found: Candidates, file: Any) -> None:
    np.savez(
        file, query_ids=found.query_ids, item_ids=found.item_ids, similarity=found.similarity, positive=found.positive
    )


def _load(path: Path, direction: Direction) -> Candidates:
    with np.load(path, allow_pickle=False) as arrays:
        return Candidates(direction, arrays["query_ids"], arrays["item_ids"], arrays["similarity"], arrays["positive"])
