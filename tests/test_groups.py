"""Batches of neighbours: which pairs a group holds, what a batch is made of, and what the teacher is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batches import StepBatch
from distill.data.matches import Matches
from distill.experiment import Experiment
from distill.groups import GroupedSampler, dense_candidates, grouped
from distill.meter import Meter
from distill.pipeline import _phase, first_candidates, stretches, taught_teacher, trained_arm
from distill.protocols import DIRECTIONS, Candidates, sides_of
from distill.recipe.build import builders
from distill.recipe.load import RecipeError, load_recipe
from tests.test_run import TINY

CAPTIONS = 3


def corpus_of(images: int) -> tuple[np.ndarray, Matches]:
    """Pairs (P, 2) of images 10, 11, ... with three captions each, and who matches whom."""
    pairs = np.stack([np.repeat(np.arange(images), CAPTIONS) + 10, np.arange(images * CAPTIONS) + 5], axis=1)
    return pairs, Matches(pairs[:, 0], pairs[:, 1], n_images=images + 10, n_texts=images * CAPTIONS + 5)


def mined_at_random(pairs: np.ndarray, k: int, seed: int = 0) -> dict[str, Candidates]:
    """``k`` non-matching items a query, the last place of some of them empty."""
    rng = np.random.default_rng(seed)
    found = {}
    for direction, query, item in (("i2t", 0, 1), ("t2i", 1, 0)):
        queries = np.unique(pairs[:, query])
        ids = []
        for asking in queries:
            others = np.setdiff1d(pairs[:, item], pairs[pairs[:, query] == asking, item])
            ids.append(rng.permutation(others)[:k])
        filled = np.array(ids)
        filled[rng.random(len(filled)) < 0.2, -1] = -1
        found[direction] = Candidates(
            direction, queries, filled, np.zeros(filled.shape, np.float32), np.zeros(filled.shape, bool)
        )
    return found


def beside(pair: np.ndarray, pairs: np.ndarray, found: dict[str, Candidates]) -> set[int]:
    """Rows of the pairs that hold a candidate of a pair's image or text."""
    texts = found["i2t"].item_ids[found["i2t"].query_ids == pair[0]]
    images = found["t2i"].item_ids[found["t2i"].query_ids == pair[1]]
    return set(np.flatnonzero(np.isin(pairs[:, 1], texts) | np.isin(pairs[:, 0], images)).tolist())


@settings(max_examples=40, deadline=None)
@given(images=st.integers(4, 30), k=st.integers(1, 6), group=st.integers(2, 8), seed=st.integers(0, 5))
def test_a_grouping_holds_every_pair_once_and_is_a_function_of_its_seed(
    images: int, k: int, group: int, seed: int
) -> None:
    pairs, _ = corpus_of(images)
    found = mined_at_random(pairs, min(k, images - 1), seed)
    groupings = grouped(pairs, found, group=group, count=2, seed=[seed])
    for order in groupings:
        assert sorted(order.tolist()) == list(range(len(pairs)))
    assert np.array_equal(groupings, grouped(pairs, found, group=group, count=2, seed=[seed]))


def reached(first: int, members: list[int], pairs: np.ndarray, found: dict[str, Candidates]) -> set[int]:
    """Members that are a candidate's pair of the first one, or of one that was reached."""
    seen, frontier = {first}, [first]
    while frontier:
        new = (beside(pairs[frontier.pop()], pairs, found) & set(members)) - seen
        seen |= new
        frontier += list(new)
    return seen


def test_most_groups_are_full_of_neighbours_and_groupings_differ() -> None:
    pairs, _ = corpus_of(200)
    found = mined_at_random(pairs, 8)
    first, second = grouped(pairs, found, group=6, count=2, seed=[3])
    members = first.reshape(-1, 6).tolist()
    grown = [set(row) <= reached(row[0], row, pairs, found) for row in members]
    assert np.mean(grown) > 0.8
    assert np.mean([len(set(pairs[row, 0].tolist())) == 6 for row in members]) > 0.8  # an image once a group
    assert len({frozenset(row) for row in members} & {frozenset(row) for row in second.reshape(-1, 6).tolist()}) < 5


