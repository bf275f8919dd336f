"""The tables and sentences of a comparison, as text: one place for the page, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distill.protocols import DIRECTIONS
from distill.report.table import ABSENT, HEADS, METRICS
from distill.report.time_table import HEADS as HEADS_OF_TIME
from distill.report.time_table import time_rows
from distill.verdicts import number, p_value

if TYPE_CHECKING:
    from distill.analysis import Analysis, ArmFigures
    from distill.compare import Comparison, GapPoint
    from distill.verdicts import Difference, Spread

Mark = Literal["", "undistilled", "best", "teacher"]
TEACHER = "teacher"
RECALLS = METRICS[:-1]
WAYS = {"i2t": "image → text", "t2i": "text → image"}

_GAP_HEADS = ("who answers", "i2t R@1", "t2i R@1", "RSUM", "ms per image query", "ms per text query")


@dataclass(frozen=True)
class Row:
    """Cells of a line; the first one names it. ``mark`` says what the line is."""

    cells: Sequence[str]
    mark: Mark = ""

    @property
    def name(self) -> str:
        """The first cell with its mark in brackets, where there is no other way to show one."""
        return f"{self.cells[0]} ({self.mark})" if self.mark and self.mark != self.cells[0] else self.cells[0]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        heads: Of the columns.
        rows: Lines.
        groups: (words, columns they span) above the heads; all columns are covered.
        left: Columns of words, set to the left; the first is always one.
    """

    heads: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    left: int = 1

    def flat_heads(self) -> list[str]:
        """Heads that say their group too."""
        above = [words for words, columns in self.groups for _ in range(columns)] or [""] * len(self.heads)
        return [f"{words} {head}".strip() for words, head in zip(above, self.heads, strict=True)]


def results_grid(comparison: Comparison, analysis: Analysis) -> Grid:
    """Recall both ways and RSUM by arm, highest first, the teacher among them; arms without a student last."""
    lines = [(_rsum(figures), _result_row(figures, analysis)) for figures in analysis.arms]
    if comparison.teacher is not None:
        metrics = comparison.teacher.metrics
        recalls = [number(metrics[name]) for name in RECALLS]
        cells = [TEACHER, number(metrics["rsum"]), ABSENT, "100 %", *recalls]
        lines.append((metrics["rsum"], Row(cells, "teacher")))
    lines.sort(key=lambda line: -line[0])
    interval = f"{100 * analysis.how.confidence:g} % interval"
    # what is compared comes first: on a narrow page the rest is to be scrolled to
    heads = ["arm", "RSUM", interval, "gap closed", *("R@1", "R@5", "R@10") * 2]
    return Grid(heads, [row for _, row in lines], [("", 4), *((WAYS[way], 3) for way in DIRECTIONS)])


def terminal_grid(comparison: Comparison, analysis: Analysis) -> Grid:
    """The same without deviations of recalls and without the interval: a terminal is 80 to 120 letters wide."""
    whole = results_grid(comparison, analysis)
    rows = [
        Row([row.cells[0], *(cell.split(" ")[0] for cell in row.cells[4:]), row.cells[1], row.cells[3]], row.mark)
        for row in whole.rows
    ]
    return Grid(["", *HEADS, "gap closed"], rows)


def _rsum(figures: ArmFigures) -> float:
    return figures.metrics["rsum"].mean if figures.metrics else float("-inf")


def _result_row(figures: ArmFigures, analysis: Analysis) -> Row:
    found = figures.rsum
    interval = ABSENT
    if found is not None and found.low is not None and found.high is not None:
        interval = f"{number(found.low)} to {number(found.high)}"
    gap = plus_minus(figures.gap_closed, digits=0, unit=" %")
    recalls = [plus_minus(figures.metrics.get(name)) for name in RECALLS]
    cells = [figures.arm, plus_minus(figures.metrics.get("rsum")), interval, gap, *recalls]
    return Row(cells, mark_of(figures.arm, analysis))


def mark_of(arm: str, analysis: Analysis) -> Mark:
    """What to say beside an arm's name."""
    return "undistilled" if arm == analysis.plain else "best" if arm == analysis.best else ""


def plus_minus(found: Spread | None, *, digits: int = 1, unit: str = "") -> str:
    """``21.4 ± 0.6``: mean and deviation over seeds; the mean alone with one seed."""
    if found is None:
        return ABSENT
    mean = number(found.mean, digits=digits)
    return f"{mean}{unit}" if found.std is None else f"{mean} ± {number(found.std, digits=digits)}{unit}"


def differences_grid(differences: Sequence[Difference], analysis: Analysis) -> Grid:
    """Leads over one arm."""
    words = {"ahead": "ahead", "behind": "behind", "none": "no significant difference"}
    heads = [
        "arm",
        "RSUM difference",
        f"{100 * analysis.how.confidence:g} % interval",
        "each seed",
        "p",
        "p (Holm)",
        "verdict",
    ]
    rows = []
    for one in differences:
        low, high = one.rsum.low, one.rsum.high
        interval = ABSENT if low is None or high is None else f"{number(low, sign='+')} to {number(high, sign='+')}"
        seeds = ", ".join(number(value, sign="+") for value in one.seeds.by_seed.values())
        cells = [one.arm, number(one.rsum.value, sign="+"), interval, seeds, p_value(one.p), p_value(one.p_holm)]
        rows.append(Row([*cells, words[one.verdict]], mark_of(one.arm, analysis)))
    return Grid(heads, rows)


