"""``distill plan`` on a tiny run: measured for real, saved, planned with elsewhere, and held beside the run's clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.planning.measured import Measured
from distill.timings import Summary

TINY = [
    "data={source: scenes, train: 60, val: 8, test: 20, size: 48, captions_per_image: 2}",
    "arms={plain: {losses: [{name: contrastive}]}, kl: {losses: [{name: contrastive}, {name: kl}]}, "
    "attention: {losses: [{name: contrastive}, {name: attention}]}, "
    "match: {losses: [{name: contrastive}, {name: embedding_match}]}}",
    "teach.steps=3",
    "teach.batch_size=16",
    "train.steps=6",
    "train.shared=0.4",
    "train.rounds=2",
    "train.batch_size=16",
    "mine.k=8",
    "evaluate.rerank=8",
    "device=cpu",
]


def plan(*more: str, recipe: str = "quickstart") -> str:
    result = CliRunner().invoke(app, ["plan", recipe, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    given = [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"]
    return [word for item in given for word in ("--set", item)]


@pytest.fixture(scope="module")
def saved(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "measured.json"
    plan("--seconds", "1", "--save", str(path), *settings)
    return path


@pytest.fixture(scope="module")
def run(saved: Path, settings: list[str]) -> Path:
    result = CliRunner().invoke(app, ["run", "quickstart", *settings], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Path(settings[-3].partition("=")[2]) / "quickstart"


def test_measuring_leaves_neither_a_run_nor_a_cache(saved: Path, settings: list[str]) -> None:
    runs = Path(settings[-3].partition("=")[2])
    assert Measured.load(saved).seconds > 0
    assert not runs.exists() or not list(runs.rglob("*.json"))


def test_everything_was_measured(saved: Path) -> None:
    found = Measured.load(saved)
    teacher = found.teachers[0]
    for each in (teacher.image, teacher.text, teacher.pair, teacher.map, found.embedding.image, found.index.build):
        assert each is not None
        assert each.high > 0
    assert teacher.vector is not None
    assert found.teaching is not None
    assert found.teaching.step.low > 0
    assert found.training.base.mid + found.training.image.mid + found.training.text.mid > 0
    assert set(found.training.loss) | set(found.training.fixed) == {"plain", "kl", "attention", "match"}
    assert {(source.side, source.kind) for source in found.sources} == {("image", "prepared"), ("text", "prepared")}
    assert 4 < found.store.unit_bytes < 100
    assert found.machine.device == "cpu"


def test_a_plan_has_the_stages_of_the_run_and_no_others(saved: Path, settings: list[str], run: Path) -> None:
    made = json.loads(plan("--measured", str(saved), "--against", str(run), "--json", *settings))
    beside = {row["name"]: row for row in made["against"]["stages"]}
    assert {stage["name"] for stage in made["stages"]} == beside.keys()
    for name, row in beside.items():
        assert row["predicted"][1] > 0, name
        assert row["measured"] > 0, name
    whole = made["against"]["whole"]
    assert whole["measured"] == pytest.approx(Summary.read(run).total)
    assert whole["measured"] == pytest.approx(sum(row["measured"] for row in beside.values()))


def test_the_pairs_that_the_run_asked_lie_within_the_plan(saved: Path, settings: list[str], run: Path) -> None:
    made = json.loads(plan("--measured", str(saved), "--against", str(run), "--json", *settings))
    (low, _, high), counted = made["against"]["asked"]
    assert counted == Summary.read(run).counted("asked")
    assert 0.5 * low <= counted <= high  # 60 pictures: what two rounds mine overlaps more than it would among many


def test_the_page_says_what_was_only_planned(saved: Path, settings: list[str]) -> None:
    here = plan("--measured", str(saved), *settings)
    wish = ["--images", "1e8", "--gpu", "h200", "--rate", "3.5", "--budget", "1000"]
    away = plan("--measured", str(saved), *wish, *settings)
    assert "planned, not measured" not in here
    assert "100,000,000 training images" in away
    assert "planned, not measured: there is no H200 SXM here" in away
    assert "budget: 285.71 hours of one worker (1,000.00 at 3.5 an hour)" in away
    assert "shards" in away
    for way in ("one process", "local processes", "ranks", "Slurm array", "Ray"):
        assert way in here


def test_processor_time_is_another_clock(settings: list[str], tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    plan("--seconds", "1", "--clock", "processor", "--save", str(path), *settings)
    assert Measured.load(path).machine.clock == "processor"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "many"], "give a whole number such as"),
        (["--images", "0"], "at least 1"),
        (["--images", "1.5"], "whole number"),
        (["--gpu", "h900"], "not in the table"),
        (["--budget", "10"], "takes --rate"),
        (["--measured", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(words: list[str], said: str, settings: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", "quickstart", *words, *settings])
    assert isinstance(result.exception, ValueError | OSError)
    assert said in str(result.exception)


def test_a_run_that_never_was_is_named(saved: Path, settings: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["plan", "quickstart", "--measured", str(saved), "--against", str(tmp_path), *settings]
    )
    assert isinstance(result.exception, FileNotFoundError)
    assert "timings.jsonl" in str(result.exception)