def test_an_image_comes_once_a_group_though_all_its_captions_are_candidates() -> None:
    pairs, _ = corpus_of(60)
    found = {}
    for direction, query, item in (("i2t", 0, 1), ("t2i", 1, 0)):
        queries = np.unique(pairs[:, query])
        image = pairs[np.searchsorted(pairs[:, 1], queries), 0] if query else queries
        after = [[(one - 10 + step) % 60 + 10 for step in (1, 2, 3)] for one in image.tolist()]
        ids = np.array([pairs[np.isin(pairs[:, 0], near), item][: 3 if item == 0 else 9] for near in after])
        found[direction] = Candidates(
            direction, queries, ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)
        )
    members = grouped(pairs, found, group=4, count=1, seed=[0])[0].reshape(-1, 4)
    once = [len(set(pairs[row, 0].tolist())) == 4 for row in members]
    assert np.mean(once) > 0.7  # the rest is what was left over


def sampler_of(images: int = 20, *, group: int = 4, batch_size: int = 12) -> tuple[GroupedSampler, np.ndarray]:
    pairs, _ = corpus_of(images)
    groupings = grouped(pairs, mined_at_random(pairs, 4), group=group, count=2, seed=[0])
    return GroupedSampler(pairs, groupings, group, batch_size, seed=7), groupings


def test_a_batch_is_made_of_whole_groups_and_groupings_take_turns() -> None:
    sampler, groupings = sampler_of()
    assert sampler.steps_per_epoch == 5
    for epoch in range(3):
        batches = [sampler.batch(epoch * 5 + step) for step in range(5)]
        assert len({tuple(pair) for batch in batches for pair in batch.tolist()}) == 60
        groups = {frozenset(map(tuple, sampler.pairs[row].tolist())) for row in groupings[epoch % 2].reshape(-1, 4)}
        for batch in batches:
            assert {frozenset(map(tuple, part.tolist())) for part in batch.reshape(-1, 4, 2)} <= groups
    assert not np.array_equal(sampler.batch(0), sampler.batch(10))  # the same groups in another order
    assert np.array_equal(sampler.batch(3), sampler_of()[0].batch(3))


def test_what_does_not_fill_a_batch_is_left_out_and_too_few_pairs_are_refused() -> None:
    sampler, _ = sampler_of(21)  # 63 pairs: 15 groups, 5 batches
    assert sampler.steps_per_epoch == 5
    with pytest.raises(ValueError, match="15 pairs make 3 groups of 4, less than a batch of 16"):
        sampler_of(5, batch_size=16)
    with pytest.raises(ValueError, match="batch_size is 10, no multiple of train.group, which is 4"):
        sampler_of(batch_size=10)


