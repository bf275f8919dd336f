"""The whole job on made pictures: what it leaves behind, and that a killed run ends as the one that was not killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from tests.test_wrong_recipes import ROOT, distill

KEYS = {"i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum"}
TINY = [
    "data.train=120",
    "data.val=20",
    "data.test=24",
    "train.batch_size=16",
    "teach.batch_size=16",
    "teach.steps=6",
    "train.steps=24",
    "train.shared=0.4",
    "train.rounds=2",
    "train.checkpoint_every=3",
    "train.log_every=3",
    "mine.k=6",
    "evaluate.rerank=8",
    "score.pairs_per_unit=200",
    "train.trackers=[tensorboard]",
    "teacher.vision.layers=1",
    "teacher.text.layers=1",
    "student.vision.layers=1",
    "student.text.layers=1",
    "arms.distilled={losses: [{name: contrastive}, {name: kl, teacher_temperature: 2.0}]}",
    "arms.maps={losses: [{name: contrastive}, {name: cprd}, {name: margin_mse, weight: 0.01}, {name: attention}]}",
    "arms.beside={losses: [{name: contrastive}, {name: momentum, queue: 40, decay: 0.9}, {name: affinity},"
    " {name: embedding_match}, {name: logit_mse, affine: learned, weight: 0.01}]}",
    "student.projection_dim=64",
]
ARMS = ("plain", "distilled", "maps", "beside")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = distill("run", "quickstart", folder=folder, settings=TINY)
    assert done.returncode == 0, done.stderr
    return folder


def summary(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "runs" / "quickstart" / "summary.json").read_text())


def test_the_summary_holds_every_figure_in_percent(whole: Path) -> None:
    found = summary(whole)
    assert set(found) == {"teacher", *ARMS}
    for name, figures in found.items():
        assert set(figures) >= KEYS, name
        parts = [figures[key] for key in KEYS - {"rsum"}]
        assert all(0 <= part <= 100 for part in parts)
        assert figures["rsum"] == pytest.approx(sum(parts))
        assert figures["t2i_r1"] <= figures["t2i_r5"] <= figures["t2i_r10"]
    noted = json.loads((whole / "runs" / "quickstart" / "teacher.json").read_text())
    assert noted["score_kind"] == "log_odds"
    assert (whole / "cache" / "scores" / noted["identity"]).is_dir()


def test_arms_differ_and_each_logs_its_own_parts(whole: Path) -> None:
    run = whole / "runs" / "quickstart"
    parts = {}
    for arm in ARMS:
        lines = [line for line in logged(run, arm) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(12, 25, 3))
        parts[arm] = {key for key in lines[-1] if key.startswith("loss/")}
    assert parts["plain"] == {"loss/contrastive"}
    assert parts["maps"] == {"loss/contrastive", "loss/cprd", "loss/margin_mse", "loss/attention"}
    beside = ("contrastive", "momentum", "affinity", "embedding_match", "logit_mse")
    assert parts["beside"] == {f"loss/{name}" for name in beside}
    weights = [(run / "arms" / arm / "student" / "model.safetensors").read_bytes() for arm in parts]
    assert len(set(weights)) == 4


def test_a_later_round_asks_the_teacher_only_for_pairs_that_no_round_asked_before(whole: Path) -> None:
    run = whole / "runs" / "quickstart"
    first, second = (line for line in logged(run, "distilled") if "teacher/asked" in line)
    assert (first["round"], second["round"]) == (1, 2)
    assert first["teacher/asked"] > 0
    assert second["teacher/asked"] < first["teacher/asked"]
    assert second["teacher/served_from_store"] >= 120 * 2  # the labelled pairs at least
    other, _ = (line for line in logged(run, "maps") if "teacher/asked" in line)
    total = first["teacher/asked"] + first["teacher/served_from_store"]
    assert (other["teacher/asked"], other["teacher/served_from_store"]) == (0, total)  # the arms share a round


def logged(run: Path, arm: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "arms" / arm / "metrics.jsonl").read_text().splitlines()]


def test_trackers_get_what_the_log_gets(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(whole / "runs" / "quickstart" / "cross2dual"))
    found.Reload()
    lines = logged(whole / "runs/quickstart", "plain")
    values = [(event.step, event.value) for event in found.Scalars("plain/loss")]
    assert values == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]


def test_the_picture_is_there_and_has_content(whole: Path) -> None:
    with PIL.Image.open(whole / "runs" / "quickstart" / "retrieval.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_a_second_run_does_no_work_again_and_says_the_same(whole: Path) -> None:
    before = summary(whole)
    done = distill("run", "quickstart", "--resume", folder=whole, settings=TINY)
    assert done.returncode == 0, done.stderr
    assert summary(whole) == before
    for phase in ("train ", "teach", "scoring"):
        assert f"{phase}:" not in done.stderr, "a finished stage was run again"


def test_search_answers_text_and_picture_and_writes_the_sheet(whole: Path) -> None:
    run = str(whole / "runs" / "quickstart")
    text = distill("search", run, "a small red ring left of a large blue square", "-k", "3", folder=whole)
    assert text.returncode == 0, text.stderr
    assert text.stdout.splitlines()[0].startswith("1  ")
    assert (whole / "runs" / "quickstart" / "search.png").is_file()
    picture = whole / "query.png"
    PIL.Image.new("RGB", (48, 48), "white").save(picture)
    found = distill("search", run, str(picture), "--arm", "plain", "--out", str(whole / "out.png"), folder=whole)
    assert found.returncode == 0, found.stderr
    assert (whole / "out.png").is_file()
    missing = distill("search", run, "nothing.jpg", folder=whole)
    assert missing.returncode == 2
    assert "no such file" in missing.stderr


def begin(folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    overrides = [f"--set={item}" for item in [*TINY, *settings, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"]]
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "run", "quickstart", "--resume", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop_when(folder: Path, reached: Callable[[Path], bool], how: signal.Signals, *settings: str) -> None:
    process = begin(folder, *settings)
    try:
        deadline = time.monotonic() + 300
        while not reached(folder):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(how)
        code = process.wait(timeout=60)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]


def units(folder: Path) -> int:
    return len(list((folder / "cache" / "scores").glob("*/*/unit-*.parquet")))


def checkpoints(folder: Path, arm: str) -> int:
    found = sorted((folder / "runs" / "quickstart" / arm / "checkpoints").glob("step-*"))
    return int(found[-1].name[5:]) if found else 0


def test_stopped_in_teaching_scoring_and_training_it_ends_with_the_same_figures(whole: Path, tmp_path: Path) -> None:
    teach = tmp_path / "runs" / "quickstart" / "teach"
    stop_when(tmp_path, lambda _: teach.is_dir(), signal.SIGKILL)
    stop_when(tmp_path, lambda folder: units(folder) >= 2, signal.SIGTERM)
    half = units(tmp_path)
    assert not (tmp_path / "runs" / "quickstart" / "arms" / "distilled" / "student").exists()
    stop_when(tmp_path, lambda folder: checkpoints(folder, "arms/distilled") >= 9, signal.SIGKILL)
    assert units(tmp_path) > half
    stop_when(tmp_path, lambda folder: checkpoints(folder, "arms/maps") >= 18, signal.SIGTERM)
    stop_when(tmp_path, lambda folder: checkpoints(folder, "arms/beside") >= 15, signal.SIGINT)
    done = distill("run", "quickstart", "--resume", folder=tmp_path, settings=TINY)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path) == summary(whole)
    for arm in ARMS:
        path = Path("runs/quickstart/arms") / arm / "student" / "model.safetensors"
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes(), arm
