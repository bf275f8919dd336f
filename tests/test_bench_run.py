"""``distill bench`` on a tiny run: every row, what the figures are of, and what is refused or left out with words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from distill import pipeline
from distill.bench import measure, teacher_costs
from distill.bench.found import Bench, Options
from distill.bench.indexes import BATCHES
from distill.bench.measure import bench
from distill.bench.sample import drawn_queries
from distill.bench.teacher_costs import ITEMS, name_of
from distill.bench.ways import OtherStudentError
from distill.cli import app
from distill.evaluate import Evaluation
from distill.experiment import Experiment
from distill.preflight import claim
from distill.recipe.build import builders
from distill.recipe.load import load_recipe
from distill.report.bench_plot import plot
from distill.report.bench_tables import show, tables
from distill.results import finish
from tests.exported import export_student
from tests.test_false_negatives_run import OF_SCENES, TeacherOfScenes

TINY = [
    "data={source: scenes, train: 60, val: 8, test: 20, size: 48, captions_per_image: 2}",
    *OF_SCENES,
    "train.steps=4",
    "train.batch_size=16",
    "mine.k=8",
    "evaluate.rerank=8",
    "device=cpu",
]
QUICK = ["--seconds", "0.01", "--threads", "1"]
PRECISION = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
STUDENTS = ["torch", "ONNX fp32", "ONNX int8", f"OpenVINO {PRECISION}"]
SAMPLED = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    recipe = load_recipe("quickstart", [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"])
    x = Experiment(recipe, builders(recipe), taught=pipeline.taught_teacher)
    claim(x, resume=False)
    finish(x)
    export_student(x.folder / "arms" / "distilled" / "student", x.folder / "arms" / "distilled" / "export")
    return x.folder


def opened(run: Path) -> Experiment:
    recipe = load_recipe(str(run / "recipe.yaml"))
    return Experiment(recipe, builders(recipe), taught=pipeline.taught_teacher)


def measured(run: Path, out: Path, *more: str) -> dict:
    result = CliRunner().invoke(app, ["bench", str(run), *QUICK, "--out", str(out), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((out / "bench.json").read_text())


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_costs, "ALONE_OF", SAMPLED)
        result = CliRunner().invoke(app, ["bench", str(run), *QUICK, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((out / "bench.json").read_text()), result.output, out


def copied(run: Path, to: Path, **changes) -> Path:
    """The run in another place, its recipe changed."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = yaml.safe_load((to / "recipe.yaml").read_text()) | changes
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return to


# --- what there is ----------------------------------------------------------------------------------------------------


def test_every_row_is_there_in_order(whole):
    found, _, _ = whole
    for query, depths in (("text", [8, 16, 32]), ("image", [8, 16, 32])):
        names = [(row["name"], row["batch"]) for row in found["rows"] if row["query"] == query]
        teacher = [*(name_of(k, items) for items in ITEMS for k in depths), *(name_of(None, items) for items in ITEMS)]
        assert names == [
            *((name, 1) for name in STUDENTS),
            *((name, 1) for name in teacher),
            *((name, 32) for name in STUDENTS),
        ]
    assert [(row["items"], row["factory"]) for row in found["indexes"]] == [
        (items, factory) for items in ("image", "text") for factory in ("Flat", "HNSW32", "SQ8")
    ]
    students = [point["name"] for point in found["points"] if point["kind"] == "student"]
    assert students == STUDENTS
    assert found["facts"]["threads"] == 1
    assert found["facts"]["queries"] == {"image": 20, "text": 40}
    assert set(found["kept_bytes"]) == {"image", "text"}


def test_times_are_made_of_their_parts(whole):
    found, _, _ = whole
    for row in found["rows"]:
        expected = {"prepare", "tower", "search"}
        if row["name"].startswith("re-ranked"):
            expected |= {"query", "score"}
        if row["name"].startswith("teacher"):
            expected = {"query", "score"}
        if row["name"].endswith("on the spot"):
            expected |= {"items"}
        assert set(row["parts"]) == expected
        assert 0 < row["total"]["median"] <= row["total"]["p90"] <= row["total"]["p95"]
        assert row["total"]["p95"] >= max(part["median"] for part in row["parts"].values())
        assert row["calls"] >= 3
        assert row["ratio"]["rounds"] == row["calls"]
        if row["name"] == "torch":
            assert row["ratio"]["median"] == 1


