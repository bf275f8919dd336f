"""The plot of ``distill bench``: quality against time, from the student alone over re-ranking to the teacher alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.durable import write_atomically
from distill.report.bench_tables import row_name

if TYPE_CHECKING:
    from pathlib import Path

    from distill.bench.found import Bench
    from distill.bench.quality import Point
    from distill.protocols import Side

# Told apart by most colour-blind people (Okabe and Ito).
_STUDENTS = ("#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7")
_MARKS = ("o", "s", "^", "v", "D")
_TEACHER, _FRESH = "#d55e00", "#8a8a8a"
_TOGETHER = 22  # pixels, within which two points share a label
_FEW_DECADES = 3000.0  # of times, up to which ticks lie between the powers of ten
_LEAST_SPAN = 10.0  # percent, of recalls
_PANELS: tuple[tuple[Side, str, str, str], ...] = (
    ("text", "t2i_r1", "a text asks for images", "text → image R@1, %"),
    ("image", "i2t_r1", "an image asks for texts", "image → text R@1, %"),
)


def plot(found: Bench, path: Path) -> None:
    """Write a PNG with a panel a direction; time is logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (side, metric, title, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        _panel(axis, found, side, metric)
        axis.set(title=title, ylabel=label, xlabel="milliseconds a query, one at a time (median; logarithmic)")
    handles = dict[str, Any]()
    for axis in figure.axes:
        handles |= dict(zip(axis.get_legend_handles_labels()[1], axis.get_legend_handles_labels()[0], strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    facts = found.facts
    queries = f"{facts['queries']['text']} texts and {facts['queries']['image']} images of the {facts['split']} split"
    figure.suptitle(
        f"{facts['run']}, arm {facts['arm']}: {queries}, {facts['threads']} thread(s); hollow: multiplied out"
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _panel(axis: Any, found: Bench, side: Side, metric: str) -> None:
    axis.set_xscale("log")
    students = [point for point in found.points if point.kind == "student"]
    for number, point in enumerate(students):
        placed = _placed(found, point, side, metric)
        if placed is not None:
            style = {"color": _STUDENTS[number % len(_STUDENTS)], "marker": _MARKS[number % len(_MARKS)]}
            axis.plot(*placed, linestyle="none", markersize=8, label=f"student, {point.name}", zorder=3, **style)
    others = [point for point in found.points if point.kind != "student"]
    for fresh in (False, True):
        _line(axis, found, [*students[:1], *others], side, metric, fresh=fresh)
    for point in others:
        if point.kind == "teacher" and found.row(side, row_name(point)) is None:
            axis.axhline(point.metrics[metric], color=_TEACHER, linestyle=":", linewidth=1.2, label=point.name)
    _scales(axis)
    for fresh in (False, True):
        _depths(axis, found, others, side, metric, fresh=fresh)


def _scales(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.margins(x=0.08, y=0.14)
    left, right = axis.get_xlim()
    ticks = (1, 2, 5) if right / left < _FEW_DECADES else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=ticks, numticks=12))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    spare = max(0.0, _LEAST_SPAN - (high - low)) / 2  # what one query changes must not look like much
    axis.set_ylim(low - spare, high + spare)
    axis.grid(color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _line(axis: Any, found: Bench, points: list[Point], side: Side, metric: str, *, fresh: bool) -> None:
    """From the student in torch over each depth to the teacher alone."""
    there = [(point, placed) for point in points if (placed := _placed(found, point, side, metric, fresh=fresh))]
    if len(there) < 2:
        return
    colour, style = (_FRESH, "--") if fresh else (_TEACHER, "-")
    label = f"the teacher re-ranks K, items encoded {'on the spot' if fresh else 'beforehand'}"
    axis.plot(*zip(*(placed for _, placed in there), strict=True), style, color=colour, linewidth=1.5, label=label)
    for point, placed in there[1:]:
        alone = point.depth is None
        filled = "white" if alone else colour  # hollow: multiplied out
        look = {"color": colour, "markerfacecolor": filled, "markersize": 11 if alone else 5}
        named = "the teacher alone, over every item" if alone else None
        axis.plot(*placed, "*" if alone else "o", linestyle="none", label=named, **look)


def _depths(axis: Any, found: Bench, points: list[Point], side: Side, metric: str, *, fresh: bool) -> None:
    """The depth at each point, or several where points lie together; above the solid line, below the dashed one."""
    from matplotlib.patheffects import withStroke

    groups: list[tuple[Any, list[str]]] = []
    for point in points:
        placed = _placed(found, point, side, metric, fresh=fresh)
        if placed is None or point.depth is None:
            continue
        text = str(point.depth)
        where = axis.transData.transform(placed)  # in pixels
        if groups and abs(where - axis.transData.transform(groups[-1][0])).max() < _TOGETHER:
            groups[-1][1].append(text)
        else:
            groups.append((placed, [text]))
    colour, place, turned = (_FRESH, (3, -14), "left") if fresh else (_TEACHER, (-3, 6), "right")
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for placed, texts in groups:
        text = axis.annotate(", ".join(texts), placed, place, textcoords="offset points", fontsize=8.5, ha=turned)
        text.set(color=colour, path_effects=halo)


def _placed(found: Bench, point: Point, side: Side, metric: str, *, fresh: bool = False) -> tuple[float, float] | None:
    """(milliseconds, quality) of a point; None where its time was not taken."""
    row = found.row(side, row_name(point, on_the_spot=fresh))
    return None if row is None else (row.total.median, point.metrics[metric])
