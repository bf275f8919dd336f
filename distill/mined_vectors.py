"""The vectors that a round is mined by, in memory or in shards on disk (``mine.shard_items``); those remembered."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.protocols import SIDES, fingerprint, weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from distill.exact import Vectors
    from distill.experiment import Experiment
    from distill.features import Features
    from distill.mined import Round
    from distill.protocols import Ids, Inputs, Side
    from distill.searched import Searched
    from distill.shards import Shards

log = logging.getLogger(__name__)
SomeVectors: TypeAlias = "Vectors | Shards"


# --- while mining -----------------------------------------------------------------------------------------------------


def embedded(x: Experiment, of: Round, student: Any) -> dict[Side, SomeVectors]:
    """Vectors of the training items of both sides by the student, in the order of their ids."""
    rows = x.corpus.split("train").ids
    if x.recipe.mine.shard_items is None:
        return {side: x.embed(student, side, rows[side]) for side in SIDES}
    return {side: _in_shards(x, of, student, side, rows[side]) for side in SIDES}


def index_over(x: Experiment, vectors: SomeVectors, ids: Ids) -> Searched:
    """The index that the recipe names, in one piece or in shards."""
    from distill.index import VectorIndex
    from distill.shard_index import ShardedIndex

    recipe = x.recipe.mine
    if isinstance(vectors, np.ndarray):
        return VectorIndex.build(vectors, ids, factory=recipe.factory, nprobe=recipe.nprobe)
    return ShardedIndex(vectors, factory=recipe.factory, nprobe=recipe.nprobe)


def forget_shards(of: Round) -> None:
    """When the round's candidates are kept."""
    for side in SIDES:
        shutil.rmtree(of.shards(side), ignore_errors=True)


def _in_shards(x: Experiment, of: Round, student: Any, side: Side, ids: Ids) -> Shards:
    """Every process embeds its share, batch for batch what it would embed in memory, and writes it to its place."""
    from distill.embed import embed_into
    from distill.shard_writer import ShardWriter
    from distill.shards import Shards

    shard_items = x.recipe.mine.shard_items
    assert shard_items is not None
    folder, batch_size = of.shards(side), x.recipe.evaluate.batch_size
    # with how they are cut: whoever goes on with smaller shards ran out of memory with those that lie here
    how = (x.ranks.count, batch_size, shard_items, ids)
    identity = fingerprint(x.corpus.fingerprint, side, weights_fingerprint(student), *how)
    part, count, own = x.ranks.index, x.ranks.count, x.ranks.share(len(ids))

    def writer() -> ShardWriter:
        return ShardWriter(folder, identity, ids, student.dim, shard_items=shard_items, part=f"{part}-of-{count}")

    if x.ranks.most(int(not _is_there(folder, identity))):
        x.ranks.work_alone(writer)  # makes the files
        sink, source = writer(), x.source(student, side)
        with x.timings.stage("embed"):
            x.timings.count(items=len(ids))
            if sink.done:
                log.info("%ss: %d batches are on disk already, in %s", side, sink.done, folder)
            embed_into(sink, student, source, ids, side, share=own, batch_size=batch_size, device=x.accelerator.device)
        x.ranks.wait()
        x.ranks.work_alone(sink.finish)
    return Shards(folder, identity=identity)


def _is_there(folder: Any, identity: str) -> bool:
    from distill.shards import Shards

    try:
        Shards(folder, identity=identity)
    except (FileNotFoundError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Part:
    """Some of the vectors, one after another, in their own count."""

    vectors: SomeVectors
    rows: slice

    def __len__(self) -> int:
        return len(range(len(self.vectors))[self.rows])

    def __getitem__(self, rows: slice) -> Vectors:
        own = range(len(self.vectors))[self.rows][rows]
        return self.vectors[own.start : own.stop]


# --- remembered -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RememberedVectors:
    """Vectors of corpus rows from disk. Pickles as a path."""

    features: Features

    def __call__(self, rows: Ids) -> Tensor:
        """(N, D) unit."""
        return self.features.get(rows)["vectors"]


def memory(x: Experiment, of: Round) -> dict[Side, RememberedVectors]:
    """Vectors of the training items by the student that mined a round."""
    from distill.features import Features

    return {side: RememberedVectors(Features.open(of.vectors(side), _mark(x, of, side))) for side in SIDES}


def remember(x: Experiment, of: Round, vectors: Mapping[Side, SomeVectors]) -> None:
    """Keep a round's vectors beside its candidates."""
    import torch

    from distill.features import write_features

    for side, rows in x.corpus.split("train").ids.items():
        whole = vectors[side]

        def of_rows(wanted: Ids, rows: Ids = rows, whole: SomeVectors = whole) -> Inputs:
            return {"vectors": torch.from_numpy(whole[np.searchsorted(rows, wanted)])}

        write_features(of.vectors(side), _mark(x, of, side), rows, of_rows)


def _mark(x: Experiment, of: Round, side: Side) -> str:
    return fingerprint("remembered", x.corpus.fingerprint, x.recipe.seed, of.number, side)
