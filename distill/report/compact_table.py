"""The table of a student's smaller vectors: on a terminal, in Markdown, and as a plot."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from distill.durable import write_atomically
from distill.report.table import HEADS, METRICS, markdown_table, show_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from distill.compact import Measured, Table

_HEADS = ("width", "kind", *HEADS, "change", "top-10 kept", "bytes in memory", "on disk")
_WIDE = 150  # columns of the table on a terminal; a narrower one breaks lines, where rich would leave out figures
# One colour a kind; what is searched by the same codes has the same marker.
_LOOKS = {
    "float32": ("#1f1f1f", "-", "o"),
    "float16": ("#8a8a8a", "--", "o"),
    "int8": ("#1f6fb4", "-", "s"),
    "int8 + rescore float32": ("#7fb8e6", "--", "s"),
    "binary": ("#b3261e", "-", "^"),
    "binary + rescore codes": ("#e58a2e", "--", "^"),
    "binary + rescore int8": ("#7d5bb5", "--", "^"),
    "binary + rescore float32": ("#3c9a5f", ":", "^"),
}


def title(table: Table) -> str:
    """What was measured."""
    return f"{table.run}, {table.arm}: smaller vectors on the {table.split} split of {table.corpus}, percent"


def notes(table: Table) -> list[str]:
    """What is to be known beside the numbers, a sentence a line."""
    trained = (
        f"The student was trained at widths {', '.join(map(str, (*table.trained, table.dim)))} (train.matryoshka)."
        if table.trained
        else f"The student was trained at its full width of {table.dim} alone (without train.matryoshka)."
    )
    counted = [f"{count} {side}s" for side, count in table.items.items()]
    sampled = [f"{count} {side}s" for side, count in table.sample.items()]
    return [
        trained,
        "Vectors are cut to their first numbers and normalised again; queries stay float32 but for binary's search.",
        f"Rescoring orders the first {table.shortlist} items of {' and '.join(counted)} again.",
        f"Ranges of int8 are set by {' and '.join(sampled)} of the training split.",
        "Bytes are of one item: in memory, what is searched; on disk, that and what a shortlist is rescored by.",
        "Change and top-10 kept are against float32 at full width. Ties count against the student.",
    ]


def show(table: Table, *, console: Console | None = None) -> None:
    """Show the table and its notes."""
    from rich.console import Console

    console = console or Console()
    console.width = max(console.width, _WIDE)
    heads, body = _cells(table)
    width = max(len(line[0]) for line in body)
    merged = [[f"{line[0]:>{width}} {line[1]}", *line[2:]] for line in body]
    show_table([" ".join(heads[:2]), *heads[2:]], merged, title=title(table), console=console)
    for note in notes(table):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def to_markdown(table: Table) -> str:
    """The same as a page."""
    lines = "".join(f"- {note}\n" for note in notes(table))
    return f"# {title(table)}\n\n{lines}\n{markdown_table(*_cells(table), left=2)}"


def as_json(table: Table) -> dict[str, object]:
    """Everything, by name; metrics stand beside the other figures of a line."""
    whole = asdict(table)
    whole["lines"] = [
        {**{k: v for k, v in line.items() if k != "metrics"}, **line["metrics"]} for line in whole["lines"]
    ]
    return {"format": 1, **whole}


def plot(table: Table, path: Path) -> None:
    """Write a PNG: RSUM against bytes an item in memory, a line a kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8.6, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for kind, (colour, dashes, marker) in _LOOKS.items():
        lines = sorted((line for line in table.lines if line.kind == kind), key=lambda line: line.width)
        if lines:
            sizes, sums = [line.bytes_in_memory for line in lines], [line.metrics["rsum"] for line in lines]
            axis.plot(sizes, sums, dashes, color=colour, marker=marker, markersize=5, linewidth=1.6, label=kind)
    axis.axhline(table.lines[0].metrics["rsum"], color="#1f1f1f", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({line.bytes_in_memory for line in table.lines}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel="bytes an item in memory (logarithmic)", ylabel="RSUM")
    axis.set_title(title(table).removesuffix(", percent"), loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="best")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    return list(_HEADS), [_line(line) for line in table.lines]


def _line(line: Measured) -> list[str]:
    return [
        str(line.width),
        line.kind,
        *(f"{line.metrics[name]:.1f}" for name in METRICS),
        f"{line.rsum_change:+.1f}",
        f"{line.top_kept:.1f}",
        str(line.bytes_in_memory),
        str(line.bytes_on_disk),
    ]
