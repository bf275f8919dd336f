import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.durable import TEMPORARY_PREFIX, exclusively
from distill.protocols import fingerprint
from distill.store import MissingScoresError, NonFiniteScoresError, ScoreStore
from distill.unit import BadUnitError, read_unit, write_unit

ROOT = Path(__file__).resolve().parents[1]
N_IMAGES, N_TEXTS = 20, 50
SAME = {
    "teacher_identity": "teacher-a",
    "corpus_fingerprint": "corpus-a",
    "score_kind": "log_odds",
    "n_images": N_IMAGES,
    "n_texts": N_TEXTS,
}


def make(folder, **other) -> ScoreStore:
    return ScoreStore(folder, **{**SAME, **other})


def all_pairs():
    images, texts = np.meshgrid(np.arange(N_IMAGES), np.arange(N_TEXTS), indexing="ij")
    return images.ravel(), texts.ravel()


def test_unit_is_one_row_an_image_with_its_origin_in_the_footer(tmp_path):
    path = make(tmp_path).write_unit([3, 1, 1], [4, 49, 2], [0.5, 0.25, -1.5])
    assert path.parent == tmp_path / "teacher-a" / "corpus-a"
    assert pq.read_table(path).to_pylist() == [
        {"image_id": 1, "text_ids": [2, 49], "logits": [-1.5, 0.25]},
        {"image_id": 3, "text_ids": [4], "logits": [0.5]},
    ]
    assert [str(field.type) for field in pq.read_schema(path)] == [
        "int64", "list<element: int64>", "list<element: float>",
    ]  # fmt: skip
    footer = {key.decode(): value.decode() for key, value in pq.read_metadata(path).metadata.items()}
    expected = {"images": "2", "pairs": "3", "schema_version": "1", **{key: str(value) for key, value in SAME.items()}}
    assert expected.items() <= footer.items()
    assert path.name == f"unit-{footer['unit']}.parquet"
    assert '"pyarrow"' in footer["software"]


def test_lookup_broadcasts_and_knows_no_item(tmp_path):
    store = make(tmp_path)
    store.write_unit([3, 1, 1], [4, 49, 2], [0.5, 0.25, -1.5])
    found = store.lookup(np.array([[1], [3], [-1]]), [49, 2, 4, -1])
    assert found.dtype == np.float32
    nan = np.nan
    np.testing.assert_array_equal(found, [[0.25, -1.5, nan, nan], [nan, nan, 0.5, nan], [nan] * 4])
    np.testing.assert_array_equal(store.missing([1, 1, -1, 1], [49, 48, 3, -1]), [False, True, False, False])
    np.testing.assert_array_equal(store.require([1, 3, 1], [2, 4, -1]), [-1.5, 0.5, nan])
    assert store.lookup([], []).shape == (0,)
    with pytest.raises(ValueError, match=r"text id 50 is outside the corpus, which has 50 texts"):
        store.lookup([0], [50])


def test_require_says_how_many_and_which(tmp_path):
    store = make(tmp_path)
    store.write_unit([1], [2], [0.0])
    with pytest.raises(MissingScoresError, match=r"2 of 3 pairs have no score .*\(1, 3\), \(7, 0\)"):
        store.require([1, 1, 7], [2, 3, 0])


def test_scores_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    store = make(tmp_path)
    with pytest.raises(NonFiniteScoresError, match=r"2 of 3 scores .*\(4, 5\), \(2, 7\)"):
        store.write_unit([4, 1, 2], [5, 6, 7], [np.nan, 1.0, np.inf])
    assert list(store.folder.iterdir()) == []
    assert store.stats().pairs == 0