def test_what_was_multiplied_out_says_so(whole):
    found, printed, out = whole
    times = {(row["query"], row["name"]): row["multiplied"] for row in found["rows"]}
    assert {key: value for key, value in times.items() if value != 1} == {
        (query, name_of(None, items)): count / SAMPLED
        for query, count in (("text", 20), ("image", 40))
        for items in ITEMS
    }
    line = "the teacher alone was timed on a sample of the items and multiplied by"
    assert line in printed
    assert line in (out / "bench.md").read_text()


def test_the_students_quality_is_that_of_the_evaluation(whole, run):
    found, _, _ = whole
    points = {point["name"]: point["metrics"] for point in found["points"]}
    evaluated = Evaluation.load(run / "evaluation" / "distilled").retrieval.as_dict()
    assert points["torch"] == pytest.approx(evaluated)
    assert points["ONNX fp32"] == pytest.approx(evaluated)  # all queries were drawn
    assert points[STUDENTS[-1]]["rsum"] == pytest.approx(evaluated["rsum"], abs=25)  # some processors run bf16


def test_the_teachers_quality_is_that_of_its_scores(whole, run):
    found, _, _ = whole
    points = {point["name"]: point["metrics"] for point in found["points"]}
    x, teacher = opened(run), TeacherOfScenes()
    split = x.corpus.split("test")
    images = teacher.encode_images(teacher.prepare_images(x.corpus.load_images(split.images)))
    texts = teacher.encode_texts(teacher.prepare_texts([x.corpus.texts[row] for row in split.texts.tolist()]))
    n, m = len(split.images), len(split.texts)
    pairs = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
    scores = teacher.score(images, texts, *pairs).detach().numpy().reshape(n, m)
    true = x.corpus.matches.is_match(split.images[:, None], split.texts[None])
    for way, matrix, mask in (("i2t", scores, true), ("t2i", scores.T, true.T)):
        first = [
            sum(other >= max(row[there]) for other in row[~there]) for row, there in zip(matrix, mask, strict=True)
        ]
        assert points["teacher alone"][f"{way}_r1"] == pytest.approx(100 * np.mean(np.array(first) < 1))
        assert points["teacher alone"][f"{way}_r5"] == pytest.approx(100 * np.mean(np.array(first) < 5))
    # 32 of 20 images are all of them
    assert points["re-ranked 32"]["t2i_r5"] == pytest.approx(points["teacher alone"]["t2i_r5"])
    assert points["re-ranked 8"]["t2i_r5"] != points["torch"]["t2i_r5"]


def test_page_picture_and_screen(whole):
    found, printed, out = whole
    page = (out / "bench.md").read_text()
    assert page.startswith("# What a query costs: quickstart, arm distilled\n\n![quality against time](latency.png)")
    for row in found["rows"]:
        assert row["name"].partition(",")[0] in printed
    assert "| ONNX int8 | 32 |" in page
    for head in ("text query: the student alone", "picture query: ", "index of 20 images", "index of 40 texts"):
        assert f"## {head}" in page
        assert head in printed
    with Image.open(out / "latency.png") as picture:
        assert picture.size[0] > 1000


def test_a_narrow_terminal_shows_whole_numbers(run):
    found = bench(opened(run), "distilled", Options(threads=1, seconds=0.01, teacher=False))
    for width in (100, 200):
        console = Console(force_terminal=True, width=width, record=True)
        with console.capture() as shown:
            show(found, console=console)
        cells = shown.get().split("\n- ")[0]
        assert "…" not in cells
        assert ("p90" in cells) == (width == 200)
    assert all("p90" in table.heads for table in tables(found)[:2])


# --- what is left out, and what is refused ----------------------------------------------------------------------------


