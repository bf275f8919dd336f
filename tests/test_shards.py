"""Shards on disk, and an index over them against one over all: the same ids, similarities and order."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from distill.data.matches import Matches
from distill.durable import NotWrittenError
from distill.index import VectorIndex
from distill.mine import MineSettings, mine
from distill.shard_commands import app
from distill.shard_index import ShardedIndex
from distill.shard_search import MissingUnitsError, ShardSearch, merge, search_shard
from distill.shard_writer import ShardWriter, blocks_of, write_shards
from distill.shards import BadShardsError, Shards
from tests.test_index import unit


def written(folder: Path, vectors: np.ndarray, ids: np.ndarray, size: int) -> Shards:
    return write_shards(folder, "made", ids, blocks_of(vectors, 7), dim=vectors.shape[1], shard_items=size)


def assert_same(one: tuple[np.ndarray, ...], two: tuple[np.ndarray, ...]) -> None:
    for mine_, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine_, theirs)
        assert mine_.dtype == theirs.dtype


def problem(data: st.DataObject) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Items, ascending ids, queries and a shard's size; whole numbers from a small range tie all the time."""
    n, b, dim = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    whole = data.draw(st.booleans())
    items, queries = (
        rng.integers(-1, 2, (count, dim)).astype(np.float32) if whole else unit(rng, count, dim) for count in (n, b)
    )
    if data.draw(st.booleans()):  # duplicates, across shards too
        items = items[rng.integers(0, max(1, n // 4), n)]
    return items, np.sort(rng.permutation(4 * n)[:n]), queries, data.draw(st.integers(1, n + 2))


KEEP_FOLDER = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@KEEP_FOLDER
@given(st.data())
def test_flat_shards_answer_as_one_flat_index(tmp_path: Path, data: st.DataObject) -> None:
    items, ids, queries, size = problem(data)
    folder = tmp_path / str(time.monotonic_ns())
    sharded, whole = ShardedIndex(written(folder, items, ids, size)), VectorIndex.build(items, ids)
    k = data.draw(st.integers(1, len(ids) + 3))  # more than a shard holds, too
    assert_same(sharded.search(queries, k), whole.search(queries, k))
    assert_same(sharded.search_exactly(queries, k), whole.search_exactly(queries, k))
    asked = np.random.default_rng(k).integers(-1, ids.max() + 3, (len(queries), 5))
    np.testing.assert_array_equal(sharded.similarity_to(queries, asked), whole.similarity_to(queries, asked))
    np.testing.assert_array_equal(sharded.contains(asked), whole.contains(asked))
    assert (len(sharded), sharded.dim, sharded.exact, sharded.max_k) == (len(ids), items.shape[1], True, None)
    np.testing.assert_array_equal(sharded.ids, ids)
    assert sharded.recall_against_exact(queries, min(k, len(ids))) == 1


@KEEP_FOLDER
@given(st.data())
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_mining_from_shards_is_mining_from_one_index(tmp_path: Path, direction: str, data: st.DataObject) -> None:
    items, ids, queries, size = problem(data)
    rng = np.random.default_rng(len(ids))
    asking = np.sort(rng.permutation(60)[: len(queries)])
    corpus = 4 * len(ids) + 60
    true = np.stack([rng.choice(asking, 40), rng.choice(ids, 40)])
    images, texts = true if direction == "i2t" else true[::-1]
    matches = Matches(images, texts, n_images=corpus, n_texts=corpus)
    most = int(np.unique(np.unique(true, axis=1)[0], return_counts=True)[1].max())
    if len(ids) - most < 1:
        return
    options = MineSettings(data.draw(st.integers(1, len(ids) - most)), with_positives=2)
    folder = tmp_path / str(time.monotonic_ns())
    drop = data.draw(st.sampled_from([None, lambda q, i: (q + i) % 3 == 0]))
    sharded = ShardedIndex(written(folder / "items", items, ids, size))
    on_disk = written(folder / "queries", queries, asking, data.draw(st.integers(1, 9)))
    found = [
        mine(index, given, query_ids=asking, matches=matches, direction=direction, settings=options, drop=drop)
        for index, given in ((VectorIndex.build(items, ids), queries), (sharded, on_disk))
    ]
    for name in ("item_ids", "similarity", "positive"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


def test_units_of_other_processes_merge_to_the_same_and_lost_ones_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items, queries = unit(rng, 83, 8), unit(rng, 31, 8)
    items[40:60] = items[:20]
    ids, asking = np.arange(83) * 2 + 1, np.arange(31)
    written(tmp_path / "items", items, ids, 20)
    written(tmp_path / "queries", queries, asking, 12)
    search = ShardSearch(tmp_path / "items", tmp_path / "queries", 25, tmp_path / "out")
    assert len(search.units) == 5 * 3
    with pytest.raises(MissingUnitsError, match="15 of 15 units are not in .*shard 0 x block 0"):
        list(merge(search))
    for part in range(3):  # as three tasks of an array would, the last one first
        again: ShardSearch = pickle.loads(pickle.dumps(search))
        assert len(list(search_shard(again, again.units[2 - part :: 3], device="cpu"))) == 5
    merged = [np.concatenate(each) for each in zip(*merge(search), strict=True)]
    np.testing.assert_array_equal(merged[0], asking)
    assert_same(tuple(merged[1:]), VectorIndex.build(items, ids).search(queries, 25))
    before = search.path(search.units[4]).stat().st_mtime_ns
    list(search_shard(search, search.units, device="cpu"))
    assert search.path(search.units[4]).stat().st_mtime_ns == before  # what is there is done
    lost, torn = (search.path(search.units[n]) for n in (7, 3))
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{torn.name} is not what was written .* do its unit again"):
        list(merge(search))
    lost.unlink()
    with pytest.raises(MissingUnitsError, match="1 of 15 units .*: shard 2 x block 1"):
        list(merge(search))
    other = ShardSearch(tmp_path / "items", tmp_path / "queries", 26, tmp_path / "out")
    assert len(other.missing) == 15  # another k is another search


def test_an_approximate_index_is_trained_once_over_all_shards_and_its_recall_is_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng, 30, 16)
    items = unit(rng, 3000, 16) * 0.5 + centres[np.sort(rng.integers(0, 30, 3000))]  # shards differ in what they hold
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    queries = items[rng.permutation(3000)[:100]]
    shards = written(tmp_path, items, np.arange(3000), 700)
    one = VectorIndex.build(items, np.arange(3000), factory="IVF30,Flat", nprobe=3)
    index = ShardedIndex(shards, factory="IVF30,Flat", nprobe=3)
    assert not index.exact
    recall = index.recall_against_exact(queries, 10)
    assert recall == pytest.approx(one.recall_against_exact(queries, 10), abs=0.02)
    with pytest.raises(ValueError, match="finds .* less than the required 100.0%"):
        ShardedIndex(shards, factory="IVF30,Flat", nprobe=1).recall_against_exact(queries, 10, floor=1.0)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("index-*/[0-9t]*.faiss")}
    assert len(files) == 6  # five shards, and the trained one
    assert_same(ShardedIndex(shards, factory="IVF30,Flat", nprobe=3).search(queries, 10), index.search(queries, 10))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("index-*/[0-9t]*.faiss")} == files
    spoilt = next(path for path in files if path.stem == "00002")
    spoilt.write_bytes(spoilt.read_bytes()[:-8] + b"notright")
    with pytest.raises(ValueError, match=r"00002\.faiss is not what was saved: delete"):
        ShardedIndex(shards, factory="IVF30,Flat", nprobe=3).search(queries, 10)
    with pytest.raises(ValueError, match="FAISS cannot make the index 'IVF9999,Flat'"):
        ShardedIndex(shards, factory="IVF9999,Flat")
    assert_same(ShardedIndex(shards, factory="HNSW16").search_exactly(queries, 5), one.search_exactly(queries, 5))


def test_a_budget_says_how_many_shards_are_held(tmp_path: Path) -> None:
    items = unit(np.random.default_rng(0), 40, 8)
    shards = written(tmp_path, items, np.arange(40), 10)
    with pytest.raises(ValueError, match=r"shard 0 of .* has 10 items and takes 320 B, more than the 319 B allowed"):
        ShardedIndex(shards, memory_bytes=319)
    for budget, held in ((None, 1), (320, 1), (640, 2), (10_000, 4)):
        index = ShardedIndex(shards, memory_bytes=budget)
        index.search(items[:3], 2)
        assert len(index._open) == held


# --- writing and reading ----------------------------------------------------------------------------------------------


@KEEP_FOLDER
@given(st.data())
def test_what_is_put_in_any_order_is_read_by_rows(tmp_path: Path, data: st.DataObject) -> None:
    items, ids, _, size = problem(data)
    folder = tmp_path / str(time.monotonic_ns())
    writer = ShardWriter(folder, "made", ids, items.shape[1], shard_items=size)
    order = np.random.default_rng(0).permutation(len(ids))
    for rows in np.array_split(order, data.draw(st.integers(1, 5))):
        writer.put(rows, items[rows])
    shards = writer.finish()
    assert shards.shape == items.shape
    assert [shard.items for shard in shards.shards] == [len(ids[at : at + size]) for at in range(0, len(ids), size)]
    np.testing.assert_array_equal(shards[:], items)
    wanted = np.random.default_rng(1).integers(0, len(ids), (3, 4))
    np.testing.assert_array_equal(shards[wanted], items[wanted])
    np.testing.assert_array_equal(shards[2:9], items[2:9])
    np.testing.assert_array_equal(shards.rows_of(ids), np.arange(len(ids)))
    assert shards.rows_of(np.array([ids.max() + 1, -1])).tolist() == [-1, -1]
    assert not list(folder.glob("done-*")) + list(folder.glob("writing.json"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "at least one"), ([3, 3], "distinct, ascending"), ([4, 3], "ascending"), ([-1, 2], "not negative")],
)
def test_ids_that_cannot_be_searched_are_refused(tmp_path: Path, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(tmp_path, np.zeros((len(ids), 3), np.float32), np.array(ids, np.int64), 2)


def test_vectors_that_are_not_right_are_refused_by_id(tmp_path: Path) -> None:
    ids, items = np.arange(10) * 5, unit(np.random.default_rng(0), 10, 3)
    items[6, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 vectors are not finite; the first ids: \[30\]"):
        written(tmp_path, items, ids, 4)
    writer = ShardWriter(tmp_path, "made", ids, 3, shard_items=4)
    with pytest.raises(ValueError, match=r"vectors must be \(2, 3\), got \(2, 4\)"):
        writer.put(np.arange(2), np.zeros((2, 4), np.float32))
    for count in (9, 11):
        with pytest.raises(ValueError, match=r"10 ids"):
            write_shards(tmp_path, "made", ids, [np.zeros((count, 3), np.float32)], dim=3, shard_items=4)
    assert not (tmp_path / "shards.json").exists()
    with pytest.raises(FileNotFoundError, match="begun and not ended"):
        Shards(tmp_path)


def test_a_shard_that_is_not_what_was_written_is_refused_by_name(tmp_path: Path) -> None:
    items = unit(np.random.default_rng(0), 30, 8)
    shards = written(tmp_path, items, np.arange(30), 10)
    path = tmp_path / "00001.vectors.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    for index in (ShardedIndex(Shards(tmp_path)), ShardedIndex(shards)):
        with pytest.raises(BadShardsError, match=r"00001\.vectors\.npy is missing or is not what was written"):
            index.search(items[:2], 3)
    path.write_bytes(whole[:-5])
    with pytest.raises(BadShardsError, match=r"00001\.vectors\.npy is torn"):
        Shards(tmp_path)
    path.unlink()
    with pytest.raises(BadShardsError, match=r"00001\.vectors\.npy is missing"):
        Shards(tmp_path)
    np.save(path, items[10:20, :7])
    with pytest.raises(BadShardsError, match=r"00001\.vectors\.npy holds \(10, 7\), but shards\.json says \(10, 8\)"):
        Shards(tmp_path)
    path.write_bytes(whole)
    assert len(Shards(tmp_path)) == 30
    with pytest.raises(ValueError, match="holds vectors of made, not of other"):
        Shards(tmp_path, identity="other")
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(BadShardsError, match=r"shards\.json is torn"):
        Shards(tmp_path)


def test_searching_for_what_is_not_there_is_refused(tmp_path: Path) -> None:
    items = unit(np.random.default_rng(0), 9, 4)
    index = ShardedIndex(written(tmp_path / "items", items, np.arange(9), 4))
    for search in (index.search, index.search_exactly):
        with pytest.raises(ValueError, match=r"queries must be \(B, 4\)"):
            search(np.zeros((2, 5), np.float32), 2)
        with pytest.raises(ValueError, match="1 queries are not finite; rows 1"):
            search(np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]], np.float32), 2)
        with pytest.raises(ValueError, match="k is 0"):
            search(items, 0)
    with pytest.raises(IndexError, match="rows must be from 0 to 8"):
        index.shards[np.array([9])]
    written(tmp_path / "wide", unit(np.random.default_rng(0), 5, 6), np.arange(5), 4)
    with pytest.raises(ValueError, match="is 4 wide, but .* 6: not of one student"):
        ShardSearch(tmp_path / "items", tmp_path / "wide", 3, tmp_path).units  # noqa: B018


