"""The decoder of requests: what is read, and that whatever else comes is refused in words, and cheaply."""

from __future__ import annotations

import base64
import json
import re
import time
import tracemalloc
from functools import partial
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from distill.teacher_service import requests
from distill.teacher_service.requests import EmbedRequest, ScoreRequest, read_request
from distill.wire import JSON, MSGPACK, Limits, RefusedError, TooMuchError, WireError, packed, unpacked
from tests.teacher_service.toy_service import square

LIMITS = Limits(pairs=64, images=8, texts=16, text_characters=40, picture_bytes=4096)
LEAKS = re.compile(r"0x[0-9a-f]{6}|/tmp|/home|/usr|site-packages|Traceback|\.py\b|pydantic", re.IGNORECASE)


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def int64(*numbers: int) -> bytes:
    return np.array(numbers, "<i8").tobytes()


def read(content: Any, model: Any = ScoreRequest, limits: Limits = LIMITS) -> Any:
    if isinstance(content, dict) and any(isinstance(one, bytes) for one in content.values()):
        return read_request(msgpack.packb(content), MSGPACK, model, limits)
    return read_request(json.dumps(content).encode(), JSON, model, limits)


def refused(
    content: Any, model: Any = ScoreRequest, kind: str | None = None, limits: Limits = LIMITS
) -> tuple[int, str]:
    ask = partial(read, content, model, limits) if kind is None else partial(read_request, content, kind, model, limits)
    with pytest.raises(RefusedError) as caught:
        ask()
    assert not LEAKS.search(str(caught.value))
    assert len(str(caught.value)) < 2000
    return caught.value.status, str(caught.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_request_says_the_same_in_msgpack_and_in_json() -> None:
    pictures = [square(3), square(4)]
    told = {"texts": ["a cat", "héllo 👩‍🚀"], "image_rows": [0, 1, 1], "text_rows": [1, 0, 1], "deadline_s": 2.5}
    in_json = read({**told, "images": [base64.b64encode(one).decode() for one in pictures]})
    body = packed({**told, "images": pictures, "image_rows": np.array([0, 1, 1]), "text_rows": np.array([1, 0, 1])})
    in_msgpack = read_request(body, MSGPACK, ScoreRequest, LIMITS)
    for asked in (in_json, in_msgpack):
        assert asked.images == tuple(pictures)
        assert asked.texts == ("a cat", "héllo 👩‍🚀")
        assert (asked.image_rows.tolist(), asked.text_rows.tolist()) == ([0, 1, 1], [1, 0, 1])
        assert (asked.deadline_s, asked.n_pairs) == (2.5, 3)
        assert asked.image_rows.dtype == np.int64


@pytest.mark.parametrize(
    ("images", "texts", "pairs"),
    [(1, 3, [(0, 0), (0, 1), (0, 2)]), (3, 1, [(0, 0), (1, 0), (2, 0)]), (2, 2, [(0, 0), (1, 1)])],
)
def test_without_places_one_goes_with_all_and_as_many_go_one_by_one(images: int, texts: int, pairs: Any) -> None:
    asked = read({"corpus": "c", "image_ids": list(range(images)), "text_ids": list(range(texts))})
    assert list(zip(asked.image_rows.tolist(), asked.text_rows.tolist(), strict=True)) == pairs


# --- what is refused --------------------------------------------------------------------------------------------------

IDS = {"corpus": "c", "image_ids": [0], "text_ids": [0]}
REFUSED = {
    "no sides": ({}, 422, "give either image_ids or images"),
    "no picture": ({"corpus": "c", "image_ids": [], "text_ids": [0]}, 422, "images are empty"),
    "both": ({**IDS, "images": []}, 422, "either"),
    "no corpus": ({"image_ids": [0], "texts": ["a"]}, 422, "give its fingerprint"),
    "empty": ({"image_ids": [], "text_ids": [0], "corpus": "c"}, 422, "nothing to score"),
    "empty pairs": ({**IDS, "image_rows": [], "text_rows": []}, 422, "nothing to score"),
    "one side of pairs": ({**IDS, "image_rows": [0]}, 422, "go together"),
    "unequal pairs": ({**IDS, "image_rows": [0], "text_rows": [0, 0]}, 422, "go together"),
    "no pairs by themselves": ({**IDS, "image_ids": [0, 1], "text_ids": [0, 1, 2]}, 422, "make no pairs"),
    "place outside": ({**IDS, "image_rows": [1], "text_rows": [0]}, 422, "place 1 of 1"),
    "negative": ({**IDS, "image_ids": [-1]}, 422, "negative"),
    "least": ({**IDS, "image_ids": [-(2**63)]}, 422, "negative"),
    "huge": ({**IDS, "image_ids": [2**63]}, 422, "give integers"),
    "bigger": ({**IDS, "image_ids": [10**30]}, 422, "give integers"),
    "fraction": ({**IDS, "image_ids": [0.5]}, 422, "give integers"),
    "boolean": ({**IDS, "image_ids": [True]}, 422, "give integers"),
    "nested": ({**IDS, "image_ids": [[0]]}, 422, "give integers"),
    "words": ({**IDS, "image_ids": "0"}, 422, "give integers"),
    "seven bytes": ({**IDS, "image_ids": bytes(7)}, 422, "8 bytes each"),
    "unknown key": ({**IDS, "image_url": "http://example.org/x.png"}, 422, "image_url"),
    "url": ({"images": ["http://example.org/x.png"], "texts": ["a"]}, 422, "links and paths are not read"),
    "path": ({"images": ["/etc/passwd"], "texts": ["a"]}, 422, "links and paths are not read"),
    "file url": ({"images": ["file:///etc/passwd"], "texts": ["a"]}, 422, "links and paths are not read"),
    "picture no list": ({"images": "AAAA", "texts": ["a"]}, 422, "list of pictures"),
    "empty text": ({**IDS, "text_ids": None, "texts": ["  "]}, 422, "empty"),
    "number as text": ({**IDS, "text_ids": None, "texts": [1]}, 422, "list of texts"),
    "no deadline": ({**IDS, "deadline_s": 0}, 422, "greater than 0"),
    "negative deadline": ({**IDS, "deadline_s": -1}, 422, "greater than 0"),
    "far deadline": ({**IDS, "deadline_s": 601}, 422, "less than or equal to 600"),
    "long corpus": ({**IDS, "corpus": "c" * 65}, 422, "64 characters"),
    "too many pairs": ({**IDS, "image_rows": [0] * 65, "text_rows": [0] * 65}, 413, "65 pairs"),
    "too many images": ({**IDS, "image_ids": list(range(9))}, 413, "9 images"),
    "too many texts": ({**IDS, "text_ids": list(range(17))}, 413, "17 texts"),
    "long text": ({**IDS, "text_ids": None, "texts": ["a" * 41]}, 413, "41 characters"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "status", "told"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_words(content: Any, status: int, told: str) -> None:
    found, said = refused(content)
    assert (found, told in said) == (status, True), said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("model", [ScoreRequest, EmbedRequest])
def test_a_deadline_that_is_no_time_is_refused(value: float, model: Any) -> None:
    content = {"corpus": "c", "image_ids": int64(0), "deadline_s": value}
    content |= {"text_ids": int64(0)} if model is ScoreRequest else {}
    assert refused(content, model)[0] == 422
    assert refused(b'{"deadline_s": NaN}', model, JSON)[0] in (400, 422)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"texts": []}, "texts is empty"),
        ({"images": []}, "images is empty"),
        ({"corpus": "c", "image_ids": []}, "image_ids is empty"),
        ({"text_ids": [0]}, "give its fingerprint"),
        ({}, "give one of"),
        ({"texts": ["a"], "images": []}, "give one of"),
    ],
)
def test_items_to_embed_are_those_of_one_side(content: Any, said: str) -> None:
    status, found = refused(content, EmbedRequest)
    assert (status, said in found) == (422, True), found


