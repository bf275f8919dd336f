"""The report of a comparison: one self-contained HTML page, Markdown for a pull request, JSON for programs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.analysis import without_nan
from distill.durable import write_atomically
from distill.report import compare_tables as tables
from distill.report.compare_plots import curve_plot, gap_plot, lead_plot
from distill.report.compare_words import facts, how_to_read
from distill.report.table import markdown_table, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from distill.analysis import Analysis
    from distill.compare import Comparison, Example, Item
    from distill.report.compare_tables import Grid
    from distill.verdicts import Difference

HTML, MARKDOWN, JSON = "compare.html", "compare.md", "compare.json"
_HERE = Path(__file__).parent
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
_VERDICTS = {"ahead": "ahead", "behind": "behind"}


def write_report(comparison: Comparison, analysis: Analysis, folder: str | Path) -> tuple[Path, Path, Path]:
    """Write ``compare.html``, ``compare.md`` and ``compare.json`` into a folder, each whole or not at all.

    The page fetches nothing: plots are inline SVG, pictures data URIs, and its policy forbids the rest.

    Returns:
        The three paths, in this order.

    Raises:
        ValueError: A picture of an example is in a format that browsers may not know.
    """
    texts = {
        HTML: to_html(comparison, analysis),
        MARKDOWN: to_markdown(comparison, analysis),
        JSON: json.dumps(to_dict(comparison, analysis), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    paths = []
    for name, text in texts.items():
        content = text.encode("utf-8", "replace")
        paths.append(Path(folder) / name)
        write_atomically(paths[-1], lambda file, content=content: file.write(content))  # type: ignore[misc]
    html, markdown, data = paths
    return html, markdown, data


# --- HTML -------------------------------------------------------------------------------------------------------------


def to_html(comparison: Comparison, analysis: Analysis) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = _data_uri
    environment.globals["verdicts"] = _VERDICTS

    def drawn(svg: str | None) -> Markup | None:
        return None if svg is None else Markup(svg)  # noqa: S704  (matplotlib's own, texts escaped)

    values: dict[str, Any] = {
        "title": comparison.title,
        "command": comparison.command,
        "corpus": comparison.corpus,
        "arms": comparison.arms,
        "seeds": comparison.seeds,
        "same": comparison.same,
        "style": Markup((_HERE / "compare.css").read_text(encoding="utf-8")),  # noqa: S704
        "in_short": list(tables.in_short(comparison, analysis)),
        "notes": analysis.notes,
        "results": tables.results_grid(comparison, analysis),
        "families": [_family(family, analysis, drawn) for family in tables.families(analysis)],
        "agreement": tables.agreement_grid(analysis),
        "gap_grids": list(tables.gap_grids(comparison)),
        "gap_plot": drawn(gap_plot(comparison.gap) if any(comparison.gap.values()) else None),
        "curve_plot": drawn(curve_plot(comparison)),
        "cost": tables.cost_grid(comparison, analysis),
        "time": tables.time_grid(comparison),
        "examples": [_example(example) for example in comparison.examples],
        "failed": tables.failed_grid(comparison),
        "reading": list(how_to_read(comparison, analysis)),
        "losses": tables.arms_grid(analysis),
        "facts": list(facts(comparison)),
    }
    values["contents"] = list(_contents(values))
    return environment.get_template("compare.html.j2").render(values)


def _contents(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sections = {
        "recall": ("Recall", "results"),
        "differences": ("Differences", "families"),
        "agreement": ("Agreement with the teacher", "agreement"),
        "gap": ("Recall against time", "gap_grids"),
        "curves": ("Training curves", "curve_plot"),
        "cost": ("Cost", "cost"),
        "examples": ("Examples", "examples"),
        "failed": ("Failures", "failed"),
        "how": ("How to read", "reading"),
        "again": ("What was run", "command"),
    }
    for anchor, (words, needs) in sections.items():
        if values[needs]:
            yield anchor, words


def _family(family: Sequence[Difference], analysis: Analysis, drawn: Any) -> dict[str, Any]:
    against = family[0].against
    return {
        "against": against,
        "what": "undistilled" if against == analysis.plain else "best",
        "plot": drawn(lead_plot(family, analysis)) if against == analysis.plain else None,
        "grid": tables.differences_grid(family, analysis),
        "sentences": tables.sentences(family),
    }


@dataclass(frozen=True)
class _Box:
    """An item, and the arms that put it first with their rank of the first true one."""

    best: Item
    correct: bool
    arms: Sequence[tuple[str, int]]


def _example(example: Example) -> dict[str, Any]:
    """Arms that answer alike share a box; right answers come first, then those that come closest."""
    boxes: dict[int, _Box] = {}
    for arm, found in example.found.items():
        held = boxes.get(found.best.id)
        arms = [*(held.arms if held else ()), (arm, found.rank)]
        boxes[found.best.id] = _Box(found.best, found.correct, arms)
    order = sorted(boxes.values(), key=lambda box: (not box.correct, min(rank for _, rank in box.arms)))
    shown = {"direction": example.direction, "query": example.query, "true": example.true, "seed": example.seed}
    return {**shown, "boxes": order}


def _data_uri(picture: bytes) -> str:
    kind = next((kind for start, kind in _KINDS.items() if picture.startswith(start)), None)
    if kind is None and picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise ValueError(f"a picture of an example starts with {picture[:8]!r}; give PNG, JPEG, GIF or WebP")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(comparison: Comparison, analysis: Analysis) -> str:
    """Tables and sentences, to be pasted into a pull request."""
    return "\n".join(_blocks(comparison, analysis))


def _blocks(comparison: Comparison, analysis: Analysis) -> Iterator[str]:
    corpus, plain = comparison.corpus, _plain
    yield f"## {plain(comparison.title)}\n"
    yield f"{plain(corpus.name)}, {plain(corpus.split)} split: {corpus.images:,} images, {corpus.texts:,} texts.\n"
    yield _bullets(tables.in_short(comparison, analysis))
    yield _section("Recall", tables.results_grid(comparison, analysis))
    for family in tables.families(analysis):
        yield _section(f"Against {family[0].against}", tables.differences_grid(family, analysis))
        yield _bullets(tables.sentences(family))
    optional = {
        "Agreement with the teacher": tables.agreement_grid(analysis),
        "From student to teacher": tables.gap_grid(comparison, analysis),
        "Cost": tables.cost_grid(comparison, analysis),
        "Wall time by stage": tables.time_grid(comparison),
        "Trainings that failed": tables.failed_grid(comparison),
        "Losses": tables.arms_grid(analysis),
    }
    for title, grid in optional.items():
        if grid is not None:
            yield _section(title, grid)
    if analysis.notes:
        yield "### To be read with care\n\n" + _bullets(analysis.notes)
    fence = "`" * (3 + comparison.command.count("`"))
    yield f"### Again\n\n{fence}\n{comparison.command}\n{fence}\n"


def _section(title: str, grid: Grid) -> str:
    body = [[_plain(cell) for cell in (row.name, *row.cells[1:])] for row in grid.rows]
    return f"### {_plain(title)}\n\n" + markdown_table(grid.flat_heads(), body, left=grid.left)


def _bullets(sentences: Iterator[str] | Sequence[str]) -> str:
    return "".join(f"- {_plain(sentence)}\n" for sentence in sentences)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML."""
    for letter in "\\`*_[]<>":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("\n", " ")


