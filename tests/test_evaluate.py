"""Evaluation and re-ranking against a brute-force full sort."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from distill.data.matches import Matches
from distill.evaluate import (
    Evaluation,
    agreement,
    evaluate_embeddings,
    evaluate_reranked,
    gap_closed,
    scores_of,
    shortlist,
)
from distill.index import VectorIndex
from distill.protocols import Candidates


def make_split(rng, *, n_images, n_texts, dim=2, whole=True):
    """Every image and every text has a match; ids start beyond 0, as those of a test split do."""
    image_ids, text_ids = 5 + np.arange(n_images), 9 + np.arange(n_texts)
    truth = np.zeros((image_ids[-1] + 1, text_ids[-1] + 1), bool)
    truth[rng.choice(image_ids, n_texts), text_ids] = True
    truth[image_ids, rng.choice(text_ids, n_images)] = True
    pairs = np.argwhere(truth)
    draw = (lambda shape: rng.integers(-1, 2, shape)) if whole else rng.standard_normal
    return {
        "images": draw((n_images, dim)).astype(np.float32),
        "texts": draw((n_texts, dim)).astype(np.float32),
        "image_ids": image_ids,
        "text_ids": text_ids,
        "truth": truth,
        "matches": Matches(pairs[:, 0], pairs[:, 1], n_images=truth.shape[0], n_texts=truth.shape[1]),
    }


def evaluated(split):
    return evaluate_embeddings(
        split["images"],
        split["texts"],
        image_ids=split["image_ids"],
        text_ids=split["text_ids"],
        matches=split["matches"],
    )


def listed(split, direction, k):
    query, item = ("image", "text") if direction == "i2t" else ("text", "image")
    index = VectorIndex.build(split[f"{item}s"], split[f"{item}_ids"])
    return shortlist(
        index,
        split[f"{query}s"],
        query_ids=split[f"{query}_ids"],
        matches=split["matches"],
        direction=direction,
        k=k,
    )


def slow_reranked(similarity, positive, teacher, k):
    """Rank of the first true item in one full list: the first k by the teacher, then the rest; ties against it."""
    n = len(similarity)
    order = sorted(range(n), key=lambda item: (-similarity[item], item))
    first, rest = order[:k], order[k:]
    full = sorted(first, key=lambda item: (-teacher[item], positive[item]))
    full += sorted(rest, key=lambda item: (-similarity[item], positive[item]))
    return 1 + next(place for place, item in enumerate(full) if positive[item])


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_reranking_equals_a_full_sort(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    split = make_split(
        rng,
        n_images=data.draw(st.integers(1, 15)),
        n_texts=data.draw(st.integers(1, 25)),
        whole=data.draw(st.booleans()),
    )
    k = data.draw(st.integers(1, 12))
    table = rng.integers(-2, 3, split["truth"].shape).astype(np.float32)  # ties are common
    found = evaluate_reranked(
        evaluated(split),
        i2t=listed(split, "i2t", k),
        t2i=listed(split, "t2i", k),
        lookup=lambda images, texts: table[images, texts],
    )
    rows = np.ix_(split["image_ids"], split["text_ids"])
    similarity = (split["images"].astype(float) @ split["texts"].astype(float).T).astype(np.float32)
    truth, teacher = split["truth"][rows], table[rows]
    assert found.i2t_ranks.tolist() == [slow_reranked(*row, k) for row in zip(similarity, truth, teacher, strict=True)]
    assert found.t2i_ranks.tolist() == [
        slow_reranked(*row, k) for row in zip(similarity.T, truth.T, teacher.T, strict=True)
    ]


def test_a_perfect_teacher_puts_all_that_the_shortlist_holds_first():
    split = make_split(np.random.default_rng(0), n_images=40, n_texts=90, dim=4, whole=False)
    first, k = evaluated(split), 8
    found = evaluate_reranked(
        first,
        i2t=listed(split, "i2t", k),
        t2i=listed(split, "t2i", k),
        lookup=lambda images, texts: split["truth"][images, texts].astype(np.float32),
    )
    for before, after in ((first.i2t_ranks, found.i2t_ranks), (first.t2i_ranks, found.t2i_ranks)):
        np.testing.assert_array_equal(after, np.where(before <= k, 1, before))
        assert (before > k).any()
        assert (before <= k).any()


def test_by_hand():
    """Two images, three texts; text 2 is true of both images."""
    split = {
        "images": np.array([[1, 0], [0, 1]], np.float32),
        "texts": np.array([[0.6, 0.8], [0.8, 0.6], [1, 0]], np.float32),
        "image_ids": np.arange(2),
        "text_ids": np.arange(3),
        "matches": Matches(np.array([0, 1, 0, 1]), np.array([0, 1, 2, 2]), n_images=2, n_texts=3),
    }
    found = evaluated(split)
    assert found.i2t_ranks.tolist() == [1, 2]  # 0: text 2 at once; 1: text 0 (0.8), then text 1 (0.6)
    assert found.t2i_ranks.tolist() == [2, 2, 1]
    assert found.retrieval.i2t_r1 == 50.0
    assert found.retrieval.t2i_r1 == pytest.approx(100 / 3)


def test_save_and_load(tmp_path):
    found = evaluated(make_split(np.random.default_rng(1), n_images=7, n_texts=20))
    found.save(tmp_path / "eval")
    table = pq.read_table(tmp_path / "eval" / "per_query.parquet")
    assert table.column_names == ["direction", "query_id", "rank"]
    assert table.num_rows == 27
    assert table["direction"].to_pylist() == ["i2t"] * 7 + ["t2i"] * 20
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == found.retrieval.as_dict()
    again = Evaluation.load(tmp_path / "eval")
    for name in ("image_ids", "i2t_ranks", "text_ids", "t2i_ranks"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.retrieval == found.retrieval
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["metrics.json", "per_query.parquet"]
    with pytest.raises(FileNotFoundError, match="run the evaluation first"):
        Evaluation.load(tmp_path)


def test_a_shortlist_keeps_true_items_and_marks_them():
    split = make_split(np.random.default_rng(2), n_images=10, n_texts=30, dim=3, whole=False)
    for direction in ("i2t", "t2i"):
        found = listed(split, direction, 12)
        assert found.item_ids.shape == ((10, 12) if direction == "i2t" else (30, 10))
        queries = np.broadcast_to(found.query_ids[:, None], found.item_ids.shape)
        images, texts = (queries, found.item_ids) if direction == "i2t" else (found.item_ids, queries)
        np.testing.assert_array_equal(found.positive, split["truth"][images, texts])
        assert found.positive.any()


def test_missing_scores_and_foreign_shortlists_are_refused():
    split = make_split(np.random.default_rng(3), n_images=6, n_texts=18, dim=3, whole=False)
    first, i2t, t2i = evaluated(split), listed(split, "i2t", 4), listed(split, "t2i", 4)

    def lookup(images, texts):
        return np.where(np.arange(len(images)) < 3, np.nan, 1.0).astype(np.float32)

    with pytest.raises(ValueError, match="3 of 24 teacher scores are missing or not finite"):
        evaluate_reranked(first, i2t=i2t, t2i=t2i, lookup=lookup)
    with pytest.raises(ValueError, match="the i2t shortlist is t2i over 18 queries"):
        evaluate_reranked(first, i2t=t2i, t2i=i2t, lookup=lookup)
    with pytest.raises(ValueError, match=r"scores of shape \(2,\) for 24 pairs"):
        scores_of(i2t, lambda images, texts: np.zeros(2, np.float32))
    other = {**split, "images": -split["images"]}
    with pytest.raises(ValueError, match="same embeddings"):
        evaluate_reranked(
            first,
            i2t=listed(other, "i2t", 4),
            t2i=t2i,
            lookup=lambda images, texts: np.zeros(len(images), np.float32),
        )


def test_scores_of_leaves_padding_nan():
    found = Candidates(
        "t2i",
        np.array([4]),
        np.array([[2, -1, 3]]),
        np.array([[1.0, -np.inf, 0.5]], np.float32),
        np.zeros((1, 3), bool),
    )
    scores = scores_of(found, lambda images, texts: (10 * images + texts).astype(np.float32))
    np.testing.assert_array_equal(scores, np.array([[24.0, np.nan, 34.0]], np.float32))


def test_agreement_equals_scipy_row_by_row():
    rng = np.random.default_rng(4)
    student, teacher = rng.integers(0, 6, (30, 9)).astype(np.float32), rng.integers(0, 6, (30, 9)).astype(np.float32)
    teacher[rng.random((30, 9)) < 0.2] = np.nan
    valid = rng.random((30, 9)) < 0.9
    found = agreement(student, teacher, valid=valid)
    rho, tau = [], []
    for ours, theirs, there in zip(student, teacher, valid & ~np.isnan(teacher), strict=True):
        rho.append(spearmanr(ours[there], theirs[there]).statistic)
        tau.append(kendalltau(ours[there], theirs[there]).statistic)
    assert found.spearman == pytest.approx(np.mean(rho))
    assert found.kendall == pytest.approx(np.mean(tau))
    assert (found.queries, found.undefined) == (30, 0)


def test_agreement_by_hand():
    nan = np.nan
    teacher = np.array([[3, 2, 1], [3, 2, 1], [3, 3, 1], [1, 1, 1], [1, nan, nan]], np.float32)
    student = np.array([[9, 5, 2], [2, 5, 9], [4, 4, 1], [3, 2, 1], [1, 2, 3]], np.float32)
    found = agreement(student, teacher)
    # third: the student cannot say which is best; fourth: any is a best one of the teacher's; fifth: one is left
    assert (found.top1, found.queries, found.undefined) == (50.0, 4, 1)
    assert found.spearman == pytest.approx((1 - 1 + 1) / 3)
    assert found.kendall == pytest.approx((1 - 1 + 1) / 3)
    with pytest.raises(ValueError, match="no query has two candidates"):
        agreement(student[4:], teacher[4:])
    with pytest.raises(ValueError, match="1 student similarities are NaN"):
        agreement(np.array([[nan, 1.0]], np.float32), np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="share one"):
        agreement(student, teacher[:2])
    constant = agreement(np.ones((2, 3), np.float32), teacher[:2])
    assert np.isnan(constant.spearman)
    assert (constant.top1, constant.undefined) == (0.0, 2)


def test_gap_closed():
    assert gap_closed({"rsum": 200.0}, {"rsum": 210.0}, {"rsum": 240.0}) == 25.0
    assert gap_closed({"rsum": 200.0}, {"rsum": 190.0}, {"rsum": 240.0}) == -25.0
    assert gap_closed({"rsum": 200.0}, {"rsum": 210.0}, {"rsum": 200.0}) is None
    assert gap_closed({"r": 1.0}, {"r": 3.0}, {"r": 2.0}, key="r") == 200.0