@pytest.mark.parametrize(
    ("images", "texts", "scores"),
    [([], [], []), ([1], [2], [0.0, 1.0]), ([-1], [2], [0.0]), ([1, 1], [2, 2], [0.0, 0.0]), ([20], [0], [0.0])],
)
def test_faulty_units_are_refused(tmp_path, images, texts, scores):
    store = make(tmp_path)
    with pytest.raises(ValueError, match="unit|outside"):
        store.write_unit(images, texts, scores)
    assert list(store.folder.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(
    units=st.lists(
        st.dictionaries(
            st.tuples(st.sampled_from([0, 1, 7, N_IMAGES - 1]), st.sampled_from([0, 2, 30, N_TEXTS - 1])),
            st.floats(-50, 50, width=32),
            min_size=1,
            max_size=12,
        ),
        max_size=6,
    ),
    actions=st.lists(st.sampled_from(["none", "compact", "reopen", "look"]), min_size=6, max_size=6),
    overlay_pairs=st.sampled_from([0, 10, 1000]),
)
def test_lookup_equals_a_dict_whatever_happens_between_units(tmp_path_factory, units, actions, overlay_pairs):
    folder = tmp_path_factory.mktemp("store")
    store = make(folder, overlay_pairs=overlay_pairs)
    expected: dict[tuple[int, int], float] = {}
    images, texts = all_pairs()
    for number, (unit, action) in enumerate(zip(units, actions, strict=False)):
        pairs = list(unit)
        path = store.write_unit([i for i, _ in pairs], [t for _, t in pairs], list(unit.values()))
        os.utime(path, ns=(10**18 + number, 10**18 + number))  # later, whatever the clock's grain
        expected |= unit
        if action == "compact":
            store.compact()
        elif action == "reopen":
            store = make(folder, overlay_pairs=overlay_pairs)
        elif action == "look":
            store.lookup(images, texts)
    store = pickle.loads(pickle.dumps(store))
    want = np.array([expected.get(pair, np.nan) for pair in zip(images.tolist(), texts.tolist(), strict=True)])
    shuffled = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_array_equal(store.lookup(images, texts), want.astype(np.float32))
    np.testing.assert_array_equal(store.lookup(images[shuffled], texts[shuffled]), want[shuffled].astype(np.float32))
    assert store.stats().pairs == len(expected)


def test_compacted_table_is_reused_and_torn_ones_are_not(tmp_path):
    store = make(tmp_path)
    for image in range(5):
        store.write_unit([image] * 3, [0, 1, 2], [image, image + 0.1, image + 0.2])
    store.compact()
    tables = list(store.folder.glob("table-*"))
    assert len(tables) == 1
    again = make(tmp_path)
    assert again._fresh == {}  # every unit is in the table: none was read again
    np.testing.assert_array_equal(again.lookup([4, 0], [1, 0]), np.float32([4.1, 0.0]))
    with open(tables[0] / "keys.npy", "r+b") as file:
        file.truncate(100)
    np.testing.assert_array_equal(make(tmp_path).lookup([4, 0], [1, 0]), np.float32([4.1, 0.0]))


def test_opening_reads_no_unit_that_a_table_holds(tmp_path, monkeypatch):
    store = make(tmp_path)
    for image in range(4):
        store.write_unit([image] * 2, [0, 1], [image, -image])
    store.compact()
    newest = store.write_unit([9], [9], [9.0])
    read = []
    monkeypatch.setattr(
        "distill.store.read_unit", lambda path, origin: read.append(path.name) or read_unit(path, origin)
    )
    again = make(tmp_path)
    assert read == [newest.name]
    np.testing.assert_array_equal(again.lookup([3, 9, 0], [1, 9, 5]), np.float32([-3, 9, np.nan]))
    again.compact()
    assert read == [newest.name] * 2  # to what the old table holds the new unit is added


def test_opening_many_new_units_reads_each_once_and_holds_no_more_than_allowed(tmp_path, monkeypatch):
    store = make(tmp_path)
    for image in range(8):
        store.write_unit([image] * N_TEXTS, range(N_TEXTS), np.full(N_TEXTS, image))
    read = []
    monkeypatch.setattr(
        "distill.store.read_unit", lambda path, origin: read.append(path.name) or read_unit(path, origin)
    )
    opened = make(tmp_path, overlay_pairs=2 * N_TEXTS)
    assert len(set(read)) == 8
    assert len(read) <= 8 + 3  # those that filled the memory are read again
    assert opened._fresh == {}
    assert isinstance(opened._base.table.keys.base, np.memmap)
    np.testing.assert_array_equal(opened.lookup(np.arange(8), 7), np.arange(8, dtype=np.float32))


def test_many_pairs_are_looked_up_piece_by_piece(tmp_path, monkeypatch):
    store = make(tmp_path)
    images, texts = all_pairs()
    store.write_unit(images[::2], texts[::2], np.arange(500))
    wanted = np.random.default_rng(0).permutation(1000)
    expected = np.where(wanted % 2, np.nan, wanted // 2).astype(np.float32)
    whole = store.lookup(images[wanted], texts[wanted])
    monkeypatch.setattr("distill.store._LOOKUP_PAIRS", 64)
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(store.lookup(images[wanted], texts[wanted]), expected)
    np.testing.assert_array_equal(
        store.lookup(images.reshape(20, 50), texts.reshape(20, 50)).reshape(-1)[::2], range(500)
    )


def test_a_unit_that_comes_late_but_is_older_does_not_count(tmp_path):
    store = make(tmp_path)
    store.write_unit([1, 2], [1, 1], [1.0, 2.0])
    late = store.write_unit([1, 3], [1, 1], [8.0, 3.0])
    content = late.read_bytes()
    late.unlink()
    store.compact()
    late.write_bytes(content)
    os.utime(late, (1000, 1000))
    for opened in (make(tmp_path), store):
        opened.refresh()
        np.testing.assert_array_equal(opened.lookup([1, 2, 3], 1), np.float32([1, 2, 3]))


def test_who_waits_to_compact_takes_what_another_has_merged_meanwhile(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    one.write_unit([1], [1], [1.0])
    with exclusively(one.folder / "table"):
        waiting = threading.Thread(target=one.compact)
        waiting.start()
        time.sleep(0.05)
        two.write_unit([2], [2], [2.0])
    waiting.join()
    two.compact()
    (table,) = two.folder.glob("table-*")
    assert one._base.path == two._base.path == table
    np.testing.assert_array_equal(one.lookup([1, 2], [1, 2]), np.float32([1, 2]))


def test_pairs_come_in_order_with_the_score_that_counts(tmp_path):
    store = make(tmp_path)
    assert list(store.pairs()) == []
    store.write_unit([3, 1, 1], [4, 49, 2], [0.5, 0.25, -1.5])
    time.sleep(0.02)
    store.write_unit([1], [49], [7.0])
    pieces = list(store.pairs())
    images, texts, scores = (np.concatenate(arrays).tolist() for arrays in zip(*pieces, strict=True))
    assert (images, texts, scores) == ([1, 1, 3], [2, 49, 4], [-1.5, 7.0, 0.5])


def forged(path, change):
    """The unit with another content and the checksum, digest and name that fit it."""
    origin = make(path.parent.parent.parent).origin
    read = read_unit(path, origin)
    path.unlink()
    return write_unit(path.parent, origin, *change(read.keys, read.scores))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda keys, scores: (keys, np.where(keys == keys[1], np.nan, scores)), "1 scores that are not finite"),
        (lambda keys, scores: (keys[[0, 0, 2]], scores), "holds a pair twice"),
        (lambda keys, scores: (keys + N_IMAGES * N_TEXTS, scores), "ids outside its corpus"),
    ],
)
def test_a_unit_that_fits_its_digest_but_makes_no_sense_is_refused(tmp_path, change, reason):
    path = make(tmp_path).write_unit([1, 1, 2], [4, 5, 6], [0.5, 0.25, -1.5])
    forged(path, change)
    with pytest.raises(BadUnitError, match=reason):
        make(tmp_path)


