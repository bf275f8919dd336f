"""The commands on stores as folders: stats, verify, merge, export."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from distill import store_commands, store_export
from distill.durable import TEMPORARY_PREFIX
from distill.store import ScoreStore
from distill.store_merge import merge_stores
from distill.store_tools import find_stores, store_facts, verify_store
from distill.unit import BadUnitError

N_IMAGES, N_TEXTS = 30, 40
TEACHER, CORPUS = "teacher-a", "corpus-a"


def make(folder, **other) -> ScoreStore:
    about = {"teacher_identity": TEACHER, "corpus_fingerprint": CORPUS, "score_kind": "log_odds"}
    return ScoreStore(folder, **{**about, "n_images": N_IMAGES, "n_texts": N_TEXTS, **other})


def write(store, image, scores=0.0, texts=range(N_TEXTS), time=None):
    """One unit of an image with some texts; ``time``: second of its modification."""
    texts = np.asarray(texts)
    path = store.write_unit(np.full(len(texts), image), texts, np.broadcast_to(scores, texts.shape))
    if time is not None:
        os.utime(path, (time, time))
    return path


def call(*arguments):
    return CliRunner().invoke(store_commands.app, [str(argument) for argument in arguments])


def on_one_line(text):
    """Without the frame and line breaks that a terminal gets."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def store(tmp_path):
    """Three units, compacted, and one more."""
    made = make(tmp_path)
    for image in range(3):
        write(made, image, image + np.arange(N_TEXTS) / 64, time=1000 + image)
    made.compact()
    write(made, 3, 3 + np.arange(N_TEXTS) / 64)
    return make(tmp_path)


# ---- finding and stats


def test_stores_are_found_from_the_root_or_a_level_below_or_directly(tmp_path):
    folders = [make(tmp_path, teacher_identity=name).folder for name in ("a", "b")]
    for folder, name in zip(folders, "ab", strict=True):
        write(make(tmp_path, teacher_identity=name), 1)
        (folder / "bad").mkdir()
        shutil.copy(next(folder.glob("unit-*")), folder / "bad")
    assert find_stores(tmp_path) == folders
    assert find_stores(tmp_path / "a") == [folders[0]]
    assert find_stores(folders[1]) == [folders[1]]