def test_without_teacher_and_export_two_rows_are_left_and_a_line_says_more(run, tmp_path):
    found = measured(run, tmp_path, "--no-teacher", "--arm", "plain", "--queries", "5")
    assert {row["name"] for row in found["rows"]} == {"torch"}
    assert len(found["rows"]) == 2 * len(BATCHES)
    assert found["kept_bytes"] == {}
    assert found["facts"]["queries"] == {"image": 5, "text": 5}
    missing = [note for note in found["notes"] if "distill export" in note]
    assert missing == [
        f"no rows of ONNX and int8, as there is no {run / 'arms' / 'plain' / 'export'}: "
        f"distill export {run} --arm plain --to {run / 'arms' / 'plain' / 'export'} adds them"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher": {"kind": "ensemble", "members": [{"kind": "custom", "target": "tests.toys:ToyTeacher"}] * 2}},
            "no rows of the teacher: it is an ensemble",
        ),
        ({"teacher": {"kind": "blip", "checkpoint": "nowhere/at/all"}}, "no rows of the teacher: it cannot be loaded"),
        ({"teacher": {"kind": "blip"}, "teach": {"steps": 9, "batch_size": 8}}, "has no taught teacher yet"),
    ],
)
def test_a_teacher_that_is_not_there_is_left_out_with_a_line(run, tmp_path, changes, said):
    moved = copied(run, tmp_path / "moved", **changes)
    found = measured(moved, tmp_path / "out", "--queries", "3")
    assert {row["name"] for row in found["rows"]} == set(STUDENTS)
    assert [note for note in found["notes"] if said in note]
    assert not (moved / "teacher").exists()


def test_an_export_of_another_student_is_refused(run, tmp_path):
    folder = run / "arms" / "distilled" / "export"
    with pytest.raises(OtherStudentError, match="exported from another student") as caught:
        CliRunner().invoke(
            app, ["bench", str(run), *QUICK, "--arm", "plain", "--export", str(folder)], catch_exceptions=False
        )
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arm", "nobody"], "no arm 'nobody'; the run has plain, distilled"),
        (["--export", "nowhere"], "nowhere holds no export_report.json"),
        (["--threads", "4096"], "--threads is 4096, but this process may use"),
    ],
)
def test_what_cannot_be_is_refused(run, more, said):
    result = CliRunner().invoke(app, ["bench", str(run), "--seconds", "0.01", *more])
    assert result.exit_code != 0
    assert said in f"{' '.join(result.output.replace('│', ' ').split())} {result.exception}"


def test_an_arm_without_a_student_is_refused(run, tmp_path):
    moved = copied(run, tmp_path / "moved")
    shutil.rmtree(moved / "arms" / "plain" / "student")
    result = CliRunner().invoke(app, ["bench", str(moved), "--arm", "plain"])
    assert "no trained student of the arm plain: train it first" in str(result.exception)


# --- vectors and fallbacks --------------------------------------------------------------------------------------------


def test_an_index_of_another_student_is_not_believed(run, tmp_path):
    moved = copied(run, tmp_path / "moved")
    shutil.rmtree(moved / "arms" / "distilled" / "index")
    shutil.copytree(moved / "arms" / "plain" / "index", moved / "arms" / "distilled" / "index")
    options = ["--no-teacher", "--arm", "distilled"]
    theirs = measured(moved, tmp_path / "out", *options)["points"][0]["metrics"]
    assert theirs == pytest.approx(Evaluation.load(run / "evaluation" / "distilled").retrieval.as_dict())


def test_where_scoring_every_item_takes_too_long_the_runs_evaluation_speaks(run, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_ALONE_S", 0.0)
    x = opened(run)
    found = bench(x, "distilled", Options(threads=1, seconds=0.01, queries=7))
    *_, last = found.points
    assert last.name == "teacher over its own 8"
    drawn = drawn_queries(x.corpus, x.corpus.split("test"), most=7, seed=x.recipe.seed)
    evaluated = Evaluation.load(run / "evaluation" / "teacher")
    for way, side in (("i2t", "image"), ("t2i", "text")):
        rank_of = dict(zip(*(values.tolist() for values in evaluated.queries(way)), strict=True))
        ranks = [rank_of[row] for row in drawn[side].ids.tolist()]
        assert len(ranks) == 7
        assert last.metrics[f"{way}_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert [note for note in found.notes if "the teacher was not asked for every item" in note]
    plot(found, tmp_path / "plot.png")
    assert isinstance(found, Bench)
    assert found.row("text", last.name) is None
