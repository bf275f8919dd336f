"""Stopped at drawn moments in every stage, again and again, a run ends bit-equal to the one that was never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_run import ARMS, TINY, begin, checkpoints, summary, units
from tests.test_wrong_recipes import distill

EACH_STEP = ["train.log_every=1", "train.trackers=[]"]
RUN = Path("runs") / "quickstart"


@dataclass(frozen=True)
class Stage:
    """When it has begun, and up to how long after that the run is stopped."""

    name: str
    begun: Callable[[Path], object]
    seconds: float


def staged(folder: Path, where: str) -> list[Path]:
    """What is being written there now."""
    return [path for path in (folder / where).glob(".partial-*") if path.is_dir()]


# in the order in which a run comes to them
STAGES = [
    Stage("embed", lambda folder: (folder / "cache/features").is_dir(), 0.2),
    Stage("teach", lambda folder: (folder / RUN / "teach").is_dir(), 0.5),
    Stage("train", lambda folder: checkpoints(folder, "shared") >= 3, 0.3),
    Stage("mine", lambda folder: (folder / RUN / "arms/plain/student").is_dir(), 0.5),
    Stage("score", lambda folder: units(folder) >= 1, 0.3),
    Stage("checkpoint", lambda folder: staged(folder, "runs/quickstart/arms/distilled/checkpoints"), 0.01),
    Stage("second round", lambda folder: checkpoints(folder, "arms/maps") >= 18, 0.3),
    Stage("evaluate", lambda folder: (folder / RUN / "arms/beside/student").is_dir(), 0.5),
]


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of every step, by part of the run."""
    return {
        str(path.parent.relative_to(folder / RUN)): [
            (line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines()) if "loss" in line
        ]
        for path in sorted((folder / RUN).rglob("metrics.jsonl"))
        if path.parent.name != "teach"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = distill("run", "quickstart", folder=folder, settings=[*TINY, *EACH_STEP])
    assert done.returncode == 0, done.stderr
    return folder


def stop_in(folder: Path, stage: Stage, draw: random.Random, how: signal.Signals, workers: int) -> None:
    process = begin(folder, *EACH_STEP, f"train.workers={workers}")
    deadline = time.monotonic() + 300
    while not stage.begun(folder):
        assert process.poll() is None, f"the run ended before {stage.name} was seen"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(draw.uniform(0, stage.seconds))
    process.send_signal(how)
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how], stage.name


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 2), (2, 0), (3, 2)])
def test_stopped_in_every_stage_it_ends_bit_equal(
    whole: Path, tmp_path: Path, how: signal.Signals, seed: int, workers: int
) -> None:
    draw = random.Random(seed)
    for stage in STAGES:
        stop_in(tmp_path, stage, draw, how, workers)
    settings = [*TINY, *EACH_STEP, f"train.workers={workers}"]
    done = distill("run", "quickstart", "--resume", folder=tmp_path, settings=settings)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(whole)
    assert len(losses(whole)["arms/distilled"]) >= 12
    assert summary(tmp_path) == summary(whole)
    for arm in ARMS:
        path = RUN / "arms" / arm / "student" / "model.safetensors"
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes(), arm
