"""What a step is made of, against a plain look at the corpus."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.batches import Batches, PairScores
from distill.protocols import DIRECTIONS, Candidates
from distill.sampler import BatchSampler, CandidateSampler
from tests.toys import expected_scores, toy_corpus


def source(rows: np.ndarray) -> dict[str, torch.Tensor]:
    return {"row": torch.from_numpy(rows.copy())}


@pytest.fixture(scope="module")
def batches() -> Batches:
    corpus = toy_corpus(24, captions=2)
    pairs = corpus.split_pairs("train")
    train = corpus.split("train")
    rng = np.random.default_rng(0)
    mined = []
    for direction, queries, items in (("i2t", train.images, train.texts), ("t2i", train.texts, train.images)):
        rows = []
        for query in queries:
            pair = (query, items) if direction == "i2t" else (items, query)
            rows.append(rng.choice(items[~corpus.matches.is_match(*np.broadcast_arrays(*pair))], 3, replace=False))
        ids = np.array(rows)
        mined.append(Candidates(direction, queries, ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool)))
    asked = [found.pairs() for found in mined] + [(pairs[:, 0], pairs[:, 1])]
    images, texts = (np.concatenate(side) for side in zip(*asked, strict=True))
    scores = PairScores.of(images, texts, expected_scores(images, texts), corpus.n_texts)
    samplers = tuple(CandidateSampler(found, 2, 0) for found in mined)
    return Batches(BatchSampler(pairs, 6, 0), source, source, corpus.matches, scores, samplers)


def test_items_are_distinct_and_their_inputs_in_the_same_order(batches: Batches) -> None:
    step = batches[3]
    for ids, inputs in ((step.image_ids, step.images), (step.text_ids, step.texts)):
        assert np.all(np.diff(ids) > 0)
        assert inputs["row"].tolist() == ids.tolist()


def test_every_cell_says_what_the_corpus_and_the_teacher_say(batches: Batches) -> None:
    known = {int(key) for key in batches.scores.keys}
    asked = 0
    for number in range(3):
        step = batches[number]
        own_images, own_texts = (set(column.tolist()) for column in batches.sampler.batch(number).T)
        for direction in DIRECTIONS:
            grid = step.grids[direction]
            queries, items, own = (
                (step.image_ids, step.text_ids, own_texts)
                if direction == "i2t"
                else (step.text_ids, step.image_ids, own_images)
            )
            rows = queries[grid.rows.numpy()]
            assert set(rows.tolist()) == (own_images if direction == "i2t" else own_texts)
            for r, query in enumerate(rows.tolist()):
                for c, item in enumerate(items.tolist()):
                    image, text = (query, item) if direction == "i2t" else (item, query)
                    assert bool(grid.positive[r, c]) == (text // 2 == image)
                    assert bool(grid.in_batch[r, c]) == (item in own)
                    score = float(grid.teacher[r, c])
                    if image * batches.scores.n_texts + text in known:
                        assert score == expected_scores(np.array(image), np.array(text))
                        asked += 1
                    else:
                        assert np.isnan(score)
    assert asked > 50


def test_each_query_meets_its_drawn_candidates_with_their_scores(batches: Batches) -> None:
    step = batches[1]
    for sampler in batches.candidates:
        direction = sampler.candidates.direction
        grid = step.grids[direction]
        queries, items = (step.image_ids, step.text_ids) if direction == "i2t" else (step.text_ids, step.image_ids)
        rows = queries[grid.rows.numpy()]
        for r, drawn in enumerate(sampler.draw(1, rows)):
            columns = np.searchsorted(items, drawn)
            assert items[columns].tolist() == drawn.tolist()
            assert not torch.isnan(grid.teacher[r, columns]).any()


def test_labelled_pairs_are_given_as_rows(batches: Batches) -> None:
    step, pairs = batches[2], batches.sampler.batch(2)
    assert step.image_ids[step.pairs[0].numpy()].tolist() == pairs[:, 0].tolist()
    assert step.text_ids[step.pairs[1].numpy()].tolist() == pairs[:, 1].tolist()


def test_a_grid_of_scores_marks_what_was_not_asked() -> None:
    scores = PairScores.of(np.array([1, 0, 1]), np.array([2, 1, 2]), np.array([5.0, 3.0, 5.0], np.float32), 4)
    assert len(scores.keys) == 2
    grid = scores.lookup(np.array([[0], [1]]), np.array([[1, 2, 3]]))
    assert np.isnan(scores.lookup(np.array([-1, 1]), np.array([2, -1]))).all()
    assert np.array_equal(grid, np.array([[3, np.nan, np.nan], [np.nan, 5, np.nan]], np.float32), equal_nan=True)
