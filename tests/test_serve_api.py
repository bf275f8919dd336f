"""The routes of a served student, against its vectors and its teacher's scores taken one by one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import zlib
from contextlib import ExitStack, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient

from distill.data.pictures import DataError
from distill.serving import guards
from distill.serving.app import PAGE, build_app
from distill.serving.engine import Engine
from distill.serving.opening import Beside, open_engine
from distill.serving.rerank import Reranker
from distill.wire import NoAnswerError
from students.dual import DualEncoder
from teachers.remote_servers import RemoteOptions
from tests.exported import made_export, opened
from tests.teacher_service.served import served

SENTENCE = "a small red ring above a large blue square"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_export(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def x(place: Path) -> Any:
    return opened(place)


@pytest.fixture(scope="module")
def engine(place: Path, x: Any) -> Engine:
    return open_engine(place / "student", Beside(teacher=x, rerank=8), precision="fp32", say=lambda _: None)


@pytest.fixture
def client(engine: Engine) -> Any:
    with TestClient(build_app(engine), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def student(place: Path) -> DualEncoder:
    return DualEncoder.load(place / "student").eval()


def vectors(place: Path, side: str) -> Any:
    return np.load(place / "student" / "embeddings" / f"{side}s.npy")


def png(image: Any) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture_of(x: Any, row: int) -> bytes:
    return png(x.corpus.load_images(np.array([row]))[0])


def text_vector(student: DualEncoder, text: str) -> Any:
    with torch.no_grad():
        return student(None, student.prepare_texts([text])).texts[0].numpy()


def one_score(x: Any, image: Any, text: str) -> float:
    with torch.no_grad():
        images = x.teacher.encode_images(x.teacher.prepare_images([image]))
        texts = x.teacher.encode_texts(x.teacher.prepare_texts([text]))
        return float(x.teacher.score(images, texts, torch.tensor([0]), torch.tensor([0])))


# --- search -----------------------------------------------------------------------------------------------------------


def test_a_sentence_finds_the_pictures_that_are_nearest(client: Any, place: Path, x: Any, student: DualEncoder) -> None:
    answer = client.post("/search", json={"text": f"  {SENTENCE} ", "k": 7}).json()
    cosines = vectors(place, "image") @ text_vector(student, SENTENCE)
    rows = x.corpus.split("test").images
    best = np.argsort(-cosines)[:7]
    assert [hit["id"] for hit in answer["hits"]] == rows[best].tolist()
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    assert (
        [hit["rank"] for hit in answer["hits"]] == [hit["rank_before"] for hit in answer["hits"]] == list(range(1, 8))
    )
    first = answer["hits"][0]
    assert first["name"] == x.corpus.image_names[first["id"]]
    own = x.corpus.pairs[x.corpus.pairs[:, 0] == first["id"], 1]
    assert sorted(first["captions"]) == sorted(x.corpus.texts[int(row)] for row in own)
    assert (first["kind"], first["text"], first["teacher_score"], first["picture"]) == (
        "images",
        None,
        None,
        first["id"],
    )
    assert answer["searched"] == {
        "find": "images", "items": 30, "exact": True, "corpus": "scenes", "split": "test", "reranked": 0,
    }  # fmt: skip
    took = answer["milliseconds"]
    assert took["rerank"] is None
    assert all(took[part] > 0 for part in ("preprocess", "embed", "search"))
    assert took["total"] == pytest.approx(took["preprocess"] + took["embed"] + took["search"], abs=0.005)


def test_ten_hits_are_given_where_no_number_is_asked_for_and_never_more_than_there_are(client: Any) -> None:
    assert len(client.post("/search", json={"text": SENTENCE}).json()["hits"]) == 10
    assert len(client.post("/search", json={"text": SENTENCE, "k": 100}).json()["hits"]) == 30


def test_a_picture_finds_captions_each_with_its_picture(client: Any, place: Path, x: Any, student: DualEncoder) -> None:
    row = int(x.corpus.split("test").images[4])
    answer = client.post("/search", files={"picture": ("x.png", picture_of(x, row))}, data={"k": "5"}).json()
    cosines = vectors(place, "text") @ vectors(place, "image")[4]
    best = np.argsort(-cosines, kind="stable")[:5]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    for hit in answer["hits"]:
        assert hit["text"] == x.corpus.texts[hit["id"]]
        assert [hit["picture"], hit["id"]] in x.corpus.pairs.tolist()
        assert hit["kind"] == "texts"


def test_a_picture_finds_itself_among_pictures_and_a_sentence_itself_among_captions(client: Any, x: Any) -> None:
    image, text = int(x.corpus.split("test").images[4]), int(x.corpus.split("test").texts[3])
    asked = {"find": "images", "k": "3"}
    hits = client.post("/search", files={"picture": picture_of(x, image)}, data=asked).json()["hits"]
    assert hits[0]["id"] == image
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    hits = client.post("/search", json={"text": x.corpus.texts[text], "find": "texts"}).json()["hits"]
    assert x.corpus.texts[hits[0]["id"]] == x.corpus.texts[text]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)


# --- re-ranking -------------------------------------------------------------------------------------------------------


def test_the_teacher_orders_the_first_hits_anew_and_the_rest_follow(client: Any, x: Any) -> None:
    plain = client.post("/search", json={"text": SENTENCE, "k": 12}).json()["hits"]
    answer = client.post("/search", json={"text": SENTENCE, "k": 12, "rerank": True}).json()
    head = [hit["id"] for hit in plain[:8]]
    slowly = {one: one_score(x, x.corpus.load_images(np.array([one]))[0], SENTENCE) for one in head}
    expected = sorted(head, key=lambda one: -slowly[one])
    hits = answer["hits"]
    assert [hit["id"] for hit in hits] == expected + [hit["id"] for hit in plain[8:]]
    assert expected != head
    assert [hit["teacher_score"] for hit in hits[:8]] == pytest.approx([slowly[one] for one in expected], abs=1e-4)
    assert [hit["teacher_score"] for hit in hits[8:]] == [None] * 4
    before = {hit["id"]: hit for hit in plain}
    assert all(hit["rank_before"] == before[hit["id"]]["rank"] for hit in hits)
    assert all(hit["score"] == before[hit["id"]]["score"] for hit in hits)
    assert [hit["rank"] for hit in hits] == list(range(1, 13))
    assert answer["searched"]["reranked"] == 8
    took = answer["milliseconds"]
    assert took["total"] > took["rerank"] > 0


def test_a_hit_from_beyond_the_shown_ones_can_come_first(client: Any) -> None:
    all_eight = client.post("/search", json={"text": SENTENCE, "k": 8, "rerank": True}).json()["hits"]
    three = client.post("/search", json={"text": SENTENCE, "k": 3, "rerank": True}).json()["hits"]
    assert [hit["id"] for hit in three] == [hit["id"] for hit in all_eight[:3]]
    assert max(hit["rank_before"] for hit in three) > 3


def test_captions_of_a_picture_are_re_ranked(client: Any, x: Any) -> None:
    row = int(x.corpus.split("test").images[0])
    form = {"k": "8", "rerank": "true"}
    hits = client.post("/search", files={"picture": picture_of(x, row)}, data=form).json()["hits"]
    image = x.corpus.load_images(np.array([row]))[0]
    slowly = [one_score(x, image, hit["text"]) for hit in hits]
    assert [hit["teacher_score"] for hit in hits] == pytest.approx(slowly, abs=1e-4)
    assert slowly == sorted(slowly, reverse=True)


def test_what_the_teacher_made_of_items_is_kept_within_a_number_of_bytes(engine: Engine, x: Any) -> None:
    assert engine.reranker is not None
    load, asked = engine.reranker._load, []

    def counted(rows: Any) -> Any:
        asked.append(rows.tolist())
        return load["image"](rows)

    rows = x.corpus.split("test").images
    roomy = Reranker(x.teacher, {**load, "image": counted})
    first = roomy.scores(SENTENCE, "image", rows[:6])
    again = roomy.scores("a large star", "image", rows[3:9])
    assert asked == [rows[:6].tolist(), rows[6:9].tolist()]
    fresh = Reranker(x.teacher, load)
    np.testing.assert_allclose(first, fresh.scores(SENTENCE, "image", rows[:6]), atol=1e-5)
    np.testing.assert_allclose(again, fresh.scores("a large star", "image", rows[3:9]), atol=1e-5)
    size = roomy._kept.used // 9
    tight = Reranker(x.teacher, load, kept_bytes=2 * size)
    np.testing.assert_allclose(tight.scores(SENTENCE, "image", rows[:6]), first, atol=1e-5)
    assert len(tight._kept) == 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"json": {"text": "a star", "find": "texts", "rerank": True}}, "captions with a sentence cannot be re-ranked"),
        ({"files": {"picture": b"x"}, "data": {"find": "images", "rerank": "1"}}, "pictures with a picture cannot be"),
    ],
)
def test_like_with_like_cannot_be_re_ranked(client: Any, asked: dict[str, Any], words: str) -> None:
    answer = client.post("/search", **asked)
    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_without_a_teacher_or_an_index_it_is_said(engine: Engine, place: Path) -> None:
    with TestClient(build_app(replace(engine, reranker=None))) as client:
        answer = client.post("/search", json={"text": "a star", "rerank": True})
        assert (answer.status_code, "--teacher" in answer.json()["error"]) == (422, True)
        assert client.get("/info").json()["teacher"] is None
    bare = open_engine(place / "bare", Beside(), precision="fp32", say=lambda _: None)
    with TestClient(build_app(bare)) as client:
        answer = client.post("/search", json={"text": "a star"})
        assert (answer.status_code, "without an index" in answer.json()["error"]) == (409, True)
        assert len(client.post("/embed", json={"texts": ["a star"]}).json()["embeddings"]) == 1
        assert client.get("/info").json()["items"] is None
        assert client.get("/picture/1").status_code == 404


# --- embed, pictures, info --------------------------------------------------------------------------------------------


def test_embeddings_are_the_students(client: Any, place: Path, x: Any, student: DualEncoder) -> None:
    texts = ["a star", SENTENCE]
    answer = client.post("/embed", json={"texts": texts}).json()
    expected = np.stack([text_vector(student, text) for text in texts])
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)
    assert (answer["dim"], answer["kind"]) == (student.dim, "texts")
    rows = x.corpus.split("test").images[:3]
    files = [("pictures", (f"{row}.png", picture_of(x, row))) for row in rows.tolist()]
    raw = client.post("/embed", files=files, headers={"Accept": "application/octet-stream"})
    assert raw.headers["content-type"] == "application/octet-stream"
    found = np.load(BytesIO(raw.content))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vectors(place, "image")[:3], atol=1e-5)


def test_a_picture_is_small_cached_and_only_of_the_index(client: Any, x: Any) -> None:
    row = int(x.corpus.split("test").images[0])
    answer = client.get(f"/picture/{row}?size=20", headers={"Accept": "image/webp,*/*"})
    assert answer.headers["content-type"] == "image/webp"
    assert PIL.Image.open(BytesIO(answer.content)).size == (48, 48)
    jpeg = client.get(f"/picture/{row}", headers={"Accept": "image/png"})
    assert jpeg.headers["content-type"] == "image/jpeg"
    original = np.asarray(x.corpus.load_images(np.array([row]))[0], np.float32)
    assert np.abs(np.asarray(PIL.Image.open(BytesIO(jpeg.content)), np.float32) - original).mean() < 8
    tag = answer.headers["etag"]
    assert tag != jpeg.headers["etag"]
    again = client.get(f"/picture/{row}?size=20", headers={"Accept": "image/webp", "If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    training = int(x.corpus.split("train").images[0])
    assert training != row
    for other, status in ((training, 404), (10**6, 404), (2**63 - 1, 404), (2**63, 422), (-1, 422), ("x", 422)):
        answer = client.get(f"/picture/{other}")
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert client.get(f"/picture/{row}?size=5000").status_code == 422


def test_info_health_and_openapi(client: Any, engine: Engine, x: Any) -> None:
    info = client.get("/info").json()
    assert info["items"] == {"images": 30, "texts": 60}
    assert info["student"]["run"] == "made"  # and not where it lies
    assert info["student"]["class"] == "CLIPModel"
    assert info["teacher"] == {"identity": x.teacher.identity, "score_kind": "log_odds", "rerank": 8}
    assert client.get("/health").json() == {"status": "ready"}
    described = client.get("/openapi.json").json()["paths"]
    for route in ("/search", "/embed"):
        content = described[route]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
    for page in ("/docs", "/redoc"):
        assert client.get(page).status_code == 404


def test_the_page_is_served_whole_and_names_no_other_host(client: Any) -> None:
    for path, (_, kind) in PAGE.items():
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        named = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.findall(r"https?:|[\"'(]//", named)


def test_metrics_count_by_route_and_never_by_what_was_asked_for(client: Any) -> None:
    client.post("/search", json={"text": SENTENCE, "rerank": True})
    client.post("/search", json={"text": ""})
    for n in range(3):
        client.get(f"/nothing-{n}")
    text = client.get("/metrics").text
    assert 'distill_requests_total{route="/search",status="200"} 1.0' in text
    assert 'distill_requests_total{route="/search",status="422"} 1.0' in text
    assert 'distill_errors_total{kind="client",route="/search"} 1.0' in text
    assert 'distill_requests_total{route="none",status="404"} 3.0' in text
    assert 'distill_request_seconds_count{route="/search"} 2.0' in text
    assert 'distill_part_seconds_count{part="rerank"} 1.0' in text
    assert "nothing-1" not in text


# --- what is refused --------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that says it has ``side`` times ``side`` pixels."""
    content = bytearray(png(PIL.Image.new("1", (8, 8))))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BAD_PICTURES = {
    "text": (b"this is no picture", "not an image of a known format"),
    "empty": (b"", "the file is empty"),
    "truncated": (png(PIL.Image.effect_noise((200, 200), 50))[:9000], "cannot be decoded"),
    "large": (bomb(9000), "too large to decode safely: 9000 x 9000"),
    "bomb": (bomb(65000), "too large to decode safely"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_and_the_service_goes_on(client: Any, name: str) -> None:
    content, words = BAD_PICTURES[name]
    for route, field in (("/search", "picture"), ("/embed", "pictures")):
        answer = client.post(route, files={field: ("a.png", content, "image/png")})
        assert answer.status_code == 422
        assert words in answer.json()["error"]
        assert "0x" not in answer.json()["error"]
    assert len(client.post("/search", json={"text": SENTENCE}).json()["hits"]) == 10


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("/search", b"{", 400, "JSON"),
        ("/search", b"[" * 100_000, 400, "JSON"),
        ("/search", b"\xff\xfe", 400, "JSON"),
        ("/search", b'{"text": "\\ud800"}', 400, "JSON"),
        ("/search", b"[]", 422, "object"),
        ("/search", b"{}", 422, "text: field required"),
        ("/search", b'{"text": "  "}', 422, "text: string should have at least 1 character"),
        ("/search", b'{"text": 3}', 422, "text: input should be a valid string; got 3"),
        ("/search", json.dumps({"text": "x" * 2001}).encode(), 422, "at most 2000 characters"),
        ("/search", b'{"text": "a", "k": 0}', 422, "k: input should be greater than or equal to 1; got 0"),
        ("/search", b'{"text": "a", "k": 101}', 422, "k: input should be less than or equal to 100; got 101"),
        ("/search", b'{"text": "a", "find": "sounds"}', 422, "find: input should be 'images' or 'texts'"),
        ("/search", b'{"text": "a", "K": 1}', 422, "K: extra inputs are not permitted"),
        ("/embed", b'{"texts": []}', 422, "texts: list should have at least 1 item"),
        ("/embed", json.dumps({"texts": ["a"] * 257}).encode(), 422, "at most 256 items"),
        ("/embed", b'{"texts": ["a", ""]}', 422, "texts.1: string should have at least 1 character"),
    ],
)
def test_a_wrong_body_is_refused_with_words(client: Any, route: str, body: bytes, status: int, words: str) -> None:
    answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]
    assert len(answer.json()["error"]) < 400


