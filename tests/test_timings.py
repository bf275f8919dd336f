"""Where time goes: a sum over sessions that adds up to the whole, whatever ended them."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from distill import stopping
from distill.report.time_table import show_time
from distill.timings import LINES, Summary, Timings


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def session(folder: Path, *, wrong: BaseException | None = None, seconds: float = 4.0) -> None:
    """Two seconds before it is kept, then mining with embedding inside it, training, and a second at the end."""
    clock = Clock()
    timings = Timings(clock=clock)
    clock.passes(2)
    with timings.kept_in(folder):
        with timings.stage("mine"):
            clock.passes(1)
            with timings.stage("embed"):
                timings.count(items=30)
                clock.passes(3)
            clock.passes(0.5)
        with timings.stage("train plain"):
            clock.passes(seconds)
            timings.spent("waiting for data", 1.5)
            timings.count(steps=2, items=40)
            if wrong is not None:
                raise wrong
        clock.passes(1)


def shown(folder: Path) -> list[str]:
    out = io.StringIO()
    show_time(folder, name="trial", console=Console(file=out))
    return out.getvalue().splitlines()


def test_stages_within_stages_are_told_apart_and_the_whole_adds_up(tmp_path: Path) -> None:
    session(tmp_path)
    found = Summary.read(tmp_path)
    assert dict(found.seconds) == {
        "mine": 1.5,
        "mine/embed": 3.0,
        "train plain": 2.5,
        "train plain/waiting for data": 1.5,
        "other": 3.0,
    }
    assert (found.total, found.whole("mine"), found.whole("train plain")) == (11.5, 4.5, 4.0)
    assert found.counts["mine/embed"] == {"items": 30}
    assert found.counts["train plain"] == {"steps": 2, "items": 40}
    assert found.sessions == ("done",)


def test_a_stage_is_not_taken_for_another_one_that_begins_alike(tmp_path: Path) -> None:
    clock = Clock()
    timings = Timings(clock=clock)
    with timings.kept_in(tmp_path):
        for name, seconds in (("train a", 1.0), ("train a-b", 2.0)):
            with timings.stage(name):
                clock.passes(seconds)
    assert Summary.read(tmp_path).whole("train a") == 1.0


def test_sessions_add_up_however_they_ended(tmp_path: Path) -> None:
    with pytest.raises(stopping.Stopped):
        session(tmp_path, wrong=stopping.Stopped(signal.SIGTERM))
    with pytest.raises(ZeroDivisionError):
        session(tmp_path, wrong=ZeroDivisionError())
    session(tmp_path)
    found = Summary.read(tmp_path)
    assert found.sessions == ("stopped by SIGTERM", "ZeroDivisionError", "done")
    assert found.total == 10.5 + 10.5 + 11.5  # the first two lack the second at the end
    assert found.counted("items") == 3 * 70
    (title,) = (line for line in shown(tmp_path) if line.startswith("trial"))
    assert "3 sessions (resumed 2 times; before: 1 stopped by SIGTERM, 1 ended by ZeroDivisionError)" in title


def test_a_killed_session_counts_up_to_its_last_line_and_a_torn_one_harms_no_other(tmp_path: Path) -> None:
    session(tmp_path)
    path = tmp_path / LINES
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # begun, mined, trained, ended
    path.write_bytes(b"".join(lines[:2]) + lines[2][:25])
    session(tmp_path)
    found = Summary.read(tmp_path)
    assert found.sessions == ("no end noted", "done")
    assert found.total == 2 + 4.5 + 11.5
    assert "1 no end noted" in shown(tmp_path)[0]


def test_a_long_stage_is_kept_once_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    timings = Timings(clock=clock)
    with timings.kept_in(tmp_path), timings.stage("train"):
        for second in range(150):
            clock.passes(1)
            timings.count(steps=1)
            if second == 130:
                assert Summary.read(tmp_path).counted("steps") == 120
                assert Summary.read(tmp_path).seconds["train"] == 120
    assert Summary.read(tmp_path).counted("steps") == 150


def test_what_cannot_be_noted_stops_no_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LINES).mkdir()
    session(tmp_path)
    assert "where the time goes is not noted" in caplog.text
    with pytest.raises(ZeroDivisionError):  # not the error of the note
        session(tmp_path, wrong=ZeroDivisionError())


def test_the_table_adds_up_and_is_kept_as_json(tmp_path: Path) -> None:
    session(tmp_path, seconds=5000.0)
    title, heads, *rows, memory = shown(tmp_path)
    assert title == "trial: wall time by stage"
    cells = {row[:20].strip(): row[20:].split() for row in rows}
    assert list(cells) == ["mine", "embed", "train plain", "waiting for data", "other", "all"]
    shares = [float(row[: row.index("%")].split()[-1]) for row in rows]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.3)
    assert shares[-1] == 100.0
    assert cells["train plain"][0] == "1:23:20"
    assert cells["embed"][-2:] == ["10", "items"]
    assert heads.split()[0] == "time"
    assert memory.startswith("peak memory: ")
    kept = json.loads((tmp_path / "timings.json").read_text())
    assert sum(kept["own"].values()) == pytest.approx(kept["total"])
    assert (kept["resumed"], kept["sessions"]) == (0, ["done"])
    assert kept["peak_bytes"]["host"] > 10 << 20


def test_nothing_was_done_in_a_folder_without_lines(tmp_path: Path) -> None:
    found = Summary.read(tmp_path)
    assert (found.total, found.sessions, dict(found.seconds)) == (0.0, (), {"other": 0.0})
