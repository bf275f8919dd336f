"""The routes of a teacher's service: what they answer, who is refused and how, and that nothing of it leaks."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from starlette.testclient import TestClient

from distill.data.corpus import Corpus
from distill.data.pictures import DataError
from distill.serving import guards
from distill.teacher_service import app as app_module
from distill.teacher_service.app import build_app
from distill.teacher_service.engine import EndedError, Engine, EngineSettings
from distill.teacher_service.requests import ScoreRequest, read_request
from distill.wire import JSON, MSGPACK, Limits, packed, read_embedded, read_scored
from tests.teacher_service.served import store_of
from tests.teacher_service.toy_service import AnyTextTeacher, known_corpus, square, toy_engine
from tests.toys import expected_scores

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105
LEAKS = re.compile(r"0x[0-9a-f]{6}|/secret|/tmp|/home|site-packages|Traceback|\.py\b")
LIMITS = Limits(body_bytes=1 << 20, pixels=100_000_000)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return known_corpus()


@pytest.fixture
def serve(corpus: Corpus) -> Iterator[Callable[..., Any]]:
    """Makes clients of services, each of an engine of its own."""
    opened: list[TestClient] = []

    def start(*, app: dict[str, Any] | None = None, **more: Any) -> TestClient:
        engine, info = toy_engine(corpus, limits=LIMITS, **more)
        client = TestClient(
            build_app(engine, info, limits=LIMITS, **(app or {})), "http://127.0.0.1", raise_server_exceptions=False
        )
        client.__enter__()
        client.engine = engine  # type: ignore[attr-defined]
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)
        assert not client.engine.alive  # type: ignore[attr-defined]


@pytest.fixture
def client(serve: Callable[..., Any]) -> Any:
    return serve()


def by_row(corpus: Corpus, images: Any, texts: Any, **more: Any) -> dict[str, Any]:
    return {"corpus": corpus.fingerprint, "image_ids": list(images), "text_ids": list(texts), **more}


def told(answer: Any, status: int) -> str:
    """What a refusal says, which names nothing of this machine."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    said: str = answer.json()["error"]
    assert not LEAKS.search(said), said
    assert answer.headers["x-content-type-options"] == "nosniff"
    return said