def test_a_wrong_form_is_refused_with_words(client: Any, x: Any) -> None:
    good = picture_of(x, 0)

    def refused(status: int, words: str, route: str = "/search", **asked: Any) -> None:
        answer = client.post(route, **asked)
        assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
        assert words in answer.json()["error"]

    refused(422, "the form's file 'picture'; it has 'image'", files={"image": good})
    refused(422, "one picture searches; the form has 2", files=[("picture", good), ("picture", good)])
    refused(422, "k: input should be a valid integer", files={"picture": good}, data={"k": "many"})
    refused(400, "Too many files", "/embed", files=[("pictures", good)] * 33)
    refused(415, "send application/json, or multipart", data={"text": "a star"})
    refused(415, "got text/plain", content=b'{"text": "a"}', headers={"Content-Type": "text/plain"})
    refused(400, "boundary", content=b"x", headers={"Content-Type": "multipart/form-data"})
    answer = client.get("/search")
    assert (answer.status_code, list(answer.json())) == (405, ["error"])


def test_more_than_may_be_sent_is_refused_by_its_length_and_as_it_comes(client: Any) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    stated = client.post("/search", content=b"short", headers=kind | {"Content-Length": str(200 << 20)})
    assert (stated.status_code, "20 MiB" in stated.json()["error"]) == (413, True)
    head = b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
    for route in ("/search", "/embed"):
        grown = client.post(route, content=iter([head, *[bytes(1 << 20)] * 25]), headers=kind)
        assert (grown.status_code, "20 MiB" in grown.json()["error"]) == (413, True)
    assert client.post("/search", json={"text": SENTENCE}).status_code == 200


