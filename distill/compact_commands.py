"""``distill compact RUN``: what a student's vectors keep when they are cut, rounded to bytes, or to bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.experiment import Experiment

Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, e.g. runs/quickstart")]
Arm = Annotated[str, typer.Option("--arm", help="whose student; the last arm's when absent")]
Widths = Annotated[
    str,
    typer.Option(
        "--widths",
        metavar="W,W,...",
        help="beside the full one; when absent those of train.matryoshka, else powers of two from 16",
    ),
]
Split = Annotated[str, typer.Option("--split", help="whose items; the one that the run evaluates when absent")]
Rescore = Annotated[
    int, typer.Option("--rescore", min=1, metavar="N", help="items of a rescored shortlist, in tens: 4 = the first 40")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="RUN/arms/ARM/compact when absent")]


def compact_command(opened: Callable[[Path], Experiment]) -> Callable[..., None]:
    """The command; ``opened`` gives the experiment of a run's folder."""

    def compact(
        run: Run, arm: Arm = "", widths: Widths = "", split: Split = "", rescore: Rescore = 4, out: Out = None
    ) -> None:
        """Recall against the size of a vector: fewer numbers, float16, int8, bits, with and without rescoring."""
        from distill.compact import compact as measured
        from distill.durable import write_atomically
        from distill.report import compact_table

        given = _numbers(widths)
        x = opened(run)
        table = measured(x, arm, widths=given, split=split, rescore=rescore)
        folder = out or x.folder / "arms" / table.arm / "compact"
        text = json.dumps(compact_table.as_json(table), indent=2) + "\n"
        page = compact_table.to_markdown(table)
        write_atomically(folder / "compact.json", lambda file: file.write(text.encode()))
        write_atomically(folder / "compact.md", lambda file: file.write(page.encode()))
        compact_table.plot(table, folder / "compact.png")
        compact_table.show(table)
        typer.echo(f"table: {folder / 'compact.md'}, plot: {folder / 'compact.png'}")

    return compact


def _numbers(given: str) -> list[int]:
    try:
        return [int(one) for one in given.split(",")] if given else []
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is no list of whole numbers such as 16,32,64", param_hint="--widths"
        ) from None