class Held(AnyTextTeacher):
    """Scores once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.began = threading.Event(), threading.Event()

    def score(self, *args: Any) -> Any:
        self.began.set()
        assert self.go.wait(20)
        return super().score(*args)


# --- what is answered -------------------------------------------------------------------------------------------------


def test_scores_come_in_the_kind_and_the_order_that_was_asked(client: Any, corpus: Corpus) -> None:
    images, texts = [3, 1, 1, 3], [5, 0, 7, 5]
    content = by_row(corpus, [1, 3], [0, 5, 7], image_rows=[1, 0, 0, 1], text_rows=[1, 0, 2, 1])
    expected = expected_scores(np.array(images), np.array(texts))
    answer = client.post("/score", json=content)
    assert answer.headers["content-type"] == JSON
    found = answer.json()
    assert found["scores"] == pytest.approx(expected.tolist())
    assert (found["score_kind"], found["identity"]) == ("log_odds", client.engine.teacher.identity)
    assert (found["asked"], found["served_from_store"]) == (3, 1)  # one pair is named twice
    body = packed({name: np.array(value) if isinstance(value, list) else value for name, value in content.items()})
    again = client.post("/score", content=body, headers={"Content-Type": MSGPACK})
    assert again.headers["content-type"] == MSGPACK
    scored = read_scored(again.content, 4)
    assert np.array_equal(scored.scores, expected)
    assert (scored.asked, scored.served_from_store) == (0, 4)


def test_pictures_and_texts_of_the_corpus_count_as_its_rows_however_they_come(
    serve: Callable[..., Any], corpus: Corpus, tmp_path: Path
) -> None:
    teacher = AnyTextTeacher()
    store = store_of(teacher, corpus, tmp_path)
    client = serve(teacher=teacher, store=store)
    files = corpus.pictures.encoded(np.array([4]))
    content = {"images": [base64.b64encode(files[0]).decode()], "texts": [corpus.texts[6]]}
    assert client.post("/score", json=content).json()["asked"] == 1
    assert client.post("/score", json=by_row(corpus, [4], [6])).json()["asked"] == 0
    client.engine.close()
    assert store.lookup(4, 6) == pytest.approx(float(expected_scores(np.array([4]), np.array([6]))[0]))


def test_vectors_of_either_side(client: Any, corpus: Corpus) -> None:
    in_json = client.post("/embed", json={"corpus": corpus.fingerprint, "text_ids": [3, 0, 3]}).json()
    body = packed({"corpus": corpus.fingerprint, "text_ids": np.array([3, 0, 3])})
    binary = client.post("/embed", content=body, headers={"Content-Type": "application/x-msgpack"})
    found = read_embedded(binary.content, 3)
    assert found.vectors.tolist() == in_json["vectors"]
    assert in_json["dim"] == 2
    assert np.allclose(found.vectors, [[np.cos(0.3), np.sin(0.3)], [1, 0], [np.cos(0.3), np.sin(0.3)]], atol=1e-6)


def test_what_the_service_says_of_itself(client: Any, corpus: Corpus) -> None:
    info = client.get("/info").json()
    assert info["identity"] == client.engine.teacher.identity
    assert info["corpus"] == {"name": "toy", "fingerprint": corpus.fingerprint, "images": 12, "texts": 24}
    assert info["limits"] == vars(LIMITS)
    assert client.get("/health").json() == {"status": "ready"}
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/score", "/embed", "/info", "/health", "/metrics"}
    content = described["paths"]["/score"]["post"]["requestBody"]["content"]
    assert set(content) == {JSON, MSGPACK}
    assert not LEAKS.search(json.dumps(info))


def test_a_score_that_is_no_number_is_null_for_people_and_nan_for_programs(
    serve: Callable[..., Any], corpus: Corpus
) -> None:
    client = serve(teacher=AnyTextTeacher(bad_pair=(1, 2)))
    assert client.post("/score", json=by_row(corpus, [1], [2, 3])).json()["scores"][0] is None
    body = packed({"corpus": corpus.fingerprint, "image_ids": np.array([1]), "text_ids": np.array([2, 3])})
    answer = client.post("/score", content=body, headers={"Content-Type": MSGPACK})
    assert np.isnan(read_scored(answer.content, 2).scores).tolist() == [True, False]


# --- who is refused ---------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_everywhere_but_of_health(serve: Callable[..., Any], corpus: Corpus) -> None:
    client = serve(app={"token": TOKEN})
    wrong = [None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer \xff"]
    for path in ("/info", "/metrics", "/openapi.json", "/score", "/embed", "/nothing"):
        for given in wrong:
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for ask in (client.get, client.post):
                answer = ask(path, headers=headers)
                assert "token" in told(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/health").json() == {"status": "ready"}
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert client.post("/score", json=by_row(corpus, [0], [0]), headers=right).status_code == 200
    assert client.get("/info", headers=right).status_code == 200


def test_the_token_is_compared_in_constant_time(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(guards.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    client = serve(app={"token": TOKEN})
    assert client.get("/info", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert seen == [(b"wrong", TOKEN.encode())]


def test_posts_from_other_sites_and_other_names_of_the_host_are_refused(
    serve: Callable[..., Any], corpus: Corpus
) -> None:
    client = serve(app={"hosts": ["localhost", "127.0.0.1"]})
    content = by_row(corpus, [0], [0])
    odd = [{"Origin": origin} for origin in ("null", "http://[", "http://[x]", "")]
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, *odd):
        assert "another site" in told(client.post("/score", json=content, headers=headers), 403)
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.", "localhost@evil.example"):
        assert client.post("/score", json=content, headers={"Host": host}).status_code == 400
    assert client.post("/score", json=content, headers={"Host": "localhost:8"}).status_code == 200
    kinds = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
    for kind in kinds:  # what a page may send without being asked first
        assert "send application/msgpack" in told(
            client.post("/score", content=b"{}", headers={"Content-Type": kind}), 415
        )


def test_no_route_and_no_method_that_is_not_there(client: Any) -> None:
    told(client.get("/nothing"), 404)
    told(client.get("/score"), 405)
    told(client.delete("/info"), 405)
    for path in ("/docs", "/redoc", "/../etc/passwd", "/%2e%2e/etc/passwd"):
        assert client.get(path).status_code == 404


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_corpus_and_another_teacher_are_refused(client: Any, corpus: Corpus) -> None:
    assert "this service has" in told(client.post("/score", json=by_row(corpus, [0], [0]) | {"corpus": "x"}), 409)
    assert "teacher" in told(client.post("/score", json=by_row(corpus, [0], [0], identity="other")), 409)
    assert client.post("/embed", json={"corpus": "x", "image_ids": [0]}).status_code == 409
    sent = {"images": [base64.b64encode(square(7)).decode()], "texts": ["a"], "corpus": "x"}
    assert client.post("/score", json=sent).status_code == 200  # no row is named


def test_rows_outside_the_corpus_are_refused(client: Any, corpus: Corpus) -> None:
    assert "image id 12 is outside the corpus, which has 12" in told(
        client.post("/score", json=by_row(corpus, [12], [0])), 422
    )
    told(client.post("/score", json=by_row(corpus, [0], [2**63 - 1])), 422)
    told(client.post("/embed", json={"corpus": corpus.fingerprint, "text_ids": [24]}), 422)


@pytest.mark.parametrize("body", [b"", b"\x81", b"{", b"\xff" * 100, b"\x80\x80"])
@pytest.mark.parametrize("kind", [JSON, MSGPACK])
def test_a_body_that_is_cut_short_is_refused(client: Any, body: bytes, kind: str) -> None:
    told(client.post("/score", content=body, headers={"Content-Type": kind}), 400)


def test_bodies_over_the_limit_are_refused_whether_they_state_their_length_or_not(client: Any) -> None:
    kind = {"Content-Type": MSGPACK}
    assert "1 MiB" in told(client.post("/score", content=bytes(LIMITS.body_bytes + 1), headers=kind), 413)
    blocks = (bytes(1 << 16) for _ in range(17))
    assert "1 MiB" in told(client.post("/score", content=blocks, headers=kind), 413)


def test_more_pairs_than_may_be_are_refused_and_ten_thousand_are_answered(client: Any, corpus: Corpus) -> None:
    def ask(pairs: int) -> Any:
        rows = np.arange(pairs)
        content = {"corpus": corpus.fingerprint, "image_ids": np.arange(12), "text_ids": np.arange(24)}
        body = packed({**content, "image_rows": rows % 12, "text_rows": rows // 12 % 24})
        return client.post("/score", content=body, headers={"Content-Type": MSGPACK})

    rows = np.arange(10_000)
    found = read_scored(ask(10_000).content, 10_000)
    assert np.array_equal(found.scores, expected_scores(rows % 12, rows // 12 % 24))
    assert found.asked == 288
    assert "16385 pairs" in told(ask(16_385), 413)


PICTURES = {
    "no picture": (b"GIF8 is what I say", "not an image of a known format"),
    "cut short": (square(1)[:45], "cannot be decoded"),
    "empty": (b"", "0 bytes"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "narrow": (square(1, (5140, 20)), "too narrow: 5140 x 20"),
}  # fmt: skip


@pytest.mark.parametrize(("picture", "said"), PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("route", ["/score", "/embed"])
def test_pictures_that_cannot_be_used_are_refused(client: Any, route: str, picture: bytes, said: str) -> None:
    content = {"images": [picture]} | ({"texts": ["a"]} if route == "/score" else {})
    answer = client.post(route, content=msgpack.packb(content), headers={"Content-Type": MSGPACK})
    assert said in told(answer, 422)


def test_many_pictures_that_are_each_within_the_limit_are_refused_together(client: Any) -> None:
    files = [square(shade, (7000, 7000)) for shade in range(2)]
    assert len(files[0]) < 200_000
    kind = {"Content-Type": MSGPACK}
    more = [*files, square(3, (7000, 700))]
    assert "pixels together" in told(
        client.post("/score", content=msgpack.packb({"images": more, "texts": ["a"]}), headers=kind), 413
    )
    again = [files[0]] * 3  # the same one is decoded once
    assert (
        client.post("/score", content=msgpack.packb({"images": again, "texts": ["a"]}), headers=kind).status_code == 200
    )


# --- too much, too late, and at the end -------------------------------------------------------------------------------


def in_background(ask: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(ask()), daemon=True).start()
    return future


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_what_waits_is_bounded_and_who_is_turned_away_hears_when_to_come_again(
    serve: Callable[..., Any], corpus: Corpus
) -> None:
    teacher = Held()
    client = serve(teacher=teacher, settings=EngineSettings(waiting_pairs=10, pairs_per_pack=4))
    first = in_background(lambda: client.post("/score", json=by_row(corpus, range(8), [0])))
    until(teacher.began.is_set)
    turned_away = client.post("/score", json=by_row(corpus, range(3), [1]))
    assert "too many pairs" in told(turned_away, 429)
    assert 1 <= int(turned_away.headers["retry-after"]) <= 30
    assert client.get("/health").status_code == 200
    fits = in_background(lambda: client.post("/score", json=by_row(corpus, range(2), [1])))
    until(lambda: client.engine.waiting == 10)
    teacher.go.set()
    assert first.result(20).status_code == fits.result(20).status_code == 200
    assert client.post("/score", json=by_row(corpus, range(3), [1])).status_code == 200
    text = client.get("/metrics").text
    assert "distill_turned_away_total 1.0" in text
    assert 'distill_requests_total{route="/score",status="429"} 1.0' in text


def test_a_deadline_that_passes_is_answered_in_time_and_what_has_not_begun_is_taken_back(
    serve: Callable[..., Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "_GRACE_S", 0.05)
    teacher = Held()
    client = serve(teacher=teacher)
    first = in_background(lambda: client.post("/score", json=by_row(corpus, [0], [0])))
    until(teacher.began.is_set)
    began = time.monotonic()
    late = client.post("/score", json=by_row(corpus, [1], [1], deadline_s=0.1))
    assert "deadline" in told(late, 504)
    assert time.monotonic() - began < 5
    until(lambda: client.engine.waiting <= 2)
    teacher.go.set()
    assert first.result(20).status_code == 200


def test_bodies_in_hand_are_bounded_together(
    serve: Callable[..., Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "BYTES_IN_HAND", 3 << 19)
    teacher = Held()
    client = serve(teacher=teacher)
    content = {**by_row(corpus, [0], [0]), "identity": teacher.identity}
    large = json.dumps(content).encode().ljust(LIMITS.body_bytes)
    first = in_background(lambda: client.post("/score", content=large, headers={"Content-Type": JSON}))
    until(teacher.began.is_set)
    assert "in a moment" in told(client.post("/score", content=large, headers={"Content-Type": JSON}), 429)
    # one that is larger than any may be is told so, and not to come again
    stated = {"Content-Type": JSON, "Content-Length": str(10**12)}
    assert told(client.post("/score", content=b"{}", headers=stated), 429)
    teacher.go.set()
    assert first.result(20).status_code == 200
    assert "1 MiB" in told(client.post("/score", content=b"{}", headers=stated), 413)
    assert client.post("/score", content=large, headers={"Content-Type": JSON}).status_code == 200


def asked_slowly(app: Any, pieces: Callable[[], Any]) -> tuple[int, bytes]:
    """What a client gets whose body comes by ``pieces``."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"test"), (b"content-type", MSGPACK.encode()), (b"content-length", b"900000")]
    scope = {"type": "http", "method": "POST", "path": "/score", "headers": headers, "query_string": b""}
    asyncio.run(asyncio.wait_for(app(scope, pieces, send), 20))
    return sent[0]["status"], sent[1]["body"]