def test_who_stops_sending_is_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PATIENCE_S", 0.05)
    told = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        told.append(message)

    headers = [(b"host", b"test"), (b"content-type", b"application/json"), (b"content-length", b"9")]
    scope = {"type": "http", "method": "POST", "path": "/search", "headers": headers, "query_string": b""}
    asyncio.run(build_app(engine)(scope, receive, send))
    assert told[0]["status"] == 408
    assert b"nothing more of the request came" in told[1]["body"]


class Stuck:
    """An engine's student that waits."""

    def __init__(self, student: Any) -> None:
        self._student, self.go = student, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)

    def run(self, side: Any, inputs: Any) -> Any:
        self.go.wait(30)
        return self._student.run(side, inputs)


def test_when_too_many_wait_the_next_is_told_to_come_again(engine: Engine) -> None:
    stuck = Stuck(engine.student)
    app = build_app(replace(engine, student=stuck))

    async def many() -> list[Any]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            asked = [asyncio.create_task(client.post("/search", json={"text": "a star"})) for _ in range(25)]
            done, _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 8:
                await asyncio.sleep(0.01)
                done = {one for one in asked if one.done()}
            assert (await client.get("/health")).status_code == 200
            stuck.go.set()
            return await asyncio.gather(*asked)

    answers = asyncio.run(many())
    assert sorted(answer.status_code for answer in answers) == [200] * 17 + [503] * 8
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "2"
    assert "try again" in refused.json()["error"]