def test_pictures_in_msgpack_are_bytes_and_never_names() -> None:
    for one in ("http://example.org/x.png", "/etc/passwd", 7, None, [b"x"]):
        content = msgpack.packb({"images": [one], "texts": ["a"]})
        status, said = refused(content, kind=MSGPACK)
        assert (status, "links and paths are not read" in said) == (422, True)


def test_a_large_picture_is_refused_by_its_bytes() -> None:
    assert refused({"images": msgpack.packb(0), "texts": ["a"]})[0] == 422  # bytes where a list is expected
    body = msgpack.packb({"images": [bytes(4097)], "texts": ["a"]})
    assert refused(body, kind=MSGPACK) == (413, "images: a picture has 4097 bytes; the service takes 4096")


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert refused(b'{"texts": ["a \\ud800"]}', kind=JSON)[0] == 400
    assert refused(b"\x81\xa5texts\x91\xa3\xed\xa0\x80", kind=MSGPACK)[0] == 400


def test_the_last_of_two_equal_names_counts_in_both_kinds() -> None:
    in_json = read_request(b'{"corpus":"a","corpus":"b","image_ids":[0],"text_ids":[0]}', JSON, ScoreRequest, LIMITS)
    twice = b"\x84\xa6corpus\xa1a\xa6corpus\xa1b\xa9image_ids\xc4\x08" + bytes(8) + b"\xa8text_ids\xc4\x08" + bytes(8)
    assert in_json.corpus == read_request(twice, MSGPACK, ScoreRequest, LIMITS).corpus == "b"


