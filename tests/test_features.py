import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.durable import TEMPORARY_PREFIX
from distill.features import Features, TornFeaturesError, write_features

N = 23


def dense(rows):
    rows = torch.from_numpy(rows)
    return {
        "pixels": rows[:, None, None].float() * torch.arange(6).view(2, 3) / 7,
        "ids": rows[:, None] * torch.tensor([1, 10]),
        "half": rows[:, None].to(torch.bfloat16) / 4,
        "label": rows,
        "flag": rows % 2 == 0,
    }


def length_of(row: int) -> int:
    return (row * 7) % 5 + 1


def ragged(rows, *, pad_id: int = 9):
    """Padded to the longest of the batch with ``pad_id``; states of padding are garbage, as a model's would be."""
    lengths = torch.tensor([length_of(row) for row in rows.tolist()])
    places = torch.arange(int(lengths.max()))
    mask = (places < lengths[:, None]).long()
    token = torch.from_numpy(rows)[:, None] * 100 + places
    states = token[..., None].float() + torch.tensor([0.0, 0.25])
    return {
        "input_ids": torch.where(mask == 1, token, pad_id),
        "attention_mask": mask,
        "states": states,
        "pooled": states[:, 0],
    }


def expected_ragged(rows, *, pad_id: int = 9):
    """What ``get`` must give: ``ragged`` with zeros for the states of padding."""
    found = ragged(np.asarray(rows), pad_id=pad_id)
    found["states"] = found["states"] * found["attention_mask"][..., None]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


ROWS = [[0], [22, 0, 7, 7, 3], list(range(N))]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_dense_arrays_come_back_as_they_were(tmp_path, rows, batch_size):
    features = write_features(tmp_path / "f", "id", N, dense, batch_size=batch_size)
    assert_same(features.get(np.array(rows)), dense(np.array(rows)))
    assert_same(Features.open(tmp_path / "f", "id")(np.array(rows)), dense(np.array(rows)))
    assert features.lengths(np.array(rows)).tolist() == [0] * len(rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_ragged_arrays_are_kept_without_padding(tmp_path, rows, batch_size):
    features = write_features(tmp_path / "f", "id", N, ragged, batch_size=batch_size)
    expected = expected_ragged(rows)
    if batch_size == 1:  # nothing was padded, so nothing tells what padding is: zeros
        expected = expected_ragged(rows, pad_id=0)
    assert_same(features.get(np.array(rows)), expected)
    total = sum(length_of(row) for row in range(N))
    assert np.load(tmp_path / "f" / "states.npy").shape == (total, 2)
    assert np.load(tmp_path / "f" / "input_ids.npy").shape == (total,)
    assert np.load(tmp_path / "f" / "pooled.npy").shape == (N, 2)
    assert features.lengths(np.array(rows)).tolist() == [length_of(row) for row in rows]


@settings(max_examples=30, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    data=st.data(),
)
def test_any_mask_comes_back(tmp_path_factory, masks, batch_size, data):
    """Left padding, holes and items of no token at all included."""

    def produce(rows):
        longest = max(len(masks[row]) for row in rows)
        padded = [masks[row] + [False] * (longest - len(masks[row])) for row in rows]
        mask = torch.tensor(padded, dtype=torch.bool).view(len(rows), longest)
        values = torch.from_numpy(rows)[:, None] * 10.0 + torch.arange(longest)
        return {"token_mask": mask, "values": values[..., None] * mask[..., None]}

    features = write_features(tmp_path_factory.mktemp("f") / "f", "id", len(masks), produce, batch_size=batch_size)
    rows = np.array(data.draw(st.lists(st.integers(0, len(masks) - 1), min_size=1, max_size=8)))
    found, expected = features.get(rows), produce(rows)
    length = found["token_mask"].shape[1]
    assert not expected["token_mask"][:, length:].any()
    assert torch.equal(found["token_mask"], expected["token_mask"][:, :length])
    assert torch.equal(found["values"], expected["values"][:, :length])


def test_half_precision_on_disk_comes_back_as_float32(tmp_path):
    features = write_features(tmp_path / "f", "id", N, ragged, batch_size=4, dtype="float16")
    assert np.load(tmp_path / "f" / "states.npy").dtype == np.float16
    found, expected = features.get(np.arange(N)), expected_ragged(np.arange(N))
    assert found["states"].dtype == torch.float32
    torch.testing.assert_close(found["states"], expected["states"], rtol=1e-3, atol=0)
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_some_fields_and_some_rows(tmp_path):
    covered = np.array([2, 3, 8, 20])
    features = write_features(tmp_path / "f", "id", covered, ragged, batch_size=3)
    assert set(features.fields) == {"input_ids", "attention_mask", "states", "pooled"}
    assert_same(features.get(np.array([20, 2])), expected_ragged([20, 2]))
    found = features.get(np.array([8, 3]), fields=["pooled"])
    assert_same(found, {"pooled": ragged(np.array([8, 3]))["pooled"]})
    with pytest.raises(KeyError, match=r"2 of 3 rows were not written .*\[4, 21\]"):
        features.get(np.array([4, 2, 21]))
    with pytest.raises(KeyError, match=r"no field \['nothing'\]"):
        features.get(np.array([2]), fields=["nothing"])
    with pytest.raises(KeyError, match=r"\[-1, 23\]"):
        write_features(tmp_path / "g", "id", N, dense).get(np.array([-1, 0, 23]))


def test_complete_folder_is_reused_without_work(tmp_path):
    calls = []

    def produce(rows):
        calls.append(len(rows))
        return dense(rows)

    write_features(tmp_path / "f", "id", N, produce, batch_size=10)
    assert calls == [10, 10, 3]
    write_features(tmp_path / "f", "id", N, produce)
    write_features(tmp_path / "f", "id", np.array([3, 5]), produce)
    assert len(calls) == 3
    write_features(tmp_path / "f", "id", N + 1, produce)  # more rows than are there
    assert sum(calls[3:]) == N + 1


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_torn_folder_is_refused_and_made_again(tmp_path, damage):
    write_features(tmp_path / "f", "id", N, ragged)
    if damage == "truncate":
        (tmp_path / "f" / "states.npy").write_bytes((tmp_path / "f" / "states.npy").read_bytes()[:-1])
    elif damage == "delete":
        (tmp_path / "f" / "attention_mask.offsets.npy").unlink()
    else:
        (tmp_path / "f" / "manifest.json").write_text("{")
    with pytest.raises(TornFeaturesError, match="torn|bytes"):
        Features.open(tmp_path / "f", "id")
    assert_same(write_features(tmp_path / "f", "id", N, ragged).get(np.arange(N)), expected_ragged(np.arange(N)))


def test_other_identity_and_strange_folders_are_refused(tmp_path):
    write_features(tmp_path / "f", "one", N, dense)
    for attempt in (
        lambda: Features.open(tmp_path / "f", "two"),
        lambda: write_features(tmp_path / "f", "two", N, dense),
    ):
        with pytest.raises(ValueError, match="features of one, not of two"):
            attempt()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no feature folder"):
        write_features(tmp_path / "mine", "one", N, dense)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Features.open(tmp_path / "nowhere", "one")


def test_failure_in_the_middle_leaves_nothing(tmp_path):
    def produce(rows):
        if rows[0] >= 8:
            raise KeyboardInterrupt
        return dense(rows)

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "f", "id", N, produce, batch_size=4)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".lock-")]


