"""The tables of ``distill bench``: on the screen, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.bench.indexes import BATCHES
from distill.bench.teacher_costs import ITEMS, name_of
from distill.protocols import SIDES
from distill.report.table import ABSENT, HEADS, METRICS, markdown_table, plain_lines, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from distill.bench.found import Bench, Row
    from distill.bench.quality import Point
    from distill.bench.rounds import Ratio
    from distill.protocols import Side

_ASKS = {"text": "text query", "image": "picture query"}
_FOUND = {"text": "texts", "image": "images"}
_STUDENT, _TEACHER = ("prepare", "tower", "search"), ("query", "items", "score")
_ENDS = ("median", "p90", "p95", "CPU", "of torch", "95 %", "calls")
_WIDE = 150  # letters that the widest table takes with its rules; a narrower terminal has plain lines without
_SPARED = {"p90", "95 %", "calls", "vectors beside"}


@dataclass(frozen=True)
class Table:
    """Cells, the first column to the left."""

    title: str
    heads: Sequence[str]
    body: Sequence[Sequence[str]]


def tables(found: Bench) -> list[Table]:
    """Students, teacher, indexes, quality."""
    made = [one for side in SIDES[::-1] for one in (_students(found, side), _teacher(found, side)) if one.body]
    made += [one for side in SIDES if (one := _indexes(found, side)).body]
    return [*made, _quality(found)]


def show(found: Bench, *, console: Console | None = None) -> None:
    """Print the tables, what was measured, and the notes."""
    from rich.console import Console

    console = console or Console()
    narrow = console.is_terminal and console.width < _WIDE
    for table in tables(found):
        kept = [place for place, head in enumerate(table.heads) if not narrow or head not in _SPARED]
        heads, *body = ([line[place] for place in kept] for line in (table.heads, *table.body))
        if narrow:
            console.out("\n".join([table.title, *plain_lines([heads, *body])]), highlight=False)
        else:
            show_table(heads, body, title=table.title, console=console)
        console.print()
    for line in [*how(found), *found.notes]:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def markdown(found: Bench, *, plot: str) -> str:
    """The page ``bench.md``; ``plot`` names the picture beside it."""
    facts = found.facts
    parts = [f"# What a query costs: {facts['run']}, arm {facts['arm']}\n", f"![quality against time]({plot})\n"]
    parts += [f"## {table.title}\n\n{markdown_table(table.heads, table.body)}" for table in tables(found)]
    parts.append("## How it was measured\n\n" + "".join(f"- {line}\n" for line in [*how(found), *found.notes]))
    return "\n".join(parts)


def how(found: Bench) -> list[str]:
    """What the figures are of, a line each."""
    facts, machine = found.facts, found.facts["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in list(machine)[3:])
    lines = [
        f"{facts['corpus']}, {facts['split']} split: {facts['images']} images, {facts['texts']} texts; drawn as "
        f"queries: {facts['queries']['text']} texts, {facts['queries']['image']} images; vectors of {facts['dim']}",
        f"{facts['threads']} thread(s) for everything; the student in torch and the teacher on {facts['device']}, the "
        f"rest on the processor: {machine['processor']}, {machine['cores']} core(s), {machine['system']}",
        versions,
        "milliseconds a query on the clock; p90 and p95 over calls; CPU: of all threads; of torch: median over rounds "
        "of the time over that of the student in torch in the same round, with its 95 % interval",
        f"peak memory of the process: {facts['peak_bytes']['host'] / 2**20:,.0f} MiB",
    ]
    for side, size in found.kept_bytes.items():
        count = facts["images" if side == "image" else "texts"]
        lines.append(
            f"a {'picture' if side == 'image' else 'text'} that the teacher keeps encoded takes {_bytes(size)}: "
            f"{_bytes(size * count)} for the {count} here"
        )
    sampled = [row for row in found.rows if row.multiplied > 1]
    if sampled:
        times = ", ".join(f"{row.multiplied:.4g} (items of a {_ASKS[row.query]})" for row in _one_a_side(sampled))
        lines.append(f"the teacher alone was timed on a sample of the items and multiplied by {times}")
    return lines


def _one_a_side(rows: Sequence[Row]) -> list[Row]:
    return list({row.query: row for row in rows}.values())


def _students(found: Bench, side: Side) -> Table:
    rows = [row for row in found.rows if row.query == side and "query" not in row.parts]
    body = [[row.name, str(row.batch), *_parts(row, _STUDENT), *_ends(row)] for row in rows]
    return Table(f"{_ASKS[side]}: the student alone, ms", ["", "batch", *_STUDENT, *_ENDS], body)


def _teacher(found: Bench, side: Side) -> Table:
    rows = [row for row in found.rows if row.query == side and "query" in row.parts]
    body = []
    for row in rows:
        name, _, items = row.name.partition(", items ")
        student = [row.parts[part].median for part in _STUDENT if part in row.parts]
        body.append(
            [name, items, _ms(sum(student)) if student else ABSENT, *_parts(row, _TEACHER), *_ends(row)],
        )
    items = _FOUND[_other(side)]
    heads = ["", f"{items} encoded", "student", *_TEACHER, *_ENDS]
    title = f"{_ASKS[side]}: the student's part, then the teacher encodes query and {items} and scores, ms"
    return Table(title, heads, body)


def _indexes(found: Bench, side: Side) -> Table:
    rows = [row for row in found.indexes if row.items == side]
    body = [
        [
            row.factory,
            f"{row.build_s:.3g}",
            _bytes(row.bytes),
            _bytes(row.vectors_bytes) if row.vectors_bytes else ABSENT,
            f"{100 * row.recall:.1f}",
            *(cell for batch in BATCHES for cell in (_ms(row.search[batch].median), _ms(row.search[batch].p95))),
            *(f"{row.ratio[batch].median:.2f}×" for batch in BATCHES),
            str(row.calls[1]),
        ]
        for row in rows
    ]
    heads = ["", "build s", "index", "vectors beside", "recall@10 %"]
    heads += [head for batch in BATCHES for head in (f"ms, batch {batch}", "p95")]
    heads += [*(f"of Flat, {batch}" for batch in BATCHES), "calls"]
    count = rows[0].count if rows else 0
    return Table(f"index of {count:,} {_FOUND[side]}", heads, body)


def _quality(found: Bench) -> Table:
    body = []
    for point in found.points:
        metrics = [f"{point.metrics[name]:.1f}" for name in METRICS]
        body.append([point.name, *metrics, *(_point_ms(found, point, side) for side in SIDES[::-1])])
    heads = ["", *HEADS, *(f"ms a {_ASKS[side]}" for side in SIDES[::-1])]
    return Table("quality on the drawn queries, percent; ms with the teacher's items encoded beforehand", heads, body)


def _point_ms(found: Bench, point: Point, side: Side) -> str:
    row = found.row(side, row_name(point))
    return ABSENT if row is None else _ms(row.total.median)


def row_name(point: Point, *, on_the_spot: bool = False) -> str:
    """Name of the row that holds a point's cost."""
    items = ITEMS[1] if on_the_spot else ITEMS[0]
    if point.kind == "student":
        return point.name
    if point.depth is not None:
        return name_of(point.depth, items)
    return name_of(None, items) if point.name == "teacher alone" else point.name


def _parts(row: Row, names: Sequence[str]) -> list[str]:
    return [_ms(row.parts[name].median) if name in row.parts else ABSENT for name in names]


def _ends(row: Row) -> list[str]:
    total = row.total
    return [*map(_ms, (total.median, total.p90, total.p95, total.cpu)), *_ratio(row.ratio), str(row.calls)]


def _ratio(ratio: Ratio) -> list[str]:
    if ratio.low is None or ratio.high is None:
        return [f"{_times(ratio.median)}×", ABSENT]
    return [f"{_times(ratio.median)}×", f"{_times(ratio.low)}–{_times(ratio.high)}"]


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB"


def _other(side: Side) -> Side:
    return "image" if side == "text" else "text"
