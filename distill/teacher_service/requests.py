"""What the service is asked: pairs to score, items to embed; from msgpack or JSON.

A request names distinct images and texts once, each side either by rows of a corpus that both hold or as it is (the
bytes of picture files, sentences), and pairs of them by place. In JSON, arrays are lists and pictures are base64.

Shape key: ``N`` images, ``M`` texts, ``P`` pairs.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from distill.wire import MSGPACK, Limits, RefusedError, TooMuchError, WireError, unpacked

if TYPE_CHECKING:
    from pydantic import ValidationInfo

    from distill.protocols import Ids

TOO_MUCH = "too_much"  # type of a validation error about sizes
MOST_JSON_VALUES = (
    250_000  # in one body: three characters can say a list, which takes a hundred times as much in memory
)


def _numbers(value: object) -> object:
    """Int64 from bytes, or from a list of integers."""
    if isinstance(value, bytes):
        if len(value) % 8:
            raise PydanticCustomError("numbers", "int64 numbers are 8 bytes each, which do not fill what was sent")
        return np.frombuffer(value, "<i8").astype(np.int64)
    if isinstance(value, list | tuple) and all(type(one) is int and -(2**63) <= one < 2**63 for one in value):
        return np.array(value, np.int64)
    raise PydanticCustomError("numbers", "give integers: a list of them, or in msgpack their bytes (int64)")


def _rows(value: object) -> object:
    found = _numbers(value)
    if isinstance(found, np.ndarray) and len(found) and int(found.min()) < 0:
        raise PydanticCustomError("rows", "rows and places count from 0; one is negative")
    return found


def _pictures(value: object, info: ValidationInfo) -> object:
    """Bytes of picture files; from JSON as base64."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("pictures", "give a list of pictures")
    limits = _limits(info)
    _check_count(len(value), limits.images, "pictures")
    if info.mode == "json":
        value = [_from_base64(one) for one in value]
    for one in value:
        if not isinstance(one, bytes):
            raise PydanticCustomError("pictures", "a picture is the bytes of its file; links and paths are not read")
        if len(one) > limits.picture_bytes:
            raise PydanticCustomError(
                TOO_MUCH,
                "a picture has {found} bytes; the service takes {most}",
                {"found": len(one), "most": limits.picture_bytes},
            )
    return tuple(value)


