"""Tables of results: on a terminal, as plain lines, as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
HEADS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "RSUM")
ABSENT = "–"


def results_table(
    rows: Mapping[str, Mapping[str, float | None]],
    *,
    extra: Sequence[str] = (),
    title: str = "",
    console: Console | None = None,
) -> None:
    """Show a row a model: recalls in percent both ways, RSUM, and further columns.

    On a terminal a ruled table; elsewhere (a file, a pipe) plain aligned lines without control characters.

    Args:
        rows: Name -> metrics by name, as :meth:`distill.metrics.Retrieval.as_dict` gives them; an absent one or None
            shows as a dash.
        extra: Names of further metrics to show, for example ``gap_closed``.
        title: Above the table.
        console: Where to show it; the standard output when absent.

    Raises:
        ValueError: There is no row.
    """
    heads, body = _cells(rows, extra)
    show_table(heads, body, title=title, console=console)


def show_table(
    heads: Sequence[str], body: Sequence[Sequence[str]], *, title: str = "", console: Console | None = None
) -> None:
    """Show cells as they are, the first column to the left and all others to the right; as :func:`results_table`."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        for line in ([title] if title else []) + plain_lines([heads, *body]):
            console.out(line, highlight=False)
        return
    table = Table(title=escape(title) or None, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if number else "left", no_wrap=True)
    for cells in body:
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)


def to_markdown(rows: Mapping[str, Mapping[str, float | None]], *, extra: Sequence[str] = ()) -> str:
    """The table of :func:`results_table` in Markdown, ending with a newline.

    Raises:
        ValueError: There is no row.
    """
    return markdown_table(*_cells(rows, extra))


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Cells in Markdown, ending with a newline; the first ``left`` columns to the left, all others to the right."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (heads, *body)]
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "".join(f"| {' | '.join(line)} |\n" for line in (escaped[0], rule, *escaped[1:]))


def _cells(rows: Mapping[str, Mapping[str, float | None]], extra: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    if not rows:
        raise ValueError("a table of results needs at least one row")
    heads = ["", *HEADS, *(name.replace("_", " ") for name in extra)]
    body = [
        [name, *(_number(row.get(key), ".1f") for key in METRICS), *(_number(row.get(key), ".4g") for key in extra)]
        for name, row in rows.items()
    ]
    return heads, body


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None or math.isnan(value) else format(value, form)


def plain_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in aligned columns: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