CUT = [b"", b"\x81", b"\xc1", b"\x81\xa5texts", b"\x81\xa5texts\xc6\xff\xff\xff\xff", b"\x90", b"\xc0", b"\x81\x01\x02"]
CUT += [b"\x80\x80", msgpack.packb([1]), msgpack.packb({b"texts": 1}), b"\x81\x93\x01\x02\x03\x01", b"\xd9\xff"]


@pytest.mark.parametrize("body", CUT, ids=repr)
def test_no_msgpack_or_half_of_it_is_refused(body: bytes) -> None:
    assert refused(body, kind=MSGPACK)[0] == 400


@pytest.mark.parametrize("body", [b"", b"{", b"nil", b"\xff", b'{"texts":', b'{"texts": [}', b"[" * 5000], ids=repr)
def test_no_json_or_half_of_it_is_refused(body: bytes) -> None:
    assert refused(body, kind=JSON)[0] == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"x"', b"[{}]"], ids=repr)
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert refused(body, kind=JSON)[0] == 422


def test_dates_and_types_of_ones_own_are_refused() -> None:
    assert refused(msgpack.packb({"deadline_s": msgpack.Timestamp(1, 2)}), kind=MSGPACK)[0] == 400
    assert refused(msgpack.packb({"texts": msgpack.ExtType(5, b"pickle")}), kind=MSGPACK)[0] == 400
    assert refused(b"\x81\xa5texts\xc7\x00\x05", kind=MSGPACK)[0] == 422  # a type of its own, of no bytes


# --- bombs: small bodies that would be large in memory ----------------------------------------------------------------

