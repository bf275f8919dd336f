"""Candidates that a second process mines while training goes on: the same whichever is faster, killed or failing."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import ahead
from distill.checkpoint import load_weights
from distill.experiment import Experiment
from distill.mined import Round, candidates, kept
from distill.pipeline import trained_arm
from distill.protocols import DIRECTIONS
from distill.recipe.load import RecipeError, load_recipe
from tests.test_groups import RUN, experiment
from tests.test_remining import rounds_of

ARM = "distilled"


class Failing(subprocess.Popen[bytes]):
    """A second process that ends at once and has done nothing."""

    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__(["false"], **options)


class Sleeping(subprocess.Popen[bytes]):
    """One that is at work still when the training that waits for it dies."""

    last: Sleeping | None = None

    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__(["sleep", "60"], **options)
        Sleeping.last, self.died = self, False

    def wait(self, timeout: float | None = None) -> int:
        if not self.died:
            self.died = True
            raise RuntimeError("the end")
        return super().wait(timeout)


def weights(x: Experiment) -> bytes:
    return (trained_arm(x, ARM) / "model.safetensors").read_bytes()


def test_it_mines_with_the_student_of_the_step_and_scores_before_the_round_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "forget_snapshot", lambda of: None)  # it is looked at below
    x = experiment(tmp_path, "train.candidates=encode", "mine.ahead=4")  # rounds of 7 steps from 10 on
    made = weights(x)
    folder = x.folder / "arms" / ARM
    _, second = rounds_of(folder)
    assert second["teacher/asked"] == 0  # it was asked while training went on
    assert second["teacher/asked_ahead"] > 0
    assert "pairs asked" in (folder / "ahead-2.log").read_text()
    student = x.fresh_student()
    load_weights(ahead.snapshot(Round(2, folder)), student)
    found = candidates(x, Round(9, tmp_path), student=student)
    for direction in DIRECTIONS:
        assert np.array_equal(found[direction].item_ids, kept(Round(2, folder))[direction].item_ids)
    assert not (folder / "ahead-2.yaml").exists()  # what the second process reads goes with it
    other = experiment(tmp_path / "other", "train.candidates=encode")
    assert weights(other) != made  # mined by the student of the round's end


@pytest.mark.slow
def test_where_the_second_process_fails_or_all_die_the_training_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = ["train.candidates=in_batch", "mine.ahead=3"]
    whole = weights(experiment(tmp_path / "whole", *own))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(ahead.subprocess, "Popen", Failing)
        assert weights(experiment(tmp_path / "failing", *own)) == whole
    assert "ended with exit code 1" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(ahead.subprocess, "Popen", Sleeping)
        with pytest.raises(RuntimeError, match="the end"):
            weights(experiment(tmp_path / "died", *own))
    assert Sleeping.last is not None
    assert Sleeping.last.poll() is not None  # it was not left behind
    died = experiment(tmp_path / "died", *own)
    assert weights(died) == whole
    assert not list((died.folder / "arms" / ARM).glob("miner-*"))


def test_a_training_of_one_round_has_nothing_to_mine_ahead_for() -> None:
    with pytest.raises(RecipeError, match=r"mine\.ahead is for rounds after the first"):
        load_recipe("quickstart", [*RUN, "train.rounds=1", "mine.ahead=5"])