# --- JSON and terminal ------------------------------------------------------------------------------------------------


def to_dict(comparison: Comparison, analysis: Analysis) -> dict[str, Any]:
    """All figures in plain containers: facts, analysis, every cell's metrics, gap reports, failures; no pictures."""
    named = ("title", "command", "arms", "plain", "seeds", "same", "environment")
    cells = [
        {"arm": cell.arm, "seed": cell.seed, "metrics": cell.evaluation.retrieval.as_dict()}
        | {"agreement": {way: found.as_dict() for way, found in (cell.agreement or {}).items()}}
        | {name: getattr(cell, name) for name in ("seconds", "peak_bytes", "asked", "served")}
        for cell in comparison.cells
    ]
    found: dict[str, Any] = without_nan(
        {name: getattr(comparison, name) for name in named}
        | {
            "corpus": asdict(comparison.corpus),
            "teacher": comparison.teacher and asdict(comparison.teacher),
            "failed": [asdict(cell) for cell in comparison.failed],
            "cells": cells,
            "time": comparison.time and comparison.time.as_dict(),
            "gap": {arm: [asdict(point) for point in points] for arm, points in comparison.gap.items()},
            "analysis": asdict(analysis),
        }
    )
    return found


def show(comparison: Comparison, analysis: Analysis, console: Console | None = None) -> None:
    """Print the table of recall, the differences in words and what must be read with care."""
    from rich.console import Console

    console = console or Console()
    corpus = comparison.corpus
    title = f"{comparison.title}: {corpus.name}, {corpus.split} split, percent"
    grid = tables.terminal_grid(comparison, analysis)
    show_table(grid.heads, [[row.name, *row.cells[1:]] for row in grid.rows], title=title, console=console)
    lines = [line for family in tables.families(analysis) for line in tables.sentences(family)]
    for line in [*lines, *(f"note: {note}" for note in analysis.notes)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