def agreement_grid(analysis: Analysis) -> Grid | None:
    """Agreement with the teacher, both ways; None where no cell has any."""
    if not any(figures.agreement for figures in analysis.arms):
        return None
    rows = []
    for figures in analysis.arms:
        cells = [figures.arm]
        for way in DIRECTIONS:
            own = figures.agreement.get(way, {})
            cells += [plus_minus(own.get("kendall"), digits=3), plus_minus(own.get("spearman"), digits=3)]
            cells.append(plus_minus(own.get("top1"), unit=" %"))
        rows.append(Row(cells, mark_of(figures.arm, analysis)))
    heads = ["arm", *("Kendall τ", "Spearman ρ", "same top-1") * 2]
    return Grid(heads, rows, [("", 1), *((WAYS[way], 3) for way in DIRECTIONS)])


def cost_grid(comparison: Comparison, analysis: Analysis) -> Grid:
    """Seconds, memory and teacher calls."""
    rows = []
    for figures in analysis.arms:
        cost = figures.cost
        memory = f"{cost.peak_bytes / 2**20:,.0f} MiB" if cost.peak_bytes else ABSENT
        cells = [figures.arm, f"{len(figures.seeds)} of {len(comparison.seeds)}", plus_minus(cost.seconds, unit=" s")]
        cells += [memory, f"{cost.asked:,}", f"{cost.served:,}"]
        rows.append(Row(cells, mark_of(figures.arm, analysis)))
    heads = ["arm", "seeds done", "training time", "peak memory", "pairs the teacher scored", "scores from the store"]
    return Grid(heads, rows)


def time_grid(comparison: Comparison) -> Grid | None:
    """Wall clock by stage; None where it is not known."""
    if comparison.time is None or not comparison.time.total:
        return None
    return Grid(["stage", *HEADS_OF_TIME[1:]], [Row(cells) for cells in time_rows(comparison.time, indented=False)])


def gap_grid(comparison: Comparison, analysis: Analysis) -> Grid | None:
    """From the student to the teacher, in recall and milliseconds; None where nothing was measured."""
    rows = [
        Row([arm, *_gap_cells(point)], mark_of(arm, analysis))
        for arm, points in comparison.gap.items()
        for point in points
    ]
    return Grid(["arm", *_GAP_HEADS], rows, left=2) if rows else None


def gap_grids(comparison: Comparison) -> Iterator[tuple[str, Grid]]:
    """(arm, its own table) of the same, for a page that has room."""
    for arm, points in comparison.gap.items():
        if points:
            yield arm, Grid(_GAP_HEADS, [Row(_gap_cells(point)) for point in points])


def _gap_cells(point: GapPoint) -> list[str]:
    recalls = [number(point.metrics[name]) for name in ("i2t_r1", "t2i_r1", "rsum")]
    return [point.label, *recalls, *(_milliseconds(point.ms_per_query.get(way)) for way in DIRECTIONS)]


def _milliseconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def arms_grid(analysis: Analysis) -> Grid:
    """The resolved losses."""
    rows = [Row([figures.arm, figures.losses], mark_of(figures.arm, analysis)) for figures in analysis.arms]
    return Grid(["arm", "losses"], rows, left=2)


def failed_grid(comparison: Comparison) -> Grid | None:
    """Cells without a student."""
    rows = [Row([cell.arm, str(cell.seed), cell.reason]) for cell in comparison.failed]
    return Grid(["arm", "seed", "why"], rows, left=3) if rows else None


def in_short(comparison: Comparison, analysis: Analysis) -> Iterator[str]:
    """What the page comes down to, a sentence each."""
    if analysis.best is None:
        yield "No arm has a student: there is nothing to show."
        return
    best = analysis.arm(analysis.best)
    over = "one seed" if len(best.seeds) == 1 else f"{len(best.seeds)} seeds"
    deviation = " ± standard deviation" if len(best.seeds) > 1 else ""
    text = f"{best.arm} has the highest RSUM: {plus_minus(best.metrics['rsum'])} (mean{deviation} over {over})."
    if best.gap_closed is not None and comparison.teacher is not None:
        text += (
            f" It closes {best.gap_closed.mean:.0f} % of the gap between {analysis.plain} and the teacher (RSUM "
            f"{number(comparison.teacher.metrics['rsum'])})."
        )
    yield text
    for family in families(analysis):
        yield from _grouped(family)


def families(analysis: Analysis) -> list[tuple[Difference, ...]]:
    """The families of differences that there are: against the undistilled arm, and against the best where another."""
    found = [analysis.against_plain] + [analysis.against_best] * (analysis.best != analysis.plain)
    return [family for family in found if family]


def _grouped(family: Sequence[Difference]) -> Iterator[str]:
    other = family[0].against
    beginnings = {
        "ahead": f"Ahead of {other}: ",
        "none": f"No significant difference from {other}: ",
        "behind": f"Behind {other}: ",
    }
    for verdict, beginning in beginnings.items():
        named = [f"{one.arm} ({number(one.rsum.value, sign='+')})" for one in family if one.verdict == verdict]
        if named:
            yield f"{beginning}{', '.join(named)}."


def sentences(family: Sequence[Difference]) -> list[str]:
    """``kl: ahead of plain by ...``, one an arm."""
    return [f"{one.arm}: {one.words}." for one in family]