def test_leftovers_of_a_killed_writer_are_swept(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}0-f").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}0-f" / "pixels.npy").write_bytes(b"half")
    write_features(tmp_path / "f", "id", N, dense)
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_values_that_are_not_finite_name_their_rows(tmp_path):
    def produce(rows):
        found = ragged(rows)
        for place, row in enumerate(rows.tolist()):
            if row in (5, 17):
                found["states"][place, 0, 1] = float("nan")
        return found

    with pytest.raises(ValueError, match=r"'states' is not finite .*2 rows, the first: \[5, 17\]"):
        write_features(tmp_path / "f", "id", N, produce)
    big = {"x": torch.tensor([[1.0], [70000.0]])}
    with pytest.raises(ValueError, match=r"too large for float16\) for 1 rows, the first: \[1\]"):
        write_features(tmp_path / "f", "id", 2, lambda _: big, dtype="float16")


def test_garbage_in_the_padding_is_not_looked_at(tmp_path):
    def produce(rows):
        found = ragged(rows)
        found["states"][found["attention_mask"] == 0] = float("nan")
        return found

    assert_same(write_features(tmp_path / "f", "id", N, produce).get(np.arange(N)), expected_ragged(np.arange(N)))


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ({"x": torch.zeros(2, 4)}, r"'x' must be float32 with 2 items of shape \(3,\)"),
        ({"x": torch.zeros(1, 3)}, "with 2 items"),
        ({"x": torch.zeros(2, 3).long()}, "got int64"),
        ({"y": torch.zeros(2, 3)}, "same arrays"),
    ],
)
def test_batches_must_be_alike(tmp_path, second, match):
    with pytest.raises(ValueError, match=match):
        write_features(tmp_path / "f", "id", 4, lambda r: second if r[0] else {"x": torch.zeros(2, 3)}, batch_size=2)


def test_array_that_happens_to_have_the_masks_shape_is_an_error_not_a_loss(tmp_path):
    def produce(rows):
        found = ragged(rows)
        return {"attention_mask": found["attention_mask"], "vector": torch.ones(len(rows), 4)}

    assert length_of(2) == 5
    assert length_of(9) == 4
    with pytest.raises(ValueError, match="'vector' had the shape of 'attention_mask' in the first batch"):
        write_features(tmp_path / "f", "id", np.array([9, 10, 12]), produce, batch_size=1)


@pytest.mark.parametrize("rows", [0, np.array([2, 1]), np.array([1, 1]), np.array([-1, 2])])
def test_faulty_rows_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="rows must be"):
        write_features(tmp_path / "f", "id", rows, dense)


def test_pickled_features_open_again_and_threads_may_share_them(tmp_path):
    features = write_features(tmp_path / "f", "id", N, ragged)
    sent = pickle.dumps(features)
    assert len(sent) < 500
    assert_same(pickle.loads(sent).get(np.arange(N)), expected_ragged(np.arange(N)))
    draws = [np.random.default_rng(seed).integers(0, N, 9) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for rows, found in zip(draws, pool.map(features.get, draws), strict=True):
            assert_same(found, expected_ragged(rows))


def test_two_that_want_the_same_make_it_once(tmp_path):
    calls, opened = [], []

    def produce(rows):
        calls.append(rows)
        return dense(rows)

    threads = [
        threading.Thread(target=lambda: opened.append(write_features(tmp_path / "f", "id", N, produce, batch_size=5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 5
    assert len(opened) == 3
