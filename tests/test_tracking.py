"""Trackers hold every logged step once and in order, however often a training was killed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_train import NoisyStudent, dying_at, lines, run
from tests.test_wrong_recipes import SMALL, distill


def tracking(folder: Path) -> Accelerator:
    """Of one session, as an experiment makes it."""
    made = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    made.init_trackers("events")
    return made


def told(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of all event files in the order in which they were written."""
    found = EventAccumulator(str(folder / "events"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_event_files_hold_the_values_of_the_log(tmp_path: Path) -> None:
    run(tmp_path / "arm", accelerator=tracking(tmp_path))
    logged = lines(tmp_path / "arm")
    for key in set(logged[0]) - {"step"}:
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in logged]
        assert told(tmp_path, f"arm/{key}") == expected, key


def test_a_step_that_is_run_again_is_told_once(tmp_path: Path) -> None:
    run(tmp_path / "whole", accelerator=tracking(tmp_path / "of whole"))
    with dying_at(8):  # the checkpoint before it is that of step 6, and step 8 was told
        run(tmp_path / "cut", accelerator=tracking(tmp_path / "of cut"))
    assert [step for step, _ in told(tmp_path / "of cut", "cut/loss")] == [2, 4, 6, 8]
    with dying_at(7):  # before step 8 is told again
        run(tmp_path / "cut", student=NoisyStudent(seed=5), accelerator=tracking(tmp_path / "of cut"))
    run(tmp_path / "cut", student=NoisyStudent(seed=5), accelerator=tracking(tmp_path / "of cut"))
    assert told(tmp_path / "of cut", "cut/loss") == told(tmp_path / "of whole", "whole/loss")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12]


class Listening(GeneralTracker):
    """Keeps what it is told."""

    name = "listening"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict]] = []

    @property
    def tracker(self) -> list:
        return self.told

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        pass

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.told.append((step, values))


def test_any_tracker_gets_names_with_the_training_in_front(tmp_path: Path) -> None:
    listening = Listening()
    accelerator = Accelerator(cpu=True, log_with=listening)
    accelerator.init_trackers("trial")
    run(tmp_path / "arm", accelerator=accelerator)
    assert [step for step, _ in listening.told] == [2, 4, 6, 8, 10, 12]
    for (_, values), line in zip(listening.told, lines(tmp_path / "arm"), strict=True):
        assert values == {f"arm/{key}": value for key, value in line.items() if key != "step"}


class OneCount(Listening):
    """Like W&B: one count of steps for everything, and names may have a step of their own."""

    name = "wandb"

    def define_metric(self, names: str, *, step_metric: str) -> None:
        self.told.append((None, {names: step_metric}))

    @property
    def tracker(self) -> OneCount:
        return self


def test_a_tracker_with_one_count_of_steps_is_told_the_trainings_own(tmp_path: Path) -> None:
    listening = OneCount()
    accelerator = Accelerator(cpu=True, log_with=listening)
    accelerator.init_trackers("trial")
    for name in ("first", "second"):  # whose steps begin anew
        run(tmp_path / name, accelerator=accelerator)
    assert all(step is None for step, _ in listening.told)
    for name in ("first", "second"):
        assert {f"{name}/*": f"{name}/step"} in [values for _, values in listening.told]
        own = [values for _, values in listening.told if f"{name}/loss" in values]
        assert [values[f"{name}/step"] for values in own] == [2, 4, 6, 8, 10, 12]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    done = distill("run", "quickstart", folder=tmp_path, settings=[*SMALL, "train.trackers=[wandb]"])
    assert done.returncode == 2
    assert "train.trackers: wandb cannot be imported: pip install wandb" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_refused_leaves_no_event_files(tmp_path: Path) -> None:
    done = distill(
        "run", "quickstart", folder=tmp_path, settings=[*SMALL, "train.trackers=[tensorboard]", "train.batch_size=1000"]
    )
    assert done.returncode == 2
    assert not (tmp_path / "runs").exists()


def test_without_trackers_nothing_is_kept_about_them(tmp_path: Path) -> None:
    with dying_at(8):
        run(tmp_path)
    run(tmp_path)
    assert not (tmp_path / "tracked.json").exists()
