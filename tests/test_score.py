import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.embed import live_source
from distill.inference import joined
from distill.score import ScoreOptions, Scoring, score_pairs, teacher_scores
from distill.store import MissingScoresError, NonFiniteScoresError, ScoreStore
from distill.work import unit_cuts, work_of
from tests.toys import ToyTeacher, expected_scores, toy_caption, toy_corpus

ROOT = Path(__file__).resolve().parents[1]
N_IMAGES, N_TEXTS = 40, 60


class Images:
    """The toy teacher's image inputs without pictures; notes each call."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def __call__(self, rows):
        self.calls.append(rows.tolist())
        return {"shade": torch.from_numpy(rows)[:, None]}


def texts(rows):
    return ToyTeacher().prepare_texts([toy_caption(row) for row in rows.tolist()])


def make(folder, teacher) -> ScoreStore:
    return ScoreStore(
        folder,
        teacher_identity=teacher.identity,
        corpus_fingerprint="toy",
        score_kind=teacher.score_kind,
        n_images=N_IMAGES,
        n_texts=N_TEXTS,
    )


def run(teacher, store, image_ids, text_ids, **options):
    return score_pairs(
        teacher, store, image_ids, text_ids, image_source=Images(), text_source=texts, options=ScoreOptions(**options)
    )


def some_pairs(count, seed=0):
    drawn = np.random.default_rng(seed).choice(N_IMAGES * N_TEXTS, count, replace=False)
    return np.divmod(drawn, N_TEXTS)


@pytest.mark.parametrize("text_memory_bytes", [1 << 20, 0])
def test_scores_are_the_teachers_own_and_nothing_is_asked_twice(tmp_path, text_memory_bytes):
    teacher = ToyTeacher()
    store = make(tmp_path, teacher)
    images, captions = some_pairs(500)
    doubled = np.concatenate([images, images[:100], [-1, 3]]), np.concatenate([captions, captions[:100], [5, -1]])
    options = {"pairs_per_unit": 90, "pairs_per_chunk": 16, "images_per_batch": 3, "texts_per_batch": 7}
    report = run(teacher, store, *doubled, text_memory_bytes=text_memory_bytes, **options)
    assert (report.asked, report.served_from_store) == (500, 0)
    assert report.pairs_per_second == pytest.approx(500 / report.seconds)
    assert sorted(teacher.pairs) == sorted(zip(images.tolist(), captions.tolist(), strict=True))
    np.testing.assert_array_equal(teacher_scores(store, images, captions), expected_scores(images, captions))
    assert teacher.largest_call <= 16
    assert store.stats().units == 6
    if text_memory_bytes:
        assert sorted(teacher.texts) == sorted(set(captions.tolist()))  # each text once a run
    assert len(teacher.images) <= len(set(images.tolist())) + 6  # each image once a unit
    again = run(teacher, store, *doubled)
    assert (again.asked, again.served_from_store) == (0, 500)
    assert len(teacher.pairs) == 500


def test_overlap_asks_exactly_the_rest(tmp_path):
    teacher = ToyTeacher()
    store = make(tmp_path, teacher)
    images, captions = some_pairs(1000)
    run(teacher, store, images[:600], captions[:600])
    teacher.pairs.clear()
    report = run(teacher, store, images[420:1000], captions[420:1000])  # 180 of 580 are there
    assert (report.asked, report.served_from_store) == (400, 180)
    assert sorted(teacher.pairs) == sorted(zip(images[600:].tolist(), captions[600:].tolist(), strict=True))
    np.testing.assert_array_equal(teacher_scores(store, images, captions), expected_scores(images, captions))


def test_both_directions_share_a_score(tmp_path):
    teacher = ToyTeacher()
    store = make(tmp_path, teacher)
    images, captions = np.meshgrid(np.arange(6), np.arange(9), indexing="ij")
    run(teacher, store, images.ravel(), captions.ravel())
    report = run(teacher, store, images.T.ravel(), captions.T.ravel())
    assert (report.asked, report.served_from_store) == (0, 54)


def test_out_of_memory_halves_the_chunk_and_goes_on(tmp_path, caplog):
    teacher = ToyTeacher(memory_for=5)
    store = make(tmp_path, teacher)
    images, captions = some_pairs(300)
    with caplog.at_level(logging.WARNING, "distill.score"):
        run(teacher, store, images, captions, pairs_per_chunk=64)
    np.testing.assert_array_equal(teacher_scores(store, images, captions), expected_scores(images, captions))
    assert len(teacher.pairs) == 300  # a call that failed scored nothing
    assert [record.args[2] for record in caplog.records] == [32, 16, 8, 4]  # said once each, and not begun anew


def test_images_are_encoded_together_as_far_as_their_memory_fits(tmp_path):
    class Counting(ToyTeacher):
        together: list[int] = []

        def encode_images(self, inputs):
            self.together = [*self.together, len(inputs["shade"])]
            memory = super().encode_images(inputs)
            return {**memory, "keys": torch.zeros(len(memory["number"]), 1000)}  # 4,000 bytes an image

    teacher = Counting()
    store = make(tmp_path, teacher)
    images, captions = some_pairs(300)
    run(teacher, store, images, captions, images_per_batch=16, image_memory_bytes=5 * 4100)
    np.testing.assert_array_equal(teacher_scores(store, images, captions), expected_scores(images, captions))
    assert teacher.together[0] == 16  # what an image takes is not known before
    assert 1 < max(teacher.together[1:]) <= 5
    assert sorted(teacher.images) == sorted(set(images.tolist()))


def test_it_says_how_much_the_store_served(tmp_path, caplog):
    teacher = ToyTeacher()
    store = make(tmp_path, teacher)
    images, captions = some_pairs(300)
    run(teacher, store, images[:100], captions[:100])
    with caplog.at_level(logging.INFO, "distill.score"):
        report = run(teacher, store, images, captions)
    assert (report.asked, report.served_from_store) == (200, 100)
    assert "teacher: 200 pairs asked, 100 served from the store" in caplog.messages


def test_one_pair_that_does_not_fit_is_an_error(tmp_path):
    teacher = ToyTeacher(memory_for=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(teacher, make(tmp_path, teacher), [1, 2], [3, 4])


def test_images_are_halved_when_encoding_runs_out_of_memory(tmp_path):
    class Narrow(ToyTeacher):
        def encode_images(self, inputs):
            if len(inputs["shade"]) > 3:
                raise torch.OutOfMemoryError("toy")
            return super().encode_images(inputs)

    teacher = Narrow()
    store = make(tmp_path, teacher)
    images, captions = some_pairs(300)
    run(teacher, store, images, captions, images_per_batch=16)
    np.testing.assert_array_equal(teacher_scores(store, images, captions), expected_scores(images, captions))
    assert sorted(teacher.images) == sorted(set(images.tolist()))


def test_a_score_that_is_not_finite_stops_and_keeps_the_units_before(tmp_path):
    images, captions = np.divmod(np.arange(400), 40)  # ten images of forty texts
    teacher = ToyTeacher(bad_pair=(7, 11))
    store = make(tmp_path, teacher)
    with pytest.raises(NonFiniteScoresError, match=r"1 of 40 scores .*\(7, 11\)"):
        run(teacher, store, images, captions, pairs_per_unit=40)
    assert store.stats().pairs == 7 * 40
    with pytest.raises(MissingScoresError, match="120 of 400"):
        teacher_scores(store, images, captions)
    healed = ToyTeacher()
    assert run(healed, store, images, captions).asked == 120


def test_teacher_is_in_eval_mode_without_gradients_and_put_back(tmp_path):
    teacher = ToyTeacher().train()
    run(teacher, make(tmp_path, teacher), [1, 2], [3, 4])
    assert teacher.modes == {(False, False)}
    assert teacher.training


def test_store_of_another_teacher_is_refused(tmp_path):
    store = make(tmp_path, ToyTeacher(name="one"))
    with pytest.raises(ValueError, match="never mixed"):
        run(ToyTeacher(name="two"), store, [1], [2])


def test_wrong_number_of_scores_is_refused(tmp_path):
    class Short(ToyTeacher):
        def score(self, *arguments):
            return super().score(*arguments)[:-1]

    teacher = Short()
    with pytest.raises(ValueError, match=r"must give \(2,\) scores"):
        run(teacher, make(tmp_path, teacher), [1, 2], [3, 4])


@pytest.mark.parametrize(("images", "captions", "match"), [([1, 2], [3], "2 images and 1"), ([40], [1], "image id 40")])
def test_faulty_ids_are_refused(tmp_path, images, captions, match):
    teacher = ToyTeacher()
    with pytest.raises(ValueError, match=match):
        run(teacher, make(tmp_path, teacher), images, captions)


@pytest.mark.parametrize("options", [{"pairs_per_unit": 0}, {"images_per_batch": -1}])
def test_faulty_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ScoreOptions(**options)


@pytest.mark.parametrize("text_memory_bytes", [1 << 20, 0])
def test_shares_of_the_units_are_the_units_of_one_process_and_no_pair_is_asked_by_two(tmp_path, text_memory_bytes):
    images, captions = some_pairs(700)
    options = ScoreOptions(pairs_per_unit=60, text_memory_bytes=text_memory_bytes, texts_per_batch=7)
    whole = make(tmp_path / "whole", ToyTeacher())
    score_pairs(ToyTeacher(), whole, images, captions, image_source=Images(), text_source=texts, options=options)
    teachers = [ToyTeacher() for _ in range(3)]
    store = make(tmp_path / "shared", teachers[0])
    work = work_of(store, images, captions, 60)
    for index, teacher in enumerate(teachers):
        scoring = Scoring(teacher, store, work, image_source=Images(), text_source=texts, options=options)
        own = range(index, len(work.units), 3)
        for some in (own[:2], own[2:]):  # a process may get its units in several goes
            assert [number for number, _ in scoring.do(some)] == list(some)
        if text_memory_bytes:
            assert len(teacher.texts) == len(set(teacher.texts)), "a text was encoded again"
    asked = [pair for teacher in teachers for pair in teacher.pairs]
    assert sorted(asked) == sorted(zip(images.tolist(), captions.tolist(), strict=True))
    one, other = ({path.name: path.read_bytes() for path in s.folder.glob("unit-*")} for s in (whole, store))
    assert len(one) == 12
    assert one == other


def test_units_are_the_same_files_whatever_the_order_of_asking(tmp_path):
    images, captions = some_pairs(500)
    order = np.random.default_rng(1).permutation(500)
    names = []
    for folder, at in (("a", np.arange(500)), ("b", order)):
        teacher = ToyTeacher()
        store = make(tmp_path / folder, teacher)
        run(teacher, store, images[at], captions[at], pairs_per_unit=64, images_per_batch=2 + len(names))
        names.append(sorted(path.name for path in store.folder.glob("unit-*")))
    assert len(names[0]) == 8
    assert names[0] == names[1]


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=60), per_unit=st.integers(1, 50))
def test_unit_cuts_are_even_and_prefer_image_borders(counts, per_unit):
    images = np.repeat(np.arange(len(counts)), counts)
    cuts = unit_cuts(images, per_unit)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(images)
    assert all(end == start for (_, end), (start, _) in zip(cuts[:-1], cuts[1:], strict=True))
    sizes = [end - start for start, end in cuts]
    assert min(sizes) >= 1
    assert max(sizes) <= per_unit + 2 * (per_unit // 4) + 1


def test_unit_cuts_fall_between_images_when_images_are_alike():
    images = np.repeat(np.arange(50), 8)
    assert all(start % 8 == 0 for start, _ in unit_cuts(images, 100))


def test_joined_pads_ragged_memories_and_refuses_what_has_no_mask():
    one = {"states": torch.ones(2, 3, 4), "text_mask": torch.ones(2, 3)}
    two = {"states": torch.full((1, 5, 4), 2.0), "text_mask": torch.ones(1, 5)}
    both = joined([one, two])
    assert both["text_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert both["states"].shape == (3, 5, 4)
    assert both["states"][:2, 3:].abs().sum() == 0
    assert (both["states"][2] == 2).all()
    with pytest.raises(ValueError, match="'states' has second dimensions"):
        joined([{"states": one["states"]}, {"states": two["states"]}])
    with pytest.raises(ValueError, match="same tensors"):
        joined([one, {"states": two["states"]}])


KILLED = """
import sys, time
import numpy as np, torch
from distill.score import ScoreOptions, score_pairs
from tests.test_score import Images, make, some_pairs, texts
from tests.toys import ToyTeacher

