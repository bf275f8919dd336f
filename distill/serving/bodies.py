"""Reading what was sent: JSON or a form with pictures, and what to say when it is neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from distill.serving.schemas import MAX_PICTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

Model = TypeVar("Model", bound=BaseModel)
_PART_BYTES = 64 << 10  # of a form's field that is no file


async def read_json(request: Request, model: type[Model]) -> Model:
    """A JSON body.

    Raises:
        HTTPException: 400 where it is no JSON, 422 where it holds something else than asked for.
    """
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise HTTPException(400 if _is_syntax(error) else 422, _words(error)) from None


async def read_form(request: Request, name: str, *, options: type[Model]) -> tuple[list[bytes], Model]:
    """A form's files of one name, at least one, and its other fields.

    Raises:
        HTTPException: 400 where it is no form, 422 where it holds something else than asked for.
    """
    async with request.form(max_files=MAX_PICTURES, max_fields=8, max_part_size=_PART_BYTES) as form:
        files = [value for key, value in form.multi_items() if key == name and isinstance(value, UploadFile)]
        others = {key for key, value in form.multi_items() if isinstance(value, UploadFile)} - {name}
        if not files or others:
            raise HTTPException(422, f"send the picture as the form's file {name!r}; it has {_named(form)}")
        fields = {key: value for key, value in form.multi_items() if not isinstance(value, UploadFile)}
        try:
            asked = options.model_validate(fields)
        except ValidationError as error:
            raise HTTPException(422, _words(error)) from None
        return [await file.read() for file in files], asked


def kind_of(request: Request) -> str:
    """``json`` or ``form``.

    Raises:
        HTTPException: 415, neither.
    """
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent == "application/json":
        return "json"
    if sent == "multipart/form-data":
        return "form"
    raise HTTPException(
        415, f"send application/json, or multipart/form-data with a picture; got {sent[:80] or 'no content type'}"
    )


def _named(form: Mapping[str, Any]) -> str:
    return ", ".join(repr(key[:40]) for key in form) or "nothing"


def _is_syntax(error: ValidationError) -> bool:
    return any(one["type"] == "json_invalid" for one in error.errors())


def _words(error: ValidationError) -> str:
    """Every fault, by where it is."""
    said = []
    for one in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in one["loc"])[:80]
        told = one["msg"][:1].lower() + one["msg"][1:]
        if one["type"] not in ("missing", "json_invalid") and not isinstance(one["input"], dict):
            told += f"; got {_short(one['input'])}"
        said.append(f"{where}: {told}" if where else told)
    return "; ".join(said[:5])


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:50]}... ({len(shown)} characters)"
