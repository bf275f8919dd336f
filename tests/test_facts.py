"""What a model card says of a run, and the intervals beside its figures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill.evaluate import Evaluation
from distill.facts import run_facts
from distill.significance import Clusters, Resampling, recall_intervals
from distill.teacher_note import TEACHER_NOTE
from tests.export.conftest import SCENES, made_run


def evaluation(rng, images=30, captions=3) -> tuple[Evaluation, Clusters]:
    ranks = rng.integers(1, 15, images)
    text_ranks = np.clip(np.repeat(ranks, captions) + rng.integers(-2, 3, images * captions), 1, None)
    ids, texts = np.arange(images), np.arange(images * captions)
    found = Evaluation(ids, ranks, texts, text_ranks)
    return found, Clusters.of(ids, np.repeat(ids, captions))


def test_recall_intervals_are_the_percentiles_of_whole_images_drawn():
    rng = np.random.default_rng(0)
    found, clusters = evaluation(rng)
    intervals = recall_intervals(found, clusters, Resampling(resamples=4000, seed=1))
    assert set(intervals) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    drawn = np.random.default_rng(5).integers(0, 30, (4000, 30))
    for name, cut, ranks in (("i2t_r5", 5, found.i2t_ranks[:, None]), ("t2i_r10", 10, found.t2i_ranks.reshape(30, 3))):
        shares = [100 * float((ranks[rows] <= cut).mean()) for rows in drawn]
        assert intervals[name] == pytest.approx(np.percentile(shares, [2.5, 97.5]), abs=2.0)
        assert intervals[name][0] < 100 * float((ranks <= cut).mean()) < intervals[name][1]
    by_caption = Clusters.of(found.text_ids, found.text_ids)
    alone = Evaluation(found.text_ids, found.t2i_ranks, found.text_ids, found.t2i_ranks)
    narrow = recall_intervals(alone, by_caption, Resampling(resamples=4000, seed=1))["t2i_r5"]
    wide = intervals["t2i_r5"]
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])  # captions of an image rise and fall together


def test_one_image_has_no_interval():
    one = Evaluation(np.array([0]), np.array([1]), np.array([0]), np.array([2]))
    assert recall_intervals(one, Clusters.of(np.array([0]), np.array([0])), Resampling(resamples=10)) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("facts"), "facts", SCENES)


def test_a_run_that_was_not_evaluated_has_no_figures_and_an_unknown_teacher(run):
    found = run_facts(run, "plain")
    assert found["figures"] is None
    assert found["teacher"]["identity"] is None
    assert found["teacher"]["score_kind"] == "log_odds"
    assert found["losses"] == [{"name": "contrastive"}]
    assert not found["distils"]


def test_an_evaluated_run_has_figures_with_intervals_and_its_teacher(run):
    split = run.corpus.split("test")
    rng = np.random.default_rng(0)
    ranks = (rng.integers(1, 20, len(split.images)), rng.integers(1, 20, len(split.texts)))
    Evaluation(split.images, ranks[0], split.texts, ranks[1]).save(run.folder / "evaluation" / "distilled")
    (run.folder / TEACHER_NOTE).write_text(json.dumps({"identity": "abc", "score_kind": "log_odds"}))
    (run.folder / "summary.json").write_text(
        json.dumps({"teacher": {"rsum": 5.0}, "plain": {"rsum": 3.0}, "distilled": {}})
    )
    found = run_facts(run, "distilled")
    one = found["figures"]["recalls"]["t2i_r10"]
    assert one["value"] == pytest.approx(100 * (ranks[1] <= 10).mean())
    assert one["interval"][0] < one["value"] < one["interval"][1]
    assert found["teacher"]["identity"] == "abc"
    assert found["beside"] == {"teacher": {"rsum": 5.0}, "plain": {"rsum": 3.0}}
    assert found["losses"][1] == {"name": "embedding_match", "weight": 40.0}
    assert found["data"]["splits"]["test"] == (40, 80)