class Slow(ToyTeacher):
    def score(self, *arguments):
        time.sleep(0.002)
        return super().score(*arguments)

teacher = Slow()
store = make(sys.argv[1], teacher)
print("begun", flush=True)
report = score_pairs(teacher, store, *some_pairs(2000), image_source=Images(), text_source=texts,
                     options=ScoreOptions(pairs_per_unit=20, images_per_batch=1))
print("asked", report.asked, flush=True)
"""


def test_scoring_killed_in_the_middle_ends_with_the_same_scores(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kept = 0
    for units, wait in ((3, 0.0), (20, 0.013)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            while len(list(tmp_path.glob("*/*/unit-*"))) < units:
                assert child.poll() is None
                time.sleep(0.001)
            time.sleep(wait)
            child.send_signal(signal.SIGKILL)
        kept_now = make(tmp_path, ToyTeacher()).stats().pairs
        assert kept < kept_now < 2000
        kept = kept_now
    last = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert last.stdout.split() == ["begun", "asked", str(2000 - kept)]
    images, captions = some_pairs(2000)
    np.testing.assert_array_equal(
        teacher_scores(make(tmp_path, ToyTeacher()), images, captions), expected_scores(images, captions)
    )


def test_a_unit_left_unfinished_is_computed_beside_the_same_pairs(tmp_path):
    corpus = toy_corpus(24)
    images, texts = (axis.ravel() for axis in np.meshgrid(np.arange(24), np.arange(48), indexing="ij"))

    def calls(store, asked_images, asked_texts):
        teacher, seen = ToyTeacher(), []
        plain = teacher.score
        teacher.score = lambda i, t, rows, columns: (
            seen.append((i["number"][rows].tolist(), t["input_ids"][columns, 0].tolist())) or plain(i, t, rows, columns)
        )
        score_pairs(
            teacher,
            store,
            asked_images,
            asked_texts,
            image_source=live_source(corpus, "image", teacher),
            text_source=live_source(corpus, "text", teacher),
            options=ScoreOptions(pairs_per_unit=250, pairs_per_chunk=64, show_progress=False),
        )
        return seen

    def store(name):
        identity = ToyTeacher().identity
        return ScoreStore(
            tmp_path / name,
            teacher_identity=identity,
            corpus_fingerprint=corpus.fingerprint,
            score_kind="log_odds",
            n_images=24,
            n_texts=48,
        )

    whole = calls(store("whole"), images, texts)
    cut = store("cut")
    calls(cut, images, texts)
    for unit in sorted(cut.folder.glob("unit-*.parquet"), key=lambda path: path.stat().st_mtime_ns)[2:4]:
        unit.unlink()
    again = calls(store("cut"), images, texts)
    assert again, "the lost units must be asked for again"
    assert all(call in whole for call in again)
