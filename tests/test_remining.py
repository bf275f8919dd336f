"""When candidates are mined anew, when those in use stay, and what the log says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import mined
from distill.mined import Round, fresh_share, kept
from distill.pipeline import stretches, trained_arm
from distill.protocols import DIRECTIONS, Candidates
from distill.recipe.load import RecipeError, load_recipe
from tests.test_groups import RUN, experiment

ARM = "distilled"
ROWS = st.lists(st.lists(st.integers(-1, 6), min_size=4, max_size=4, unique=True), min_size=1, max_size=5)


def candidates(rows: list[list[int]]) -> Candidates:
    ids = np.array(rows, np.int64)
    return Candidates("i2t", np.arange(len(ids)) * 3, ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool))


@settings(max_examples=60, deadline=None)
@given(old=ROWS, new=ROWS)
def test_the_fresh_share_is_counted_query_by_query(old: list[list[int]], new: list[list[int]]) -> None:
    count = min(len(old), len(new))
    pairs = list(zip(old[:count], new[:count], strict=True))
    there = sum(item >= 0 for _, row in pairs for item in row)
    fresh = sum(item >= 0 and item not in before for before, row in pairs for item in row)
    found = fresh_share(candidates(old[:count]), candidates(new[:count]))
    assert found == pytest.approx(fresh / there if there else 0.0)


def test_rounds_are_cut_every_so_many_epochs(tmp_path: Path) -> None:
    x = experiment(tmp_path, "train.rounds=1", "mine.every_epochs=0.4")  # 240 pairs in batches of 16
    assert [(one.number, one.start, one.stop) for one in stretches(x)] == [
        (0, 0, 10), (1, 10, 16), (2, 16, 24)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["mine.every_epochs=2"], r"every_epochs is 2 and train\.rounds 2: .* leave one out"),
        (
            ["train.rounds=1", "mine.overlap_below=0.5"],
            "there is only one round: set mine.every_epochs or train.rounds",
        ),
    ],
)
def test_what_says_nothing_or_two_things_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [*RUN, *keys])


def rounds_of(folder: Path) -> list[dict[str, float]]:
    """One line a round, of all that the metrics say of it."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "round" in line:
            found[line["round"]] = found.get(line["round"], {}) | line
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("kind", ["encode", "in_batch"])
@pytest.mark.parametrize("stays", [True, False])
def test_candidates_that_are_much_the_same_stay_and_the_teacher_is_asked_nothing(
    tmp_path: Path, kind: str, stays: bool
) -> None:
    limit = 0.0 if stays else 1.0
    x = experiment(tmp_path, f"train.candidates={kind}", f"mine.overlap_below={limit}")
    trained_arm(x, "distilled")
    folder = x.folder / "arms" / "distilled"
    of, before = Round(2, folder), Round(1, x.folder / "shared")
    first, second = rounds_of(folder)
    for direction in DIRECTIONS:
        same = np.array_equal(kept(of)[direction].item_ids, kept(before)[direction].item_ids)
        assert same == stays
        assert 0 < second[f"candidates/fresh_share/{direction}"] < 1
        assert 0 < second[f"candidates/above_match/{direction}"] < 1
        assert f"candidates/fresh_share/{direction}" not in first
        for line in (first, second):
            assert 0 <= line[f"teacher/above_match/{direction}"] <= 1
    assert (second["candidates/taken"], second["teacher/asked"] > 0) == ((0, False) if stays else (1, True))
    assert (second["teacher/saved"] > 0) == stays
    if kind == "in_batch":
        groupings = [np.load(one.groups)["groupings"] for one in (before, of)]
        assert np.array_equal(*groupings) == stays
    else:
        found = kept(before)["i2t"]
        own = similarity_of_match(x, found)
        there = found.item_ids >= 0
        expected = (found.similarity > own[:, None])[there].mean()
        assert first["candidates/above_match/i2t"] == pytest.approx(expected, abs=1e-3)


