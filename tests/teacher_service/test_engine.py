"""The queue before the teacher: what is merged, what is kept, who is turned away, and what a fault costs."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import CancelledError
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch

from distill.data.corpus import build_corpus
from distill.data.pictures import pictures_of_bytes
from distill.teacher_service.app import build_app
from distill.teacher_service.engine import BusyError, EndedError, TooLateError
from distill.teacher_service.kept import size_of
from distill.teacher_service.on_ray import Replica
from distill.teacher_service.requests import ScoreRequest
from distill.wire import Limits, RefusedError
from tests.teacher_service.served import engine_of, info_of, items, pairs, store_of
from tests.toys import ToyTeacher, expected_scores, toy_caption, toy_corpus

CORPUS = toy_corpus(12)
SOON = 60.0


def later(seconds: float = SOON) -> float:
    return time.monotonic() + seconds


def all_pairs(images=range(12), texts=range(24)):
    grid = np.meshgrid(list(images), list(texts), indexing="ij")
    return grid[0].ravel(), grid[1].ravel()


class HeldTeacher(ToyTeacher):
    """Waits in its first call until it is let go on, so that what comes meanwhile waits too."""

    def __init__(self, **options):
        super().__init__(**options)
        self.go_on, self.has_begun = threading.Event(), threading.Event()

    def score(self, *arguments):
        self.has_begun.set()
        assert self.go_on.wait(30)
        return super().score(*arguments)


def png(shade: int, size: int = 4) -> bytes:
    file = BytesIO()
    PIL.Image.new("L", (size, size), color=shade).save(file, "PNG")
    return file.getvalue()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_scores_are_those_of_the_teacher_in_the_order_of_the_request():
    teacher, draw = ToyTeacher(), np.random.default_rng(0)
    images, texts = draw.integers(0, 12, 200), draw.integers(0, 24, 200)
    with engine_of(teacher, CORPUS, pairs_per_pack=17, images_per_batch=3, texts_per_batch=4) as engine:
        answer = engine.score(pairs(CORPUS, images, texts), later()).result(SOON)
    np.testing.assert_array_equal(answer.scores, expected_scores(images, texts))
    distinct = len(set(zip(images.tolist(), texts.tolist(), strict=True)))
    assert (answer.asked, answer.served_from_store) == (distinct, 200 - distinct)
    assert sorted(set(teacher.pairs)) == sorted(teacher.pairs), "no pair twice"
    assert (answer.identity, answer.score_kind) == (teacher.identity, "log_odds")
    assert teacher.modes == {(False, False)}


def test_what_waits_is_scored_together_each_pair_once_and_each_item_encoded_once():
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS) as engine:
        first = engine.score(pairs(CORPUS, [0], [0]), later())
        assert teacher.has_begun.wait(30)
        # two packs can be under way beside those that wait: the one that is scored and the one that is prepared
        second = engine.score(pairs(CORPUS, [0], [1]), later())
        time.sleep(0.2)
        clients = [engine.score(pairs(CORPUS, *all_pairs(range(4), range(n, n + 6))), later()) for n in range(8)]
        teacher.go_on.set()
        answers = [client.result(SOON) for client in (first, second, *clients)]
        assert engine.counts.packs == 3
    assert sorted(teacher.pairs) == sorted({(0, 0), (0, 1)} | {(i, t) for i in range(4) for t in range(13)})
    assert sorted(teacher.images) == [0, 1, 2, 3]
    assert sorted(teacher.texts) == list(range(13))
    for n, answer in enumerate(answers[2:]):
        np.testing.assert_array_equal(answer.scores, expected_scores(*all_pairs(range(4), range(n, n + 6))))
    assert sum(answer.asked for answer in answers) == len(teacher.pairs)
    groups = [image for image, _ in teacher.pairs[2:]]
    assert groups == sorted(groups), "an image's pairs lie side by side"


def test_scores_go_into_the_store_and_come_from_it(tmp_path):
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS, tmp_path, pairs_per_unit=50) as engine:
        engine.score(pairs(CORPUS, *all_pairs(texts=range(10))), later()).result(SOON)
        assert engine.score(pairs(CORPUS, *all_pairs(texts=range(10))), later()).result(SOON).asked == 0
    assert len(teacher.pairs) == 120
    found = store_of(teacher, CORPUS, tmp_path).require(*all_pairs(texts=range(10)))
    np.testing.assert_array_equal(found, expected_scores(*all_pairs(texts=range(10))))
    again = ToyTeacher()
    with engine_of(again, CORPUS, tmp_path) as engine:
        answer = engine.score(pairs(CORPUS, *all_pairs(texts=range(11))), later()).result(SOON)
    assert (answer.asked, answer.served_from_store) == (12, 120)
    assert {text for _, text in again.pairs} == {10}


def test_scores_are_written_where_nothing_waits(tmp_path):
    with engine_of(ToyTeacher(), CORPUS, tmp_path) as engine:
        engine.score(pairs(CORPUS, [1], [2]), later()).result(SOON)
        deadline = time.monotonic() + 20
        while not store_of(ToyTeacher(), CORPUS, tmp_path).stats().pairs:
            assert time.monotonic() < deadline, "the engine was not closed, and yet the score must be kept"
            time.sleep(0.1)


def test_an_item_that_was_sent_and_is_in_the_corpus_counts_as_its_row(tmp_path):
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS, tmp_path) as engine:
        sent = {"images": [CORPUS.pictures.encoded(np.array([3]))[0]], "texts": [CORPUS.texts[5], "99 word"]}
        answer = engine.score(ScoreRequest.model_validate(sent), later()).result(SOON)
        np.testing.assert_array_equal(answer.scores, expected_scores(np.array([3, 3]), np.array([5, 99])))
        assert engine.score(pairs(CORPUS, [3], [5]), later()).result(SOON).asked == 0
        assert engine.score(ScoreRequest.model_validate(sent), later()).result(SOON).asked == 0
    assert store_of(teacher, CORPUS, tmp_path).stats().pairs == 1, "what is not of the corpus is not stored"


def test_copies_in_the_corpus_are_encoded_once_and_stored_each(tmp_path):
    corpus = build_corpus(
        "copies",
        pictures_of_bytes([png(3), png(5), png(3)], names=list("abc"), fingerprints=[sha(png(n)) for n in (3, 5, 3)]),
        texts=["1", "2", "1"],
        pairs=np.array([[0, 0], [1, 1], [2, 2]]),
        image_splits=["train"] * 3,
    )
    teacher = ToyTeacher()
    images, texts = all_pairs(range(3), range(3))
    with engine_of(teacher, corpus, tmp_path, images_per_batch=1) as engine:
        answer = engine.score(pairs(corpus, images, texts), later()).result(SOON)
        assert answer.asked == 9
        again = engine.score(pairs(corpus, images, texts), later()).result(SOON)
        assert again.asked == 0
    expected = expected_scores(np.array([3, 5, 3])[images], np.array([1, 2, 1])[texts])
    np.testing.assert_array_equal(answer.scores, expected)
    np.testing.assert_array_equal(again.scores, expected)
    assert (sorted(teacher.images), sorted(teacher.texts)) == ([3, 5], [1, 2])
    assert not store_of(teacher, corpus, tmp_path).missing(images, texts).any()


def test_pictures_that_were_sent_are_encoded_together():
    teacher = ToyTeacher()
    sizes = []
    encode = teacher.encode_images
    teacher.encode_images = lambda inputs: sizes.append(len(inputs["shade"])) or encode(inputs)
    with engine_of(teacher, images_per_batch=8) as engine:
        request = ScoreRequest.model_validate({"images": [png(shade) for shade in range(20)], "texts": ["1"]})
        answer = engine.score(request, later()).result(SOON)
    np.testing.assert_array_equal(answer.scores, expected_scores(np.arange(20), np.ones(20)))
    assert sizes == [8, 8, 4]


def test_a_picture_that_cannot_be_read_fails_its_own_request_alone():
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS, max_pixels=100) as engine:
        first = engine.score(pairs(CORPUS, [0], [0]), later())
        assert teacher.has_begun.wait(30)
        good = engine.score(pairs(CORPUS, [1], [1]), later())
        for content, told in ((b"GIF89a", "not an image|decoded"), (png(1, size=11), "too large")):  # by their headers
            with pytest.raises(RefusedError, match=told) as refused:
                engine.score(ScoreRequest.model_validate({"images": [content], "texts": ["1"]}), later())
            assert refused.value.status == 422
        cut = engine.score(ScoreRequest.model_validate({"images": [png(1)[:-20]], "texts": ["1"]}), later())
        teacher.go_on.set()
        with pytest.raises(RefusedError, match="decoded") as refused:
            cut.result(SOON)
        assert refused.value.status == 422
        assert first.result(SOON).asked == good.result(SOON).asked == 1


def test_a_request_that_makes_the_teacher_fail_spoils_no_other():
    class Fussy(HeldTeacher):
        def score(self, images, texts, image_rows, text_rows):
            if bool((images["number"][image_rows] == 7).any()):
                raise RuntimeError("seven")
            return super().score(images, texts, image_rows, text_rows)

    teacher = Fussy()
    with engine_of(teacher, CORPUS) as engine:
        held = [engine.score(pairs(CORPUS, [0], [n]), later()) for n in range(2)]
        assert teacher.has_begun.wait(30)
        time.sleep(0.2)
        waiting = [engine.score(pairs(CORPUS, [n], [n]), later()) for n in (5, 7, 9)]
        teacher.go_on.set()
        assert [one.result(SOON).scores[0] for one in (*held, waiting[0], waiting[2])] == [
            expected_scores(np.array(i), np.array(t)) for i, t in ((0, 0), (0, 1), (5, 5), (9, 9))
        ]
        with pytest.raises(RuntimeError, match="seven"):
            waiting[1].result(SOON)
        assert engine.alive


def test_a_score_that_is_not_finite_is_said_and_not_kept(tmp_path):
    teacher = ToyTeacher(bad_pair=(2, 3))
    with engine_of(teacher, CORPUS, tmp_path) as engine:
        answer = engine.score(pairs(CORPUS, [2, 2], [3, 4]), later()).result(SOON)
        assert np.isnan(answer.scores).tolist() == [True, False]
        assert answer.as_json()["scores"][0] is None
    assert store_of(teacher, CORPUS, tmp_path).missing([2, 2], [3, 4]).tolist() == [True, False]


def test_out_of_memory_takes_fewer_images_at_a_time():
    teacher = ToyTeacher(memory_for=24)
    with engine_of(teacher, CORPUS, images_per_batch=8) as engine:
        answer = engine.score(pairs(CORPUS, *all_pairs()), later()).result(SOON)
        assert engine.memories["image"].batch == 1
    np.testing.assert_array_equal(answer.scores, expected_scores(*all_pairs()))


def test_memory_of_items_stays_within_its_budget_and_what_left_is_made_anew():
    teacher = ToyTeacher()
    two = size_of(teacher.encode_images({"shade": torch.zeros(2, 1, dtype=torch.int64)}), 2)
    teacher.images.clear()
    with engine_of(teacher, CORPUS, image_memory_bytes=2 * two, images_per_batch=2) as engine:
        for text in range(3):
            engine.score(pairs(CORPUS, range(12), [text] * 12), later()).result(SOON)
            assert engine.memories["image"].kept_bytes == 2 * two
        engine.score(pairs(CORPUS, range(8, 12), [5] * 4), later()).result(SOON)
        assert engine.memories["image"].found == 4 + 4 + 4
    assert len(teacher.images) == 12 + 8 + 8


def test_what_is_too_much_to_wait_is_turned_away_and_taken_later():
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS, waiting_pairs=30) as engine:
        first = engine.score(pairs(CORPUS, *all_pairs(range(1), range(20))), later())
        assert teacher.has_begun.wait(30)
        second = engine.score(pairs(CORPUS, *all_pairs(range(1, 2), range(10))), later())
        with pytest.raises(BusyError) as busy:
            engine.score(pairs(CORPUS, [5], [5]), later())
        assert 1 <= busy.value.seconds <= 30
        assert (engine.waiting, engine.counts.turned_away) == (30, 1)
        teacher.go_on.set()
        first.result(SOON), second.result(SOON)
        assert engine.score(pairs(CORPUS, [5], [5]), later()).result(SOON).asked == 1
        assert engine.waiting == 0
        # alone, a request may be larger than all that may wait
        assert engine.score(pairs(CORPUS, *all_pairs()), later()).result(SOON).scores.shape == (288,)


def test_deadlines_count_from_arrival_and_what_is_late_is_not_scored():
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS) as engine:
        first = engine.score(pairs(CORPUS, [0], [0]), later())
        assert teacher.has_begun.wait(30)
        second = engine.score(pairs(CORPUS, [1], [1]), later())  # prepared while the first is scored
        time.sleep(0.2)
        late, in_time = (
            engine.score(pairs(CORPUS, [2], [2]), later(0.1)),
            engine.score(pairs(CORPUS, [3], [3]), later()),
        )
        time.sleep(0.2)
        teacher.go_on.set()
        with pytest.raises(TooLateError):
            late.result(SOON)
        assert [one.result(SOON).asked for one in (first, second, in_time)] == [1, 1, 1]
    assert (2, 2) not in teacher.pairs


def test_what_is_taken_back_is_not_scored_and_holds_nothing():
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS, pairs_per_pack=4) as engine:
        engine.score(pairs(CORPUS, [0], [0]), later())
        assert teacher.has_begun.wait(30)
        engine.score(pairs(CORPUS, [0], [1]), later())
        time.sleep(0.2)
        for _ in range(500):
            future = engine.score(pairs(CORPUS, *all_pairs(range(4, 6))), later())
            assert future.cancel()
            with pytest.raises(CancelledError):
                future.result()
        assert engine.waiting == 2
        assert len(engine._waiting) < 100
        teacher.go_on.set()
        engine.score(pairs(CORPUS, [1], [1]), later()).result(SOON)
    assert {image for image, _ in teacher.pairs} == {0, 1}


def test_closing_answers_what_waits_keeps_its_scores_and_takes_no_more(tmp_path):
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS, tmp_path) as engine:
        waiting = [engine.score(pairs(CORPUS, [n], [n]), later()) for n in range(8)]
        assert teacher.has_begun.wait(30)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while engine.alive:
            time.sleep(0.01)
        with pytest.raises(EndedError):
            engine.score(pairs(CORPUS, [9], [9]), later())
        teacher.go_on.set()
        closing.join(30)
        assert [one.result(0).asked for one in waiting] == [1] * 8
    assert not store_of(teacher, CORPUS, tmp_path).missing(range(8), range(8)).any()


def test_an_engine_whose_thread_ends_says_so_to_whoever_waits(monkeypatch):
    teacher = HeldTeacher()
    with engine_of(teacher, CORPUS) as engine:
        monkeypatch.setattr(engine, "_note", lambda *_: 1 / 0)  # a fault of ours, outside what a request can cause
        first = engine.score(pairs(CORPUS, [0], [0]), later())
        assert teacher.has_begun.wait(30)
        second, third = (engine.score(pairs(CORPUS, [n], [n]), later()) for n in (1, 2))
        teacher.go_on.set()
        assert first.result(SOON).asked == 1
        for future in (second, third):
            with pytest.raises(EndedError):
                future.result(SOON)
        assert not engine.alive
        with pytest.raises(EndedError):
            engine.score(pairs(CORPUS, [0], [0]), later())


def test_two_services_on_one_store_do_not_ask_for_what_the_other_has_kept(tmp_path):
    one, other = ToyTeacher(), ToyTeacher()
    with engine_of(one, CORPUS, tmp_path, pairs_per_unit=8) as first, engine_of(other, CORPUS, tmp_path) as second:
        asked = pairs(CORPUS, range(8), range(8))
        assert second.score(pairs(CORPUS, [9], [9]), later()).result(SOON).asked == 1
        assert first.score(asked, later()).result(SOON).asked == 8
        assert second.score(asked, later()).result(SOON).asked == 0
    assert len(other.pairs) == 1


def failing(*_):
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def test_an_error_after_which_the_device_computes_on_costs_its_request_alone(monkeypatch):
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(teacher, "score", failing)
            with pytest.raises(torch.AcceleratorError):
                engine.score(pairs(CORPUS, [0], [0]), later()).result(SOON)
        assert engine.score(pairs(CORPUS, [0], [0]), later()).result(SOON).asked == 1


def test_a_device_that_fails_takes_no_score_that_was_answered(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.teacher_service.engine._computes", lambda device: False)
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS, tmp_path) as engine:
        engine.score(pairs(CORPUS, [3], [4]), later()).result(SOON)
        monkeypatch.setattr(teacher, "score", failing)
        with pytest.raises(EndedError):
            engine.score(pairs(CORPUS, [0], [0]), later()).result(SOON)
    assert store_of(teacher, CORPUS, tmp_path).missing([3, 0], [4, 0]).tolist() == [False, True]


@pytest.mark.parametrize("asked", ["scores", "vectors"])
def test_a_device_that_fails_ends_the_engine_since_it_fails_whatever_is_asked(monkeypatch, asked):
    monkeypatch.setattr("distill.teacher_service.engine._computes", lambda device: False)
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS) as engine:
        replica = Replica()
        replica.app = build_app(engine, info_of(teacher, CORPUS, Limits()), limits=Limits())
        replica.check_health()
        monkeypatch.setattr(teacher, "score", failing)
        monkeypatch.setattr(teacher, "embed", failing, raising=False)
        if asked == "scores":
            answer = engine.score(pairs(CORPUS, [0, 1], [0, 1]), later())
        else:
            answer = engine.embed(items(image_ids=[0], corpus=CORPUS.fingerprint), later())
        with pytest.raises(EndedError):
            answer.result(SOON)
        assert not engine.alive
        with pytest.raises(RuntimeError, match="the engine has ended"):
            replica.check_health()


def test_a_full_disk_costs_no_answer_and_the_scores_are_written_later(tmp_path, monkeypatch, caplog):
    teacher = ToyTeacher()
    with engine_of(teacher, CORPUS, tmp_path, pairs_per_unit=10) as engine:
        store = engine._known._store
        write = store.write_unit
        monkeypatch.setattr(
            store, "write_unit", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        answer = engine.score(pairs(CORPUS, *all_pairs(range(2))), later()).result(SOON)
        np.testing.assert_array_equal(answer.scores, expected_scores(*all_pairs(range(2))))
        assert engine.score(pairs(CORPUS, *all_pairs(range(2))), later()).result(SOON).asked == 0
        assert "cannot be written" in caplog.text
        monkeypatch.setattr(store, "write_unit", write)
    assert not store_of(teacher, CORPUS, tmp_path).missing(*all_pairs(range(2))).any()


def test_vectors_of_the_contrastive_head():
    with engine_of(ToyTeacher(), CORPUS, images_per_batch=2) as engine:
        by_row = engine.embed(items(image_ids=[5, 0, 5], corpus="x"), later()).result(SOON).vectors
        sent = engine.embed(items(texts=[toy_caption(5), toy_caption(0)]), later()).result(SOON).vectors
    np.testing.assert_allclose(by_row, [[np.cos(0.5), np.sin(0.5)], [1, 0], [np.cos(0.5), np.sin(0.5)]], rtol=1e-6)
    np.testing.assert_allclose(sent, by_row[:2])


def test_without_a_contrastive_head_there_are_no_vectors():
    teacher = ToyTeacher()
    plain = teacher.encode_texts
    teacher.encode_texts = lambda inputs: {k: v for k, v in plain(inputs).items() if k != "embedding"}
    with engine_of(teacher, CORPUS) as engine:
        with pytest.raises(RefusedError, match="no contrastive head"):
            engine.embed(items(texts=["1"]), later()).result(SOON)
        assert engine.score(pairs(CORPUS, [0], [0]), later()).result(SOON).asked == 1


def test_many_threads_ask_at_once_and_no_pair_is_scored_twice(tmp_path):
    teacher, draws = ToyTeacher(), [np.random.default_rng(seed) for seed in range(8)]
    faults = []

    def client(draw):
        for _ in range(20):
            images, texts = draw.integers(0, 12, 30), draw.integers(0, 24, 30)
            found = engine.score(pairs(CORPUS, images, texts), later()).result(SOON).scores
            if not np.array_equal(found, expected_scores(images, texts)):
                faults.append((images, texts))

    with engine_of(teacher, CORPUS, tmp_path, pairs_per_unit=40) as engine:
        threads = [threading.Thread(target=client, args=(draw,)) for draw in draws]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not faults
    assert len(teacher.pairs) == len(set(teacher.pairs)) == store_of(teacher, CORPUS, tmp_path).stats().pairs