@pytest.mark.parametrize(("name", "message"), [("nowhere", "is no folder"), ("", "holds no scores")])
def test_a_folder_without_scores_is_an_error(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_stores(tmp_path / name)


def test_facts_come_from_the_folder_alone(store):
    facts = store_facts(store.folder)
    assert facts.origin == store.origin
    assert (facts.units, facts.pairs, facts.tables) == (4, 4 * N_TEXTS, 1)
    assert facts.bytes == sum(path.stat().st_size for path in store.folder.glob("unit-*"))
    assert facts.table_bytes > 3 * N_TEXTS * 12
    text = call("stats", store.folder.parent.parent).stdout
    assert all(word in text for word in (TEACHER, CORPUS, "log_odds", "160 distinct", "4, ", "30 images x 40 texts"))
    (told,) = json.loads(call("stats", store.folder, "--json").stdout)
    assert told["origin"]["n_texts"] == N_TEXTS
    assert told["pairs"] == 160


def test_facts_of_a_store_with_a_bad_unit_say_so(store):
    path = next(store.folder.glob("unit-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert store_facts(store.folder).pairs is None
    assert "see distill store verify" in call("stats", store.folder).stdout


# ---- verify


def test_a_sound_store_verifies_and_nothing_is_changed(store):
    (store.folder / f"{TEMPORARY_PREFIX}left-unit-x.parquet").write_bytes(b"PAR1")
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    found = verify_store(store.folder)
    assert (found.units, found.pairs, found.tables, found.leftovers, found.faults) == (4, 160, 1, 1, ())
    result = call("verify", store.folder.parent.parent)
    assert result.exit_code == 0
    assert "all sound (sound: units 4, pairs 160, tables 1)" in result.stdout
    assert "unfinished files: 1;" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")} == before


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def test_a_bit_flipped_anywhere_is_found_and_its_scores_are_not_served(store):
    path = sorted(store.folder.glob("unit-*"))[0]
    content, size = path.read_bytes(), path.stat().st_size
    footer = size - 8 - int.from_bytes(content[-8:-4], "little")
    data, tail = random.Random(0).sample(range(4, footer), 20), random.Random(1).sample(range(footer, size), 40)
    for place in [0, size - 1, content.rindex(b"file_sha256") + 20, *data, *tail]:
        flipped(path, place)
        (fault,) = verify_store(store.folder).faults
        assert fault.path == path
        assert "torn" in fault.reason or "digest" in fault.reason
        with pytest.raises(BadUnitError, match=path.name):
            store.refresh()
        with pytest.raises(BadUnitError, match=path.name):
            store.lookup([0], [0])  # also by who had it open, and where a table knows the scores
        path.write_bytes(content)
    assert verify_store(store.folder).faults == ()


def swap(folder):
    one, two = sorted(folder.glob("unit-*"))[:2]
    names = [two.name, one.name]
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    return names, "not what its name says"


def truncate(folder):
    path = sorted(folder.glob("unit-*"))[1]
    os.truncate(path, path.stat().st_size // 2)
    return [path.name], "torn"


def empty(folder):
    path = sorted(folder.glob("unit-*"))[1]
    os.truncate(path, 0)
    return [path.name], "torn"


def of_another_teacher(folder):
    path = write(make(folder.parent.parent, teacher_identity="teacher-b"), 7)
    shutil.copy(path, folder)
    return [path.name], "has teacher_identity 'teacher-b' where this store has 'teacher-a'"


def of_another_corpus(folder):
    path = write(make(folder.parent.parent, corpus_fingerprint="corpus-b"), 7)
    shutil.copy(path, folder)
    return [path.name], "has corpus_fingerprint 'corpus-b'"


def of_another_kind(folder):
    path = write(make(folder.parent.parent / "elsewhere", score_kind="cosine"), 7)
    shutil.copy(path, folder)
    return [path.name], "has score_kind 'cosine'"


def no_unit(folder):
    name = f"unit-{'0' * 32}.parquet"
    (folder / name).write_bytes(b"PAR1 nothing of the kind PAR1")
    return [name], "no unit at all"


@pytest.mark.parametrize(
    "harm", [swap, truncate, empty, of_another_teacher, of_another_corpus, of_another_kind, no_unit]
)
def test_bad_units_are_named_and_moved_aside_and_only_their_pairs_are_asked_again(store, harm):
    whole = make(store.folder.parent.parent).lookup(np.arange(4)[:, None], np.arange(N_TEXTS))
    names, reason = harm(store.folder)
    found = verify_store(store.folder)
    assert sorted(fault.path.name for fault in found.faults) == sorted(names)
    assert all(reason in fault.reason for fault in found.faults)
    with pytest.raises(BadUnitError):
        make(store.folder.parent.parent)
    result = call("verify", store.folder, "--quarantine")
    assert result.exit_code == 1
    assert all(f"bad: {name}" in result.stdout for name in names)
    assert sorted(path.name for path in (store.folder / "bad").iterdir()) == sorted(names)
    assert call("verify", store.folder).exit_code == 0
    again = make(store.folder.parent.parent).lookup(np.arange(4)[:, None], np.arange(N_TEXTS))
    lost = np.isnan(again).any(axis=1)
    assert lost.sum() == (0 if harm.__name__.startswith(("of_", "no_")) else len(names))
    np.testing.assert_array_equal(again[~lost], whole[~lost])


def test_moving_aside_keeps_what_was_moved_before(store):
    for _ in range(3):
        os.truncate(write(make(store.folder.parent.parent), 9), 50)
        assert call("verify", store.folder, "--quarantine").exit_code == 1
    names = sorted(path.name for path in (store.folder / "bad").iterdir())
    assert [name.partition(".parquet")[2] for name in names] == ["", ".1", ".2"]


def test_a_store_whose_units_are_all_bad_is_still_verified(tmp_path):
    path = write(make(tmp_path), 1)
    os.truncate(path, 10)
    result = call("verify", tmp_path, "--quarantine")
    assert (result.exit_code, "1 bad" in result.stdout) == (1, True)
    assert call("verify", tmp_path).exit_code == 0
    assert make(tmp_path).missing([1], [1]).all()


def altered_table(store, name, change):
    """The table with its array changed, and a manifest that does not betray it."""
    (table,) = store.folder.glob("table-*")
    array = np.load(table / name)
    change(array)
    about = json.loads((table / "manifest.json").read_text())
    np.save(table / name, array)
    times = about["files"][name][1]
    os.utime(table / name, ns=(times, times))
    assert (table / name).stat().st_size == about["files"][name][0]
    return table


def bump(array):
    array[50] += 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [("scores.npy", "0 of their pairs are not in it, 1 have another score"), ("keys.npy", r"[1-9]\d* of their pairs")],
)
def test_a_table_that_does_not_agree_with_its_units_is_found(store, name, reason):
    table = altered_table(store, name, bump)
    (fault,) = verify_store(store.folder).faults
    assert fault.path == table
    assert re.search(reason, fault.reason)
    assert call("verify", store.folder, "--quarantine").exit_code == 1
    assert call("verify", store.folder).exit_code == 0
    np.testing.assert_array_equal(
        make(store.folder.parent.parent).require(np.arange(4)[:, None], np.arange(N_TEXTS)),
        np.arange(4)[:, None] + np.arange(N_TEXTS) / np.float32(64),
    )


def test_a_table_with_pairs_of_no_unit_is_found(tmp_path):
    store = make(tmp_path)
    write(store, 1, texts=[0, 1, 2])
    write(store, 2, texts=[0, 1, 2])
    store.compact()
    (table,) = store.folder.glob("table-*")
    about = json.loads((table / "manifest.json").read_text())
    gone = next(store.folder.glob("unit-*"))
    gone.unlink()
    about["units"].pop(gone.name[5:-8])
    (table / "manifest.json").write_text(json.dumps(about))
    (fault,) = verify_store(store.folder).faults
    assert "3 pairs are of no unit" in fault.reason


def test_tables_behind_their_units_are_no_fault(store):
    write(store, 1, 9.0)  # written anew: the table holds the old scores, which nobody reads
    assert verify_store(store.folder).tables == 1
    assert verify_store(store.folder).faults == ()
    next(store.folder.glob("unit-*")).unlink()
    found = verify_store(store.folder)
    assert (found.faults, found.tables + found.outdated) == ((), 1)


def test_verify_knows_which_of_two_units_counts(tmp_path):
    store = make(tmp_path)
    write(store, 1, 1.0, texts=[0, 1, 2], time=2000)
    write(store, 1, 2.0, texts=[2, 3], time=1000)
    store.compact()
    np.testing.assert_array_equal(store.lookup(1, [0, 1, 2, 3]), np.float32([1, 1, 1, 2]))
    assert verify_store(store.folder).faults == ()
    altered_table(store, "scores.npy", lambda scores: scores.__setitem__(2, 2.0))  # what the earlier one says
    assert len(verify_store(store.folder).faults) == 1


# ---- merge


def test_merging_brings_origins_together_and_keeps_them_apart(tmp_path):
    for place, images in (("one", (1, 2)), ("two", (2, 3))):
        for image in images:
            write(make(tmp_path / place), image, image)
    write(make(tmp_path / "two", teacher_identity="teacher-b"), 1, 99)
    result = call("merge", tmp_path / "one", tmp_path / "two", "--into", tmp_path / "all")
    assert result.exit_code == 0
    assert "copied 4 units, 160 pairs; 1 units were there" in result.stdout
    merged = make(tmp_path / "all")
    np.testing.assert_array_equal(merged.require([1, 2, 3], 5), np.float32([1, 2, 3]))
    assert make(tmp_path / "all", teacher_identity="teacher-b").require([1], [1]).tolist() == [99]
    assert merged.stats().units == 3
    before = {path: path.read_bytes() for path in (tmp_path / "all").rglob("unit-*")}
    again = merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    assert (again.copied, again.already_there, again.differing) == (0, 5, 0)
    assert {path: path.read_bytes() for path in (tmp_path / "all").rglob("unit-*")} == before


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
@pytest.mark.parametrize("texts", [range(N_TEXTS), range(10, N_TEXTS)], ids=["same unit", "overlapping unit"])
@pytest.mark.parametrize("compacted", [False, True])
def test_of_a_pair_scored_differently_the_later_unit_counts(tmp_path, order, texts, compacted):
    write(make(tmp_path / "old"), 1, 1.0, time=1000)
    write(make(tmp_path / "new"), 1, 1.5, texts=texts, time=2000)
    report = merge_stores([tmp_path / order[0]], tmp_path / "all")
    assert (report.copied, report.differing) == (1, 0)
    if compacted:
        make(tmp_path / "all").compact()
    report = merge_stores([tmp_path / order[1]], tmp_path / "all")
    assert (report.differing, report.largest_difference) == (len(texts), 0.5)
    expected = np.full(N_TEXTS, 1.0, np.float32)
    expected[texts] = 1.5
    merged = make(tmp_path / "all")
    np.testing.assert_array_equal(merged.lookup(1, np.arange(N_TEXTS)), expected)
    merged.compact()
    np.testing.assert_array_equal(merged.lookup(1, np.arange(N_TEXTS)), expected)
    assert verify_store(merged.folder).faults == ()


def test_bad_source_units_are_refused_by_name_and_the_rest_is_merged(tmp_path):
    source = make(tmp_path / "source")
    paths = [write(source, image, image) for image in range(5)]
    flipped(paths[2], 100)
    shutil.copy(write(make(tmp_path / "other", teacher_identity="teacher-b"), 9), source.folder)
    result = call("merge", source.folder, "--into", tmp_path / "all")
    assert result.exit_code == 1
    assert "copied 4 units" in result.stdout
    assert f"refused {paths[2]}" in result.stderr
    assert "teacher_identity 'teacher-b'" in result.stderr
    merged = make(tmp_path / "all")
    np.testing.assert_array_equal(merged.missing(np.arange(5), 0), [False, False, True, False, False])


def test_a_store_of_another_shape_is_refused_whole(tmp_path):
    write(make(tmp_path / "one"), 1)
    write(make(tmp_path / "two", n_texts=50), 1)
    merge_stores([tmp_path / "one"], tmp_path / "all")
    (fault,) = merge_stores([tmp_path / "two"], tmp_path / "all").refused
    assert "30 images x 50 texts" in fault.reason
    assert make(tmp_path / "all").stats().units == 1


def test_a_store_is_not_merged_into_itself(tmp_path):
    write(make(tmp_path), 1)
    with pytest.raises(ValueError, match="merged into itself"):
        merge_stores([tmp_path], tmp_path)


# ---- export


def expected_rows(store):
    images, texts = (axis.ravel() for axis in np.meshgrid(np.arange(4), np.arange(N_TEXTS), indexing="ij"))
    return list(zip(images.tolist(), texts.tolist(), store.require(images, texts).tolist(), strict=True))


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_export_writes_every_pair_and_the_origin(store, tmp_path, ending):
    write(store, 1, 9.125, texts=[0])  # a pair that two units hold is written once
    out = tmp_path / f"scores.{ending}"
    result = call("export", store.folder, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "160 pairs" in result.stdout
    if ending == "parquet":
        rows = [(row["image_id"], row["text_id"], row["score"]) for row in pq.read_table(out).to_pylist()]
        origin = {key.decode(): value.decode() for key, value in pq.read_metadata(out).metadata.items()}
    else:
        origin = json.loads((tmp_path / f"scores.{ending}.origin.json").read_text())
        with open(out, newline="") as file:
            read = list(csv.DictReader(file)) if ending == "csv" else [json.loads(line) for line in file]
        rows = [(int(row["image_id"]), int(row["text_id"]), float(np.float32(row["score"]))) for row in read]
    assert rows == expected_rows(store)
    assert rows[N_TEXTS] == (1, 0, 9.125)
    assert (origin["teacher_identity"], int(origin["n_images"])) == (TEACHER, N_IMAGES)


def test_export_is_written_in_pieces(store, tmp_path, monkeypatch):
    pieces = []
    plain = ScoreStore.pairs

    def small(self):
        for images, texts, scores in plain(self):
            for at in range(0, len(scores), 7):
                pieces.append(len(scores[at : at + 7]))
                yield images[at : at + 7], texts[at : at + 7], scores[at : at + 7]

    monkeypatch.setattr(ScoreStore, "pairs", small)
    assert store_export.export_scores(store, tmp_path / "a.jsonl") == 160 == sum(pieces)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 160


def test_export_refuses_other_endings_and_many_stores(tmp_path):
    for name in ("a", "b"):
        write(make(tmp_path / "scores", teacher_identity=name), 1)
    result = call("export", tmp_path / "scores", "--out", tmp_path / "x.parquet")
    assert result.exit_code == 2
    assert "holds 2 stores" in on_one_line(result.stderr)
    with pytest.raises(ValueError, match=r"known here: \.parquet, \.csv, \.jsonl"):
        store_export.export_scores(make(tmp_path / "scores", teacher_identity="a"), tmp_path / "x.xlsx")


def test_help_says_what_ids_are():
    assert "rows of the corpus" in on_one_line(call("export", "--help").stdout)