def test_a_teacher_elsewhere_re_ranks_and_one_that_is_gone_holds_nobody_up(
    place: Path, x: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.serving.opening.DISTANT_S", 1.0)
    asked = {"text": SENTENCE, "k": 8, "rerank": True}

    def unanswered() -> None:
        with suppress(NoAnswerError):
            by_it.reordered(found)

    near = client.post("/search", json=asked).json()["hits"]
    with ExitStack() as service:
        url = service.enter_context(served(x.teacher, x.corpus))
        elsewhere = opened(place, f"teacher={{kind: remote, urls: ['{url}']}}", "teach=null")
        by_it = open_engine(place / "student", Beside(teacher=elsewhere, rerank=8), precision="fp32", say=list)
        with TestClient(build_app(by_it), raise_server_exceptions=False) as other:
            far = other.post("/search", json=asked).json()["hits"]
            assert [hit["id"] for hit in far] == [hit["id"] for hit in near]
            np.testing.assert_allclose(*([hit["teacher_score"] for hit in some] for some in (far, near)), atol=1e-4)
            service.close()
            began = time.monotonic()
            answer = other.post("/search", json=asked)
            assert time.monotonic() - began < 10
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
            assert "does not answer" in answer.json()["error"]
            assert url not in answer.text
            assert other.post("/search", json={"text": SENTENCE}).status_code == 200
            found = by_it.search(SENTENCE, "image", depth=8)
            by_it.reranker.teacher.servers.options = RemoteOptions(patience_s=600)
            waiting = threading.Thread(target=unanswered, daemon=True)
            waiting.start()
            time.sleep(0.5)
            assert waiting.is_alive()
        waiting.join(10)
        assert not waiting.is_alive(), "a service that is told to end waits for nobody"


class Lost:
    def load(self, rows: Any) -> Any:
        raise DataError(f"/secret/place/{rows[0]}.png is gone")


def test_errors_say_nothing_of_where_things_lie(
    engine: Engine, x: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = int(x.corpus.split("test").images[0])
    with TestClient(build_app(replace(engine, pictures=Lost())), raise_server_exceptions=False) as client:
        answer = client.get(f"/picture/{row}")
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        assert "/secret/place/" in caplog.text
        monkeypatch.setattr(Engine, "search", lambda *_, **__: 1 / 0)
        answer = client.post("/search", json={"text": "a star"})
        assert answer.status_code == 500
        assert "the service's log says what" in answer.json()["error"]
        monkeypatch.undo()
        assert client.post("/search", json={"text": "a star"}).status_code == 200


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_with_a_token_only_the_pages_files_are_open(engine: Engine) -> None:
    token = "0123456789abcdef0123"
    with TestClient(build_app(engine, token=token)) as client:
        for path in PAGE:
            assert client.get(path).status_code == 200
        wrong = [None, "Bearer", "Bearer x", f"Basic {token}", f"Bearer {token}x", "Bearer \u00e9", token]
        for path in ("/info", "/health", "/metrics", "/openapi.json", "/picture/1", "/nothing"):
            for header in wrong:
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, (path, header)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/search", json={"text": "a star"}).status_code == 401
        right = {"Authorization": f"Bearer {token}"}
        assert client.post("/search", json={"text": "a star"}, headers=right).status_code == 200
        assert client.get("/health", headers=right).status_code == 200


def test_other_hosts_names_and_other_sites_posts_are_refused(engine: Engine) -> None:
    app = build_app(engine, hosts=["localhost", "127.0.0.1", "[::1]"])
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/info").status_code == 200
        assert client.get("/info", headers={"Host": "localhost:9"}).status_code == 200
        assert client.get("/info", headers={"Host": "[::1]:8000"}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
            assert client.get("/info", headers={"Host": host}).status_code == 400

        def post(**headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.post("/search", json={"text": "a star"}, headers=named).status_code

        assert post(Origin="http://127.0.0.1:8000", Sec_Fetch_Site="same-origin") == 200
        assert post(Origin="http://evil.example") == 403
        assert post(Origin="http://127.0.0.1:3000") == 403
        assert post(Origin="null") == 403
        assert post(Sec_Fetch_Site="cross-site") == 403
        assert post(Sec_Fetch_Site="same-site") == 403
