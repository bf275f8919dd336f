"""``distill store``: look into stores of teacher scores, check them, bring them together, hand them on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.store_tools import StoreFacts, Verification

app = typer.Typer(
    no_args_is_help=True, help="Stores of teacher scores: what they hold, whether it is sound, merge, export."
)
StoreFolder = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        help="a store, <teacher identity>/<corpus fingerprint>, or the folder that holds stores, such as .cache/scores",
    ),
]


@app.command()
def stats(
    folder: StoreFolder,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a list of stores")] = False,
) -> None:
    """What each store holds. Where many units are new, counting brings the store's look-up table up to date."""
    from distill.store_tools import find_stores, store_facts

    found = [store_facts(store) for store in find_stores(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(facts) | {"folder": str(facts.folder)} for facts in found], indent=2))
    else:
        typer.echo("\n\n".join(_facts_text(facts) for facts in found))


@app.command()
def verify(
    folder: StoreFolder,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="move what is bad into a folder bad/ beside it; nothing is deleted")
    ] = False,
) -> None:
    """Read every unit in full and compare every table with its units; exit code 1 when anything is bad.

    Once bad units are moved aside, the next scoring asks the teacher for their pairs again, and for no others.
    """
    from distill import store_tools

    bad = False
    for store in store_tools.find_stores(folder):
        found = store_tools.verify_store(store)
        typer.echo(_verification_text(found))
        bad |= bool(found.faults)
        if quarantine:
            for path in store_tools.quarantine(found.faults):
                typer.echo(f"  moved to {path}")
    raise typer.Exit(int(bad))


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="stores, or folders that hold stores")],
    into: Annotated[Path, typer.Option("--into", metavar="TARGET", help="folder that is to hold all stores")],
) -> None:
    """Bring the scores of several machines together; stores of different teachers or corpora stay apart.

    Units are verified and keep their time: of a pair that two units score differently the later one counts. Merging
    again changes nothing. Bad units are named and left out; then the exit code is 1.
    """
    from distill.store_merge import merge_stores

    report = merge_stores(sources, into)
    typer.echo(f"copied {report.copied} units, {report.copied_pairs} pairs; {report.already_there} units were there")
    if report.differing:
        typer.echo(
            f"{report.differing} pairs had another score in the target, the largest difference is "
            f"{report.largest_difference:.3g}; the later unit counts"
        )
    if report.superseded:
        typer.echo(f"left out {report.superseded} units that the target has with later scores")
    for fault in report.refused:
        typer.echo(f"refused {fault.path}: {fault.reason}", err=True)
    raise typer.Exit(int(bool(report.refused)))


@app.command()
def export(
    store: StoreFolder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="ending in .parquet, .csv or .jsonl")],
) -> None:
    """Write all scores of one store to one file with the columns image_id, text_id and score.

    Ids are rows of the corpus, in the order in which the recipe's data gives images and texts. The origin of the scores
    is in the Parquet footer; for .csv and .jsonl it is in FILE.origin.json.
    """
    from distill.store_export import export_scores
    from distill.store_tools import find_stores, open_folder

    found = find_stores(store)
    if len(found) > 1:
        listed = "\n".join(f"  {path}" for path in found)
        raise typer.BadParameter(f"{store} holds {len(found)} stores; give one of\n{listed}", param_hint="FOLDER")
    typer.echo(f"{export_scores(open_folder(found[0]), out)} pairs: {out}")


def _facts_text(facts: StoreFacts) -> str:
    origin = facts.origin
    made = (
        f"{origin.score_kind} of {origin.n_images} images x {origin.n_texts} texts"
        if origin
        else "unknown: no unit can be read"
    )
    pairs = "unknown: some unit is bad, see distill store verify" if facts.pairs is None else f"{facts.pairs} distinct"
    return (
        f"{facts.folder}\n  teacher  {facts.folder.parent.name}\n  corpus   {facts.folder.name}\n  scores   {made}\n"
        f"  pairs    {pairs}\n  units    {facts.units}, {_megabytes(facts.bytes)}\n"
        f"  tables   {facts.tables}, {_megabytes(facts.table_bytes)}"
    )


def _verification_text(found: Verification) -> str:
    verdict = f"{len(found.faults)} bad" if found.faults else "all sound"
    lines = [f"{found.folder}: {verdict} (sound: units {found.units}, pairs {found.pairs}, tables {found.tables})"]
    lines += [f"  bad: {fault.path.name} {fault.reason}" for fault in found.faults]
    if found.leftovers:
        lines.append(f"  unfinished files: {found.leftovers}; those of killed writers go when the store is next opened")
    if found.outdated:
        lines.append(f"  tables with units that are gone: {found.outdated}; they are never read")
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