SIZE = 4 << 20
BOMBS = {
    "a long list": (MSGPACK, b"\x81\xa6images\xdd\x00\x3f\xff\x00" + b"\x90" * SIZE, 413),
    "many mappings": (MSGPACK, b"\x81\xa6images\xdc\x40\x00" + b"\x80" * SIZE, 413),
    "lists in a list": (MSGPACK, b"\x81\xa5texts\xdc\x00\x10" + b"\x90" * SIZE, 413),
    "many names": (MSGPACK, b"\xdf\x00\x10\x00\x00" + b"".join(b"\xa3%03x\xc0" % n for n in range(4096)) * 200, 413),
    "claimed lengths": (MSGPACK, (b"\x81\xa6images" + b"\xdd\x00\x3f\xff\x00" * 1000).ljust(SIZE, b"\xc0"), 413),
    "lengths that may be": (MSGPACK, (b"\x81\xa6images" + b"\xdc\x00\x10" * 1000).ljust(SIZE, b"\xc0"), 413),
    "too deep": (MSGPACK, b"\x81\xa6images" + b"\x91" * SIZE, 400),
    "JSON lists": (JSON, b'{"images":[' + b"[]," * (SIZE // 3) + b"[]]}", 413),
    "JSON numbers": (JSON, b'{"image_ids":[' + b"0," * (SIZE // 2) + b"0]}", 413),
    "JSON objects": (JSON, b'{"images":' + b'{"a":' * (SIZE // 5), 413),
    "JSON brackets": (JSON, b'{"images":' + b"[" * SIZE, 413),
    "JSON digits": (JSON, b'{"image_ids":[' + b"9" * SIZE + b"]}", 400),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "status"), BOMBS.values(), ids=BOMBS)
def test_a_body_takes_no_more_memory_than_a_few_times_its_size(kind: str, body: bytes, status: int) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        found, _ = refused(body, kind=kind, limits=Limits())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == status
    assert most < 12 * SIZE
    assert time.process_time() - began < 2


def test_a_request_of_every_limit_at_once_is_no_bomb() -> None:
    limits = Limits()
    rows = np.arange(limits.pairs)
    content = {
        "corpus": "c",
        "image_ids": (rows[: limits.images]).tolist(),
        "texts": ["a, [b], {c}"] * limits.texts,
        "image_rows": (rows % limits.images).tolist(),
        "text_rows": rows.tolist(),
    }
    assert read(content, limits=limits).n_pairs == limits.pairs
    body = packed({**content, **{name: np.array(content[name]) for name in ("image_ids", "image_rows", "text_rows")}})
    assert read_request(body, MSGPACK, ScoreRequest, limits).n_pairs == limits.pairs
    assert content["image_rows"][-1] < requests.MOST_JSON_VALUES


# --- fuzzing ----------------------------------------------------------------------------------------------------------

NAMES = ["corpus", "identity", "deadline_s", "image_ids", "images", "text_ids", "texts", "image_rows", "text_rows", "x"]
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=50)
BINARY = SCALARS | st.binary(max_size=64) | st.lists(st.integers(-3, 20), max_size=12).map(lambda n: int64(*n))
NESTED = st.recursive(
    BINARY, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner), max_leaves=20
)
NEARLY = {
    "corpus": st.just("c") | NESTED,
    "identity": st.none() | NESTED,
    "deadline_s": st.floats(0.1, 10) | NESTED,
    "image_ids": st.none() | st.lists(st.integers(0, 20), max_size=9).map(lambda n: int64(*n)) | NESTED,
    "text_ids": st.none() | st.lists(st.integers(0, 20), max_size=9) | NESTED,
    "texts": st.none() | st.lists(st.text(min_size=1, max_size=50), max_size=9) | NESTED,
    "images": st.none() | st.lists(st.binary(max_size=64), max_size=9) | NESTED,
    "image_rows": st.none() | st.lists(st.integers(0, 9), max_size=9) | NESTED,
    "text_rows": st.none() | st.lists(st.integers(0, 9), max_size=9) | NESTED,
}  # fmt: skip
LIKELY = st.fixed_dictionaries({}, optional=NEARLY)
MODELS = st.sampled_from([ScoreRequest, EmbedRequest])


def read_or_refused(body: bytes, kind: str, model: Any) -> bool:
    """Whether it was read; a refusal says nothing of this machine, and what is read is within the limits."""
    try:
        asked = read_request(body, kind, model, LIMITS)
    except RefusedError as error:
        status, said = error.status, str(error)
        asked = None
    if asked is None:
        assert status in (400, 413, 422)
        # names of the request come back in the words, so that only what no request holds by chance is looked for
        assert not re.search(r"0x[0-9a-f]{6,}|site-packages|Traceback", said)
        said.encode()
        return False
    assert 0 < asked.deadline_s <= LIMITS.deadline_s
    for name, most in (("image_ids", 8), ("images", 8), ("text_ids", 16), ("texts", 16)):
        assert len(getattr(asked, name) if getattr(asked, name) is not None else ()) <= most
    if isinstance(asked, ScoreRequest):
        assert 1 <= asked.n_pairs <= LIMITS.pairs
        assert len(asked.text_rows) == asked.n_pairs
        images = asked.image_ids if asked.images is None else asked.images
        assert 0 <= asked.image_rows.min() <= asked.image_rows.max() < len(images)
    return True


@fuzzed(300)
@given(st.binary(max_size=200), st.sampled_from([MSGPACK, JSON]), MODELS)
def test_any_bytes_are_refused_or_read(body: bytes, kind: str, model: Any) -> None:
    read_or_refused(body, kind, model)


@fuzzed(200)
@given(LIKELY | NESTED, MODELS)
def test_any_msgpack_is_refused_or_read(content: Any, model: Any) -> None:
    try:
        body = msgpack.packb(content)
    except (UnicodeEncodeError, ValueError):  # halves of surrogate pairs
        return
    read_or_refused(body, MSGPACK, model)


JSONS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner), max_leaves=20
)
PARTS = {
    "corpus": st.just("c"),
    "image_ids": st.lists(st.integers(0, 20), max_size=9),
    "images": st.lists(st.binary(max_size=64).map(lambda one: base64.b64encode(one).decode()), max_size=9),
    "texts": st.lists(st.text(max_size=50), max_size=9),
    "image_rows": st.lists(st.integers(0, 9), max_size=9),
    "text_rows": st.lists(st.integers(0, 9), max_size=9),
}  # fmt: skip


@fuzzed(200)
@given(st.fixed_dictionaries({}, optional=PARTS) | st.dictionaries(st.sampled_from(NAMES), JSONS) | JSONS, MODELS)
def test_any_json_is_refused_or_read(content: Any, model: Any) -> None:
    read_or_refused(json.dumps(content).encode(), JSON, model)


VALID = [
    packed({"corpus": "c", "image_ids": np.arange(3), "text_ids": np.arange(3)}),
    packed({"images": [square(1), square(2)], "texts": ["a"], "image_rows": np.array([1]), "text_rows": np.array([0])}),
    json.dumps({"corpus": "c", "image_ids": [0, 1], "texts": ["a é"], "deadline_s": 3}).encode(),
    json.dumps({"images": [base64.b64encode(square(1)).decode()], "text_ids": [0], "corpus": "c"}).encode(),
]  # fmt: skip


def mutated(body: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, new in cuts:
        place = at % (len(body) + 1)
        body = body[:place] + new + body[place + length :]
    return body


CHANGES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=4)


@fuzzed(200)
@given(st.integers(0, 3), CHANGES)
def test_a_request_that_was_changed_on_its_way_is_refused_or_read(which: int, changes: Any) -> None:
    kind = MSGPACK if which < 2 else JSON
    assert read_or_refused(VALID[which], kind, ScoreRequest)
    read_or_refused(mutated(VALID[which], changes), kind, ScoreRequest)


@pytest.mark.slow
@fuzzed(20_000)
@given(st.integers(0, 3), CHANGES)
def test_many_changed_requests_are_refused_or_read(which: int, changes: Any) -> None:
    read_or_refused(mutated(VALID[which], changes), MSGPACK if which < 2 else JSON, ScoreRequest)


@pytest.mark.slow
@fuzzed(20_000)
@given(LIKELY | NESTED, MODELS)
def test_many_msgpacks_are_refused_or_read(content: Any, model: Any) -> None:
    try:
        body = msgpack.packb(content)
    except (UnicodeEncodeError, ValueError):
        return
    read_or_refused(body, MSGPACK, model)


def test_what_a_message_may_hold_is_unpacked() -> None:
    flat = {f"n{n}": [n] * 5 for n in range(10)}
    assert unpacked(msgpack.packb(flat), items=5) == flat
    with pytest.raises(TooMuchError, match="more than 4 entries"):
        unpacked(msgpack.packb(flat), items=4)
    with pytest.raises(TooMuchError, match="lists within lists"):
        unpacked(msgpack.packb({"a": [[]] * 20}))
    with pytest.raises(TooMuchError, match="mappings within mappings"):
        unpacked(msgpack.packb({"a": {"b": 1}}))
    with pytest.raises(WireError, match="a mapping with names"):
        unpacked(msgpack.packb([1]))