def test_a_unit_whose_checksum_is_not_that_of_its_content_is_refused(tmp_path, monkeypatch):
    def wrong(*parts):
        return fingerprint(*parts) if isinstance(parts[0], str) else "0" * 32

    with monkeypatch.context() as patch:
        patch.setattr("distill.unit.fingerprint", wrong)
        make(tmp_path).write_unit([1, 1, 2], [4, 5, 6], [0.5, 0.25, -1.5])
    with pytest.raises(BadUnitError, match="do not match its checksum"):
        make(tmp_path)


def test_deleted_unit_is_not_served_from_a_table(tmp_path):
    store = make(tmp_path)
    path = store.write_unit([1], [1], [1.0])
    store.write_unit([2], [2], [2.0])
    store.compact()
    path.unlink()
    for opened in (make(tmp_path), store):
        opened.refresh()
        np.testing.assert_array_equal(opened.missing([1, 2], [1, 2]), [True, False])


def test_last_rename_wins_also_over_a_compacted_table(tmp_path):
    store = make(tmp_path)
    store.write_unit([1, 2], [1, 1], [1.0, 1.0])
    store.compact()
    time.sleep(0.02)
    store.write_unit([1, 3], [1, 1], [5.0, 5.0])
    np.testing.assert_array_equal(store.lookup([1, 2, 3], 1), np.float32([5, 1, 5]))
    time.sleep(0.02)
    store.write_unit([1, 2], [1, 1], [7.0, 7.0])  # the same pairs: the same file, renamed over
    assert store.stats().units == 2
    np.testing.assert_array_equal(store.lookup([1, 2, 3], 1), np.float32([7, 7, 5]))
    store.compact()
    np.testing.assert_array_equal(make(tmp_path).lookup([1, 2, 3], 1), np.float32([7, 7, 5]))


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path):
    path = make(tmp_path).write_unit([3, 1, 1], [4, 49, 2], [0.5, 0.25, -1.5])
    content = path.read_bytes()
    places = random.Random(0).sample(range(len(content)), 150)
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1 << (place % 8)
        path.write_bytes(altered)
        with pytest.raises(BadUnitError, match=path.name):
            make(tmp_path)
    path.write_bytes(content)
    assert make(tmp_path).stats().pairs == 3


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_truncated_unit_is_refused(tmp_path, length):
    path = make(tmp_path).write_unit([3, 1, 1], [4, 49, 2], [0.5, 0.25, -1.5])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadUnitError, match=f"{path.name} is torn"):
        make(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"teacher_identity": "teacher-b"},
        {"corpus_fingerprint": "corpus-b"},
        {"score_kind": "logit+cosine"},
        {"n_texts": 51},
    ],
)
def test_foreign_units_are_refused(tmp_path, other):
    path = make(tmp_path / "a").write_unit([1], [2], [0.5])
    folder = tmp_path / "b" / other.get("teacher_identity", "teacher-a") / other.get("corpus_fingerprint", "corpus-a")
    folder.mkdir(parents=True)
    (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BadUnitError, match=f"{path.name} has {next(iter(other))}"):
        make(tmp_path / "b", **other)


