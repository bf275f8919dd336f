"""Where a run's time went, for people: a table of its stages, the most memory it took, what the teacher was asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from distill.durable import write_atomically
from distill.progress import clock_time
from distill.report.table import ABSENT, show_table
from distill.timings import DONE, OTHER, Summary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

HEADS = ("", "time", "of it its own", "share", "a second")
_SHOWN_S = 0.05  # a stage that rounds to nothing is not shown


def show_time(folder: Path, *, name: str, console: Console | None = None) -> None:
    """Sum up all sessions of the run in ``folder``, show them, and write ``timings.json`` beside their lines.

    Args:
        folder: of the run.
        name: of the run.
        console: where to show it; the standard output when absent.
    """
    from rich.console import Console

    console = console or Console()
    found = Summary.read(folder)
    text = json.dumps(found.as_dict(), indent=2) + "\n"
    write_atomically(folder / "timings.json", lambda file: file.write(text.encode()))
    show_table(HEADS, time_rows(found), title=f"{name}: {sessions_in_words(found)}", console=console)
    for line in _footnotes(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def time_rows(found: Summary, *, indented: bool = True) -> list[list[str]]:
    """A row a stage, those within another one indented or by their path, then the rest and the sum.

    Shares are of own times. A stage that took less than 50 ms with all in it has no row.
    """
    total = found.total
    rows = []
    for path, own in found.seconds.items():
        whole = found.whole(path)
        if whole < _SHOWN_S and path != OTHER:
            continue
        label = "  " * path.count("/") + path.rsplit("/", 1)[-1] if indented else path.replace("/", " / ")
        rows.append([label, _time(whole), _time(own), f"{100 * own / total if total else 0:.1f} %", _rate(found, path)])
    return [*rows, ["all", _time(total), _time(total), "100.0 %", ""]]


def sessions_in_words(found: Summary) -> str:
    """How many sessions there were and how those before the last ended."""
    *before, _ = found.sessions or ("",)
    if not before:
        return "wall time by stage"
    ends = ", ".join(f"{before.count(end)} {_ending(end)}" for end in dict.fromkeys(before))
    return f"wall time by stage over {len(found.sessions)} sessions (resumed {len(before)} times; before: {ends})"


def _ending(end: str) -> str:
    return "ended well" if end == DONE else end if " " in end else f"ended by {end}"


def _footnotes(found: Summary) -> Iterator[str]:
    memory = [(found.peak.get(place, 0), words) for place, words in _PLACES.items()]
    said = ", ".join(f"{size / 2**20:,.0f} MiB {words}" for size, words in memory if size)
    yield f"peak memory: {said or ABSENT}"
    asked, served = found.counted("asked"), found.counted("served")
    if asked or served:
        yield f"teacher: {asked:,} pairs asked, {served:,} served from the store"


_PLACES = {
    "host": "in the main process",
    "children": "in the largest process it started (loader workers share pages with it)",
    "device": "of tensors on the device",
}


def _rate(found: Summary, path: str) -> str:
    """What the stage got through, over all its time."""
    for name, words in (("asked", "pairs"), ("items", "items")):
        number, seconds = found.counts.get(path, {}).get(name, 0), found.whole(path)
        if number and seconds:
            return f"{number / seconds:,.0f} {words}"
    return ""


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else clock_time(seconds)
