"""The score store at size: writing, opening, looking up; beside a dict in memory and SQLite at a size that fits them.

``python -m benchmarks.store [--quick] [--json FILE]``

Pairs are made: 32 texts an image, as hard negatives are, one unit per 8192 images; texts and scores are a formula of
the ids, so that every score looked up is compared with what it must be. Every phase runs in a process of its own. The
process that started it reads the phase's anonymous resident memory (``RssAnon`` of ``/proc/<pid>/status``: what is
resident beyond the page cache that holds mapped files) every two milliseconds; the peak is reported.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.child import in_child
from benchmarks.made_pairs import compare, drawn_pairs, made_units, shape
from distill.store import ScoreStore

if TYPE_CHECKING:
    from benchmarks.child import Phase


@dataclass(frozen=True)
class Sizes:
    """Pairs written, how many of them are looked up, and the same for the side-by-side with dict and SQLite."""

    pairs: int
    lookups: int
    rival_pairs: int
    rival_lookups: int


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 M pairs in place of 100 M")] = False,
    pairs: Annotated[int | None, typer.Option(min=1024, help="another number of pairs; a tenth is looked up")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    folder: Annotated[Path | None, typer.Option(help="where the store is made for a while: 40 bytes a pair")] = None,
) -> None:
    """Measure, print a table, remove everything again."""
    pairs = pairs or (2_000_000 if quick else 100_000_000)
    rivals = min(pairs, 200_000 if quick else 5_000_000)
    sizes = Sizes(pairs, pairs // 10, rivals, min(rivals, 1_000_000) // (5 if quick else 1))
    with tempfile.TemporaryDirectory(dir=folder, prefix="cross2dual-store-") as place:
        figures = measure(Path(place), sizes)
    show(figures)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2))


def measure(place: Path, sizes: Sizes) -> dict[str, float]:
    """All figures of one run; seconds, bytes and ratios, by name."""
    figures: dict[str, float] = {
        "pairs": sizes.pairs,
        "lookups": sizes.lookups,
        "rival_pairs": sizes.rival_pairs,
        "rival_lookups": sizes.rival_lookups,
    }
    big = place / "big"
    for name, work, arguments in (
        ("write", write, (big, sizes.pairs)),
        ("compact", open_new, (big, sizes.pairs)),
        ("open", open_again, (big, sizes.pairs)),
        ("lookup_cold", look_up, (big, sizes.pairs, sizes.lookups, True)),
        ("lookup", look_up, (big, sizes.pairs, sizes.lookups, False)),
    ):
        figures |= _named(name, in_child(work, *arguments))
    shutil.rmtree(big)
    for name, rival in (("store", with_store), ("dict", with_dict), ("sqlite", with_sqlite)):
        phase = in_child(rival, place / f"small-{name}", sizes.rival_pairs, sizes.rival_lookups)
        figures |= _named(f"rival_{name}", phase)
    for name in ("dict", "sqlite"):
        figures[f"ratio_{name}"] = figures[f"rival_{name}_lookup_s"] / figures["rival_store_lookup_s"]
        figures[f"memory_ratio_{name}"] = figures[f"rival_{name}_anonymous"] / figures["rival_store_anonymous"]
    figures["ratio_sqlite_join"] = figures["rival_sqlite_join_s"] / figures["rival_store_lookup_s"]
    return figures


# ---- phases, each in a process of its own


def opened(folder: Path, pairs: int) -> ScoreStore:
    """The store of the made pairs."""
    n_images, n_texts = shape(pairs)
    about: dict[str, Any] = {"teacher_identity": "made", "corpus_fingerprint": "made", "score_kind": "log_odds"}
    return ScoreStore(folder, **about, n_images=n_images, n_texts=n_texts)


def write(folder: Path, pairs: int) -> dict[str, float]:
    """Time of writing alone, without that of making the pairs."""
    store, seconds = opened(folder, pairs), 0.0
    for images, texts, scores in made_units(pairs):
        started = time.perf_counter()
        store.write_unit(images, texts, scores)
        seconds += time.perf_counter() - started
    files = list(store.folder.glob("unit-*"))
    return {"s": seconds, "units": len(files), "bytes": sum(file.stat().st_size for file in files)}


def open_new(folder: Path, pairs: int) -> dict[str, float]:
    """The first opening, which verifies all units, and one table made of them."""
    started = time.perf_counter()
    store = opened(folder, pairs)
    store.compact()
    seconds = time.perf_counter() - started
    return {"s": seconds, "bytes": sum(file.stat().st_size for file in store.folder.glob("table-*/*"))}


def open_again(folder: Path, pairs: int) -> dict[str, float]:
    """Another opening, which finds the table."""
    started = time.perf_counter()
    opened(folder, pairs)
    return {"s": time.perf_counter() - started}


def look_up(folder: Path, pairs: int, count: int, cold: bool) -> dict[str, float]:
    """Look up ``count`` pairs in random order; ``cold``: the table is not in the page cache."""
    images, texts = drawn_pairs(pairs, count)
    store = opened(folder, pairs)
    for file in store.folder.glob("table-*/*.npy"):
        _evict(file) if cold else _read(file)
    started = time.perf_counter()
    found = store.lookup(images, texts)
    seconds = time.perf_counter() - started
    compare(found, images, texts)
    return {"s": seconds}


def with_store(folder: Path, pairs: int, count: int) -> dict[str, float]:
    """Write, open, look up."""
    started = time.perf_counter()
    store = opened(folder, pairs)
    for unit in made_units(pairs):
        store.write_unit(*unit)
    store.compact()
    built = time.perf_counter() - started
    images, texts = drawn_pairs(pairs, count)
    started = time.perf_counter()
    found = store.lookup(images, texts)
    seconds = time.perf_counter() - started
    compare(found, images, texts)
    return {"build_s": built, "lookup_s": seconds}


def with_dict(folder: Path, pairs: int, count: int) -> dict[str, float]:
    """A dict from pair key to score; arrays in, an array out, as for the store. Nothing outlives the process."""
    n_texts = shape(pairs)[1]
    started = time.perf_counter()
    held: dict[int, float] = {}
    for images, texts, scores in made_units(pairs):
        held.update(zip((images * n_texts + texts).tolist(), scores.tolist(), strict=True))
    built = time.perf_counter() - started
    images, texts = drawn_pairs(pairs, count)
    started = time.perf_counter()
    wanted = (images * n_texts + texts).tolist()
    found = np.fromiter((held.get(key, np.nan) for key in wanted), np.float32, count)
    seconds = time.perf_counter() - started
    compare(found, images, texts)
    return {"build_s": built, "lookup_s": seconds}


def with_sqlite(folder: Path, pairs: int, count: int) -> dict[str, float]:
    """SQLite with the pair key as primary key: one SELECT a pair, and one join with a table of all that is wanted."""
    folder.mkdir(parents=True)
    n_texts = shape(pairs)[1]
    started = time.perf_counter()
    base = sqlite3.connect(folder / "scores.sqlite")
    base.execute("CREATE TABLE scores (pair INTEGER PRIMARY KEY, score REAL)")
    for images, texts, scores in made_units(pairs):
        with base:  # a transaction a unit
            rows = zip((images * n_texts + texts).tolist(), scores.tolist(), strict=True)
            base.executemany("INSERT INTO scores VALUES (?, ?)", rows)
    built = time.perf_counter() - started
    images, texts = drawn_pairs(pairs, count)
    started = time.perf_counter()
    wanted = (images * n_texts + texts).tolist()
    one = "SELECT score FROM scores WHERE pair = ?"
    found = np.fromiter((base.execute(one, (key,)).fetchone()[0] for key in wanted), np.float32, count)
    seconds = time.perf_counter() - started
    compare(found, images, texts)
    started = time.perf_counter()
    base.execute("CREATE TEMP TABLE wanted (place INTEGER PRIMARY KEY, pair INTEGER)")
    base.executemany("INSERT INTO wanted VALUES (?, ?)", enumerate((images * n_texts + texts).tolist()))
    joined = base.execute("SELECT score FROM wanted JOIN scores USING (pair) ORDER BY place")
    found = np.fromiter((score for (score,) in joined), np.float32, count)
    join_seconds = time.perf_counter() - started
    compare(found, images, texts)
    base.close()
    return {"build_s": built, "lookup_s": seconds, "join_s": join_seconds}


def _evict(file: Path) -> None:
    """Ask the system to drop the file from the page cache; it was fsynced, so that it can."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(file: Path) -> None:
    """Bring the file into the page cache."""
    with open(file, "rb") as content:
        while content.read(1 << 20):
            pass


