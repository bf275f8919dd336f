import numpy as np
import pytest

from distill import pairtable
from distill.pairtable import Compacted, PairTable, empty_table, find_first, in_order, table_of


def some_parts(count, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        keys = np.unique(rng.integers(0, 5000, 400) if rng.random() < 0.5 else rng.integers(0, 10**9, 400))
        yield keys, rng.normal(size=len(keys)).astype(np.float32)


@pytest.mark.parametrize("run_pairs", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("n_base", [0, 3, 7])
def test_merging_runs_equals_a_dict_filled_in_order(tmp_path, run_pairs, n_base):
    parts = list(some_parts(7))
    base = table_of(parts[:n_base])
    expected = {key: score for keys, scores in parts for key, score in zip(keys.tolist(), scores, strict=True)}
    kept = pairtable.write_table(tmp_path, base, iter(parts[n_base:]), run_pairs=run_pairs)
    keys, scores = (np.load(tmp_path / name) for name in ("keys.npy", "scores.npy"))
    assert kept == len(expected) == len(scores) < sum(len(keys) for keys, _ in parts)
    assert keys.tolist() == sorted(expected)
    assert scores.tolist() == [expected[key] for key in sorted(expected)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.npy", "scores.npy"]  # no run is left


def test_merging_takes_stretches_of_bounded_size():
    runs = [table_of([part]) for part in some_parts(30)]
    for bound in (100, 1000):
        merged = list(pairtable._merged(runs, bound))
        assert len(merged) > 3
        assert max(len(keys) for keys, _ in merged) <= bound
        assert (np.diff(np.concatenate([keys for keys, _ in merged])) > 0).all()


def test_merging_nothing_gives_an_empty_table(tmp_path):
    assert pairtable.write_table(tmp_path, empty_table(), ()) == 0
    assert np.load(tmp_path / "keys.npy").shape == (0,)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_locate_equals_a_search_one_by_one(monkeypatch, block):
    monkeypatch.setattr(pairtable, "_FIND_PAIRS", block)
    rng = np.random.default_rng(block)
    hits = 0
    for _ in range(60):
        held = np.sort(rng.choice(300, rng.integers(0, 60), replace=False))
        wanted = np.sort(rng.integers(rng.integers(-1, 250), 310, rng.integers(0, 60)))
        place = {key: at for at, key in enumerate(held.tolist())}
        table = PairTable(held, held.astype(np.float32) / 2)
        assert table.locate(wanted).tolist() == [place.get(key, -1) for key in wanted.tolist()]
        found = [key / 2 if key in place else np.nan for key in wanted.tolist()]
        np.testing.assert_array_equal(table.find(wanted), np.float32(found))
        hits += int(np.isfinite(found).sum())
    assert hits > 100


def test_the_first_table_that_has_a_key_counts():
    one = PairTable(np.array([1, 3]), np.float32([10, 30]))
    two = PairTable(np.array([1, 2]), np.float32([11, 22]))
    expected = np.float32([30, np.nan, 10, 22, 30, np.nan])
    np.testing.assert_array_equal(find_first(np.array([3, -1, 1, 2, 3, 9]), one, two), expected)
    assert find_first(np.array([], np.int64), one, two).shape == (0,)


def test_units_are_in_order_of_time_then_name():
    stamps = {"b": (9, 5), "a": (1, 5), "c": (2, 4), "d": (0, 6)}
    assert in_order(stamps) == ["c", "a", "b", "d"]


@pytest.mark.parametrize(
    ("name", "time", "score", "expected"),
    [
        ("new", 8, 5.0, False),  # later than all: laid over
        ("new", 6, 5.0, True),  # older, and another score: the table's unit counts
        ("new", 6, 1.0, False),  # older, the same score
        ("m", 7, 5.0, True),  # as old as the latest: by name
        ("z", 7, 5.0, False),
        ("unit", 6, 1.0, True),  # an older state of a unit that the table holds
    ],
)
def test_an_older_unit_that_disagrees_cannot_be_laid_over_a_table(name, time, score, expected):
    made = Compacted(PairTable(np.array([4]), np.float32([1])), {"unit": (10, 7), "other": (10, 3)})
    assert made.outlasts(name, (10, time), (np.array([4, 5]), np.float32([score, 2]))) == expected


@pytest.mark.parametrize(
    "harm",
    [
        lambda table: (table / "keys.npy").unlink(),
        lambda table: (table / "manifest.json").write_text("[1, 2"),
        lambda table: (table / "manifest.json").write_text("[1, 2]"),
        lambda table: (table / "scores.npy").write_bytes((table / "scores.npy").read_bytes()[:-4]),
        lambda table: (table / "scores.npy").write_bytes((table / "scores.npy").read_bytes()),  # written since
    ],
)
def test_a_table_that_may_have_changed_is_not_opened(tmp_path, harm):
    origin = {"teacher_identity": "t"}
    path = pairtable.write_compacted(tmp_path, empty_table(), some_parts(2), origin=origin, stamps={"u": (1, 2)})
    made = pairtable.open_compacted(path, origin)
    assert made.stamps == {"u": (1, 2)}
    assert (np.diff(made.table.keys) > 0).all()
    assert pairtable.open_compacted(path, {"teacher_identity": "x"}) is None
    harm(path)
    assert pairtable.open_compacted(path, origin) is None
