"""Ranks and recalls against matrices one can rank by eye, and against a full sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import exact
from distill.data.matches import Matches
from distill.metrics import (
    first_positive_ranks,
    mean_reciprocal_rank,
    ranks_from_embeddings,
    recall_at,
    summarise,
)


def slow_rank(similarity, positive):
    """The best true item placed after every tie, by sorting; a NaN competitor stands above."""
    best = max((float(s) for s, p in zip(similarity, positive, strict=True) if p and np.isfinite(s)), default=None)
    if best is None:
        return len(similarity)
    others = [np.inf if np.isnan(s) else float(s) for s, p in zip(similarity, positive, strict=True) if not p]
    line = sorted([(-value, 0) for value in others] + [(-best, 1)])
    return line.index((-best, 1)) + 1


def test_ranks_by_eye():
    similarity = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # first
            [0.9, 0.1, 0.2, 0.3],  # two true ones, the better is second
            [0.5, 0.5, 0.5, 0.5],  # everything ties: last
            [0.5, 0.5, 0.1, 0.2],  # a tie between true ones costs nothing
            [0.9, 0.8, 0.7, 0.6],  # third
        ],
        np.float32,
    )
    positive = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], bool)
    ranks = first_positive_ranks(similarity, positive)
    assert ranks.tolist() == [1, 2, 4, 1, 3]
    assert ranks.dtype == np.int64


def test_nan_counts_as_wrong():
    nan, inf = np.nan, np.inf
    similarity = np.array(
        [[0.9, nan, 0.2], [nan, 0.1, 0.2], [nan, 0.3, 0.2], [nan, nan, nan], [0.5, -inf, 0.2], [-inf, 1, inf]],
        np.float32,
    )
    positive = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    # a NaN competitor is above; the only true one is NaN: last; one of two is NaN: passed over; all are NaN: last
    assert first_positive_ranks(similarity, positive).tolist() == [2, 3, 1, 3, 1, 2]


def test_queries_without_a_true_item_are_named():
    with pytest.raises(ValueError, match=r"2 queries have no true item here \(rows 0, 2\)"):
        first_positive_ranks(np.zeros((3, 2), np.float32), np.array([[0, 0], [1, 0], [0, 0]], bool))
    with pytest.raises(ValueError, match=r"must share one \(B, N\) shape"):
        first_positive_ranks(np.zeros((3, 2), np.float32), np.zeros((3, 3), bool))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_ranks_equal_a_full_sort(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    b, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    similarity = rng.choice(np.array([-1.0, 0.0, 0.5, 1.0, np.nan], np.float32), (b, n))
    positive = rng.random((b, n)) < 0.3
    positive[np.arange(b), rng.integers(0, n, b)] = True
    found = first_positive_ranks(similarity, positive)
    assert found.tolist() == [slow_rank(s, p) for s, p in zip(similarity, positive, strict=True)]
    shuffled = rng.permutation(n)
    np.testing.assert_array_equal(found, first_positive_ranks(similarity[:, shuffled], positive[:, shuffled]))
    np.testing.assert_array_equal(found, first_positive_ranks(2 * similarity + 3, positive))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_over_embeddings_equal_the_whole_matrix(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    b, n, dim = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    direction = data.draw(st.sampled_from(["i2t", "t2i"]))
    corpus = 2 * (b + n)
    query_ids, item_ids = rng.permutation(corpus)[:b], rng.permutation(corpus)[:n]
    truth = rng.random((corpus, corpus)) < 0.1
    truth[query_ids, rng.choice(item_ids, b)] = True  # every query has one
    pairs = np.argwhere(truth) if direction == "i2t" else np.argwhere(truth)[:, ::-1]
    queries, items = (rng.integers(-1, 2, (count, dim)).astype(np.float32) for count in (b, n))
    if data.draw(st.booleans()):
        items[rng.integers(0, n)] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "CELLS", data.draw(st.sampled_from([1, 7, 1 << 20])) * exact.QUERY_BLOCK)
        found = ranks_from_embeddings(
            queries,
            items,
            query_ids=query_ids,
            item_ids=item_ids,
            matches=Matches(pairs[:, 0], pairs[:, 1], n_images=corpus, n_texts=corpus),
            direction=direction,
            block=data.draw(st.sampled_from([1, 4, 256])),
        )
    positive = truth[query_ids][:, item_ids]
    assert found.tolist() == [slow_rank(s, p) for s, p in zip(queries @ items.T, positive, strict=True)]


def test_equal_items_tie_even_where_a_float32_product_would_not_see_it():
    """A caption that is there twice, once as a true one: never rank 1."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((400, 67)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    items[200:] = items[:200]
    matches = Matches(np.arange(200), np.arange(200), n_images=200, n_texts=400)
    ranks = ranks_from_embeddings(
        items[:200], items, query_ids=np.arange(200), item_ids=np.arange(400), matches=matches, direction="i2t"
    )
    assert (ranks == 2).all()


def test_embeddings_that_do_not_fit_are_refused():
    matches = Matches(np.arange(3), np.arange(3), n_images=4, n_texts=4)
    vectors, ids = np.eye(4, dtype=np.float32), np.arange(4)

    def ranks(queries=vectors, items=vectors, query_ids=ids, item_ids=ids):
        return ranks_from_embeddings(
            queries, items, query_ids=query_ids, item_ids=item_ids, matches=matches, direction="i2t"
        )

    with pytest.raises(ValueError, match=r"1 queries have no true item here \(query ids 3\)"):
        ranks()
    with pytest.raises(ValueError, match=r"3 queries have no true item here \(query ids 0, 1, 2\)"):
        ranks(queries=vectors[:3], query_ids=ids[:3], items=vectors[3:], item_ids=ids[3:])
    with pytest.raises(ValueError, match="distinct"):
        ranks(item_ids=np.array([0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(4, 4\)"):
        ranks(queries=vectors[:, :3])
    with pytest.raises(ValueError, match="one id a vector"):
        ranks(item_ids=ids[:3])


def test_recall_by_hand():
    i2t, t2i = np.array([1, 2, 6, 11]), np.array([1, 1, 5, 10, 10])
    found = summarise(i2t, t2i)
    assert (found.i2t_r1, found.i2t_r5, found.i2t_r10) == (25.0, 50.0, 75.0)
    assert (found.t2i_r1, found.t2i_r5, found.t2i_r10) == (40.0, 60.0, 100.0)
    assert found.rsum == 350.0
    assert found.i2t_mrr == pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 11) / 4)
    assert found.t2i_mrr == pytest.approx((1 + 1 + 1 / 5 + 1 / 10 + 1 / 10) / 5)
    assert list(found.as_dict()) == [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + [
        "rsum",
        "i2t_mrr",
        "t2i_mrr",
    ]
    assert all(type(value) is float for value in found.as_dict().values())


def test_nothing_to_average_over():
    for measure in (mean_reciprocal_rank, lambda ranks: recall_at(ranks, 1)):
        with pytest.raises(ValueError, match="no query"):
            measure(np.empty(0, np.int64))
