"""``distill compare`` as a user runs it: cells, a failure among them, going on, and what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distill.timings import Summary
from tests.test_run import TINY
from tests.test_wrong_recipes import ROOT
from tests.test_wrong_recipes import distill as distill_with_two_threads

SETTINGS = [item for item in TINY if not item.startswith(("arms.", "train.rounds", "train.trackers"))]
LOSSES = ["half=kl:weight=0.5"]
BROKEN = "broken=custom:target=tests.losses_of_users:breaks"


def distill(*arguments: str, folder: Path, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """One thread a cell: two cells run at a time."""
    return distill_with_two_threads(*arguments, folder=folder, settings=settings, threads=1)


def arguments(*losses: str, seeds: int = 2) -> list[str]:
    return ["compare", "quickstart", *(f"--loss={loss}" for loss in losses), f"--seeds={seeds}", "--jobs=2"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("compared")
    done = distill(*arguments(*LOSSES), "--gap-queries=10", folder=folder, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def home(folder: Path) -> Path:
    return folder / "runs" / "quickstart-compare"


def report(folder: Path) -> dict:
    return json.loads((home(folder) / "compare.json").read_text())


def weights(folder: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(home(folder))): path.read_bytes() for path in home(folder).rglob("student/*.safetensors")
    }
    assert found
    return found


def test_every_arm_and_seed_is_there_and_shares_candidates_and_teacher(compared: tuple[Path, str]) -> None:
    folder, said = compared
    arms = ["plain", "half"]
    assert sorted({path.split("/")[2] for path in weights(folder)}) == sorted(arms)
    assert len(weights(folder)) == 4
    assert len(set(weights(folder).values())) == 4
    for seed in (0, 1):
        run = home(folder) / f"seed-{seed}"
        assert len(list(run.rglob("candidates-1-i2t.npz"))) == 1, "one set of candidates for all arms of a seed"
        assert not (run / "teacher").exists()
    assert (folder / "runs" / "quickstart" / "teacher").is_dir(), "taught once"
    assert len(list((folder / "cache" / "scores").iterdir())) == 1, "one teacher, one store"
    for name in ("compare.html", "compare.md", "compare.json"):
        assert (home(folder) / name).stat().st_size > 500
    for arm in arms:
        assert arm in said
        assert arm in (home(folder) / "compare.md").read_text()
    spent = json.loads((home(folder) / "timings.json").read_text())["own"]
    assert max(spent, key=spent.__getitem__) == "cells"
    assert {"start", "check", "teach", "evaluate", "evaluate/embed", "report"} <= set(spent)
    assert "wall time by stage" in said
    own = [Summary.read(home(folder) / f"seed-{seed}").total for seed in (0, 1)]
    assert report(folder)["time"]["total"] == pytest.approx(sum(own))


def test_the_report_holds_the_figures_of_the_cells(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    found = report(folder)
    text = json.dumps(found)
    for arm in ("plain", "half"):
        values = [
            json.loads((home(folder) / f"seed-{seed}" / "evaluation" / arm / "metrics.json").read_text())["rsum"]
            for seed in (0, 1)
        ]
        assert repr(sum(values) / 2)[:8] in text, arm


def test_an_arm_is_what_distill_train_makes_of_it(compared: tuple[Path, str], tmp_path: Path) -> None:
    """The comparison's cells are ordinary runs: the same recipe by hand gives the same weights."""
    folder, _ = compared
    recipe = home(folder) / "seed-1" / "recipe.yaml"
    overrides = [f"runs={tmp_path / 'runs'}", f"cache={folder / 'cache'}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "distill",
            "train",
            str(recipe),
            "--arm",
            "half",
            *(f"--set={one}" for one in overrides),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    own = tmp_path / "runs" / "seed-1" / "arms" / "half" / "student" / "model.safetensors"
    assert own.read_bytes() == weights(folder)["seed-1/arms/half/student/model.safetensors"]


def test_another_loss_joins_and_nothing_is_trained_twice_though_one_cell_fails(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    before = weights(folder)
    stamps = {path: path.stat().st_mtime_ns for path in home(folder).rglob("student/*.safetensors")}
    done = distill(*arguments(*LOSSES, "hinge", BROKEN), "--gap-queries=10", folder=folder, settings=SETTINGS)
    assert done.returncode == 1, done.stderr
    assert "failed: broken, seed 0: " in done.stderr
    assert "a loss of the user's own fell over" in done.stderr
    after = weights(folder)
    assert set(after) - set(before) == {f"seed-{n}/arms/hinge/student/model.safetensors" for n in (0, 1)}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert "a loss of the user" in (home(folder) / "compare.html").read_text()
    fewer = distill(*arguments("hinge"), "--gap-queries=10", folder=folder, settings=SETTINGS)
    assert fewer.returncode == 0, fewer.stderr
    assert set(weights(folder)) == set(after), "what is not asked for stays"
    assert "| half" not in (home(folder) / "compare.md").read_text()  # but for the time that it once took


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again_it_ends_with_the_same_weights(
    compared: tuple[Path, str], tmp_path: Path, how: signal.Signals
) -> None:
    folder, _ = compared
    overrides = [f"--set={one}" for one in [*SETTINGS, f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", *arguments(*LOSSES), "--gap-queries=10", *overrides],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(home(tmp_path).glob("seed-0/arms/*/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, how)  # a terminal's Ctrl-C too reaches the command and its cells
    _, said = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no cell outlives the command
    done = distill(*arguments(*LOSSES), "--gap-queries=10", folder=tmp_path, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    whole = {path: content for path, content in weights(folder).items() if "hinge" not in path}
    found = weights(tmp_path)
    assert set(found) == set(whole)
    for path, content in whole.items():
        if "plain" in path:
            assert found[path] == content, path
            continue
        # seeds score at the same time: a score's last digits depend on which of them asks for a pair they share first
        ours, theirs = (safetensors.torch.load(one) for one in (found[path], content))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_what_is_no_cell_is_not_redone(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    done = distill(*arguments(*LOSSES), "--redo=nothing/0", folder=folder, settings=SETTINGS)
    assert done.returncode == 2
    assert "'nothing/0' is no cell" in done.stderr
