"""``distill shards``: cut vectors into shards, search them by parts on any machines, merge what was found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Vectors in shards on disk: cut them, search them in parts on several machines, merge exactly.",
)
Items = Annotated[Path, typer.Argument(metavar="ITEMS", help="shards of what is searched")]
Queries = Annotated[Path, typer.Argument(metavar="QUERIES", help="shards of the queries")]
K = Annotated[int, typer.Option("--k", min=1, help="items found a query")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="where what is found goes")]
Factory = Annotated[str, typer.Option("--factory", help="FAISS factory string; Flat is exact")]
NProbe = Annotated[int | None, typer.Option("--nprobe", min=1)]


@app.command()
def write(
    vectors: Annotated[Path, typer.Argument(metavar="VECTORS", help=".npy file, (N, D) floats")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    items: Annotated[int, typer.Option("--items", min=1, help="most of a shard")],
    ids: Annotated[Path | None, typer.Option("--ids", help=".npy file, (N,) ascending; 0, 1, ... when absent")] = None,
) -> None:
    """Cut vectors into shards. Killed, the same command goes on; complete, it does nothing."""
    import numpy as np

    from distill.durable import sha256_of
    from distill.protocols import fingerprint
    from distill.shard_writer import blocks_of, write_shards

    whole = _array(vectors)
    if whole.ndim != 2 or not np.issubdtype(whole.dtype, np.floating):
        raise ValueError(f"{vectors} must hold (N, D) vectors of floats, got {whole.dtype} {whole.shape}")
    own = np.arange(len(whole)) if ids is None else _array(ids)
    if own.shape != whole.shape[:1] or not np.issubdtype(own.dtype, np.integer):
        raise ValueError(f"{ids} must hold ({len(whole)},) ids, got {own.dtype} {own.shape}")
    identity = fingerprint("file", sha256_of(vectors))
    found = write_shards(folder, identity, own, blocks_of(whole), dim=whole.shape[1], shard_items=items)
    typer.echo(f"{len(found)} vectors of {found.dim} numbers in {len(found.shards)} shards: {folder}")


@app.command()
def search(
    items: Items,
    queries: Queries,
    k: K,
    out: Out,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="of N parts the I-th, counted from 0; all when absent")
    ] = "0/1",
    factory: Factory = "Flat",
    nprobe: NProbe = None,
    device: Annotated[Literal["auto", "cpu", "gpu"], typer.Option("--device")] = "auto",
) -> None:
    """Search one shard after another: each with a block of queries is a unit, and a unit that is done is left alone."""
    from distill.shard_search import ShardSearch, search_shard

    wanted = ShardSearch(items, queries, k, out, factory, nprobe)
    index, count = _part(part)
    own = wanted.units[len(wanted.units) * index // count : len(wanted.units) * (index + 1) // count]
    for path in search_shard(wanted, own, device=device):
        typer.echo(path.name)
    typer.echo(f"part {part}: {len(own)} units are done; {len(wanted.missing)} of {len(wanted.units)} are missing")


@app.command()
def merge(items: Items, queries: Queries, k: K, out: Out, factory: Factory = "Flat", nprobe: NProbe = None) -> None:
    """What one index over all items would have found: ``neighbours-N.npz`` of each block of queries."""
    import numpy as np

    from distill.durable import write_atomically
    from distill.shard_search import ShardSearch
    from distill.shard_search import merge as merged

    wanted = ShardSearch(items, queries, k, out, factory, nprobe)
    written = set()
    for number, (query_ids, similarity, ids) in enumerate(merged(wanted)):
        path = out / f"neighbours-{number:05d}.npz"
        write_atomically(path, partial(np.savez, query_ids=query_ids, similarity=similarity, ids=ids))
        written.add(path)
        typer.echo(f"{path}: {len(query_ids)} queries, {k} items each")
    for path in set(out.glob("neighbours-*.npz")) - written:  # of an earlier search, which had more queries
        path.unlink()


def _array(path: Path) -> Any:
    """Mapped from a .npy file."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, EOFError):
        raise ValueError(f"{path} is no .npy file of numbers, or is torn: write one with numpy.save") from None


def _part(given: str) -> tuple[int, int]:
    index, slash, count = given.partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise typer.BadParameter(f"--part is I/N with 0 <= I < N, such as 0/8, got {given!r}")
    return int(index), int(count)
