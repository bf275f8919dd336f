"""The plots of a comparison as SVG for the inside of a page: in its fonts and its light or dark colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.protocols import DIRECTIONS

if TYPE_CHECKING:
    from distill.analysis import Analysis
    from distill.compare import Cell, Comparison, GapPoint
    from distill.verdicts import Difference

# Drawn in these and then replaced by the page's variables, so that one SVG suits light and dark.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#010204": "var(--faint)",
    "#010205": "var(--rule)",
    "#010206": "var(--paper)",
    "#010211": "var(--c1)",
    "#010212": "var(--c2)",
    "#010213": "var(--c3)",
    "#010214": "var(--c4)",
    "#010215": "var(--c5)",
    "#010216": "var(--c6)",
}
_INK, _FAINT, _RULE, _PAPER, *_COLOURS = _VARIABLES
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
    "text.parse_math": False,  # an arm may be called "$x$"
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_WIDTH = 7.8  # inches, of which the page makes its own width
_LONGEST = 24  # letters of a name on a plot
_POINTS = 160  # of a training curve


def lead_plot(differences: Sequence[Difference], analysis: Analysis) -> str:
    """Dots and intervals: each arm's RSUM minus that of the arm it is compared with, each seed a small dot."""
    against = differences[0].against
    with _figure(1.1 + 0.42 * len(differences)) as (figure, svg):
        axis = figure.subplots()
        axis.axvline(0, color=_INK, linewidth=1)
        for place, one in enumerate(differences):
            colour = {"ahead": _COLOURS[0], "behind": _COLOURS[1], "none": _FAINT}[one.verdict]
            if one.rsum.low is not None and one.rsum.high is not None:
                axis.plot([one.rsum.low, one.rsum.high], [place, place], color=colour, linewidth=2.4)
            filled = colour if one.verdict != "none" else _PAPER
            axis.plot(
                one.rsum.value, place, "o", color=colour, markerfacecolor=filled, markersize=8, markeredgewidth=1.8
            )
            seeds = list(one.seeds.by_seed.values())
            axis.plot(seeds, np.full(len(seeds), place + 0.27), "o", color=colour, markersize=3.2, alpha=0.9)
        axis.set_yticks(range(len(differences)), [_short(one.arm) for one in differences])
        axis.set_ylim(len(differences) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(f"RSUM minus that of {_short(against)}, with {100 * analysis.how.confidence:g} % interval")
        label = f"RSUM difference from {against}: " + "; ".join(
            f"{one.arm} {one.rsum.value:+.1f}" for one in differences
        )
        return svg("lead", label)


def gap_plot(gap: Mapping[str, Sequence[GapPoint]]) -> str:
    """RSUM against milliseconds a query, a line an arm, from the student alone to the teacher."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with _figure(4.2) as (figure, svg):
        axis = figure.subplots()
        for number, (arm, points) in enumerate(gap.items()):
            placed = sorted((_mean_ms(point), point.metrics["rsum"], point) for point in points if point.ms_per_query)
            colour, line = _COLOURS[number % len(_COLOURS)], ("-", "--", ":")[number // len(_COLOURS) % 3]
            times, rsums = [ms for ms, _, _ in placed], [rsum for _, rsum, _ in placed]
            axis.plot(times, rsums, line, color=colour, marker="o", markersize=5, linewidth=1.8, label=_short(arm))
            if number == 0:  # K is the same for all
                for ms, rsum, point in placed:
                    text = f"K = {point.k}" if point.k else point.label
                    axis.annotate(text, (ms, rsum), (4, -12), textcoords="offset points", fontsize=8.5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a decade may be all there is
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())  # its own would print powers as source text
        axis.margins(x=0.12, y=0.12)
        axis.set(xlabel="milliseconds a query (mean of both directions, logarithmic)", ylabel="RSUM")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 0.04))
        return svg("gap", f"RSUM against milliseconds a query for {', '.join(gap)}; the tables below hold the figures")


def _mean_ms(point: GapPoint) -> float:
    return float(np.mean([point.ms_per_query[way] for way in DIRECTIONS if way in point.ms_per_query]))


def curve_plot(comparison: Comparison) -> str | None:
    """Small multiples: the parts of each arm's loss by step, a thin line a seed; None where nothing was written."""
    curves = {arm: [cell for cell in comparison.cells_of(arm).values() if cell.curve] for arm in comparison.arms}
    curves = {arm: cells for arm, cells in curves.items() if cells}
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with _figure(0.3 + 1.95 * rows) as (figure, svg):
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axis, (arm, cells) in zip(axes, curves.items(), strict=False):
            _one_curve(axis, cells)
            axis.set_title(_short(arm), fontweight="bold")
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        for place, axis in enumerate(axes[: len(curves)]):
            if place + columns >= len(curves):  # nothing below it
                axis.tick_params(labelbottom=True)
                axis.set_xlabel("step")
        return svg("curves", f"Training loss and its parts by step, one panel an arm: {', '.join(curves)}")


def _one_curve(axis: Any, cells: Sequence[Cell]) -> None:
    parts = list(
        dict.fromkeys(name for cell in cells for line in cell.curve for name in line if name.startswith("loss"))
    )
    if len(parts) == 2:  # a total of one part
        parts.remove("loss")
    for number, part in enumerate(sorted(parts, key=lambda name: name == "loss")):
        colour = _INK if part == "loss" else _COLOURS[number % len(_COLOURS)]
        for place, cell in enumerate(cells):
            points = [(line["step"], line[part]) for line in cell.curve if np.isfinite(line.get(part, np.nan))]
            if points:
                steps, values = np.array(points[:: max(1, len(points) // _POINTS)]).T
                label = (part.removeprefix("loss/") if part != "loss" else "sum") if place == 0 else None
                axis.plot(steps, values, color=colour, linewidth=0.9, alpha=0.85, label=label)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.legend(loc="upper right", fontsize=8, handlelength=1.2, borderaxespad=0, labelspacing=0.25)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Callable[[str, str], str]]]:
    """A figure, and what turns it into SVG with a name for its parts and words for those who cannot see it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # not what a user's matplotlibrc says
        for name, value in _STYLE.items():
            mpl.rcParams[name] = value  # type: ignore[index]  # a name is one of hundreds of literals
        warnings.filterwarnings("ignore", message=".*missing from font")  # the page's own font draws it
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, lambda name, label: _inline(figure, name, label)


def _inline(figure: Any, name: str, label: str) -> str:
    import matplotlib as mpl
    from markupsafe import escape

    file = io.StringIO()
    mpl.rcParams["svg.hashsalt"] = name  # the same figures give the same bytes
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    # ids are unique within a plot only; a page holds several
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg role="img" aria-label="{escape(label)}" {box.group() if box else ""}>{body}'
