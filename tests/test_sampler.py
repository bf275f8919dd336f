"""Which pairs and candidates a step sees."""

from __future__ import annotations

import numpy as np
import pytest

from distill.protocols import Candidates
from distill.sampler import BatchSampler, CandidateSampler


def pairs(count: int) -> np.ndarray:
    return np.stack([np.arange(count), np.arange(count) + 1000], axis=1)


def test_an_epoch_holds_every_pair_once_and_the_next_in_another_order() -> None:
    sampler = BatchSampler(pairs(12), 4, seed=3)
    epochs = [np.concatenate([sampler.batch(step) for step in range(e * 3, e * 3 + 3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(12))
        assert np.array_equal(epoch[:, 1], epoch[:, 0] + 1000)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, second = BatchSampler(pairs(50), 8, seed=1), BatchSampler(pairs(50), 8, seed=1)
    for step in range(20):
        first.batch(step)
    assert np.array_equal(first.batch(7), second.batch(7))
    assert not np.array_equal(first.batch(7), BatchSampler(pairs(50), 8, seed=2).batch(7))


def test_a_batch_larger_than_the_split_is_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=r"5 pairs .* at most 5"):
        BatchSampler(pairs(5), 6, seed=0)


def mined(items: list[list[int]], queries: list[int]) -> Candidates:
    ids = np.array(items, np.int64)
    return Candidates("i2t", np.array(queries), ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool))


def test_draws_come_from_the_query_s_own_row_without_repetition() -> None:
    sampler = CandidateSampler(mined([[1, 2, 3, 4], [5, 6, 7, 8]], [10, 20]), 2, seed=0)
    for step in range(50):
        first, second = sampler.draw(step, np.array([10, 20]))
        assert set(first) <= {1, 2, 3, 4}
        assert set(second) <= {5, 6, 7, 8}
        assert len(set(first)) == len(set(second)) == 2


def test_every_candidate_is_drawn_about_equally_often() -> None:
    sampler = CandidateSampler(mined([[1, 2, 3, 4]], [10]), 1, seed=5)
    counts = np.bincount([int(sampler.draw(step, np.array([10]))[0, 0]) for step in range(4000)], minlength=5)[1:]
    assert counts.min() > 850  # 1000 expected, standard deviation 27
    assert counts.max() < 1150


def test_a_query_s_draw_does_not_depend_on_the_others_in_its_batch() -> None:
    sampler = CandidateSampler(mined([[1, 2, 3, 4], [5, 6, 7, 8]], [10, 20]), 2, seed=0)
    for step in range(20):
        assert np.array_equal(sampler.draw(step, np.array([20]))[0], sampler.draw(step, np.array([10, 20]))[1])


def test_missing_candidates_come_last() -> None:
    sampler = CandidateSampler(mined([[1, -1, 3, -1]], [10]), 3, seed=0)
    for step in range(20):
        drawn = sampler.draw(step, np.array([10]))[0].tolist()
        assert set(drawn[:2]) == {1, 3}
        assert drawn[2] == -1


def test_a_query_that_was_not_mined_is_named() -> None:
    with pytest.raises(KeyError, match="15"):
        CandidateSampler(mined([[1], [2]], [10, 20]), 1, seed=0).draw(0, np.array([10, 15]))


def test_unsorted_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted"):
        CandidateSampler(mined([[1], [2]], [20, 10]), 1, seed=0)
