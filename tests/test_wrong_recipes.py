"""Recipes that would fail later fail at once, with a message that says what to change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import ROOT as ROOT
from tests.forked import command

SMALL = ["data.train=60", "data.val=20", "data.test=20", "train.batch_size=16", "teach.batch_size=16"]


def distill(
    *arguments: str, folder: Path, settings: list[str] = SMALL, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a folder of the test's."""
    overrides = [f"--set={item}" for item in [*settings, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"]]
    search = arguments and arguments[0] in ("search", "compact")  # which read a run, not a recipe
    return command(*arguments, *([] if search else overrides), folder=folder, threads=threads)


ATTENTION = "arms={plain: {losses: [{name: contrastive}]}, a: {losses: [{name: attention}]}}"
READS_SCORES = "arms.distilled.losses=[{name: contrastive}, {name: kl}]"
RECOMPUTES = "train.gradient_checkpointing=true"
TOY_STUDENT = "student={kind: custom, target: 'tests.toys:ToyStudent'}"
MAPLESS = "teacher={kind: custom, target: 'tests.toys:ToyTeacher'}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=5"], "train.stepz: unknown key; did you mean steps?"),
        (["train.steps=many"], "train.steps: Input should be a valid integer"),
        ([READS_SCORES, "mine.k=500"], "mine.k (i2t):"),
        (["train.batch_size=1000"], "train.batch_size is 1000 but the training split has 120 pairs"),
        (
            [ATTENTION, MAPLESS, "teach=null"],
            "the attention loss reads the teacher's cross-attention, but ToyTeacher has no",
        ),
        ([ATTENTION, "train.micro_batch=8"], "train.micro_batch is 8: leave micro_batch out"),
        ([ATTENTION, "student.vision.patch_size=12"], "the teacher's image grid is (3, 3) and the student's (4, 4)"),
        ([MAPLESS], "ToyTeacher cannot be taught"),
        ([RECOMPUTES, "student.freeze=[image, text]"], "image tower (clip_vision_model) is frozen, text tower"),
        ([RECOMPUTES, TOY_STUDENT], "ToyStudent has no recompute_activations(): leave it out, or lower the memory by"),
        (["teacher.checkpoint=/no/such/folder", "teach=null"], "/no/such/folder"),
        (["data={source: manifest, file: /no/such.jsonl}"], "/no/such.jsonl"),
        (["data={source: karpathy, annotations: /no/such.json, images: /}"], "/no/such.json"),
        (["evaluate.split=dev"], "dev"),
        (
            ["arms.distilled.losses=[{name: cprd}]", "teacher.score_kind=cosine"],
            "cprd accepts candidates by their log-odds",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_within_ten_seconds(tmp_path: Path, overrides: list[str], message: str) -> None:
    began = time.monotonic()
    replaced = {item.split("=")[0].split(".")[0] for item in overrides if item.split("=")[0] == "data"}
    settings = [item for item in SMALL if item.split(".")[0] not in replaced]
    done = distill("run", "quickstart", folder=tmp_path, settings=[*settings, *overrides])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing may be begun"
    assert time.monotonic() - began < 60  # ten seconds on a free machine, which this one may not be


def test_compiling_without_a_compiler_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # read when torch is imported, so in a process that imports it
    options = [f"--set={one}" for one in [*SMALL, "train.compile=true", f"runs={tmp_path / 'runs'}"]]
    done = subprocess.run(
        [sys.executable, "-m", "distill", "run", "quickstart", *options, f"--set=cache={tmp_path / 'cache'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "train.compile: torch.compile cannot be used here: InvalidCxxCompiler: No working C++ comp" in done.stderr
    assert "install a C++ compiler (g++, or one that the variable CXX names), or leave train.compile out" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_is_neither_overwritten_nor_gone_on_with_under_another_recipe(tmp_path: Path) -> None:
    quick = ["train.steps=4", "teach.steps=2", "train.shared=0.5"]
    first = distill("mine", "quickstart", folder=tmp_path, settings=[*SMALL, *quick])
    assert first.returncode == 0, first.stderr
    again = distill("run", "quickstart", folder=tmp_path, settings=[*SMALL, *quick])
    assert again.returncode == 2
    assert "add --resume" in again.stderr
    other = distill("run", "quickstart", "--resume", folder=tmp_path, settings=[*SMALL, *quick, "train.lr=0.5"])
    assert other.returncode == 2
    assert "train.lr: was 0.002, now 0.5" in other.stderr


def test_search_in_what_is_no_run_says_what_was_expected(tmp_path: Path) -> None:
    done = distill("search", "nowhere", "a red ring", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere is not a run's folder" in done.stderr
