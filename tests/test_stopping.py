"""What SIGTERM and SIGINT do: end at once, or after what is in hand where that was asked for."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distill import stopping
from distill.batches import Batches
from distill.checkpoint import latest_checkpoint, step_of
from tests.test_train import SETTINGS, NoisyStudent, dying_at, lines, run


@pytest.fixture(autouse=True)
def _listening():
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    with stopping.listening():
        yield
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_did_not_ask_for_time(number, code):
    with pytest.raises(stopping.Stopped, match=number.name) as stopped:
        signal.raise_signal(number)
    assert stopped.value.exit_code == code
    assert not isinstance(stopped.value, Exception)


def test_what_is_in_hand_is_finished_and_then_the_signal_counts():
    done = []

    def work():
        with stopping.finishing():
            for part in range(5):
                if part == 2:
                    signal.raise_signal(signal.SIGTERM)
                done.append(part)
                assert stopping.told() == (signal.SIGTERM if part == 2 else 0)
                stopping.heed()

    with pytest.raises(stopping.Stopped):
        work()
    assert done == [0, 1, 2]


def test_at_the_end_of_the_block_it_counts_at_the_latest():
    done = []

    def work():
        with stopping.finishing():
            signal.raise_signal(signal.SIGINT)
            done.append("inside")
        done.append("outside")

    with pytest.raises(stopping.Stopped):
        work()
    assert done == ["inside"]


def test_the_same_signal_again_ends_at_once_and_another_one_is_the_same_request(monkeypatch):
    done = []

    def work():
        with stopping.finishing():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # of the comparison whose terminal sent the first
            signal.raise_signal(signal.SIGINT)  # once to the group, once passed on
            done.append("still at work")
            monkeypatch.setattr(stopping, "PAUSE_S", 0.0)  # as if time had passed
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")

    with pytest.raises(stopping.Stopped) as stopped:
        work()
    assert done == ["still at work"]
    assert stopped.value.number == signal.SIGINT


def test_a_worker_dies_of_sigterm_and_leaves_sigint_to_its_parent():
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def untimed(folder: Path) -> list[dict[str, float]]:
    timed = {"items_per_second", "waiting_share"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(folder)]


def test_a_training_that_is_told_to_stop_keeps_its_step_and_ends_as_the_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    original = Batches.__getitem__

    def stopping_at(self: Batches, step: int):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(Batches, "__getitem__", stopping_at)
    with pytest.raises(stopping.Stopped):
        run(tmp_path / "cut")
    monkeypatch.undo()
    found = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert found is not None
    assert step_of(found) == 8  # neither a multiple of checkpoint_every nor lost
    with stopping.listening():  # another process
        resumed = run(tmp_path / "cut", student=NoisyStudent(seed=5))
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


def test_lines_of_the_log_do_not_depend_on_where_a_training_died(tmp_path: Path) -> None:
    """A checkpoint between two lines: the next line averages the steps before it too."""
    settings = replace(SETTINGS, log_every=5, checkpoint_every=3)
    run(tmp_path / "whole", settings=settings)
    with dying_at(8):
        run(tmp_path / "cut", settings=settings)
    run(tmp_path / "cut", student=NoisyStudent(seed=5), settings=settings)
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [5, 10]


def test_what_ends_the_caller_ends_the_work_of_a_thread_of_its_own():
    begun, ended = threading.Event(), []

    def work() -> None:
        try:
            begun.set()
            while True:
                time.sleep(0.01)
        finally:
            ended.append(threading.current_thread())

    def tell() -> None:
        begun.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    began = time.monotonic()
    with pytest.raises(stopping.Stopped), stopping.listening():
        stopping.in_thread_of_its_own(work)
    teller.join()
    assert time.monotonic() - began < 10
    assert len(ended) == 1
    assert not ended[0].is_alive()


def test_what_the_work_of_a_thread_of_its_own_gives_or_raises_is_the_callers():
    assert stopping.in_thread_of_its_own(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        stopping.in_thread_of_its_own(lambda: 1 / 0)
