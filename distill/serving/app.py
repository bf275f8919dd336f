"""The routes: ``/`` and its files, ``/search``, ``/embed``, ``/picture/{id}``, ``/info``, ``/health``, ``/metrics``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distill.data.pictures import DataError, UnreadableImageError
from distill.serving import answers
from distill.serving.bodies import kind_of, read_form, read_json
from distill.serving.engine import Engine
from distill.serving.gate import BusyError, Gate
from distill.serving.guards import SAFE_HEADERS, guard
from distill.serving.metrics import Metrics
from distill.serving.pictures import SIZES, Thumbnails
from distill.serving.schemas import (
    BODY_BYTES,
    EmbedAnswer,
    EmbedRequest,
    Health,
    Info,
    Problem,
    SearchAnswer,
    SearchOptions,
    SearchRequest,
    _Strict,
)
from distill.wire import NoAnswerError

log = logging.getLogger(__name__)
PAGE = {"/": ("index.html", "text/html"), "/search.css": ("search.css", "text/css")}
PAGE |= {"/search.js": ("search.js", "text/javascript")}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": told}
    for code, told in {
        400: "Not what its content type says.",
        401: "The token is missing or wrong.",
        413: f"More than {BODY_BYTES >> 20} MiB.",
        415: "Neither JSON nor a form.",
        422: "A value is out of range, or a picture cannot be read.",
        503: "Too many requests wait, or a teacher elsewhere does not answer; Retry-After says when to come again.",
    }.items()
}
_BINARY = "application/octet-stream"


def build_app(engine: Engine, *, token: str | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The service over loaded models.

    Args:
        engine: What answers.
        token: That every request but those for the page's own files has to carry.
        hosts: Names under which the service may be asked, against DNS rebinding; ``*`` is any.
    """
    service = _Service(engine)
    app = FastAPI(
        title="cross2dual student",
        version=distribution_version(),
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=service.life,
    )
    _answer_errors(app)
    _add_routes(app, service)
    guard(app, token=token, open_paths=tuple(PAGE), hosts=hosts, body_bytes=BODY_BYTES, metrics=service.metrics)
    return app