def _write_slowly(folder: Path, items: np.ndarray) -> None:
    def slow():
        for block in blocks_of(items, 10):
            yield block
            time.sleep(0.05)

    write_shards(folder, "made", np.arange(len(items)), slow(), dim=items.shape[1], shard_items=16)


def test_killed_while_writing_it_goes_on_and_asks_for_nothing_twice(tmp_path: Path) -> None:
    items = unit(np.random.default_rng(0), 200, 8)
    child = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(tmp_path, items))
    child.start()
    done = tmp_path / "done-0-of-1"
    while not done.is_file() or json.loads(done.read_text())["done"] < 4:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    told = json.loads(done.read_text())["done"]
    assert 4 <= told < 20
    asked = []

    def blocks():
        for number, block in enumerate(blocks_of(items, 10)):
            asked.append(number)
            yield block if number >= told else np.full_like(block, np.nan)  # not looked at again

    shards = write_shards(tmp_path, "made", np.arange(200), blocks(), dim=8, shard_items=16)
    np.testing.assert_array_equal(shards[:], items)
    whole = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    written(tmp_path, items, np.arange(200), 16)  # complete: opened as it is
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == whole


@pytest.mark.parametrize("change", ["identity", "ids", "size", "lost"])
def test_what_was_begun_for_something_else_is_begun_anew(tmp_path: Path, change: str) -> None:
    items = unit(np.random.default_rng(0), 20, 4)
    first = ShardWriter(tmp_path, "made", np.arange(20), 4, shard_items=6)
    first.put(np.arange(8), items[:8])
    first.keep()
    assert ShardWriter(tmp_path, "made", np.arange(20), 4, shard_items=6).done == 1
    if change == "lost":
        (tmp_path / "00001.vectors.npy").unlink()
    ids = np.arange(20) + (change == "ids")
    identity, size = ("other" if change == "identity" else "made"), (7 if change == "size" else 6)
    assert ShardWriter(tmp_path, identity, ids, 4, shard_items=size).done == 0


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = unit(np.random.default_rng(0), 20, 4)
    monkeypatch.chdir(tmp_path)
    np.save("items.npy", items)
    Path("done-list").touch()
    for size in (6, 7):  # begun anew for another size
        ShardWriter(tmp_path, "made", np.arange(20), 4, shard_items=size)
    done = CliRunner().invoke(app, ["write", "items.npy", ".", "--items", "8"])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load("items.npy"), items)
    assert Path("done-list").exists()
    assert sorted(path.name for path in tmp_path.glob("*.vectors.npy")) == [f"0000{n}.vectors.npy" for n in range(3)]


