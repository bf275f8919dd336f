"""How the local driver deals out units, with workers that are scripts and load no library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill import stopping
from distill.drivers import local
from distill.drivers.driver import DriverError, Task
from distill.drivers.local import LocalDriver
from tests.drivers.test_plan import written

# A worker: says it is ready, does what it is given by making files, and does as its name in ``does`` says.
_WORKER = """
import json, os, signal, sys, time
from pathlib import Path
folder, number = Path(sys.argv[1]), sys.argv[2]
does = (folder / f"does-{number}").read_text() if (folder / f"does-{number}").exists() else ""
(folder / f"started-{number}").open("a").write("x")
print("about to work", file=sys.stderr, flush=True)
def say(**values):
    os.write(1, json.dumps(values).encode() + b"\\n")
say(ready=True)
for line in sys.stdin:
    for unit in json.loads(line):
        if does == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "dies last":
            (folder / "begun").touch()
            while len(list(folder.glob("unit-*"))) < 7:
                time.sleep(0.01)
            time.sleep(0.3)  # until the other one waits
            os.kill(os.getpid(), signal.SIGKILL)
        while does == "comes second" and not (folder / "begun").exists():
            time.sleep(0.01)
        if does == "fails":
            say(failed="the disk is full")
            sys.exit(2)
        if does == "stuck":
            time.sleep(60)
        (folder / f"unit-{unit}").touch()
        say(done=unit)
    say(ready=True)
"""


@pytest.fixture
def crew(tmp_path, monkeypatch):
    """run(workers, units, number=what it does): the units that were said to be done."""
    monkeypatch.setattr(local, "command", lambda plan, number: [sys.executable, "-c", _WORKER, str(tmp_path), number])
    monkeypatch.setattr(local, "environment", lambda *_, **__: {"PATH": ""})

    def run(workers: int, units: int, **does: str) -> list[int]:
        for number, what in does.items():
            (tmp_path / f"does-{number.removeprefix('w')}").write_text(what)
        names = [f"{number:032x}" for number in range(units)]
        plan = written(tmp_path / "plan", cuts=[(0, 0, 1)] * units, names=names)
        done: list[int] = []
        LocalDriver(workers, threads=1).run(Task(plan, list(range(units)), set), done.append)
        return done

    run.folder = tmp_path
    return run


def started(folder: Path, number: int) -> int:
    path = folder / f"started-{number}"
    return len(path.read_text()) if path.exists() else 0


def test_all_units_are_done_once(crew):
    assert sorted(crew(3, 40)) == list(range(40))


def test_no_more_workers_are_started_than_there_is_work_for(crew):
    assert sorted(crew(5, 2)) == [0, 1]
    assert {path.name for path in (crew.folder / "logs-plan").iterdir()} == {"worker-0.log", "worker-1.log"}


def test_the_units_of_one_that_always_dies_are_done_by_the_other(crew, caplog):
    assert sorted(crew(2, 20, w0="dies")) == list(range(20))
    assert started(crew.folder, 0) <= 1 + local.RESTARTS
    assert "worker 0 died (SIGKILL)" in caplog.text
    assert "about to work" in caplog.text


def test_what_the_last_one_dies_of_goes_to_one_that_waits(crew, monkeypatch):
    monkeypatch.setattr(local, "RESTARTS", 0)
    assert sorted(crew(2, 8, w0="dies last", w1="comes second")) == list(range(8))


def test_when_all_die_the_last_words_are_said(crew):
    with pytest.raises(DriverError, match="every worker died, the last one by SIGKILL(.|\n)*about to work"):
        crew(2, 8, w0="dies", w1="dies")
    assert started(crew.folder, 0) + started(crew.folder, 1) == 2 + local.RESTARTS


def test_a_failure_ends_all_with_its_words(crew):
    with pytest.raises(DriverError, match="the disk is full\nUnits that are done are kept"):
        crew(2, 8, w0="fails")


def test_a_worker_that_does_not_end_when_told_is_ended(crew, monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 0.2)
    with pytest.raises(DriverError, match="the disk is full"):
        crew(2, 20, w0="fails", w1="stuck")


def test_told_to_stop_nothing_more_is_dealt_out(crew, monkeypatch):
    told = iter([0, 0, *[15] * 1000])
    monkeypatch.setattr(stopping, "told", lambda: next(told))
    assert len(crew(2, 400)) < 400