def _from_base64(value: object) -> bytes:
    try:
        return base64.b64decode(cast("str", value), validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise PydanticCustomError(
            "pictures", "in JSON a picture is the base64 of its file; links and paths are not read"
        ) from None


def _texts(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise PydanticCustomError("texts", "give a list of texts")
    limits = _limits(info)
    _check_count(len(value), limits.texts, "texts")
    for one in value:
        if not one.strip():
            raise PydanticCustomError("texts", "a text is empty")
        if not one.isascii() and not _is_unicode(one):
            raise PydanticCustomError("texts", "a text holds half of a surrogate pair, which is no character")
        if len(one) > limits.text_characters:
            raise PydanticCustomError(
                TOO_MUCH,
                "a text has {found} characters; the service takes {most}",
                {"found": len(one), "most": limits.text_characters},
            )
    return tuple(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _limits(info: ValidationInfo) -> Limits:
    return info.context if isinstance(info.context, Limits) else Limits()


def _check_count(found: int, most: int, what: str) -> None:
    if found > most:
        raise PydanticCustomError(
            TOO_MUCH,
            "{found} {what} in one request; the service takes {most}",
            {"found": found, "what": what, "most": most},
        )


_INTEGERS = WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})
_BASE64 = WithJsonSchema({"type": "array", "items": {"type": "string", "contentEncoding": "base64"}})
_STRINGS = WithJsonSchema({"type": "array", "items": {"type": "string", "minLength": 1}})
Rows = Annotated[Any, BeforeValidator(_rows), _INTEGERS]
Pictures = Annotated[Any, BeforeValidator(_pictures), _BASE64]
Texts = Annotated[Any, BeforeValidator(_texts), _STRINGS]
Mark = Annotated[str, Field(max_length=64)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    corpus: Mark | None = Field(default=None, description="fingerprint of the corpus that rows belong to")
    identity: Mark | None = Field(default=None, description="of the teacher that is meant; another one refuses")
    deadline_s: float = Field(
        default=60.0, gt=0, le=Limits.deadline_s, allow_inf_nan=False, description="seconds from the request's arrival"
    )


class ScoreRequest(_Asked):
    """Pairs to score. Without places: every image with every text where one of them is alone, else one by one."""

    image_ids: Rows | None = Field(default=None, description="rows of the corpus, or:")
    images: Pictures | None = Field(default=None, description="picture files")
    text_ids: Rows | None = Field(default=None, description="rows of the corpus, or:")
    texts: Texts | None = None
    image_rows: Rows | None = Field(default=None, description="(P,) places among the images")
    text_rows: Rows | None = Field(default=None, description="(P,) places among the texts")

    @model_validator(mode="after")
    def _makes_pairs(self, info: ValidationInfo) -> ScoreRequest:
        limits = _limits(info)
        images = _one_of(self.image_ids, self.images, "image_ids", "images")
        texts = _one_of(self.text_ids, self.texts, "text_ids", "texts")
        _check_count(len(images), limits.images, "images")
        _check_count(len(texts), limits.texts, "texts")
        if self.corpus is None and (self.image_ids is not None or self.text_ids is not None):
            raise PydanticCustomError("corpus", "ids are rows of a corpus: give its fingerprint as corpus (see /info)")
        self.image_rows, self.text_rows = _paired(self.image_rows, self.text_rows, len(images), len(texts))
        _check_count(len(self.image_rows), limits.pairs, "pairs")
        sides = ("image_rows", self.image_rows, len(images)), ("text_rows", self.text_rows, len(texts))
        for name, rows, count in sides:
            if len(rows) and int(rows.max()) >= count:
                raise PydanticCustomError(
                    "rows",
                    "{name} names place {place} of {count}",
                    {"name": name, "place": int(rows.max()), "count": count},
                )
        return self

    @property
    def n_pairs(self) -> int:
        """How many."""
        return len(cast("Ids", self.image_rows))


class EmbedRequest(_Asked):
    """Items of one side whose vectors are wanted."""

    image_ids: Rows | None = None
    images: Pictures | None = None
    text_ids: Rows | None = None
    texts: Texts | None = None

    @model_validator(mode="after")
    def _is_one_side(self, info: ValidationInfo) -> EmbedRequest:
        given = [name for name in ("image_ids", "images", "text_ids", "texts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError("items", "give one of image_ids, images, text_ids and texts")
        if given[0].endswith("_ids") and self.corpus is None:
            raise PydanticCustomError("corpus", "ids are rows of a corpus: give its fingerprint as corpus (see /info)")
        if not len(getattr(self, given[0])):
            raise PydanticCustomError("items", "{name} is empty: there is nothing to embed", {"name": given[0]})
        _check_count(len(getattr(self, given[0])), _limits(info).images, "items")
        return self


def _one_of(ids: Any, items: Any, name: str, other: str) -> Any:
    if (ids is None) == (items is None):
        raise PydanticCustomError("items", "give either {name} or {other}", {"name": name, "other": other})
    found = items if ids is None else ids
    if not len(found):
        raise PydanticCustomError("items", "{other} are empty: there is nothing to score", {"other": other})
    return found


def _paired(image_rows: Any, text_rows: Any, images: int, texts: int) -> tuple[Ids, Ids]:
    if image_rows is None and text_rows is None:
        if images != texts and 1 not in (images, texts):
            raise PydanticCustomError(
                "rows",
                "{images} images and {texts} texts make no pairs by themselves: give image_rows and text_rows",
                {"images": images, "texts": texts},
            )
        places = np.arange(max(images, texts), dtype=np.int64)
        return places % images, places % texts
    if image_rows is None or text_rows is None or len(image_rows) != len(text_rows):
        raise PydanticCustomError("rows", "image_rows and text_rows go together, one of each a pair")
    if not len(image_rows):
        raise PydanticCustomError("rows", "image_rows and text_rows are empty: there is nothing to score")
    return image_rows, text_rows


def read_request(body: bytes, kind: str, model: type[ScoreRequest] | type[EmbedRequest], limits: Limits) -> Any:
    """A request of ``model`` from a body of content type ``kind``, msgpack or JSON.

    Raises:
        RefusedError: with what was found and what is expected.
    """
    try:
        if kind == MSGPACK:
            return model.model_validate(unpacked(body, items=max(limits.images, limits.texts)), context=limits)
        _check_values(body)
        return model.model_validate_json(body, context=limits)
    except TooMuchError as error:
        raise RefusedError(413, str(error)) from None
    except WireError as error:
        raise RefusedError(400, str(error)) from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        kinds = {fault["type"] for fault in faults}
        status = 413 if TOO_MUCH in kinds else 400 if "json_invalid" in kinds else 422
        raise RefusedError(status, _words(faults)) from None


def _check_values(body: bytes) -> None:
    """Refuse JSON whose values are too many, before they are made; punctuation within texts counts with the rest."""
    found = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if found > MOST_JSON_VALUES:
        raise RefusedError(
            413, f"about {found} values in JSON; the service takes {MOST_JSON_VALUES}: send less at a time, or msgpack"
        )


def _words(faults: list[Any]) -> str:
    """The first faults, by where they are; names come from the request, and are cut."""
    said = []
    for fault in faults[:5]:
        where = ".".join(str(part) for part in fault["loc"])[:60]
        said.append(f"{where}: {fault['msg']}" if where else fault["msg"])
    return "; ".join(said)