@pytest.mark.parametrize("change", ["ids", "size"])
def test_what_is_complete_in_another_way_is_neither_taken_nor_thrown_away(tmp_path: Path, change: str) -> None:
    items = unit(np.random.default_rng(0), 20, 4)
    written(tmp_path, items, np.arange(20), 6)
    with pytest.raises(ValueError, match="the first of 6 items: use another folder"):
        written(tmp_path, items, np.arange(20) + (change == "ids"), 7 if change == "size" else 6)
    np.testing.assert_array_equal(Shards(tmp_path)[:], items)


def test_a_full_disk_is_said_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="vectors of 1000000000 numbers need .* free: make room"):
        ShardWriter(tmp_path, "made", np.arange(100_000), 10**9, shard_items=10)
    writer = ShardWriter(tmp_path, "made", np.arange(4), 4, shard_items=2)
    (tmp_path / "00001.vectors.npy").unlink()
    os.symlink("/dev/full", tmp_path / "00001.vectors.npy")
    with pytest.raises(NotWrittenError, match=r"00001\.vectors\.npy could not be written: no room is left"):
        writer.put(np.arange(4), np.zeros((4, 4), np.float32))


def test_the_commands_cut_search_in_parts_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, rng = CliRunner(), np.random.default_rng(0)
    items, queries = unit(rng, 50, 6), unit(rng, 20, 6)
    monkeypatch.chdir(tmp_path)
    for name, vectors, size in (("items", items, 15), ("queries", queries, 8)):
        np.save(f"{name}.npy", vectors)
        done = runner.invoke(app, ["write", f"{name}.npy", name, "--items", str(size)])
        assert done.exit_code == 0, done.output
    what = ["items", "queries", "--k", "9", "--out", "out"]
    for part in ("1/2", "0/2"):
        done = runner.invoke(app, ["search", *what, "--part", part, "--device", "cpu"])
        assert done.exit_code == 0, done.output
    assert "0 of 12 are missing" in done.output
    (tmp_path / "out" / "neighbours-00009.npz").write_text("of a search that had more queries")
    done = runner.invoke(app, ["merge", *what])
    assert done.exit_code == 0, done.output
    found = [np.load(path) for path in sorted((tmp_path / "out").glob("neighbours-*.npz"))]
    merged = tuple(np.concatenate([each[name] for each in found]) for name in ("similarity", "ids"))
    assert_same(merged, VectorIndex.build(items, np.arange(50)).search(queries, 9))
    assert runner.invoke(app, ["search", *what, "--part", "2/2"]).exit_code == 2
    assert isinstance(runner.invoke(app, ["merge", *what[:3], "8", *what[4:]]).exception, MissingUnitsError)
    np.save("ids.npy", np.arange(49))
    done = runner.invoke(app, ["write", "items.npy", "other", "--items", "9", "--ids", "ids.npy"])
    assert "must hold (50,) ids" in str(done.exception)
    np.save("ids.npy", np.arange(50) / 2)
    done = runner.invoke(app, ["write", "items.npy", "other", "--items", "9", "--ids", "ids.npy"])
    assert "must hold (50,) ids, got float64 (50,)" in str(done.exception)
    Path("text.npy").write_text("no array")
    for name, words in (("text.npy", "is no .npy file of numbers"), ("gone.npy", "there is no file gone.npy")):
        done = runner.invoke(app, ["write", name, "other", "--items", "9"])
        assert words in str(done.exception)
    assert not Path("other").exists()


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = unit(np.random.default_rng(0), 40, 8)
    index = ShardedIndex(written(tmp_path, items, np.arange(40), 10))
    alive: weakref.WeakSet[VectorIndex] = weakref.WeakSet()
    seen, build = [], VectorIndex.build

    def counted(*arguments, **options):
        gc.collect()
        seen.append(len(alive))  # when the next one is about to be loaded
        alive.add(made := build(*arguments, **options))
        return made

    monkeypatch.setattr(VectorIndex, "build", counted)
    index.search(items[:5], 3)
    assert seen == [0, 0, 0, 0]
