"""The whole app under requests that schemathesis and hypothesis make: no 500, no hang, answers as described."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import schemathesis
    from schemathesis.specs.openapi import checks as openapi

from distill.teacher_service.app import build_app
from distill.teacher_service.engine import EngineSettings
from distill.wire import MSGPACK, Limits, read_embedded, read_scored
from tests.teacher_service.toy_service import known_corpus, square, toy_engine
from tests.toys import expected_scores

LIMITS = Limits(body_bytes=1 << 20, pairs=64, images=8, texts=16, text_characters=60)
CORPUS = known_corpus()
ANSWERED = {200, 400, 409, 413, 415, 422, 504}


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=10_000,  # milliseconds; nothing hangs
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    engine, info = toy_engine(CORPUS, limits=LIMITS, settings=EngineSettings(pairs_per_pack=16))
    close, engine.close = engine.close, lambda: None  # type: ignore[method-assign]  # schemathesis ends it at each call
    yield build_app(engine, info, limits=LIMITS)
    assert engine.alive
    close()


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    return TestClient(app)  # an error of the app is one of the test


OPERATIONS = [("POST", "/score"), ("POST", "/embed"), ("GET", "/info"), ("GET", "/health"), ("GET", "/metrics")]
CHECKS = [
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_headers_conformance,
    openapi.response_schema_conformance,
]


def fuzz_operation(app: Any, method: str, path: str, examples: int) -> set[int]:
    """The statuses of answers to requests that the description allows and to some that it does not; each is checked."""
    described = schemathesis.openapi.from_asgi("/openapi.json", app)
    assert len(list(described.get_all_operations())) == len(OPERATIONS)
    operation = described[path][method]
    modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    statuses = set()

    @fuzzed(examples)
    @given(case=st.one_of(modes))
    def checked(case: Any) -> None:
        response = case.call()
        statuses.add(response.status_code)
        if response.status_code != 405:  # another method, which the description says nothing of
            late = response.status_code == 504  # what the client itself asks for by a deadline of next to nothing
            no_fault = [] if late else [schemathesis.checks.not_a_server_error]
            case.validate_response(response, checks=[*no_fault, *CHECKS])

    checked()
    return statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_schemathesis_sends_is_answered_as_described(app: Any, method: str, path: str) -> None:
    statuses = fuzz_operation(app, method, path, 40 if method == "POST" else 5)
    assert statuses - {405} <= ANSWERED
    assert len(statuses) >= (2 if method == "POST" else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_schemathesis_sends_for_long_is_answered_as_described(app: Any, method: str, path: str) -> None:
    assert fuzz_operation(app, method, path, 3000) - {405} <= ANSWERED


def int64(numbers: list[int]) -> bytes:
    return np.array(numbers, "<i8").tobytes()


PICTURES = st.integers(0, 3).map(square) | st.integers(0, 11).map(lambda row: FILES[row]) | st.binary(max_size=40)
FILES = CORPUS.pictures.encoded(np.arange(12))
TEXTS = st.text(min_size=1, max_size=62) | st.sampled_from(list(CORPUS.texts))
PARTS = {
    "corpus": st.just(CORPUS.fingerprint) | st.text(max_size=5),
    "identity": st.none() | st.text(max_size=5),
    "deadline_s": st.floats(1, 20) | st.floats(),
    "image_ids": st.lists(st.integers(-1, 12), max_size=9).map(int64),
    "images": st.lists(PICTURES, max_size=9),
    "text_ids": st.lists(st.integers(0, 24), max_size=17).map(int64),
    "texts": st.lists(TEXTS, max_size=17),
    "image_rows": st.lists(st.integers(0, 3), max_size=70).map(int64),
    "text_rows": st.lists(st.integers(0, 3), max_size=70).map(int64),
    "unknown": st.integers(-(2**63), 2**64 - 1),
}  # fmt: skip


SOUND = {
    "image_ids": st.lists(st.integers(0, 11), min_size=3, max_size=8).map(int64),
    "images": st.lists(st.integers(0, 11).map(lambda row: FILES[row]) | st.just(square(3)), min_size=3, max_size=8),
    "text_ids": st.lists(st.integers(0, 23), min_size=3, max_size=16).map(int64),
    "texts": st.lists(st.sampled_from(list(CORPUS.texts)) | st.just("a cat"), min_size=3, max_size=16),
}  # fmt: skip


@st.composite
def plausible(draw: Any) -> dict[str, Any]:
    """A request that makes sense, with something else in it now and then."""
    other = {name: draw(PARTS[name]) for name in draw(st.sets(st.sampled_from(sorted(PARTS)), max_size=1))}
    sides = draw(st.sampled_from(["image_ids", "images"])), draw(st.sampled_from(["text_ids", "texts"]))
    pairs = draw(st.integers(1, 64))
    rows = {f"{side}_rows": int64(draw(st.lists(st.integers(0, 2), min_size=pairs, max_size=pairs))) for side in SIDES}
    return {"corpus": CORPUS.fingerprint, **{name: draw(SOUND[name]) for name in sides}, **rows, **other}


SIDES = ("image", "text")


def ask(client: TestClient, route: str, content: dict[str, Any]) -> Any:
    try:
        body = msgpack.packb(content)
    except (UnicodeEncodeError, ValueError):
        return None
    answer = client.post(route, content=body, headers={"Content-Type": MSGPACK})
    assert answer.status_code in ANSWERED, answer.text
    if answer.status_code != 200:
        assert set(answer.json()) == {"error"}
    return answer


def right_scores(content: dict[str, Any], answer: Any) -> None:
    """Where both sides are rows of the corpus, the scores are known."""
    left, right = (np.frombuffer(content[f"{side}_rows"], "<i8") for side in SIDES)
    found = read_scored(answer.content, len(left))
    assert np.isfinite(found.scores).all()
    if "image_ids" in content and "text_ids" in content:
        images, texts = (np.frombuffer(content[f"{side}_ids"], "<i8") for side in SIDES)
        assert np.array_equal(found.scores, expected_scores(images[left], texts[right]))


@fuzzed(150)
@given(content=plausible())
def test_pairs_in_msgpack_are_scored_rightly_or_refused(client: TestClient, content: dict[str, Any]) -> None:
    answer = ask(client, "/score", content)
    if answer is not None and answer.status_code == 200:
        right_scores(content, answer)


@fuzzed(80)
@given(content=st.fixed_dictionaries({}, optional=PARTS))
def test_items_in_msgpack_are_embedded_or_refused(client: TestClient, content: dict[str, Any]) -> None:
    answer = ask(client, "/embed", content)
    if answer is not None and answer.status_code == 200:
        [items] = [
            content[name] for name in ("image_ids", "images", "text_ids", "texts") if content.get(name) is not None
        ]
        count = len(items) // 8 if isinstance(items, bytes) else len(items)
        assert read_embedded(answer.content, count).vectors.shape == (count, 2)


def test_the_requests_that_are_made_are_not_all_refused(client: TestClient) -> None:
    """A fuzzer that nothing gets past finds nothing."""
    statuses: list[int] = []

    @fuzzed(60)
    @given(content=plausible())
    def tried(content: dict[str, Any]) -> None:
        answer = ask(client, "/score", content)
        if answer is not None:
            statuses.append(answer.status_code)

    tried()
    assert statuses.count(200) > 5
    assert len(set(statuses)) >= 3


@pytest.mark.slow
@fuzzed(10_000)
@given(content=plausible())
def test_many_pairs_in_msgpack_are_scored_rightly_or_refused(client: TestClient, content: dict[str, Any]) -> None:
    answer = ask(client, "/score", content)
    if answer is not None and answer.status_code == 200:
        right_scores(content, answer)


CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 9), st.binary(max_size=9)), max_size=4)


@fuzzed(100)
@given(which=st.sampled_from(["png", "corpus", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"]), changes=CHANGES)
def test_broken_pictures_are_read_or_refused(client: TestClient, which: str, changes: Any) -> None:
    content = picture(which)
    for at, length, new in changes:
        place = at % (len(content) + 1)
        content = content[:place] + new + content[place + length :]
    answer = client.post("/score", json={"images": [base64.b64encode(content).decode()], "texts": ["a"]})
    assert answer.status_code in (200, 413, 422), answer.text


def picture(which: str) -> bytes:
    from io import BytesIO

    import PIL.Image

    if which == "corpus":
        return FILES[0]
    file = BytesIO()
    PIL.Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file, which)
    return file.getvalue()
