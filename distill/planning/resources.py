"""What a plan needs beside time: bytes on disk, in memory and over the network, and how many shards the index takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill.planning.estimate import Stage
from distill.planning.loads import sources_of
from distill.planning.measured import Measured, Shape, Source
from distill.planning.ranges import Known, Range, as_range, total
from distill.recipe.experiment import Recipe

_CANDIDATE_BYTES = 8 + 4 + 1  # of a mined candidate in the run's folder: id, similarity, whether it is a match
_LOOKED_UP_BYTES = 8 + 4 + 2 * (8 + 8 + 4)  # of a pair's score in the memory of a training, see batches.PairScores
_ASKED_BYTES = 8 + 8  # two ids, of a pair that is sent to a service
_ANSWER_BYTES = 4  # its score
_FLOAT = 4
_USED = 0.7  # of a machine's memory: the rest is for the program and the system's own


@dataclass(frozen=True)
class Amounts:
    """Bytes, by what they are of.

    Attributes:
        disk: What a run and its caches leave.
        memory: What one process must hold at once.
        network: What travels once where storage, workers and a service are apart from one another.
        shards: Pieces of the larger side, one at a time in memory, that searching takes; 1 = it fits whole.
        shard_items: Of the larger side, in one of them.
        index_bytes: Of that side's vectors.
        whole_bytes: Of both sides' vectors and that index.
    """

    disk: tuple[tuple[str, Range], ...]
    memory: tuple[tuple[str, Range], ...]
    network: tuple[tuple[str, Range], ...]
    shards: int
    shard_items: int
    index_bytes: float
    whole_bytes: float


def amounts(
    recipe: Recipe, shape: Shape, measured: Measured, stages: Sequence[Stage], minings: int, *, memory_bytes: float
) -> Amounts:
    """Of a plan; ``memory_bytes``: of the machine that mines."""
    asked = total(stage.calls for stage in stages)
    in_training = total(stage.calls for stage in stages if stage.name != "evaluate")
    sources, dim = sources_of(recipe, shape, measured), measured.embedding.dim
    index_bytes = float(max(shape.images, shape.texts) * dim * _FLOAT) if minings else 0.0
    vectors = float((shape.images + shape.texts) * dim * _FLOAT) if minings else 0.0
    # one side's index beside the vectors of both
    larger = max(shape.images, shape.texts)
    shards = max(1, math.ceil((vectors + index_bytes) / (_USED * memory_bytes)))
    items = recipe.mine.shard_items or math.ceil(larger / shards)
    shards = math.ceil(larger / items)
    return Amounts(
        disk=_some(
            ("prepared inputs and frozen outputs", _kept(sources, shape)),
            ("vectors of the teacher", _teacher_vectors(recipe, measured, shape)),
            ("attention maps", _maps(recipe, measured, shape)),
            ("candidates", minings * recipe.mine.k * (shape.images + shape.texts) * _CANDIDATE_BYTES),
            ("scores, unit files", asked * measured.store.unit_bytes),
            ("scores, table for look-up", asked * measured.store.table_bytes),
            ("checkpoints and models", _checkpoints(recipe, measured)),
        ),
        memory=_some(
            ("vectors of both sides", vectors),
            ("index of the larger side", index_bytes),
            ("scores of a round's pairs", in_training * _LOOKED_UP_BYTES),
            ("the teacher's weights", max(teacher.weight_bytes for teacher in measured.teachers)),
            ("the student's training", measured.training.checkpoint_bytes),
        ),
        network=_some(
            ("pictures from storage", _pictures_read(sources, shape, minings)),
            ("ids and scores through a service", asked * float(_ASKED_BYTES + _ANSWER_BYTES)),
            ("vectors from workers", vectors * minings),
        ),
        shards=shards,
        shard_items=items,
        index_bytes=index_bytes,
        whole_bytes=vectors + index_bytes,
    )


def _some(*named: tuple[str, Known]) -> tuple[tuple[str, Range], ...]:
    return tuple((name, as_range(value)) for name, value in named if as_range(value).high > 0)


def _count(shape: Shape, side: str) -> int:
    return shape.all_images if side == "image" else shape.all_texts


def _kept(sources: Sequence[Source], shape: Shape) -> float:
    return sum(source.bytes * _count(shape, source.side) for source in sources)


def _teacher_vectors(recipe: Recipe, measured: Measured, shape: Shape) -> float:
    parts = [part for arm in recipe.arms.values() for part in arm.losses] + list(recipe.shared_losses)
    if not any(part.reads_vectors for part in parts):
        return 0.0
    return float(sum(teacher.dim for teacher in measured.teachers) * (shape.images + shape.texts) * _FLOAT)


def _maps(recipe: Recipe, measured: Measured, shape: Shape) -> float:
    return max(teacher.map_bytes for teacher in measured.teachers) * shape.pairs if recipe.needs_maps else 0.0


def _checkpoints(recipe: Recipe, measured: Measured) -> float:
    training, keep = measured.training, recipe.train.keep_checkpoints
    parts = len(recipe.arms) + (1 if recipe.train.shared else 0)
    found = parts * keep * training.checkpoint_bytes + len(recipe.arms) * training.weight_bytes
    if measured.teaching is not None:
        found += measured.teaching.checkpoint_bytes + measured.teachers[0].weight_bytes
    return found


def _pictures_read(sources: Sequence[Source], shape: Shape, minings: int) -> float:
    """Each picture once to be checked, once for each model whose inputs are kept, and at every use where none are."""
    times = 1.0
    for source in sources:
        if source.side == "image":
            times += 1 if source.kind != "live" else len(source.users) * (1 + minings)
    return times * shape.picture_bytes * shape.all_images


def shard_words(found: Amounts, memory_bytes: float) -> str:
    """Whether the vectors and the index fit, and in how many shards where not."""
    from distill.durable import size_of

    if not found.index_bytes:
        return "no mining, no index"
    have = size_of(memory_bytes)
    if found.shards == 1:
        return f"vectors and index fit into {have} of memory"
    return (
        f"mining in {found.shards} shards of {found.shard_items:,} items, one in memory at a time or each on a machine "
        f"of its own: vectors of both sides and an index take {size_of(found.whole_bytes)}, the machine has {have}"
    )