def test_renamed_unit_is_refused(tmp_path):
    path = make(tmp_path).write_unit([1], [2], [0.5])
    path.rename(path.with_name(f"unit-{'0' * 32}.parquet"))
    with pytest.raises(BadUnitError, match="not what its name says"):
        make(tmp_path)


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b"])
def test_identity_must_be_a_folder_name(tmp_path, name):
    with pytest.raises(ValueError, match="names a folder"):
        make(tmp_path, teacher_identity=name)


def test_leftovers_and_strange_files_are_no_units(tmp_path):
    store = make(tmp_path)
    store.write_unit([1], [2], [0.5])
    (store.folder / f"{TEMPORARY_PREFIX}0-unit-x.parquet").write_bytes(b"PAR1 half")
    (store.folder / "notes.txt").write_text("mine")
    assert make(tmp_path).stats().pairs == 1
    assert not list(store.folder.glob(f"{TEMPORARY_PREFIX}*"))
    assert (store.folder / "notes.txt").exists()


def test_writers_see_each_other_after_refresh(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    one.write_unit([1], [2], [0.5])
    assert two.missing([1], [2]).all()
    np.testing.assert_array_equal(two.require([1], [2]), [0.5])  # looks again before it complains


KILLED = """
import sys, time
import numpy as np
from distill.store import ScoreStore
about = {"teacher_identity": "t", "corpus_fingerprint": "c", "score_kind": "log_odds"}
store = ScoreStore(sys.argv[1], **about, n_images=400, n_texts=50)
written = 0
for image in range(400):
    texts = np.arange(50)
    if store.missing(image, texts).any():
        store.write_unit(np.full(50, image), texts, image + texts / 64)
        written += 1
        print(image, flush=True)
        time.sleep(0.001)
    if image % 40 == 39:
        store.compact()
print("written", written, flush=True)
"""


def test_killed_at_any_moment_nothing_finished_is_lost_and_nothing_torn_is_read(tmp_path):
    options = {"teacher_identity": "t", "corpus_fingerprint": "c", "score_kind": "log_odds"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    draw = random.Random(3)
    done: list[int] = []
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
            done.append(int(child.stdout.readline()))  # it has begun to write
            time.sleep(draw.random() * 0.15)
            child.send_signal(signal.SIGKILL)
            done += [int(line) for line in child.stdout.read().splitlines() if line.isdigit()]
        store = ScoreStore(tmp_path, **options, n_images=400, n_texts=50)
        np.testing.assert_array_equal(
            store.require(np.array(done)[:, None], np.arange(50)),
            np.array(done)[:, None] + np.arange(50) / np.float32(64),
        )
        assert store.stats().pairs % 50 == 0  # units are whole
        assert not list(store.folder.glob(f"{TEMPORARY_PREFIX}*"))
    assert len(done) == len(set(done)) < 400  # no finished unit was written again; something was left to do
    there = store.stats().units
    last = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert last.stdout.splitlines()[-1] == f"written {400 - there}"
    store = ScoreStore(tmp_path, **options, n_images=400, n_texts=50)
    images = np.arange(400)[:, None]
    np.testing.assert_array_equal(store.require(images, np.arange(50)), images + np.arange(50) / np.float32(64))
