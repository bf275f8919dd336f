"""The index against numpy and against exact rational arithmetic on small whole numbers."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import exact
from distill.faiss_setup import MissingFaissError, bounded_threads, faiss_module, set_nprobe, wants_gpu
from distill.index import GPU_MAX_K, VectorIndex


def unit(rng, count, dim):
    vectors = rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def slow_search(queries, items, ids, k):
    """Every pair in a loop, sorted by (similarity down, id up)."""
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for row, query in enumerate(queries):
        scored = [
            (-np.float32(float(np.dot(query.astype(float), item.astype(float)))), int(one))
            for item, one in zip(items, ids, strict=True)
        ]
        for column, (value, one) in enumerate(sorted(scored)[:k]):
            similarity[row, column], found[row, column] = -value, one
    return similarity, found


@pytest.mark.parametrize("k", [1, 3, 40, 57])
def test_flat_equals_numpy_with_ids_in_any_order(k):
    rng = np.random.default_rng(0)
    items, queries, ids = unit(rng, 40, 12), unit(rng, 9, 12), rng.permutation(1000)[:40]
    similarity, found = VectorIndex.build(items, ids).search(queries, k)
    wanted, wanted_ids = slow_search(queries, items, ids, k)
    np.testing.assert_array_equal(found, wanted_ids)
    np.testing.assert_array_equal(similarity, wanted)
    assert similarity.dtype == np.float32
    assert found.dtype == np.int64


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ties_go_to_the_lower_id_in_every_search(data):
    """Whole numbers from a small range tie all the time, at the k-th place too."""
    n, b, dim = (data.draw(st.integers(1, 60)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    items, queries = (rng.integers(-1, 2, (count, dim)).astype(np.float32) for count in (n, b))
    ids, k = rng.permutation(5 * n)[:n], data.draw(st.integers(1, n + 3))
    wanted = slow_search(queries, items, ids, k)
    index = VectorIndex.build(items, ids)
    for found in (index.search(queries, k), index.search_exactly(queries, k)):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_a_collapsed_model_gives_the_lowest_ids_not_an_accident():
    same = np.repeat(unit(np.random.default_rng(1), 1, 37), 500, axis=0)
    _, found = VectorIndex.build(same, np.arange(500)[::-1]).search(same[:30], 7)
    np.testing.assert_array_equal(found, np.tile(np.arange(7), (30, 1)))


def test_what_faiss_rounds_away_at_the_last_place_is_found_again():
    """A stand-in for FAISS that prefers the last of equal items, as a kernel with another rounding may."""

    class Contrary:
        def search(self, queries, depth):
            similarity = queries @ items.T + np.linspace(0, 1e-7, len(items), dtype=np.float32)
            rows = np.argsort(-similarity, axis=1, kind="stable")[:, :depth]
            return np.take_along_axis(similarity, rows, axis=1), rows

    rng = np.random.default_rng(8)
    items, queries = unit(rng, 300, 16), unit(rng, 10, 16)
    items[50:250] = items[50]  # more equal ones than any search looks at
    items[280:290] = items[7]
    queries[:3], queries[3:5] = items[50], items[7]
    index = VectorIndex.build(items, np.arange(300))
    faiss_index, index._index = index._index, Contrary()
    for k in (1, 4, 20):
        for found, wanted in zip(index.search(queries, k), slow_search(queries, items, np.arange(300), k), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert faiss_index.ntotal == 300  # kept alive: the vectors are its memory


def test_equal_items_tie_exactly_whatever_the_batch():
    rng = np.random.default_rng(2)
    items, queries = unit(rng, 300, 71), unit(rng, 64, 71)
    items[[5, 150, 299]] = items[77]
    index = VectorIndex.build(items, np.arange(300))
    together, alone = index.search(queries, 300), [index.search(query[None], 300) for query in queries]
    np.testing.assert_array_equal(together[0], np.concatenate([one[0] for one in alone]))
    np.testing.assert_array_equal(together[1], np.concatenate([one[1] for one in alone]))
    for values, ids in zip(*together, strict=True):
        copies = np.flatnonzero(np.isin(ids, [5, 77, 150, 299]))
        assert ids[copies].tolist() == [5, 77, 150, 299]
        assert len(set(values[copies].tolist())) == 1


def test_exact_search_is_the_same_over_many_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    items, queries = rng.integers(-2, 3, (90, 4)).astype(np.float32), rng.integers(-2, 3, (20, 4)).astype(np.float32)
    wanted = slow_search(queries, items, np.arange(90), 11)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 7)
    monkeypatch.setattr(exact, "CELLS", 7 * 13)
    assert len(list(exact.item_blocks(items))) == 7
    for found in (
        exact.search(queries, items, 11, ids=np.arange(90)),
        VectorIndex.build(items, np.arange(90)).search(queries, 11),
    ):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_similarity_to_chosen_items():
    rng = np.random.default_rng(4)
    items, queries = unit(rng, 10, 6), unit(rng, 2, 6)
    index = VectorIndex.build(items, 10 * np.arange(10))
    found = index.similarity_to(queries, np.array([[20, -1, 90], [5, 0, 1000]]))
    wanted = [[queries[0] @ items[2], -np.inf, queries[0] @ items[9]], [-np.inf, queries[1] @ items[0], -np.inf]]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(index.contains(np.array([0, 5, 90, 91, -1])), [True, False, True, False, False])


@pytest.mark.parametrize(("factory", "nprobe"), [("Flat", None), ("IVF8,Flat", 3), ("IVF8,PQ4x4", 8), ("HNSW8", None)])
def test_saved_index_answers_the_same(tmp_path, factory, nprobe):
    rng = np.random.default_rng(5)
    items, queries = unit(rng, 700, 16), unit(rng, 20, 16)
    index = VectorIndex.build(items, np.arange(700) + 3, factory=factory, nprobe=nprobe)
    index.save(tmp_path / "index")
    again = VectorIndex.load(tmp_path / "index")
    for before, after in zip(index.search(queries, 9), again.search(queries, 9), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (len(again), again.dim, again.factory) == (700, 16, factory)
    assert not again.on_gpu


def test_approximate_indexes_give_exact_similarities_and_say_what_they_miss():
    rng = np.random.default_rng(6)
    items, queries, ids = unit(rng, 800, 8), unit(rng, 30, 8), np.arange(800)
    narrow = VectorIndex.build(items, ids, factory="IVF20,Flat", nprobe=1)
    similarity, found = narrow.search(queries, 100)
    there = found >= 0
    assert not there.all()  # one list of twenty cannot hold a hundred
    assert np.isneginf(similarity[~there]).all()
    rows = np.nonzero(there)[0]
    np.testing.assert_allclose(
        similarity[there], np.sum(queries[rows] * items[found[there]], axis=1), rtol=1e-5, atol=1e-6
    )
    assert narrow.recall_against_exact(queries, 10) < 0.9
    with pytest.raises(ValueError, match=r"finds \d+\.\d% of the true 10 nearest items over 30 queries.*nprobe"):
        narrow.recall_against_exact(queries, 10, floor=0.95)
    wide = VectorIndex.build(items, ids, factory="IVF20,Flat", nprobe=20)
    assert wide.recall_against_exact(queries, 10, floor=1.0) == 1.0
    truth = slow_search(queries, items, ids, 10)[1]
    recall = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(narrow.search(queries, 10)[1].tolist(), truth.tolist(), strict=True)]
    )
    assert narrow.recall_against_exact(queries, 10) == pytest.approx(recall)


def test_nprobe_reaches_an_index_behind_a_transform():
    items = unit(np.random.default_rng(7), 600, 8)
    index = VectorIndex.build(items, np.arange(600), factory="RR8,IVF40,Flat", nprobe=40)
    assert index.recall_against_exact(items[:50], 10) == 1.0
    assert VectorIndex.build(items, np.arange(600), factory="RR8,IVF40,Flat").recall_against_exact(items[:50], 10) < 1.0


@pytest.mark.parametrize(
    ("factory", "nprobe", "message"),
    [
        ("IVFx", None, "cannot make the index 'IVFx' over 50 vectors of width 4"),
        ("IVF64,Flat", None, "fewer lists than vectors"),
        ("Flat", 3, "nprobe is 3, but the factory 'Flat' makes no IVF index"),
    ],
)
def test_bad_factories_say_what_to_do(factory, nprobe, message):
    with pytest.raises(ValueError, match=message):
        VectorIndex.build(unit(np.random.default_rng(0), 50, 4), np.arange(50), factory=factory, nprobe=nprobe)


def test_nprobe_out_of_range():
    faiss = faiss_module()
    with pytest.raises(ValueError, match="nprobe is 9; .* 1 to 4"):
        set_nprobe(faiss, faiss.index_factory(4, "IVF4,Flat"), 9, factory="IVF4,Flat")


def test_bad_items_are_refused_by_id():
    vectors = np.ones((4, 3), np.float32)
    for ids, message in [
        ([0, 1, 1, 2], "more than once: 1"),
        ([0, 1, -1, 2], "must not be negative"),
        ([0, 1, 2], r"got \(4, 3\) and \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            VectorIndex.build(vectors, np.array(ids))
    vectors[2, 1], vectors[0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 vectors are not finite; ids 70, 90"):
        VectorIndex.build(vectors, np.array([90, 80, 70, 60]))
    with pytest.raises(ValueError, match=r"must be \(N, D\) with N, D > 0"):
        VectorIndex.build(np.empty((0, 3), np.float32), np.empty(0, np.int64))
    with pytest.raises(ValueError, match="ids must be integers, got float64"):
        VectorIndex.build(np.ones((1, 3), np.float32), np.array([0.5]))


def test_bad_queries_are_refused():
    index = VectorIndex.build(np.eye(3, dtype=np.float32), np.arange(3))
    with pytest.raises(ValueError, match=r"must be \(B, 3\) like the indexed items, got \(1, 4\)"):
        index.search(np.ones((1, 4), np.float32), 1)
    with pytest.raises(ValueError, match="1 queries are not finite; rows 1"):
        index.search(np.array([[0, 0, 1], [0, np.nan, 1]], np.float32), 1)
    for search in (index.search, index.search_exactly):
        with pytest.raises(ValueError, match="k is 0"):
            search(np.ones((1, 3), np.float32), 0)
    assert index.search(np.empty((0, 3), np.float32), 2)[1].shape == (0, 2)


def test_the_gpu_limit_is_stated():
    index = VectorIndex.build(np.eye(3, dtype=np.float32), np.arange(3))
    assert index.max_k is None
    index.on_gpu = True
    with pytest.raises(ValueError, match=f"k is {GPU_MAX_K + 1}; .* at most {GPU_MAX_K}.*limit on a GPU"):
        index.search(np.eye(3, dtype=np.float32), GPU_MAX_K + 1)


def test_gpu_is_taken_where_there_is_one_and_refused_where_not():
    class WithGpu:
        StandardGpuResources = object
        get_num_gpus = staticmethod(lambda: 1)

    class Without:
        get_num_gpus = staticmethod(lambda: 0)

    assert wants_gpu(WithGpu, "auto")
    assert not wants_gpu(WithGpu, "cpu")
    assert not wants_gpu(Without, "auto")
    with pytest.raises(ValueError, match="finds none"):
        wants_gpu(Without, "gpu")


@pytest.mark.parametrize("damage", ["cut", "missing", "changed"])
def test_damaged_files_are_refused(tmp_path, damage):
    folder = tmp_path / "index"
    VectorIndex.build(np.eye(3, dtype=np.float32), np.arange(3)).save(folder)
    path = folder / "index.faiss"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.faiss is missing or is not what was saved"):
        VectorIndex.load(folder)
    with pytest.raises(FileNotFoundError, match="no index in"):
        VectorIndex.load(tmp_path / "elsewhere")


def test_an_index_of_another_format_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="format is 9, expected 1"):
        VectorIndex.load(tmp_path)


def test_threads_are_a_share_of_the_cores_and_are_put_back(monkeypatch):
    faiss = faiss_module()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(6)
    try:
        for processes, wanted in [("2", 4), ("64", 1), ("1", 6)]:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
            with bounded_threads(faiss) as share:
                assert share == wanted
                assert faiss.omp_get_max_threads() == wanted
            assert faiss.omp_get_max_threads() == 6
    finally:
        faiss.omp_set_num_threads(before)


def test_missing_faiss_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingFaissError, match=r'pip install "cross2dual\[cpu\]".*never both'):
        VectorIndex.build(np.eye(2, dtype=np.float32), np.arange(2))


def test_importing_is_cheap():
    names = ["index", "mine", "metrics", "evaluate", "search", "filters", "exact", "report.table", "report.sheet"]
    code = (
        f"import sys\nimport {', '.join('distill.' + name for name in names)}\n"
        "heavy = {'torch', 'transformers', 'faiss', 'datasets', 'scipy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vectors_outlive_the_index_they_came_from(tmp_path):
    made = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    ids = np.arange(5000)[::-1].copy()
    VectorIndex.build(made, ids).save(tmp_path / "index")
    kept = [VectorIndex.load(tmp_path / "index", device="cpu").vectors() for _ in range(3)]
    gc.collect()
    np.random.default_rng(1).normal(size=(50, 5000, 8))  # writes over memory that was given back
    for vectors in kept:
        np.testing.assert_array_equal(vectors, made[::-1])
