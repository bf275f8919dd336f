"""Cells as processes: what is done is not done again, what fails costs one cell, and what was spent is noted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.cells import Cost, Job, forget, run_cells
from distill.pipeline import DONE, SHARED

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
stage, recipe, *rest = sys.argv[1:]
run = Path(recipe).parent
arm = rest[1] if stage == "train" else "shared"
with (run / "calls").open("a") as file:
    file.write(f"{arm} {os.environ['OMP_NUM_THREADS']}\\n")
behaviour = run / f"{arm}.behaviour"
exec(behaviour.read_text() if behaviour.exists() else "pass")
if stage == "train":
    student = run / "arms" / arm / "student"
    student.mkdir(parents=True)
    (student / "done.json").write_text("{}")
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    runs = [tmp_path / "seed-0", tmp_path / "seed-1"]
    for run in runs:
        run.mkdir()

    def go(jobs=1):
        waves = [[Job(run, SHARED, "score") for run in runs], [Job(run, arm, "train") for run in runs for arm in "ab"]]
        return run_cells(waves, jobs=jobs, program=(sys.executable, str(script)))

    return runs, go


def calls(run: Path) -> list[str]:
    path = run / "calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_every_cell_runs_once_shared_parts_first(world):
    runs, go = world
    costs = go(jobs=2)
    assert set(costs) == {f"{arm}/{run.name}" for run in runs for arm in (SHARED, "a", "b")}
    assert all(cost.finished and cost.attempts == 1 and cost.seconds > 0 for cost in costs.values())
    assert all(cost.peak_bytes > 1 << 20 for cost in costs.values())  # a Python process takes megabytes, not kilobytes
    assert [sorted(calls(run)) for run in runs] == [["a", "b", SHARED]] * 2
    assert [calls(run)[0] for run in runs] == [SHARED] * 2
    go()
    assert [len(calls(run)) for run in runs] == [3, 3], "what is done is not done again"


def test_a_student_that_is_gone_is_trained_again(world):
    runs, go = world
    go()
    (runs[0] / "arms" / "a" / "student" / DONE).unlink()
    (runs[0] / "arms" / "a" / "student").rmdir()
    go()
    assert calls(runs[0]).count("a") == 2
    assert Cost.load(Job(runs[0], "a", "train").record).attempts == 2


def test_a_failure_costs_one_cell_and_its_reason_is_kept(world):
    runs, go = world
    (runs[0] / "a.behaviour").write_text("print('before'); print('error: lower train.lr'); sys.exit(2)")
    costs = go()
    failed = [label for label, cost in costs.items() if not cost.finished]
    assert failed == ["a/seed-0"]
    assert costs["a/seed-0"].reason.startswith("lower train.lr\n(exit code 2; log: ")
    (runs[0] / "a.behaviour").unlink()
    costs = go()
    assert costs["a/seed-0"].finished
    assert costs["a/seed-0"].reason == ""
    assert costs["a/seed-0"].attempts == 2


def test_a_killed_process_is_told_from_one_that_gave_up(world):
    runs, go = world
    (runs[1] / "b.behaviour").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    reason = go()["b/seed-1"].reason
    assert reason.startswith("$ distill train")  # its own command is the last that was written
    assert f"(signal {signal.SIGKILL.value}; log: " in reason


def test_without_its_shared_part_no_cell_of_a_seed_is_tried(world):
    runs, go = world
    (runs[0] / f"{SHARED}.behaviour").write_text("raise SystemExit('error: no teacher')")
    costs = go()
    assert set(costs) == {f"{SHARED}/seed-0", f"{SHARED}/seed-1", "a/seed-1", "b/seed-1"}
    assert calls(runs[0]) == [SHARED]


def test_a_forgotten_cell_runs_anew_and_no_other(world):
    runs, go = world
    go()
    forget(runs[1], "b")
    assert not (runs[1] / "arms" / "b").exists()
    go()
    assert calls(runs[1]).count("b") == 2
    assert calls(runs[1]).count("a") == calls(runs[0]).count("b") == 1
    assert Cost.load(Job(runs[1], "b", "train").record).attempts == 1


def test_a_process_that_outlived_its_command_is_waited_for(world, tmp_path):
    runs, go = world
    job = Job(runs[0], "a", "train")
    job.record.parent.mkdir()
    orphan = (
        "import fcntl, pathlib, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX);"
        "pathlib.Path(sys.argv[2]).touch(); time.sleep(1.5); pathlib.Path(sys.argv[3]).touch()"
    )
    held, ended = tmp_path / "held", tmp_path / "ended"
    paths = [str(job.record.parent / f".lock-{job.record.name}"), str(held), str(ended)]
    with subprocess.Popen([sys.executable, "-c", orphan, *paths]):
        while not held.exists():
            time.sleep(0.01)
        (runs[0] / "a.behaviour").write_text(f"assert Path({str(ended)!r}).exists(), 'two at once'")
        assert go()["a/seed-0"].finished


def test_cores_are_shared_out_among_the_processes(world, monkeypatch):
    runs, go = world
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    go(jobs=3)
    assert {line.split()[1] for line in (runs[0] / "calls").read_text().splitlines()} == {"2"}
