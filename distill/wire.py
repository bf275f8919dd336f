"""What travels between a teacher's service and those who ask it, packed with msgpack.

Arrays of numbers are little-endian bytes: int64 for rows and places, float32 for scores and vectors. What a request
may hold is in ``distill.teacher_service.requests``; the same requests can be made in JSON.

Shape key: ``N`` items, ``P`` pairs, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, get_args

import numpy as np

from distill.protocols import ScoreKind

MSGPACK = "application/msgpack"
JSON = "application/json"
TOKEN_VARIABLE = "DISTILL_TOKEN"  # noqa: S105  (the variable's name)
Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


class WireError(ValueError):
    """What came is no request, or no answer, of this protocol; the message says where and why."""


class TooMuchError(WireError):
    """More values, or more deeply nested ones, than any request or answer of this protocol has."""


class NoAnswerError(RuntimeError):
    """A service that was asked gives no answer that can be used."""


class RefusedError(ValueError):
    """A request that cannot be answered; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        """400: cannot be read. 413: too much. 422: does not make sense."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    body_bytes: int = 64 << 20
    pairs: int = 16_384
    images: int = 1024
    texts: int = 16_384
    text_characters: int = 2000
    picture_bytes: int = 20 << 20
    picture_pixels: int = 50_000_000
    pixels: int = 500_000_000  # of all pictures that are sent together: a small file can hold many
    deadline_s: float = 600.0


def carried(token: str) -> bool:
    """Whether a header can carry it as a token."""
    return bool(token) and token.isascii() and token.isprintable() and " " not in token


def packed(values: Mapping[str, Any]) -> bytes:
    """Msgpack of a flat mapping; arrays as the bytes of their numbers, what is None left out."""
    import msgpack

    found: bytes = msgpack.packb({key: _bytes_of(value) for key, value in values.items() if value is not None})
    return found


def _bytes_of(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    kind = "<f4" if np.issubdtype(value.dtype, np.floating) else "<i8"
    return np.ascontiguousarray(value, kind).tobytes()


_MOST_NAMES, _MOST_LISTS = 64, 16


def unpacked(body: bytes, *, items: int = Limits.texts) -> dict[str, Any]:
    """The mapping that ``packed`` packed, arrays still bytes.

    A byte of msgpack can say an empty list, which takes sixty in memory: what comes is bounded while it is read.

    Args:
        body: what came.
        items: in a list, at most.

    Raises:
        TooMuchError: a longer list, or more names or lists than a message has.
        WireError: it is no msgpack, or no mapping with names.
    """
    import msgpack

    lists = mappings = 0

    def listed(value: list[Any]) -> list[Any]:
        nonlocal lists
        lists += 1
        if lists > _MOST_LISTS:
            raise TooMuchError("lists within lists; the names of a message stand for numbers, strings and flat lists")
        return value

    def mapped(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal mappings
        mappings += 1
        if mappings > 1:
            raise TooMuchError("mappings within mappings; the names of a message stand for numbers, strings and lists")
        return value

    try:
        found = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            use_list=True,
            list_hook=listed,
            object_hook=mapped,
            max_array_len=items,
            max_map_len=_MOST_NAMES,
            max_ext_len=0,
        )
    except TooMuchError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        if "exceeds max_array_len" in str(error) or "exceeds max_map_len" in str(error):
            raise TooMuchError(f"a list of more than {items} entries, or more than {_MOST_NAMES} names") from None
        raise WireError(f"no msgpack, or cut short ({type(error).__name__}, {len(body)} bytes)") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise WireError(f"a mapping with names is expected, not {type(found).__name__}")
    return found


# --- what is answered -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """An answer to a ``ScoreRequest``."""

    scores: Numbers  # (P,) raw; NaN where the teacher gave no finite number
    score_kind: ScoreKind
    identity: str  # of the teacher
    asked: int  # pairs that the teacher read for this request
    served_from_store: int  # pairs that were known, or computed for another request

    def packed(self) -> bytes:
        """Msgpack."""
        return packed(vars(self))

    def as_json(self) -> dict[str, Any]:
        """For people; null where a score is not finite."""
        finite = np.isfinite(self.scores)
        scores = [float(one) if good else None for one, good in zip(self.scores, finite, strict=True)]
        return {**vars(self), "scores": scores}


@dataclass(frozen=True)
class Embedded:
    """An answer to an ``EmbedRequest``."""

    vectors: Numbers  # (N, D) unit
    identity: str

    def packed(self) -> bytes:
        """Msgpack."""
        return packed({**vars(self), "dim": self.vectors.shape[1]})

    def as_json(self) -> dict[str, Any]:
        """For people."""
        return {"vectors": self.vectors.tolist(), "dim": self.vectors.shape[1], "identity": self.identity}


def read_scored(body: bytes, pairs: int) -> Scored:
    """The answer to a request of so many pairs.

    Raises:
        WireError: cut short, another number of scores, or something else.
    """
    found = unpacked(body)
    scores = _floats(found, "scores")
    if len(scores) != pairs:
        raise WireError(f"{pairs} pairs were asked and {len(scores)} scores came")
    kind = found.get("score_kind")
    if kind not in get_args(ScoreKind):
        raise WireError(f"score_kind is {kind!r}")
    return Scored(
        scores, cast("ScoreKind", kind), _name(found), _count(found, "asked"), _count(found, "served_from_store")
    )


def read_embedded(body: bytes, items: int) -> Embedded:
    """The answer to a request of so many items.

    Raises:
        WireError: cut short, another number of vectors, or something else.
    """
    found = unpacked(body)
    flat, dim = _floats(found, "vectors"), _count(found, "dim")
    if len(flat) != items * dim:
        raise WireError(f"{items} vectors of {dim} numbers were asked and {len(flat)} numbers came")
    return Embedded(flat.reshape(items, dim), _name(found))


def _floats(found: Mapping[str, Any], key: str) -> Numbers:
    content = found.get(key)
    if not isinstance(content, bytes) or len(content) % 4:
        raise WireError(f"{key} are no float32 numbers")
    return np.frombuffer(content, "<f4").astype(np.float32)


def _name(found: Mapping[str, Any]) -> str:
    identity = found.get("identity")
    if not isinstance(identity, str) or not identity:
        raise WireError("it does not say which teacher answered")
    return identity


def _count(found: Mapping[str, Any], key: str) -> int:
    value = found.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireError(f"{key} is {value!r}, no count")
    return value