def _named(name: str, phase: Phase) -> dict[str, float]:
    found = {**phase.result, "anonymous": phase.anonymous, "resident": phase.resident}
    return {f"{name}_{key}": value for key, value in found.items()}


# ---- the tables


def show(figures: dict[str, float]) -> None:
    """Print what was measured."""
    from rich.console import Console
    from rich.table import Table

    pairs, lookups = figures["pairs"], figures["lookups"]
    console = Console()
    table = Table(title=f"{pairs / 1e6:g} M pairs, {lookups / 1e6:g} M looked up in random order")
    for heading in ("", "seconds", "M pairs/s", "peak anonymous MB", "peak resident MB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name, count in (
        (
            f"write {figures['write_units']:.0f} units, {figures['write_bytes'] / pairs:.1f} bytes a pair",
            "write",
            pairs,
        ),
        ("first opening: verify all, compact", "compact", pairs),
        ("opening with a table", "open", None),
        ("look up, table not in the page cache", "lookup_cold", lookups),
        ("look up, table in the page cache", "lookup", lookups),
    ):
        seconds = figures[f"{name}_s"]
        rate = "" if count is None else f"{count / seconds / 1e6:.2f}"
        table.add_row(label, f"{seconds:.2f}", rate, *_megabytes(figures, name))
    console.print(table)
    rivals, looked = figures["rival_pairs"], figures["rival_lookups"]
    table = Table(title=f"{rivals / 1e6:g} M pairs, {looked / 1e6:g} M looked up in random order, side by side")
    for heading in ("", "build s", "look up s", "times the store's", "peak anonymous MB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name, key in (
        ("score store (kept on disk, verified)", "store", "lookup_s"),
        ("dict in memory (not kept)", "dict", "lookup_s"),
        ("SQLite, one SELECT a pair", "sqlite", "lookup_s"),
        ("SQLite, one join", "sqlite", "join_s"),
    ):
        seconds = figures[f"rival_{name}_{key}"]
        ratio = seconds / figures["rival_store_lookup_s"]
        built, memory = figures[f"rival_{name}_build_s"], _megabytes(figures, f"rival_{name}")[0]
        table.add_row(label, f"{built:.2f}", f"{seconds:.2f}", f"{ratio:.1f}", memory)
    console.print(table)


def _megabytes(figures: dict[str, float], name: str) -> list[str]:
    return [f"{figures[f'{name}_{kind}'] / 1e6:.0f}" for kind in ("anonymous", "resident")]


if __name__ == "__main__":
    typer.run(main)
