"""Mining a side that is larger than the memory one would give it: in one piece, and in shards on disk.

``python -m benchmarks.sharded_mining [--quick] [--json FILE] [--items N] [--shard-items N] [--queries N]``

Vectors are made block by block, as a student would make them. In one piece they are gathered in memory and indexed, as
a run does without ``mine.shard_items``; in shards they go to disk as they come and one shard at a time is searched.
Each way runs in a process of its own that is watched from outside. What both find is compared: ids, similarities and
order must be equal, or the benchmark fails. ``anonymous`` is what the process itself holds; ``resident`` has the pages
of files besides, which the system takes back when it needs room.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.child import in_child, memory_of
from benchmarks.sidebyside import JsonFile, Quick, show, write_json

_BLOCK = 1 << 14  # vectors made at a time


@dataclass(frozen=True)
class Sizes:
    """Items and queries, width of the vectors, items of a shard, items found a query."""

    items: int = 2_000_000
    queries: int = 500
    width: int = 256
    shard_items: int = 200_000
    k: int = 32


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    items: Annotated[int | None, typer.Option(min=100)] = None,
    shard_items: Annotated[int | None, typer.Option("--shard-items", min=10)] = None,
    queries: Annotated[int | None, typer.Option(min=1)] = None,
    folder: Annotated[Path | None, typer.Option(help="where the shards go; a temporary folder when absent")] = None,
) -> None:
    """Mine both ways, compare, print a table."""
    base = Sizes(items=20_000, queries=50, shard_items=3_000) if quick else Sizes()
    sizes = Sizes(items or base.items, queries or base.queries, base.width, shard_items or base.shard_items)
    with tempfile.TemporaryDirectory(prefix="cross2dual-shards-", dir=folder) as temporary:
        figures = measure(Path(temporary), sizes)
    rows = [
        (
            way,
            *(
                figures[f"{way}_{what}"] / scale
                for what, scale in (("s", 1), ("anonymous", 2**20), ("resident", 2**20))
            ),
        )
        for way in ("one_piece", "shards")
    ]
    vectors = 4 * sizes.items * sizes.width / 2**20
    title = (
        f"{sizes.items:,} items, {sizes.width} wide ({vectors:,.0f} MiB), {sizes.queries:,} queries, K = {sizes.k}, "
        f"shards of {sizes.shard_items:,}: equal ids and similarities"
    )
    show(title, ("way", "seconds", "MiB anonymous", "MiB resident"), rows)
    write_json(json_file, figures)


def measure(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Seconds and peak bytes of both ways; ``ratio_anonymous``, ``ratio_resident``: one piece over shards.

    Raises:
        AssertionError: they find other things.
    """
    figures: dict[str, float] = {"items": sizes.items, "queries": sizes.queries, "shard_items": sizes.shard_items}
    for name, way in (("one_piece", one_piece), ("shards", shards)):
        phase = in_child(way, folder, sizes)
        before = phase.result["before"]
        figures |= {
            f"{name}_s": phase.result["s"],
            f"{name}_anonymous": phase.anonymous - before,
            f"{name}_resident": phase.resident - before,
        }
    whole, cut = (np.load(folder / f"{name}.npz") for name in ("one_piece", "shards"))
    for what in ("ids", "similarity"):
        assert np.array_equal(whole[what], cut[what]), f"shards find other {what} than one piece"
    for what in ("anonymous", "resident"):
        figures[f"ratio_{what}"] = figures[f"one_piece_{what}"] / figures[f"shards_{what}"]
    figures["ratio_s"] = figures["one_piece_s"] / figures["shards_s"]
    return figures


def made(sizes: Sizes) -> Iterator[np.ndarray[Any, Any]]:
    """Blocks of unit vectors; each thousandth is one of the block's first ten again, so that there are ties."""
    for number, start in enumerate(range(0, sizes.items, _BLOCK)):
        rng = np.random.default_rng([number])
        block = rng.standard_normal((min(_BLOCK, sizes.items - start), sizes.width), np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        copies = np.arange(10, len(block), 1000)
        block[copies] = block[copies % 10]
        yield block


def queries_of(sizes: Sizes) -> np.ndarray[Any, Any]:
    """Near the first items, so that ties are among what is found."""
    near = next(made(sizes))[np.arange(sizes.queries) % 1000]
    noise = np.random.default_rng([0, 1]).standard_normal(near.shape, np.float32) / np.sqrt(sizes.width)
    found = near + noise.astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def one_piece(folder: Path, sizes: Sizes) -> dict[str, float]:
    """All vectors and their index in memory."""
    from distill.index import VectorIndex

    queries, (before, _) = queries_of(sizes), memory_of(os.getpid())
    began = time.perf_counter()
    vectors = np.empty((sizes.items, sizes.width), np.float32)
    start = 0
    for block in made(sizes):
        vectors[start : start + len(block)] = block
        start += len(block)
    similarity, ids = VectorIndex.build(vectors, np.arange(sizes.items), device="cpu").search(queries, sizes.k)
    seconds = time.perf_counter() - began
    np.savez(folder / "one_piece.npz", similarity=similarity, ids=ids)
    return {"s": seconds, "before": before}


def shards(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Vectors to disk as they come, then one shard at a time."""
    from distill.shard_index import ShardedIndex
    from distill.shard_writer import write_shards

    queries, (before, _) = queries_of(sizes), memory_of(os.getpid())
    began = time.perf_counter()
    written = write_shards(
        folder / "shards",
        "made",
        np.arange(sizes.items),
        made(sizes),
        dim=sizes.width,
        shard_items=sizes.shard_items,
    )
    similarity, ids = ShardedIndex(written, device="cpu").search(queries, sizes.k)
    seconds = time.perf_counter() - began
    np.savez(folder / "shards.npz", similarity=similarity, ids=ids)
    return {"s": seconds, "before": before}


if __name__ == "__main__":
    typer.run(main)
