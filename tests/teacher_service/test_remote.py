"""A teacher behind a URL: the same scores as one that is here, whatever happens on the way."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from contextlib import ExitStack, suppress

import numpy as np
import PIL.Image
import pytest
import torch

from distill.embed import DistantSource, embed_with_teacher, item_source, live_source
from distill.protocols import Distant, Teacher
from distill.score import score_pairs
from distill.serving.rerank import Reranker
from distill.stopping import Stopped
from distill.wire import Limits, unpacked
from teachers.remote import RemoteTeacher
from teachers.remote_servers import OtherTeacherError, RemoteOptions, RemoteTeacherError
from tests.teacher_service.meddling import (
    broken_off,
    changed,
    closed,
    cut_short,
    garbage,
    meddling,
    status,
    without_a_pair,
    without_an_end,
)
from tests.teacher_service.served import served, store_of
from tests.toys import ToyTeacher, expected_scores, toy_corpus

CORPUS = toy_corpus(12)
HASTY = RemoteOptions(pairs_per_request=64, connections=2, deadline_s=20, patience_s=20)
IMAGES, TEXTS = (grid.ravel() for grid in np.meshgrid(np.arange(12), np.arange(24), indexing="ij"))


def scores_by(teacher, corpus=CORPUS, images=IMAGES, texts=TEXTS):
    """As a stage asks: by the sources that are made for the teacher."""
    image_ids, image_rows = np.unique(images, return_inverse=True)
    text_ids, text_rows = np.unique(texts, return_inverse=True)
    memories = (
        teacher.encode_images(DistantSource(corpus, "image", teacher)(image_ids)),
        teacher.encode_texts(DistantSource(corpus, "text", teacher)(text_ids)),
    )
    return teacher.score(*memories, torch.from_numpy(image_rows), torch.from_numpy(text_rows)).numpy()


@pytest.fixture
def connect():
    """RemoteTeacher(...) that is closed at the end."""
    with ExitStack() as stack:

        def connected(*urls, options=HASTY, **more):
            teacher = RemoteTeacher(urls, options=options, **more)
            stack.callback(teacher.close)
            return teacher

        yield connected


@pytest.fixture(scope="module")
def toy():
    return ToyTeacher()


@pytest.fixture(scope="module")
def url(toy):
    with served(toy, CORPUS) as address:
        yield address


def test_it_is_a_teacher_like_any_other(url, toy, connect):
    remote = connect(url)
    assert isinstance(remote, Teacher)
    assert isinstance(remote, Distant)
    assert (remote.identity, remote.score_kind) == (toy.identity, toy.score_kind)
    np.testing.assert_array_equal(scores_by(remote), expected_scores(IMAGES, TEXTS))


def test_rows_travel_where_both_have_the_corpus_and_else_what_they_are(url, connect, tmp_path):
    other = toy_corpus(12, captions=3)
    with meddling(url) as between:
        remote = connect(between.url)
        assert remote.knows(CORPUS.fingerprint)
        assert not remote.knows(other.fingerprint)
        scores_by(remote)
        assert {frozenset(unpacked(body)) for body in between.asked} == {
            frozenset({"image_ids", "text_ids", "corpus", "image_rows", "text_rows", "identity", "deadline_s"})
        }
        between.asked.clear()
        found = scores_by(remote, other, np.array([3, 4]), np.array([30, 2]))
        np.testing.assert_array_equal(found, expected_scores(np.array([3, 4]), np.array([30, 2])))
        (body,) = map(unpacked, between.asked)
        assert body["images"] == other.pictures.encoded(np.array([3, 4]))
        assert body["texts"] == [other.texts[2], other.texts[30]]
    assert isinstance(item_source(CORPUS, "image", remote, tmp_path), DistantSource)


def test_pictures_that_are_no_files_go_without_loss(url, connect):
    remote = connect(url)
    images = remote.encode_images(remote.prepare_images(CORPUS.load_images(np.array([7, 2]))))
    texts = remote.encode_texts(remote.prepare_texts(["40 word", "3"]))
    found = remote.score(images, texts, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    np.testing.assert_array_equal(found, expected_scores(np.array([7, 2, 7]), np.array([40, 40, 3])))


def test_a_source_that_keeps_nothing_sends_rows_too(url, connect):
    source = live_source(CORPUS, "image", connect(url))
    assert source(np.array([3, 1]))["row"].tolist() == [[3], [1]]


def test_it_re_ranks(url, toy, connect):
    load = {"image": CORPUS.load_images, "text": lambda ids: [CORPUS.texts[row] for row in ids.tolist()]}
    far, near = (Reranker(teacher, load) for teacher in (connect(url), toy))
    found = np.array([3, 1, 7], np.int64)
    for query, side in (("5 word", "image"), (CORPUS.load_images(np.array([2]))[0], "text")):
        np.testing.assert_array_equal(far.scores(query, side, found), near.scores(query, side, found))


def test_vectors_of_its_contrastive_head(url, toy, connect):
    remote = connect(url)
    for side, count in (("image", 12), ("text", 24)):
        found = embed_with_teacher(remote, DistantSource(CORPUS, side, remote), np.arange(count), side, batch_size=5)
        angle = np.arange(count) * 0.1
        np.testing.assert_allclose(found, np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=1e-6)


def test_the_scoring_stage_fills_the_same_store_and_asks_each_pair_once(connect, tmp_path):
    toy = ToyTeacher()
    with served(toy, CORPUS) as address:
        remote = connect(address)
        store = store_of(toy, CORPUS, tmp_path / "remote")
        sources = {f"{side}_source": DistantSource(CORPUS, side, remote) for side in ("image", "text")}
        report = score_pairs(remote, store, np.tile(IMAGES, 2), np.tile(TEXTS, 2), **sources)
    assert report.asked == len(toy.pairs) == len(set(toy.pairs)) == 288
    np.testing.assert_array_equal(store.require(IMAGES, TEXTS), expected_scores(IMAGES, TEXTS))


def test_ten_thousand_pairs_in_one_call(connect):
    big, toy = toy_corpus(100, captions=1), ToyTeacher()
    images, texts = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(100), indexing="ij"))
    with served(toy, big) as address:
        remote = connect(address)
        np.testing.assert_array_equal(scores_by(remote, big, images, texts), expected_scores(images, texts))
        assert len(toy.pairs) == 10_000
        whole = connect(address, options=RemoteOptions(pairs_per_request=10_000))
        np.testing.assert_array_equal(scores_by(whole, big, images, texts), expected_scores(images, texts))
        assert len(toy.pairs) == 10_000


FAULTS = {
    "a pair is missing": without_a_pair,
    "a pair too many": changed(scores=np.zeros(289, np.float32)),
    "cut short": cut_short,
    "broken off": broken_off,
    "no answer of ours": garbage,
    "closed": closed,
    "an error of the service": status(500),
    "a proxy's error": status(502),
    "it ends": status(503, Retry_After="0"),
    "too much waits": status(429, Retry_After="0"),
    "too late": status(504),
    "no counts": changed(asked="many"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_spoiled_answer_is_asked_for_again(url, connect, fault):
    with meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(pairs_per_request=288, connections=1, patience_s=20))
        between.faults += [fault, fault]
        np.testing.assert_array_equal(scores_by(remote), expected_scores(IMAGES, TEXTS))
        assert len(between.asked) == 3
        assert len(set(between.asked)) == 1


def test_an_answer_without_an_end_is_not_taken_to_its_end(url, connect):
    with meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(pairs_per_request=288, connections=1, patience_s=0.1))
        between.faults += [without_an_end]
        remote.servers._answered_at = 0.0
        with pytest.raises(RemoteTeacherError, match=r"cannot be used \(more than 64 MiB\)"):
            scores_by(remote)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (400, "answered 400: told"),
        (401, "DISTILL_TOKEN"),
        (409, "answered 409"),
        (422, "answered 422: told"),
    ],
)
def test_what_would_be_refused_again_is_not_asked_again(url, connect, code, told):
    with meddling(url) as between:
        remote = connect(between.url)
        between.faults += [status(code)] * 50
        with pytest.raises(RemoteTeacherError, match=told):
            scores_by(remote)
        assert len(between.asked) <= 5, "the parts of one call, each once"


def test_a_service_that_fails_at_one_request_again_and_again_is_given_up(url, connect):
    with meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(pairs_per_request=288, connections=1))
        between.faults += [status(500)] * 50
        with pytest.raises(RemoteTeacherError, match="answered 500: told"):
            scores_by(remote)
        assert len(between.asked) == 3


@pytest.mark.parametrize("what", [{"identity": "another"}, {"score_kind": "cosine"}])
def test_another_teacher_in_an_answer_ends_it_and_nothing_is_stored(url, toy, connect, tmp_path, what):
    with meddling(url) as between:
        remote = connect(between.url)
        store = store_of(toy, CORPUS, tmp_path)
        sources = {f"{side}_source": DistantSource(CORPUS, side, remote) for side in ("image", "text")}
        between.faults += [changed(**what)] * 50
        with pytest.raises(OtherTeacherError):
            score_pairs(remote, store, IMAGES, TEXTS, **sources)
    assert store.stats().pairs == 0


def test_a_service_that_comes_back_with_another_teacher_is_refused_by_itself(toy, connect):
    with served(toy, CORPUS) as address:
        remote = connect(address)
        scores_by(remote)
        port = int(address.rpartition(":")[2])
    with (
        served(ToyTeacher(name="other"), CORPUS, port=port),
        pytest.raises(OtherTeacherError, match="has another teacher by now"),
    ):
        scores_by(remote)


def test_the_identity_that_a_recipe_names_is_held_to(url, toy, connect):
    assert connect(url, identity=toy.identity).identity == toy.identity
    with pytest.raises(OtherTeacherError, match="is meant"):
        connect(url, identity="f" * 32)


def test_servers_of_different_teachers_are_refused(url, connect):
    with served(ToyTeacher(name="other"), CORPUS) as other, pytest.raises(OtherTeacherError, match="never mixed"):
        connect(url, other)


def test_servers_with_different_corpora_get_what_the_items_are(url, connect):
    with served(ToyTeacher(), toy_corpus(12, captions=3)) as other, meddling(other) as between:
        for urls in ((url, between.url), (between.url, url)):
            remote = connect(*urls, options=RemoteOptions(pairs_per_request=16, connections=2))
            assert not remote.knows(CORPUS.fingerprint)
            np.testing.assert_array_equal(scores_by(remote), expected_scores(IMAGES, TEXTS))
        assert between.asked
        assert all("images" in unpacked(body) for body in between.asked)


def test_a_server_that_comes_later_with_another_corpus_is_said(url, connect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = connect(url, f"http://127.0.0.1:{port}", options=RemoteOptions(pairs_per_request=8, connections=2))
    remote.servers._servers[1].rests_until = 0.0
    with (
        served(ToyTeacher(), toy_corpus(12, captions=3), port=port),
        pytest.raises(RemoteTeacherError, match="started with another corpus .* serve the same recipe"),
    ):
        scores_by(remote)


def test_a_token_is_asked_for_and_a_wrong_one_is_said_at_once(toy, connect, monkeypatch):
    with served(toy, CORPUS, token="0123456789abcdef") as address:
        for token in (None, "wrong"):
            began = time.monotonic()
            with pytest.raises(RemoteTeacherError, match="set DISTILL_TOKEN"):
                connect(address, token=token)
            assert time.monotonic() - began < 5
        np.testing.assert_array_equal(
            scores_by(connect(address, token="0123456789abcdef")), expected_scores(IMAGES, TEXTS)
        )
        monkeypatch.setenv("DISTILL_TOKEN", "0123456789abcdef")
        assert connect(address).identity == toy.identity


def test_a_token_is_read_as_the_service_reads_it_and_what_is_none_is_said_without_it(toy, connect, monkeypatch):
    with served(toy, CORPUS, token="0123456789abcdef") as address:
        monkeypatch.setenv("DISTILL_TOKEN", "0123456789abcdef\n")
        assert connect(address).identity == toy.identity
        for wrong in ("", "0123456789\nabcdef", "0123456789 abcdef", "schl\u00fcssel-schl\u00fcssel"):
            with pytest.raises(RemoteTeacherError, match="token_file holds no token") as told:
                connect(address, token=wrong)
            assert not wrong or wrong not in str(told.value)


def test_a_server_that_goes_and_comes_again_is_waited_for(toy, connect):
    with served(toy, CORPUS) as address:
        remote = connect(address)
        port = int(address.rpartition(":")[2])
    found = []
    asking = threading.Thread(target=lambda: found.append(scores_by(remote)), daemon=True)
    asking.start()
    time.sleep(1)
    assert asking.is_alive()
    with served(toy, CORPUS, port=port):
        asking.join(20)
    np.testing.assert_array_equal(found[0], expected_scores(IMAGES, TEXTS))


def test_requests_go_to_both_servers_and_to_one_where_the_other_dies(connect):
    toys, answers = [ToyTeacher(), ToyTeacher()], []
    with ExitStack() as first:
        one = first.enter_context(served(toys[0], CORPUS))
        with served(toys[1], CORPUS) as two:
            remote = connect(one, two, options=RemoteOptions(pairs_per_request=8, connections=2, patience_s=20))
            answers.append(scores_by(remote))
            assert min(len(toy.pairs) for toy in toys) >= 8
            asking = threading.Thread(target=lambda: answers.append(scores_by(remote)), daemon=True)
            asking.start()
            first.close()
            asking.join(20)
            answers.append(scores_by(remote))
            began = time.monotonic()
            assert connect(one, two).identity == toys[1].identity  # one of them is enough to begin
            assert time.monotonic() - began < 5
    for found in answers:
        np.testing.assert_array_equal(found, expected_scores(IMAGES, TEXTS))
    assert len(answers) == 3


def test_a_server_that_stays_away_for_days_costs_no_more_than_a_try_now_and_then(url, connect):
    away = "http://127.0.0.1:9"
    remote = connect(away, url)
    server = next(one for one in remote.servers._servers if one.url == away)
    server.failures, server.rests_until = 100_000, 0.0
    np.testing.assert_array_equal(scores_by(remote), expected_scores(IMAGES, TEXTS))
    assert server.failures > 100_000, "it was tried"
    assert 0 < server.rests_until - time.monotonic() <= 15


def test_nobody_answers_for_longer_than_patience(url, connect):
    with meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(connections=1, patience_s=1.5))
        between.faults += [closed] * 1000
        with pytest.raises(
            RemoteTeacherError, match=r"no answer from http://127.* for 1.5 s; .*What was scored is kept"
        ):
            scores_by(remote)


def test_nobody_is_there_to_begin_with(connect):
    with pytest.raises(
        RemoteTeacherError, match="start one with distill serve teacher RECIPE, or correct teacher.urls"
    ):
        connect("http://127.0.0.1:9", options=RemoteOptions(patience_s=0.3))


def test_another_kind_of_service_is_told_from_a_teacher(connect):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *_):
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(RemoteTeacherError, match="is no teacher's service"):
            connect(f"http://127.0.0.1:{server.server_port}")


def test_a_score_that_is_not_finite_is_named_and_not_stored(connect, tmp_path):
    from distill.store import NonFiniteScoresError

    toy = ToyTeacher(bad_pair=(2, 3))
    with served(toy, CORPUS) as address:
        remote, store = connect(address), store_of(toy, CORPUS, tmp_path)
        sources = {f"{side}_source": DistantSource(CORPUS, side, remote) for side in ("image", "text")}
        with pytest.raises(NonFiniteScoresError, match=r"\(2, 3\)"):
            score_pairs(remote, store, IMAGES, TEXTS, **sources)


def test_pictures_go_to_loader_processes_and_back(url, connect):
    remote = connect(url)
    copy = pickle.loads(pickle.dumps(remote))
    np.testing.assert_array_equal(scores_by(copy), expected_scores(IMAGES, TEXTS))
    copy.close()


def test_what_is_told_to_end_while_it_waits_ends(url, connect):
    ends_at = []

    def heed():
        if ends_at and time.monotonic() > ends_at[0]:
            raise Stopped(15)

    with meddling(url) as between:
        remote = connect(between.url, heed=heed)
        between.faults += [closed] * 1000
        ends_at.append(time.monotonic() + 1)
        with pytest.raises(Stopped):
            scores_by(remote)
        assert time.monotonic() < ends_at[0] + 5
        with suppress(RemoteTeacherError):
            remote.servers._pool.shutdown(wait=True)  # nobody goes on trying
        assert time.monotonic() < ends_at[0] + 8


def test_who_asks_a_teacher_that_is_closed_waits_no_longer(url, connect):
    with meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(pairs_per_request=64, connections=4, patience_s=600))
        between.faults += [closed] * 1000
        told = []

        def ask():
            try:
                scores_by(remote)
            except RemoteTeacherError as error:
                told.append(str(error))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(0.5)
        assert asking.is_alive()
        began = time.monotonic()
        remote.close()
        assert time.monotonic() < began + 5, "all requests end, not the first alone"
        asking.join(5)
        assert not asking.is_alive()
        assert "was closed" in told[0]
        with pytest.raises(RemoteTeacherError, match="was closed"):
            scores_by(remote, images=IMAGES[:8], texts=TEXTS[:8])


def test_pictures_that_do_not_fit_into_a_request_go_in_several(connect):
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    noise[:, 0, 0] = np.arange(12)[:, None]  # what the toy teacher looks at
    with served(ToyTeacher(), limits=Limits(body_bytes=12_000), max_pixels=1000) as url, meddling(url) as between:
        remote = connect(between.url, options=RemoteOptions(pairs_per_request=1000))
        images = remote.prepare_images([PIL.Image.fromarray(one) for one in noise])
        texts = remote.prepare_texts(["1", "2"])
        rows = torch.arange(24)
        found = remote.score(images, texts, rows // 2, rows % 2).numpy()
        assert len(between.asked) >= 4
        assert max(map(len, between.asked)) <= 12_000
    np.testing.assert_array_equal(found, expected_scores(np.arange(24) // 2, np.arange(24) % 2 + 1))


def test_where_files_travel_fewer_pictures_are_in_memory_at_once(connect, tmp_path, monkeypatch):
    corpus, toy, at_once = toy_corpus(100, captions=1), ToyTeacher(), []
    with served(toy, max_pixels=1000) as url:
        remote = connect(url)
        prepare = remote.prepare_files
        monkeypatch.setattr(remote, "prepare_files", lambda files: at_once.append(len(files)) or prepare(files))
        store, rows = store_of(toy, corpus, tmp_path), np.arange(100)
        sources = {f"{side}_source": DistantSource(corpus, side, remote) for side in ("image", "text")}
        score_pairs(remote, store, rows, rows, **sources)
    np.testing.assert_array_equal(store.require(rows, rows), expected_scores(rows, rows))
    assert (max(at_once), sum(at_once)) == (32, 100)


def test_pictures_that_are_too_large_together_are_embedded_in_several_requests(connect):
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    noise[:, 0, 0] = np.arange(12)[:, None]
    with (
        served(ToyTeacher(), limits=Limits(body_bytes=12_000), max_pixels=1000) as url,
        meddling(url) as between,
    ):
        remote = connect(between.url)
        images = remote.prepare_images([PIL.Image.fromarray(one) for one in noise])
        found = remote.embed("image", images)
        assert len(between.asked) >= 2
        assert max(map(len, between.asked)) <= 12_000
    np.testing.assert_allclose(found, ToyTeacher().encode_images({"shade": torch.arange(12)[:, None]})["embedding"])


def test_a_service_that_takes_less_at_a_time_is_asked_for_less(connect):
    toy = ToyTeacher()
    with served(toy, CORPUS, limits=Limits(pairs=10)) as url:
        np.testing.assert_array_equal(scores_by(connect(url)), expected_scores(IMAGES, TEXTS))


def test_what_is_too_large_by_itself_is_said(connect):
    told = r"413: texts: a text has 11 characters; the service takes 10$"
    with served(ToyTeacher(), limits=Limits(text_characters=10), max_pixels=1000) as url:
        remote = connect(url)
        images = remote.prepare_images([PIL.Image.new("RGB", (4, 4), (n, n, n)) for n in range(3)])
        texts = remote.prepare_texts(["1", "2", "3 and so on"])
        with pytest.raises(RemoteTeacherError, match=told):
            remote.score(images, texts, torch.arange(3), torch.arange(3))