def test_a_body_that_stops_and_one_that_trickles_are_not_waited_for(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, info = toy_engine(corpus)
    app = build_app(engine, info, limits=LIMITS)
    monkeypatch.setattr(guards, "PATIENCE_S", 0.2)
    count = 0

    async def nothing() -> Any:
        await asyncio.sleep(60)

    async def trickle() -> Any:
        nonlocal count
        count += 1
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"\x81", "more_body": True}

    async def steady() -> Any:
        nonlocal count
        count += 1
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": bytes(8192), "more_body": count < 12}

    try:
        assert asked_slowly(app, nothing) == (408, b'{"error":"nothing more of the request came for 0 seconds"}')
        status, said = asked_slowly(app, trickle)
        assert (status, b"too slowly" in said) == (408, True)
        assert 2 <= count <= 5
        count = 0
        assert asked_slowly(app, steady)[0] == 400  # read to its end, though it took longer than patience
        assert count == 12
    finally:
        engine.close()


def test_a_service_that_ends_answers_what_waits_and_keeps_the_scores(corpus: Corpus, tmp_path: Path) -> None:
    teacher = Held()
    store = store_of(teacher, corpus, tmp_path)
    engine, info = toy_engine(corpus, teacher=teacher, store=store)
    with TestClient(build_app(engine, info, limits=LIMITS), raise_server_exceptions=False) as client:
        first = in_background(lambda: client.post("/score", json=by_row(corpus, [2], [3])))
        until(teacher.began.is_set)
        waits = in_background(lambda: client.post("/score", json=by_row(corpus, [4], [5])))
        until(lambda: engine.waiting == 2)
        ended = in_background(engine.close)
        until(lambda: not engine.alive)
        refused = client.post("/score", json=by_row(corpus, [0], [0]))
        assert "takes nothing any more" in told(refused, 503)
        assert refused.headers["retry-after"] == "5"
        told(client.get("/health"), 503)
        teacher.go.set()
        assert first.result(20).status_code == waits.result(20).status_code == 200
        ended.result(20)
    assert np.isfinite(store_of(teacher, corpus, tmp_path).lookup([2, 4], [3, 5])).all()