def similarity_of_match(x, found: Candidates) -> np.ndarray:
    """Of each image with its first caption, by the student of the shared steps."""
    from distill.checkpoint import latest_checkpoint, load_weights

    student = x.fresh_student()
    load_weights(latest_checkpoint(x.folder / "shared" / "checkpoints"), student)
    texts = np.array([x.corpus.matches.texts_of(int(image))[0] for image in found.query_ids])
    images = x.embed(student, "image", found.query_ids)
    return np.einsum("nd,nd->n", images, x.embed(student, "text", texts))


def test_an_approximate_index_tells_its_recall_and_is_refused_under_the_floor(tmp_path: Path) -> None:
    own = ["mine.factory='IVF16,Flat'", "mine.nprobe=1"]
    with pytest.raises(ValueError, match=r"mine\.factory, i2t: the index 'IVF16,Flat' finds .* mine\.recall_floor"):
        trained_arm(experiment(tmp_path / "refused", *own, "mine.recall_floor=0.99"), "distilled")
    x = experiment(tmp_path / "taken", "mine.factory='IVF16,Flat'", "mine.nprobe=12", "mine.recall_floor=0.5")
    trained_arm(x, "distilled")
    for line in rounds_of(x.folder / "arms" / "distilled"):
        for direction in DIRECTIONS:
            assert 0.5 <= line[f"candidates/index_recall/{direction}"] <= 1


@pytest.fixture
def unsettled() -> Iterator[None]:
    """Accelerate settles the precision of a process once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unsettled")
def test_with_bf16_a_round_is_mined_by_the_same_student_after_a_stop_between_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["train.candidates=encode", "train.precision=bf16"]
    whole = experiment(tmp_path / "whole", *own)
    weights = (trained_arm(whole, ARM) / "model.safetensors").read_bytes()
    mining = mined.candidates

    def stopped(x: Any, of: Round, **options: Any) -> Any:
        if of.number == 2:
            raise RuntimeError("the end")
        return mining(x, of, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mined, "candidates", stopped)
        with pytest.raises(RuntimeError, match="the end"):
            trained_arm(experiment(tmp_path / "stopped", *own), ARM)
    again = experiment(tmp_path / "stopped", *own)
    assert (trained_arm(again, ARM) / "model.safetensors").read_bytes() == weights
    for direction in DIRECTIONS:
        one, two = (kept(Round(2, x.folder / "arms" / ARM))[direction] for x in (whole, again))
        assert np.array_equal(one.similarity, two.similarity)


def test_an_arm_that_reads_no_scores_tells_of_its_candidates_too(tmp_path: Path) -> None:
    arm = "arms={hard: {losses: [{name: contrastive, negatives: all}]}}"
    x = experiment(tmp_path, "train.candidates=encode", "train.rounds=1", arm)
    trained_arm(x, "hard")
    (line,) = rounds_of(x.folder / "arms" / "hard")
    assert 0 < line["candidates/above_match/i2t"] <= 1
    assert "teacher/asked" not in line


@pytest.mark.parametrize("key", ["every_epochs=2", "overlap_below=0.5", "ahead=3"])
def test_rounds_without_candidates_are_refused(key: str) -> None:
    plain = "arms={plain: {losses: [{name: contrastive}]}}"
    with pytest.raises(RecipeError, match="no arm has a loss that reads candidates"):
        load_recipe("quickstart", [*RUN, plain, f"mine.{key}", "train.rounds=1"])


def test_a_tail_too_short_to_mine_for_joins_the_round_before_and_there_is_always_one(tmp_path: Path) -> None:
    x = experiment(tmp_path, "train.rounds=1", "mine.every_epochs=0.4", "train.steps=26", "train.shared=0.5")
    assert [(one.start, one.stop) for one in stretches(x)] == [(0, 13), (13, 19), (19, 26)]  # 25 to 26 is no round
    all_shared = experiment(tmp_path, "train.rounds=1", "mine.every_epochs=1", "train.shared=1")
    assert [(one.start, one.stop) for one in stretches(all_shared)] == [(0, 24), (24, 24)]
