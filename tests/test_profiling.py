"""A look into a training's steps leaves a trace and tables, and changes nothing of what is computed."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distill import stopping
from distill.batches import Batches
from distill.profiling import Profiler, Window, _own_time, traced
from tests.test_stopping import untimed
from tests.test_train import SETTINGS, NoisyStudent, StoppedError, dying_at, run
from tests.test_wrong_recipes import distill

PHASES = ["wait for data", "loss", "to device", "encode", "backward", "clip", "optimizer", "checkpoint"]


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "a:b", "-1:5", "5:-1", "1.5:2", "3:4:5", "3 : 4", "٣:٤"])
def test_a_window_is_two_whole_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="--profile is START:COUNT, two whole numbers such as 20:5, got"):
        Window.parse(text)


@pytest.mark.parametrize(("text", "message"), [("0:5", "START must be at least 1"), ("5:0", "COUNT must be 1 to 100")])
def test_a_window_has_bounds(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window.parse(text)
    assert Window.parse("5:100") == Window(5, 100)


def test_a_bad_window_is_refused_before_any_work(tmp_path: Path) -> None:
    done = distill("run", "quickstart", "--profile", "0:5", folder=tmp_path)
    assert done.returncode == 2
    assert "error: --profile 0:5: START must be at least 1" in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing may be begun"


def recorded(folder: Path, steps: str) -> tuple[list[dict], list[str]]:
    """Events of the trace, and the lines beside it."""
    there = folder / "profile" / steps
    with gzip.open(there / "trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"], (there / "operators.txt").read_text().splitlines()


def test_the_trace_holds_the_steps_of_the_window_by_phase(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(tmp_path, profiler=Profiler(Window(4, 3)))
    events, lines = recorded(tmp_path, "steps-5-7")
    named = [event["name"] for event in events]
    assert sorted({name for name in named if name.startswith("ProfilerStep#")}) == [
        f"ProfilerStep#{n}" for n in (4, 5, 6)
    ]
    for phase in PHASES:  # a checkpoint is due after step 6, within the window
        assert named.count(f"step: {phase}") == (1 if phase == "checkpoint" else 3), phase
    assert "aten::mm" in named
    assert lines[0].endswith("steps 5 to 7: milliseconds a step by phase, wall clock of the training's own thread")
    table = {line[:20].strip(): [float(cell) for cell in line[20:].replace("%", "").split()] for line in lines[2:11]}
    assert list(table) == [*sorted(PHASES, key=list(table).index), "the rest of the step"]
    assert sum(share for _, share in table.values()) == pytest.approx(100, abs=0.5)
    assert all(ms >= 0 for ms, _ in table.values())
    whole = sum(event["dur"] for event in events if event["name"].startswith("ProfilerStep#")) / 3000
    assert sum(ms for ms, _ in table.values()) == pytest.approx(whole, rel=0.01)
    operators = lines[12:]
    assert operators[0].startswith("operators, self time a step on the CPU: 25 costliest of ")
    costs = [float(line.split()[-3]) for line in operators[2:]]
    assert len(costs) == 25
    assert costs == sorted(costs, reverse=True)
    assert not any("ProfilerStep" in line or "step: " in line for line in operators)
    assert f"trace of 3 of 3 steps asked for: {tmp_path}/profile/steps-5-7/trace.json.gz" in caplog.text
    assert "https://ui.perfetto.dev" in caplog.text


def test_a_phase_within_another_is_not_counted_twice(tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found, traced("outer"):
        time.sleep(0.02)
        with traced("inner"):
            time.sleep(0.05)
    own = _own_time(found.events())
    assert list(own) == ["outer", "inner"]
    assert 20_000 <= own["outer"] < 45_000
    assert own["inner"] >= 50_000


def test_while_nobody_records_a_range_is_nothing() -> None:
    assert traced("one") is traced("another")


def test_it_changes_no_bit_and_no_line_of_a_training_and_of_one_that_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    looked_into = run(tmp_path / "looked into", profiler=Profiler(Window(3, 4)))
    with dying_at(8):
        run(tmp_path / "cut", profiler=Profiler(Window(1, 2)))
    resumed = run(tmp_path / "cut", student=NoisyStudent(seed=5), profiler=Profiler(Window(1, 2)))
    for name, value in whole.state_dict().items():
        assert value.equal(looked_into.state_dict()[name]), name
        assert value.equal(resumed.state_dict()[name]), name
    for other in ("looked into", "cut"):
        assert untimed(tmp_path / other) == untimed(tmp_path / "whole")
    # numbered by the schedule: the second session went on after step 6
    assert sorted(path.name for path in (tmp_path / "cut" / "profile").iterdir()) == ["steps-2-3", "steps-8-9"]


def test_a_window_that_no_step_reaches_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, profiler=Profiler(Window(12, 2)))
    assert f"--profile 12:2: {tmp_path.name} ended after 12 steps, before the window" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_what_there_was_of_a_window_is_kept_at_the_end_and_at_a_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    run(tmp_path / "short", profiler=Profiler(Window(10, 5)))
    assert "trace of 2 of 5 steps asked for" in caplog.text
    assert recorded(tmp_path / "short", "steps-11-12")
    with dying_at(7):
        run(tmp_path / "died", profiler=Profiler(Window(5, 5)))
    assert recorded(tmp_path / "died", "steps-6-7")
    stop_in_step(7, monkeypatch)
    with stopping.listening(), pytest.raises(stopping.Stopped):
        run(tmp_path / "stopped", profiler=Profiler(Window(5, 5)))
    assert recorded(tmp_path / "stopped", "steps-6-7")


def stop_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batches.__getitem__

    def stopping_at(self: Batches, asked: int):
        if asked == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, asked)

    monkeypatch.setattr(Batches, "__getitem__", stopping_at)


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    run(tmp_path, profiler=Profiler(Window(2, 2)))
    assert "could not be written" in caplog.text
    assert len(untimed(tmp_path)) == 6


def test_with_workers_the_wait_is_there_too(tmp_path: Path) -> None:
    run(tmp_path, settings=replace(SETTINGS, workers=1), profiler=Profiler(Window(2, 2)))
    events, _ = recorded(tmp_path, "steps-3-4")
    assert [event["name"] for event in events].count("step: wait for data") == 2


def test_processes_that_do_not_write_record_nothing(tmp_path: Path) -> None:
    profiler = Profiler(Window(1, 1))
    with profiler.over(tmp_path, 0, writes=False) as step_done:
        for _ in range(3):
            step_done()
    assert (profiler.trainings, list(tmp_path.iterdir())) == (0, [])


def test_a_training_that_fails_fails_with_its_own_error(tmp_path: Path) -> None:
    profiler = Profiler(Window(2, 2))
    with pytest.raises(StoppedError), profiler.over(tmp_path, 0):
        raise StoppedError