# --- faults on this side ----------------------------------------------------------------------------------------------


class Failing(AnyTextTeacher):
    """Fails for one picture."""

    def score(self, images: Any, texts: Any, image_rows: Any, text_rows: Any) -> Any:
        if 3 in images["number"][image_rows].tolist():
            raise RuntimeError("cannot read /secret/weights.safetensors at 0x7fffdeadbeef")
        return super().score(images, texts, image_rows, text_rows)


def test_a_teacher_that_fails_is_answered_without_its_words_and_spoils_nobody_else(
    serve: Callable[..., Any], corpus: Corpus
) -> None:
    client = serve(teacher=Failing())
    said = told(client.post("/score", json=by_row(corpus, [3], [0])), 500)
    assert said == "something went wrong here; the service's log says what"
    assert client.post("/score", json=by_row(corpus, [2], [0])).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_picture_of_the_corpus_that_has_changed_is_answered_without_its_path(
    serve: Callable[..., Any], corpus: Corpus
) -> None:
    client = serve()

    def changed(rows: Any) -> Any:
        raise DataError("image 'x.jpg' (row 3, /secret/x.jpg) is not what it was")

    client.engine.items["image"]._source = changed
    assert told(client.post("/score", json=by_row(corpus, [3], [0])), 500) == (
        "a picture of the corpus cannot be read; the service's log says which"
    )
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("thread", ["first", "second"])
def test_where_a_thread_of_the_engine_dies_all_who_wait_hear_of_it_and_it_still_ends(
    serve: Callable[..., Any], corpus: Corpus, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(BaseException):
        """What nobody catches."""

    def die(*_: Any) -> None:
        raise Gone

    client = serve()
    monkeypatch.setattr(client.engine, "_begun" if thread == "first" else "_answer", die)
    assert "takes nothing any more" in told(client.post("/score", json=by_row(corpus, [0], [0])), 503)
    told(client.get("/health"), 503)
    told(client.post("/score", json=by_row(corpus, [0], [0])), 503)
    until(lambda: not any(one.is_alive() for one in client.engine._threads))


def test_requests_that_are_taken_back_leave_nothing_in_memory(corpus: Corpus) -> None:
    teacher = Held()
    engine, _ = toy_engine(corpus, teacher=teacher, settings=EngineSettings(waiting_pairs=10**6))
    try:
        content = {"corpus": corpus.fingerprint, "image_ids": [0], "text_ids": [0]}
        one = read_request(json.dumps(content).encode(), JSON, ScoreRequest, LIMITS)
        honest = [engine.score(one, time.monotonic() + 60) for _ in range(50)]
        until(teacher.began.is_set)
        gc.collect()
        tracemalloc.start()
        for shade in range(100):
            picture = square(shade % 256) + bytes(1 << 20)  # what follows a picture is not read
            body = msgpack.packb({"images": [picture], "texts": ["a"]})
            asked = read_request(body, MSGPACK, ScoreRequest, Limits())
            engine.score(asked, time.monotonic() + 60).cancel()
            del asked, body, picture
        held, _ = tracemalloc.get_traced_memory()
        assert held < 4 << 20  # and not a hundred pictures
        teacher.go.set()
        assert all(len(future.result(20).scores) == 1 for future in honest)
    finally:
        tracemalloc.stop()
        teacher.go.set()
        engine.close()


def test_an_engine_that_has_ended_takes_nothing(corpus: Corpus) -> None:
    engine, _ = toy_engine(corpus)
    engine.close()
    content = {"corpus": corpus.fingerprint, "image_ids": [0], "text_ids": [0]}
    with pytest.raises(EndedError):
        engine.score(read_request(json.dumps(content).encode(), JSON, ScoreRequest, LIMITS), time.monotonic() + 60)
    assert isinstance(engine, Engine)