class _Service:
    """The engine behind its gates: the student's calls, the teacher's and the making of small pictures queue apart."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gates = {"student": Gate("student"), "teacher": Gate("teacher"), "pictures": Gate("pictures", waiting=128)}
        self.metrics = Metrics(self.gates)
        self.thumbnails = None if engine.pictures is None else Thumbnails(engine.pictures)
        self.info = answers.info_of(engine, distribution_version())

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.engine.close()
        for gate in self.gates.values():
            gate.close()

    async def search(self, request: Request) -> SearchAnswer:
        query, asked = await _query_of(request)
        find = asked.find or ("images" if isinstance(query, str) else "texts")
        self._check(find, of_text=isinstance(query, str), rerank=asked.rerank)
        depth = max(asked.k, self.engine.rerank) if asked.rerank else asked.k
        search = partial(self.engine.search, query, answers.SIDE_OF[find], depth=depth)
        found = await self.gates["student"].run(search)
        if asked.rerank:
            found = await self.gates["teacher"].run(partial(self.engine.reordered, found))
        self.metrics.parts(found.milliseconds)
        return answers.answer_of(self.engine, found, k=asked.k)

    def _check(self, find: str, *, of_text: bool, rerank: bool) -> None:
        if self.engine.catalog is None:
            raise HTTPException(409, "this student was exported without an index, so there is nothing to search")
        if not rerank:
            return
        if self.engine.reranker is None:
            raise HTTPException(422, "there is no teacher to re-rank with: the service was started without --teacher")
        if of_text == (find == "texts"):
            pair = "captions with a sentence" if of_text else "pictures with a picture"
            raise HTTPException(422, f"the teacher reads a picture with a sentence, so {pair} cannot be re-ranked")

    async def embed(self, request: Request) -> Response:
        if kind_of(request) == "json":
            items: Sequence[str] | Sequence[bytes] = (await read_json(request, EmbedRequest)).texts
        else:
            items, _ = await read_form(request, "pictures", options=_Strict)
        binary = _BINARY in request.headers.get("accept", "")
        return await self.gates["student"].run(partial(self._embedded, items, binary=binary))

    def _embedded(self, items: Sequence[str] | Sequence[bytes], *, binary: bool) -> Response:
        vectors, took = self.engine.embed(items)
        self.metrics.parts(took)
        if binary:
            out = BytesIO()
            np.save(out, vectors, allow_pickle=False)
            return Response(out.getvalue(), media_type=_BINARY)
        return JSONResponse(
            {
                "dim": vectors.shape[1],
                "kind": "texts" if isinstance(items[0], str) else "images",
                "embeddings": vectors.tolist(),
                "milliseconds": answers.milliseconds_of(took).model_dump(),
            }
        )

    async def picture(self, request: Request, image: int, size: int) -> Response:
        catalog = self.engine.catalog
        if catalog is None or image not in catalog:
            raise HTTPException(404, f"no picture {image} in the index")
        if self.thumbnails is None:
            raise HTTPException(404, "no pictures: the service was started without --pictures, --data and --teacher")
        kind = "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
        size = next(one for one in SIZES if one >= size)
        tag = f'"{catalog.sha256(image)[:32]}-{size}-{kind}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=3600", "Vary": "Accept"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = await self.gates["pictures"].run(partial(self.thumbnails.get, image, size, kind))
        return Response(content, media_type=f"image/{kind}", headers=headers)


async def _query_of(request: Request) -> tuple[str | bytes, SearchOptions]:
    if kind_of(request) == "json":
        asked = await read_json(request, SearchRequest)
        return asked.text, asked
    contents, options = await read_form(request, "picture", options=SearchOptions)
    if len(contents) > 1:
        raise HTTPException(422, f"one picture searches; the form has {len(contents)}")
    return contents[0], options


def _add_routes(app: FastAPI, service: _Service) -> None:
    for path in PAGE:
        app.add_api_route(path, _page(path), methods=["GET"], include_in_schema=False)

    @app.post(
        "/search",
        responses=_PROBLEMS | {409: {"model": Problem, "description": "There is no index."}},
        openapi_extra=_body(SearchRequest, SearchOptions, {"picture": {"type": "string", "format": "binary"}}),
    )
    async def search(request: Request) -> SearchAnswer:
        """Search by a sentence (JSON) or by a picture (form)."""
        return await service.search(request)

    pictures = {"type": "array", "items": {"type": "string", "format": "binary"}}
    vectors = {
        "model": EmbedAnswer,
        "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}},
        "description": f"Unit vectors; with Accept: {_BINARY} the bytes of a .npy file, (N, D) float32.",
    }

    @app.post(
        "/embed",
        responses=_PROBLEMS | {200: vectors},
        openapi_extra=_body(EmbedRequest, _Strict, {"pictures": pictures}),
    )
    async def embed(request: Request) -> Response:
        """Unit vectors of sentences (JSON) or pictures (form)."""
        return await service.embed(request)

    @app.get("/picture/{id}", responses={404: {"model": Problem}, 401: {"model": Problem}}, response_class=Response)
    async def picture(
        request: Request,
        id: Annotated[int, Path(ge=0, lt=2**63)],
        size: Annotated[int, Query(ge=1, le=SIZES[-1], description="longest edge, pixels")] = 256,
    ) -> Response:
        """A small copy of an indexed picture, WebP where it is accepted, else JPEG."""
        return await service.picture(request, id, size)

    @app.get("/info")
    async def info() -> Info:
        """What answers, and what is searched."""
        return service.info

    @app.get("/health")
    async def health() -> Health:
        """Answers once everything is loaded."""
        return Health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page(path: str) -> Any:
    name, kind = PAGE[path]
    content = (files("distill.serving") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


def _body(request: type[Any], options: type[Any], files: dict[str, Any]) -> dict[str, Any]:
    """A request body that is JSON or a form, for OpenAPI."""
    form = options.model_json_schema()
    form["properties"] = files | form.get("properties", {})
    form["required"] = list(files)
    content = {"application/json": {"schema": request.model_json_schema()}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        said = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
        return JSONResponse({"error": said}, 422)

    @app.exception_handler(UnreadableImageError)
    async def unreadable(_: Request, error: UnreadableImageError) -> Response:
        return JSONResponse({"error": f"the picture cannot be used: {error}"}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return JSONResponse({"error": "the request broke off"}, 400)  # nobody hears it, but it is counted

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        return JSONResponse({"error": "too many requests wait; try again in a moment"}, 503, {"Retry-After": "2"})

    @app.exception_handler(NoAnswerError)
    async def unanswered(_: Request, error: NoAnswerError) -> Response:
        log.error("%s", error)  # with the teacher's address
        told = "the teacher does not answer: search without re-ranking, or try again later"
        return JSONResponse({"error": told}, 503, {"Retry-After": "10"})

    @app.exception_handler(DataError)
    async def lost(_: Request, error: DataError) -> Response:
        log.error("%s", error)
        return JSONResponse({"error": "a picture of the index cannot be read; the service's log says which"}, 500)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        told = {"error": "something went wrong here; the service's log says what"}
        return JSONResponse(told, 500, SAFE_HEADERS)  # this one is made outside the guards


def distribution_version() -> str:
    """Of this package."""
    try:
        return version("cross2dual")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