def test_candidates_are_what_the_groups_hold_hardest_first() -> None:
    pairs, matches = corpus_of(15)
    groupings = grouped(pairs, mined_at_random(pairs, 4), group=4, count=2, seed=[0])
    rng = np.random.default_rng(1)
    vectors = {}
    for side, column in (("image", 0), ("text", 1)):
        ids = np.unique(pairs[:, column])
        vectors[side] = ids, rng.standard_normal((len(ids), 6)).astype(np.float32)
    found = dense_candidates(pairs, groupings, 4, matches, vectors)
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        expected: dict[int, set[int]] = {}
        for order in groupings:
            for row in order[: len(pairs) // 4 * 4].reshape(-1, 4):
                for image in pairs[row, 0].tolist():
                    for text in pairs[row, 1].tolist():
                        if not matches.is_match(np.array(image), np.array(text)):
                            asking, asked = (image, text) if direction == "i2t" else (text, image)
                            expected.setdefault(asking, set()).add(asked)
        those = found[direction]
        assert np.array_equal(those.query_ids, np.unique(pairs[:, 0 if query == "image" else 1]))
        for asking, ids, similarity in zip(those.query_ids.tolist(), those.item_ids, those.similarity, strict=True):
            there = ids >= 0
            assert set(ids[there].tolist()) == expected.get(asking, set())
            assert there.sum() == len(set(ids[there].tolist()))
            mine, theirs = (
                of[1][np.searchsorted(of[0], key)]
                for of, key in zip((vectors[query], vectors[item]), (asking, ids[there]), strict=True)
            )
            np.testing.assert_allclose(similarity[there], theirs @ mine, rtol=1e-5)
            assert (np.diff(similarity[there]) <= 0).all()
            assert np.isneginf(similarity[~there]).all()


# --- in a run ---------------------------------------------------------------------------------------------------------

RUN = [item for item in TINY if not item.startswith(("arms.maps", "arms.beside", "train.trackers"))]


def experiment(tmp_path: Path, *own: str) -> Experiment:
    places = [f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}", "train.candidates=in_batch", "train.group=4"]
    recipe = load_recipe("quickstart", [*RUN, *places, *own])
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def test_in_a_run_the_teacher_s_scores_are_dense_within_groups_and_nothing_else_is_encoded(tmp_path: Path) -> None:
    x = experiment(tmp_path)
    found, stretch = first_candidates(x), stretches(x)[1]
    arm = x.recipe.arms["distilled"]
    losses = x.builders.losses(arm.losses)
    phase = _phase(
        x,
        x.fresh_student(),
        losses,
        stretch,
        folder=x.folder / "arms" / "distilled",
        recipe_of_losses=arm.losses,
        found=found,
        scores=True,
    )
    for step in range(stretch.start, stretch.start + 3):
        batch, pairs = phase.batches[step], phase.batches.sampler.batch(step)
        assert batch.image_ids.tolist() == np.unique(pairs[:, 0]).tolist()
        assert batch.text_ids.tolist() == np.unique(pairs[:, 1]).tolist()
        asked = ~np.isnan(batch.grids["i2t"].teacher.numpy())
        for group in pairs.reshape(-1, 4, 2):
            rows, columns = (
                np.searchsorted(ids, group[:, side]) for side, ids in enumerate((batch.image_ids, batch.text_ids))
            )
            matching = x.corpus.matches.is_match(group[:, 0][:, None], group[:, 1][None])
            assert (asked[np.ix_(rows, columns)] | matching).all()
            assert asked[rows, columns].all()  # the labelled pairs
        assert 0 < asked.mean() < 0.6  # others of the batch were not asked about
        assert all(grid.in_batch.all() for grid in batch.grids.values())


def test_a_recipe_trains_with_it_in_both_rounds_and_the_meaning_knows_the_groups(tmp_path: Path) -> None:
    x = experiment(tmp_path)
    assert (trained_arm(x, "distilled") / "model.safetensors").is_file()
    for number, home in ((1, x.folder / "shared"), (2, x.folder / "arms" / "distilled")):
        with np.load(home / f"groups-{number}.npz") as kept:
            assert kept["groupings"].shape == (2, len(x.corpus.split_pairs("train")))


def test_a_run_that_died_between_and_amid_rounds_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_arm(experiment(tmp_path / "whole"), "distilled")
    own = Meter.step
    for at in (10, 13, 16, 19):  # 10 steps shared, rounds of 7, a checkpoint every 3

        def dying(meter: Meter, batch: StepBatch, *args: Any, at: int = at, **options: Any) -> Any:
            if batch.step == at:
                raise RuntimeError("the end")
            return own(meter, batch, *args, **options)

        monkeypatch.setattr(Meter, "step", dying)
        with pytest.raises(RuntimeError, match="the end"):
            trained_arm(experiment(tmp_path / "died"), "distilled")
    monkeypatch.setattr(Meter, "step", own)
    died = trained_arm(experiment(tmp_path / "died"), "distilled")
    assert (died / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_batch_that_groups_do_not_fill_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match=r"batch_size is 16 and group 6: set batch_size to 12"):
        load_recipe("quickstart", [*RUN, "train.candidates=in_batch", "train.group=6"])
