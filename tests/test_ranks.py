"""Two processes train as one: the same batches, candidates and losses, and the same weights up to rounding."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distill.sampler import share_of
from distill.timings import Summary
from tests.test_run import TINY
from tests.test_wrong_recipes import ROOT

SETTINGS = [
    *(item for item in TINY if not item.startswith(("arms.maps", "train.rounds"))),
    "arms.alone={losses: [{name: kl}]}",  # nothing in it trains the scale
]
ARMS = ("plain", "distilled", "beside", "alone")
RUN = Path("runs") / "quickstart"
LITTLE_MEMORY = ("train.micro_batch=5", "train.gradient_checkpointing=true")


def launch(
    folder: Path, count: int, *settings: str, module: str = "distill", environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """The run in so many processes, as a launcher starts them."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [f"--set={one}" for one in (*SETTINGS, *settings, f"runs={folder}/runs", f"cache={folder}/cache")]
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, "run", "quickstart", "--resume", *overrides],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **(environment or {}),
                **several,
                **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What each said on stderr."""
    said = [process.communicate(timeout=300) for process in processes]
    errors = [err for _, err in said]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(errors)[-6000:]
    return errors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {count: tmp_path_factory.mktemp(f"by-{count}") for count in (1, 2)}
    for count, folder in folders.items():
        said = ended(launch(folder, count))
        if count == 2:
            assert "summary: " in said[0]
            assert said[1].strip() == "", "the second process has no log"
    return folders


def lines(folder: Path, part: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / RUN / part / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.mark.parametrize("part", ["shared", *(f"arms/{arm}" for arm in ARMS)])
def test_losses_are_equal(runs: dict[int, Path], part: str) -> None:
    one, two = lines(runs[1], part), lines(runs[2], part)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert len(one) >= 3
    for ours, theirs in zip(two, one, strict=True):
        for name in theirs:
            if name.startswith("loss") or name in ("scale", "grad_norm"):
                # the learned map of logit_mse is stepped by Adam, which makes of a gradient's rounding a whole step
                close = 1e-3 if name == "loss/logit_mse" else 1e-5
                assert ours[name] == pytest.approx(theirs[name], rel=close, abs=1e-5), (theirs["step"], name)


def test_candidates_are_the_same_and_no_pair_was_scored_twice(runs: dict[int, Path]) -> None:
    for direction in ("i2t", "t2i"):
        one, two = (np.load(runs[n] / RUN / "shared" / f"candidates-1-{direction}.npz") for n in (1, 2))
        assert np.array_equal(one["query_ids"], two["query_ids"])
        assert np.array_equal(one["item_ids"], two["item_ids"])
    said: list[dict[str, float]] = []
    for count in (1, 2):
        metrics = (runs[count] / RUN / "arms/distilled/metrics.jsonl").read_text().splitlines()
        of_rounds = [line for line in map(json.loads, metrics) if "round" in line]
        said.append({name: value for line in of_rounds for name, value in line.items()})
    assert said[0] == pytest.approx(said[1], rel=1e-4)
    assert said[0]["candidates/above_match/i2t"] > 0
    assert said[0]["teacher/asked"] > 0
    counted = [{name: Summary.read(runs[n] / RUN).counted(name) for name in ("asked", "served")} for n in (1, 2)]
    assert counted[0] == counted[1]
    assert counted[0]["served"] > 0


def test_weights_are_equal_up_to_rounding(runs: dict[int, Path]) -> None:
    for arm in ARMS:
        path = RUN / "arms" / arm / "student" / "model.safetensors"
        one, two = (safetensors.torch.load_file(runs[n] / path) for n in (1, 2))
        for name, tensor in one.items():
            if name.endswith("k_proj.bias"):  # no softmax sees it: its gradient is rounding, and Adam steps by the sign
                continue
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5, msg=f"{arm}: {name}")


def test_in_pieces_and_recomputing_they_are_equal_too_and_a_signal_to_one_stops_both(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    processes = launch(tmp_path, 2, *LITTLE_MEMORY)
    checkpoints = tmp_path / RUN / "arms" / "distilled" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")):
        assert processes[0].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes, code=143)
    assert "stopped by SIGTERM" in said[0]
    assert "the image tower computes its activations anew" in said[0]
    ended(launch(tmp_path, 2, *LITTLE_MEMORY))
    for part in ("shared", "arms/distilled", "arms/beside"):
        one, two = lines(runs[1], part), lines(tmp_path, part)
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for ours, theirs in zip(two, one, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5), (part, theirs["step"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in_batch", "memory"])
def test_other_kinds_of_candidates_are_the_same_too(tmp_path: Path, kind: str) -> None:
    own = [f"train.candidates={kind}", "train.group=4", "train.rounds=2"]
    for count in (1, 2):
        ended(launch(tmp_path / str(count), count, *own))
    for part in ("arms/distilled", "arms/alone"):
        one, two = (lines(tmp_path / str(count), part) for count in (1, 2))
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for ours, theirs in zip(two, one, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5), (part, theirs["step"])
    for direction in ("i2t", "t2i"):
        path = RUN / "arms" / "distilled" / f"candidates-2-{direction}.npz"
        one, two = (np.load(tmp_path / str(count) / path) for count in (1, 2))
        assert np.array_equal(one["item_ids"], two["item_ids"])


def test_a_comparison_under_a_launcher_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill", "compare", "quickstart", *(f"--set={one}" for one in SETTINGS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "compare starts its own processes" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [0, 1, 7, 12])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_cover_everything_once_and_are_even(n: int, count: int) -> None:
    shares = [share_of(n, index, count) for index in range(count)]
    assert [row for share in shares for row in range(n)[share]] == list(range(n))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
