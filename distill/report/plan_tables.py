"""A plan for people: what each stage costs, ways to run it, bytes, what fits a budget, and what was only assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.durable import size_of
from distill.planning.estimate import whole
from distill.planning.resources import shard_words
from distill.progress import clock_time
from distill.report.table import ABSENT, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from distill.planning.against import Against, Beside
    from distill.planning.estimate import Stage
    from distill.planning.plan import Plan
    from distill.planning.ranges import Range

_HOUR = 3600.0
_SPREAD = {
    "one": "one process",
    "any": "every way",
    "items": "ranks",
    "ranks": "ranks: encoding",
    "searches": "ranks, each with the index",
}


def show(plan: Plan, *, console: Console | None = None) -> None:
    """Print all tables and notes of a plan."""
    from rich.console import Console

    console = console or Console()
    title = f"{plan.name}: {plan.shape.images:,} training images, {plan.shape.texts:,} texts"
    title += "" if plan.is_measured else "; planned, not measured"
    show_table(*_stages(plan), title=title, console=console)
    console.out("")
    show_table(*_ways(plan), title=_ways_title(plan), console=console)
    console.out("")
    show_table(*_amounts(plan), title="bytes", console=console)
    for line in _budget(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plan.against is not None:
        console.out("")
        show_against(plan.against, console=console)
    console.out("")
    for line in (shard_words(plan.amounts, plan.memory_bytes), *plan.notes):
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def show_against(found: Against, *, console: Console) -> None:
    """Predicted and measured by stage."""
    body = [_beside(row) for row in (*found.stages, found.whole)]
    heads = ("", "predicted", "range", "measured", "measured / predicted")
    show_table(heads, body, title=f"beside a run of {found.sessions} session(s)", console=console)
    predicted, counted = found.asked
    console.out(f"pairs asked: predicted {_number(predicted)}, counted {counted:,}", highlight=False)


def _beside(row: Beside) -> list[str]:
    ratio = ABSENT if row.ratio is None else f"{row.ratio:.2f}"
    return [row.name, duration(row.predicted.mid), _between(row.predicted), duration(row.measured), ratio]


def _stages(plan: Plan) -> tuple[Sequence[str], list[list[str]]]:
    heads = (
        "stage",
        "what",
        "teacher calls",
        "one process",
        "range",
        "models",
        "processors",
        "grows with",
        "shared by",
    )
    body = [_stage(stage) for stage in plan.stages]
    found = whole(list(plan.stages))
    calls = [stage.calls for stage in plan.stages if stage.calls.high]
    asked = _number(sum(calls[1:], calls[0])) if calls else ABSENT
    seconds = [duration(found.wall.mid), _between(found.wall), duration(found.device.mid), duration(found.host.mid)]
    return heads, [*body, ["all", "", asked, *seconds, "", ""]]


def _stage(stage: Stage) -> list[str]:
    what = ", ".join(f"{_number(count)} {name}" for name, count in stage.what)
    calls = _number(stage.calls) if stage.calls.high else ABSENT
    return [
        stage.name,
        what,
        calls,
        duration(stage.wall.mid),
        _between(stage.wall),
        duration(stage.device.mid),
        duration(stage.host.mid),
        stage.grows,
        _SPREAD[stage.spread],
    ]


def _ways_title(plan: Plan) -> str:
    money = "" if plan.wish.rate is None else f"; money at {plan.wish.rate:g} an hour of a worker"
    return f"ways to run it, wall clock by stage{money}"


def _ways(plan: Plan) -> tuple[Sequence[str], list[list[str]]]:
    heads = ["", *(f"{run.way.name} ({run.workers})" for run in plan.ways)]
    body = [[stage.name, *(duration(run.seconds[stage.name].mid) for run in plan.ways)] for stage in plan.stages]
    body.append(["all", *(duration(run.wall.mid) for run in plan.ways)])
    body.append(["range", *(_between(run.wall) for run in plan.ways)])
    body.append(["hours paid", *(_hours(run.held) for run in plan.ways)])
    if plan.wish.rate is not None:
        body.append(["money", *(_money(run.money) for run in plan.ways)])
    return heads, body


def _amounts(plan: Plan) -> tuple[Sequence[str], list[list[str]]]:
    kinds = (("disk", plan.amounts.disk), ("memory", plan.amounts.memory), ("network", plan.amounts.network))
    body = [[f"{kind}: {name}", size_of(value.mid), _sizes(value)] for kind, values in kinds for name, value in values]
    return ("", "bytes", "range"), body


def _budget(plan: Plan) -> Iterator[str]:
    fit, rate = plan.fit, plan.wish.rate
    if fit is None:
        return
    money = "" if rate is None else f" ({fit.hours * rate:,.2f} at {rate:g} an hour)"
    yield ""
    yield f"budget: {fit.hours:,.2f} hours of one worker{money}; the whole takes {_hours(fit.needed)}"
    if fit.fits:
        yield "the whole fits"
        return
    yield f"  asking the teacher about a part of the candidates: {share_words(fit.share)}"
    yield f"  fewer candidates a query: {'none fits' if fit.k is None else fewer_words(fit.k, fit.per_query)}"
    images = "none fits" if fit.images is None else f"{fit.images:,} images: --images {fit.images}"
    yield f"  fewer training images: {images}"


def share_words(share: float | None) -> str:
    """The part that fits, and the key that says so."""
    if share is None:
        return "no part of them fits"
    return f"{share:.1%} of them: --set mine.subset.share={share:.3g}"


def fewer_words(k: int, per_query: int) -> str:
    """The keys to set; a step draws no more candidates than there are."""
    return f"--set mine.k={k}" + (f" --set train.candidates_per_query={k}" if k < per_query else "")


def duration(seconds: float) -> str:
    """Seconds, then minutes and hours on the clock, then whole hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 100 * _HOUR:
        return clock_time(seconds)
    return f"{seconds / _HOUR:,.0f} h"


def _between(value: Range) -> str:
    return f"{duration(value.low)} .. {duration(value.high)}"


def _hours(value: Range) -> str:
    low, mid, high = (f"{each:,.2f}" if each < 10 else f"{each:,.0f}" for each in value.ends)
    return f"{mid} h ({low} .. {high})"


def _money(value: Range | None) -> str:
    if value is None:
        return ABSENT
    low, mid, high = (f"{each:,.2f}" if each < 100 else f"{each:,.0f}" for each in value.ends)
    return f"{mid} ({low} .. {high})"


def _number(value: Range) -> str:
    return f"{value.mid:,.0f}" if value.mid < 1e7 else f"{value.mid:.3g}"


def _sizes(value: Range) -> str:
    return "" if value.low == value.high else f"{size_of(value.low)} .. {size_of(value.high)}"
