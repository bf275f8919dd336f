"""Mining against a brute-force full sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import mine as mine_module
from distill.data.matches import Matches
from distill.index import VectorIndex
from distill.mine import MineSettings, TeacherMargin, check_k, filter_by_teacher, mine
from distill.protocols import Candidates


def slow_mine(problem, settings, drop=lambda query, item: False):
    """Full sort of every row: -> lists of (item, similarity) of the matches and of the negatives."""
    rows = []
    for query_id, query in zip(problem["query_ids"], problem["queries"], strict=True):
        everything = []
        for item_id, item in zip(problem["item_ids"], problem["items"], strict=True):
            everything.append((-float(np.float32(query.astype(float) @ item.astype(float))), int(item_id)))
        everything.sort()
        positives = [one for one in everything if (query_id, one[1]) in problem["true"]]
        others = [one for one in everything if (query_id, one[1]) not in problem["true"]]
        left = [one for one in others[settings.skip_top :] if not drop(query_id, one[1])]
        rows.append((positives[: settings.with_positives], left[: settings.k]))
    return rows


def assert_same(found, wanted, settings):
    assert found.item_ids.shape == (len(wanted), settings.with_positives + settings.k)
    for row, (positives, negatives) in enumerate(wanted):
        for part, rows, positive in (
            (slice(None, settings.with_positives), positives, True),
            (slice(settings.with_positives, None), negatives, False),
        ):
            there = found.item_ids[row, part] >= 0
            assert found.item_ids[row, part][there].tolist() == [one for _, one in rows]
            assert found.similarity[row, part][there].tolist() == [-value for value, _ in rows]
            assert np.isneginf(found.similarity[row, part][~there]).all()
            assert there[: len(rows)].all()  # nothing between, padding only at the end
            assert (found.positive[row, part] == (there & positive)).all()


def make_problem(rng, *, b, n, dim, direction, density, whole):
    """Queries and items whose ids are scattered through a larger corpus; matches inside and outside of the index."""
    corpus = 3 * (b + n)
    draw = (lambda shape: rng.integers(-1, 2, shape)) if whole else rng.standard_normal
    query_ids, item_ids = rng.permutation(corpus)[:b], rng.permutation(corpus)[:n]
    truth = np.argwhere(rng.random((corpus, corpus)) < density)
    columns = truth if direction == "i2t" else truth[:, ::-1]
    return {
        "queries": draw((b, dim)).astype(np.float32),
        "items": draw((n, dim)).astype(np.float32),
        "query_ids": query_ids,
        "item_ids": item_ids,
        "true": {tuple(pair) for pair in truth.tolist()},
        "matches": Matches(columns[:, 0], columns[:, 1], n_images=corpus, n_texts=corpus),
        "direction": direction,
    }


def run(problem, settings, *, drop=None, **index_options):
    index = VectorIndex.build(problem["items"], problem["item_ids"], **index_options)
    return mine(
        index,
        problem["queries"],
        query_ids=problem["query_ids"],
        matches=problem["matches"],
        direction=problem["direction"],
        settings=settings,
        drop=drop,
    )


def most_matches(problem):
    items = set(problem["item_ids"].tolist())
    return max(sum((query, item) in problem["true"] for item in items) for query in problem["query_ids"].tolist())


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_equals_brute_force(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    problem = make_problem(
        rng,
        b=data.draw(st.integers(1, 12)),
        n=data.draw(st.integers(4, 30)),
        dim=data.draw(st.integers(1, 4)),
        direction=data.draw(st.sampled_from(["i2t", "t2i"])),
        density=data.draw(st.sampled_from([0.0, 0.05, 0.3])),
        whole=data.draw(st.booleans()),
    )
    left = len(problem["items"]) - most_matches(problem)
    if left < 1:
        return
    k = data.draw(st.integers(1, left))
    options = MineSettings(k, skip_top=data.draw(st.integers(0, left - k)), with_positives=data.draw(st.integers(0, 4)))
    odd = data.draw(st.sampled_from([2, 3, 1000]))
    drops = data.draw(st.booleans())
    found = run(problem, options, drop=(lambda q, i: (q + i) % odd == 0) if drops else None)
    wanted = slow_mine(problem, options, (lambda q, i: (q + i) % odd == 0) if drops else lambda q, i: False)
    assert_same(found, wanted, options)
    queries, items = found.pairs() if problem["direction"] == "i2t" else found.pairs()[::-1]
    negative = ~found.positive[found.item_ids >= 0]
    assert (
        not {pair for pair in zip(queries[negative].tolist(), items[negative].tolist(), strict=True)} & problem["true"]
    )


def test_small_blocks_change_nothing(monkeypatch):
    problem = make_problem(np.random.default_rng(0), b=37, n=50, dim=2, direction="t2i", density=0.1, whole=True)
    options = MineSettings(6, skip_top=2, with_positives=3)
    whole = run(problem, options)
    monkeypatch.setattr(mine_module, "_BLOCK", 5)
    monkeypatch.setattr(mine_module, "_CELLS", 40)
    parts = run(problem, options)
    for name in ("query_ids", "item_ids", "similarity", "positive"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.positive.any()


def test_captions_of_the_same_image_never_come_back():
    """Five captions an image, all of them the most similar items there are."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((20, 8)).astype(np.float32)
    texts = np.repeat(images, 5, axis=0)
    matches = Matches(np.arange(100) // 5, np.arange(100), n_images=20, n_texts=100)
    found = mine(
        VectorIndex.build(texts, np.arange(100)),
        images,
        query_ids=np.arange(20),
        matches=matches,
        direction="i2t",
        settings=MineSettings(10, with_positives=5),
    )
    np.testing.assert_array_equal(found.item_ids[:, :5], np.arange(100).reshape(20, 5))
    assert found.positive[:, :5].all()
    assert not (found.item_ids[:, 5:] // 5 == np.arange(20)[:, None]).any()
    assert (found.item_ids >= 0).all()


def test_a_drop_that_refuses_the_nearest_is_answered_by_deeper_search():
    problem = make_problem(np.random.default_rng(2), b=6, n=200, dim=3, direction="i2t", density=0.01, whole=False)
    asked = []

    def drop(queries, items):
        asked.append(len(items))
        return items % 10 != 0  # nine in ten

    options = MineSettings(8)
    found = run(problem, options, drop=drop)
    assert_same(found, slow_mine(problem, options, lambda query, item: item % 10 != 0), options)
    assert asked[0] < asked[-1] or len(asked) > 1


def test_a_drop_that_leaves_too_few_gives_padding():
    problem = make_problem(np.random.default_rng(3), b=4, n=30, dim=3, direction="t2i", density=0.02, whole=False)
    found = run(problem, MineSettings(5), drop=lambda queries, items: items != problem["item_ids"][0])
    assert ((found.item_ids >= 0).sum(axis=1) <= 1).all()
    assert (found.item_ids[:, 1:] == -1).all()


def test_an_approximate_index_gives_full_rows():
    problem = make_problem(np.random.default_rng(4), b=25, n=400, dim=6, direction="i2t", density=0.02, whole=False)
    options = MineSettings(60, with_positives=2)
    found = run(problem, options, factory="IVF20,Flat", nprobe=1)  # 20 items a list, on average
    assert (found.item_ids[:, 2:] >= 0).all()
    queries, items = found.pairs()
    negative = ~found.positive[found.item_ids >= 0]
    assert not set(zip(queries[negative].tolist(), items[negative].tolist(), strict=True)) & problem["true"]


def test_searches_deeper_than_a_gpu_can_are_exact(monkeypatch):
    problem = make_problem(np.random.default_rng(5), b=5, n=60, dim=3, direction="i2t", density=0.05, whole=True)
    monkeypatch.setattr(VectorIndex, "max_k", property(lambda self: 10))
    options = MineSettings(20, skip_top=3)
    assert_same(run(problem, options), slow_mine(problem, options), options)


@pytest.mark.parametrize(("k", "n", "most", "skip", "largest"), [(6, 10, 5, 0, 5), (5, 10, 5, 1, 4), (1, 3, 3, 0, 1)])
def test_check_k_refuses_what_the_corpus_cannot_give(k, n, most, skip, largest):
    with pytest.raises(ValueError, match=f"k is {k}, but of {n} items .* set k to {largest} or less"):
        check_k(k, n, most, skip_top=skip)
    check_k(n - most - skip or 0, n, most, skip_top=skip)


def test_mine_refuses_before_it_searches(monkeypatch):
    problem = make_problem(np.random.default_rng(6), b=3, n=10, dim=2, direction="i2t", density=0.0, whole=False)
    monkeypatch.setattr(VectorIndex, "search", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match="k is 11, but of 10 items"):
        run(problem, MineSettings(11))
    with pytest.raises(ValueError, match=r"query_ids must be \(3,\)"):
        run(problem | {"query_ids": np.arange(4)}, MineSettings(2))
    for bad in ({"k": 0}, {"k": 1, "skip_top": -1}, {"k": 1, "with_positives": -1}):
        with pytest.raises(ValueError, match="at least"):
            MineSettings(**bad)


def score_table(problem, rng):
    size = problem["matches"].n_images
    return rng.standard_normal((size, size)).astype(np.float32)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_teacher_margin_equals_brute_force(direction):
    rng = np.random.default_rng(7)
    problem = make_problem(rng, b=10, n=40, dim=3, direction=direction, density=0.1, whole=False)
    table = score_table(problem, rng)  # [image, text]

    def score(query, item):
        return float(table[query, item] if direction == "i2t" else table[item, query])

    def too_good(query, item):
        best = max(score(query, one) for one in range(len(table)) if (query, one) in problem["true"])
        return score(query, item) > np.float32(best) + np.float32(-0.8)

    options = MineSettings(9)
    drop = TeacherMargin(-0.8, lambda images, texts: table[images, texts], problem["matches"], direction)
    found = run(problem, options, drop=drop)
    assert_same(found, slow_mine(problem, options, too_good), options)
    assert not np.array_equal(found.item_ids, run(problem, options).item_ids)


def test_teacher_margin_and_missing_scores():
    matches = Matches(np.array([0, 1]), np.array([0, 1]), n_images=3, n_texts=3)
    table = np.array([[0.0, np.nan, 2.0], [5.0, np.nan, 0.0], [0.0, 0.0, 0.0]], np.float32)
    queries, items = np.array([0, 0]), np.array([1, 2])

    def lookup(images, texts):
        return table[images, texts]

    with pytest.raises(ValueError, match="has not scored 1 of 2 candidates"):
        TeacherMargin(1.0, lookup, matches, "i2t")(queries, items)
    assert TeacherMargin(1.0, lookup, matches, "i2t", unasked="keep")(queries, items).tolist() == [False, True]
    assert TeacherMargin(2.0, lookup, matches, "i2t", unasked="keep")(queries, items).tolist() == [False, False]
    with pytest.raises(ValueError, match="1 queries have no match with a teacher score.*query ids 1"):
        TeacherMargin(1.0, lookup, matches, "i2t")(np.array([1]), np.array([0]))


def test_filter_by_teacher_on_an_over_mined_list():
    nan = np.nan
    found = Candidates(
        "i2t",
        np.array([7, 8]),
        np.array([[3, 1, 4, 5, 9], [2, 6, 0, -1, -1]]),
        np.array([[0.9, 0.8, 0.7, 0.6, 0.5], [0.4, 0.3, 0.2, -np.inf, -np.inf]], np.float32),
        np.array([[True, False, False, False, False], [False, False, False, False, False]]),
    )
    scores = np.array([[nan, 3.5, 2.0, 3.0, 1.0], [0.0, 0.6, 0.5, nan, nan]], np.float32)
    kept = filter_by_teacher(
        found, scores=scores, positive_scores=np.array([2.0, -0.5], np.float32), margin=1.0, keep=2
    )
    np.testing.assert_array_equal(kept.item_ids, [[3, 4, 5], [-1, 2, 0]])
    np.testing.assert_array_equal(kept.similarity, np.array([[0.9, 0.7, 0.6], [-np.inf, 0.4, 0.2]], np.float32))
    np.testing.assert_array_equal(kept.positive, [[True, False, False], [False, False, False]])
    with pytest.raises(ValueError, match="2 teacher scores of candidates or matches are missing"):
        filter_by_teacher(
            found,
            scores=np.where(scores == 0.6, nan, scores),
            positive_scores=np.array([nan, 0], np.float32),
            margin=1.0,
            keep=2,
        )
    with pytest.raises(ValueError, match="keep is 0"):
        filter_by_teacher(found, scores=scores, positive_scores=np.zeros(2, np.float32), margin=1.0, keep=0)
    with pytest.raises(ValueError, match="scores must be"):
        filter_by_teacher(found, scores=scores[:, :2], positive_scores=np.zeros(2, np.float32), margin=1.0, keep=1)
