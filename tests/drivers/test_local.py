"""Worker processes on this machine and the tasks of a job array: the units of one process, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.driver_commands import Asking
from distill.drivers.driver import DriverError, HandedOver
from distill.drivers.local import LocalDriver, environment
from distill.drivers.slurm import SlurmDriver
from tests.drivers.noting import experiment, kill_one_amid_a_call, notes, once, pairs, units, until, workers_at_work
from tests.test_wrong_recipes import ROOT

IN_HAND = 2 * 60 + 2 * 15  # pairs of two units at most, whose cuts may be moved by a quarter
SLOW_S = 0.3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Scores and units as one process makes them."""
    x = experiment(tmp_path_factory.mktemp("whole"))
    return x.ask(*pairs(x)), units(x)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_killed_worker_is_noticed_and_its_units_are_done_again(tmp_path, whole, caplog):
    (tmp_path / "slow").touch()
    x = experiment(tmp_path, seconds=SLOW_S)
    x.elsewhere = Asking(x, LocalDriver(2, threads=1))
    thread = once(lambda: len(units(x)) >= 1, lambda: kill_one_amid_a_call(tmp_path))
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(x.ask(*pairs(x)), whole[0])
    thread.join()
    assert units(x) == whole[1]
    asked = notes(tmp_path)
    assert len(asked) == 900
    assert 0 < asked.total() - 900 <= IN_HAND
    assert "died (SIGKILL)" in caplog.text
    assert "0 of 15 units are there, 15 with 900 pairs to go" in caplog.text


def test_the_tasks_of_a_job_array_run_in_a_shell_make_the_units_of_one_process(tmp_path, whole):
    x = experiment(tmp_path)
    x.elsewhere = Asking(x, SlurmDriver(2))
    with pytest.raises(HandedOver) as handed:
        x.ask(*pairs(x))
    (script,) = (tmp_path / "cache" / "plans").glob("*.sbatch")
    assert f"sbatch {script}" in str(handed.value)
    text = script.read_text()
    for line in ("--array=0-1", "--requeue", "--signal=B:TERM@120", "--cpus-per-task=1"):
        assert f"#SBATCH {line}\n" in text
    assert list((tmp_path / "cache" / "plans").glob("logs-*"))
    tasks = [
        subprocess.Popen(
            ["bash", str(script)],
            cwd="/",
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "share 0/2: 8 units with" in said[0]
    assert units(x) == whole[1]
    assert set(notes(tmp_path).values()) == {1}
    np.testing.assert_array_equal(experiment(tmp_path).ask(*pairs(x)), whole[0])
    unnumbered = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert unnumbered.returncode != 0
    assert "number of the task, from 0" in unnumbered.stderr


@pytest.mark.slow
def test_a_task_that_is_told_to_stop_ends_after_the_unit_in_hand_and_goes_on_when_it_is_run_again(tmp_path, whole):
    (tmp_path / "slow").touch()
    x = experiment(tmp_path, seconds=SLOW_S)
    x.elsewhere = Asking(x, SlurmDriver(1))
    with pytest.raises(HandedOver):
        x.ask(*pairs(x))
    (script,) = (tmp_path / "cache" / "plans").glob("*.sbatch")
    environ = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
    task = subprocess.Popen(["bash", str(script)], env=environ, stderr=subprocess.PIPE, text=True)
    until(lambda: len(units(x)) >= 2)
    task.send_signal(signal.SIGTERM)
    said = task.communicate(timeout=60)[1]
    assert task.returncode == 143, said
    assert "the same command goes on" in said
    (tmp_path / "slow").unlink()
    assert subprocess.run(["bash", str(script)], env=environ, check=False).returncode == 0
    assert units(x) == whole[1]
    assert set(notes(tmp_path).values()) == {1}


def test_gpus_and_threads_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    monkeypatch.setenv("WORLD_SIZE", "4")
    seen = [environment(number, threads=3, gpus=None) for number in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["2", "3", "5", "2"]
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"3"}
    assert "WORLD_SIZE" not in seen[0]
    halves = [environment(number, threads=1, gpus=0.5)["CUDA_VISIBLE_DEVICES"] for number in range(4)]
    assert halves == ["2", "2", "3", "3"]
    assert environment(1, threads=1, gpus=2)["CUDA_VISIBLE_DEVICES"] == "5,2"
    assert environment(1, threads=1, gpus=0)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment(0, threads=1, gpus=None)["CUDA_VISIBLE_DEVICES"] == ""


# ---- a driver in a process of its own, which something happens to

_DRIVE = """
import sys
from pathlib import Path
from distill import stopping
from distill.driver_commands import Asking, driver_of
from tests.drivers.noting import experiment, pairs
folder, seconds, driver = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
x = experiment(folder, seconds=seconds)
x.elsewhere = Asking(x, driver_of(driver, "2", gpus=None, threads=1, address=""))
try:
    with stopping.listening():
        x.ask(*pairs(x))
except stopping.Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def driving(folder: Path, *, seconds: float = SLOW_S, driver: str = "local") -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "said").open("ab") as said:  # no pipe, which what outlives it would hold open
        return subprocess.Popen(
            [sys.executable, "-c", _DRIVE, str(folder), str(seconds), driver],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def ended(process: subprocess.Popen[bytes], folder: Path, seconds: float = 200) -> None:
    assert process.wait(timeout=seconds) == 0, (folder / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_stopped_leaves_no_worker_and_the_same_command_goes_on(tmp_path, whole, how):
    (tmp_path / "slow").touch()
    x = experiment(tmp_path, seconds=SLOW_S)
    process = driving(tmp_path)
    until(lambda: len(units(x)) >= 2)
    process.send_signal(how)
    assert process.wait(timeout=60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    if how == signal.SIGKILL:
        again = driving(tmp_path)  # at once, beside workers that have not noticed yet
    else:
        until(lambda: not any(alive(pid) for pid in workers_at_work(tmp_path)), 1)
        again = driving(tmp_path)
    ended(again, tmp_path)
    until(lambda: not any(alive(pid) for pid in workers_at_work(tmp_path)), 10)
    assert units(x) == whole[1]
    asked = notes(tmp_path)
    assert len(asked) == 900
    assert asked.total() - 900 <= IN_HAND


def alive(pid: int) -> bool:
    try:
        return b"\0work\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_two_drivers_at_once_on_one_plan_end_with_one_right_store(tmp_path, whole):
    both = [driving(tmp_path, seconds=0) for _ in range(2)]
    for process in both:
        ended(process, tmp_path)
    x = experiment(tmp_path)
    assert units(x) == whole[1]
    assert set(notes(tmp_path).values()) == {1}


@pytest.mark.slow
def test_what_a_worker_cannot_mend_is_said_once_and_ends_all(tmp_path):
    x = experiment(tmp_path, bad=3)
    x.elsewhere = Asking(x, LocalDriver(2, threads=1))
    with pytest.raises(DriverError, match=r"scores that are not finite.*\n.*goes on"):
        x.ask(*pairs(x))
    assert not any(alive(pid) for pid in workers_at_work(tmp_path))


@pytest.mark.slow
def test_workers_that_all_die_are_started_again_a_few_times_and_their_last_words_are_said(tmp_path, caplog):
    x = experiment(tmp_path, dies=True)
    x.elsewhere = Asking(x, LocalDriver(1, threads=1))
    with pytest.raises(DriverError, match="every worker died, the last one by SIGKILL, and 3 were started again"):
        x.ask(*pairs(x))
    assert caplog.text.count("died (SIGKILL)") == 4
    assert not units(x)
