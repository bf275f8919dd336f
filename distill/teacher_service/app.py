"""The routes: ``/score``, ``/embed``, ``/info``, ``/health``, ``/metrics``."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distill.data.pictures import DataError
from distill.serving.app import distribution_version
from distill.serving.guards import SAFE_HEADERS, guard
from distill.serving.schemas import Health, Problem
from distill.teacher_service.engine import BusyError, EndedError, Engine, TooLateError
from distill.teacher_service.metrics import TeacherMetrics
from distill.teacher_service.requests import EmbedRequest, ScoreRequest, read_request
from distill.teacher_service.schemas import EmbedAnswer, Info, ScoreAnswer
from distill.wire import JSON, MSGPACK, Limits, RefusedError

if TYPE_CHECKING:
    from distill.wire import Embedded, Scored

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", bound="Scored | Embedded")
BYTES_IN_HAND = 512 << 20
_GRACE_S = 1.0  # past a deadline, for an answer that is on its way
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": told}
    for code, told in {
        400: "Not what its content type says.",
        401: "The token is missing or wrong.",
        408: "The body came too slowly.",
        409: "Another corpus or another teacher is meant.",
        413: "More than /info says that a request may hold.",
        415: "Neither msgpack nor JSON.",
        422: "A value is out of range, or a picture cannot be read.",
        429: "Too much waits; Retry-After says when to come again.",
        503: "The service ends.",
        504: "The request's deadline has passed.",
    }.items()
}


def build_app(
    engine: Engine, info: Info, *, limits: Limits, token: str | None = None, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The service over a running engine, which it closes at its end.

    Args:
        engine: What answers.
        info: What ``/info`` says.
        limits: Of a request.
        token: That every request but that for ``/health`` has to carry.
        hosts: Names under which the service may be asked, against DNS rebinding; ``*`` is any.
    """
    service = _Service(engine, info, limits)
    app = FastAPI(
        title="cross2dual teacher",
        version=distribution_version(),
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=service.life,
    )
    app.state.engine = engine
    _answer_errors(app)
    _add_routes(app, service)
    guard(
        app,
        token=token,
        open_paths=("/health",),
        hosts=hosts,
        body_bytes=limits.body_bytes,
        metrics=service.metrics,
        bytes_in_hand=BYTES_IN_HAND,
    )
    return app


class _Service:
    """Reads requests, waits for the engine, writes answers."""

    def __init__(self, engine: Engine, info: Info, limits: Limits) -> None:
        self.engine, self.info, self.limits = engine, info, limits
        self.metrics = TeacherMetrics(engine)

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.engine.close)

    async def score(self, request: Request) -> Response:
        return await self._answered(request, ScoreRequest, self.engine.score)

    async def embed(self, request: Request) -> Response:
        return await self._answered(request, EmbedRequest, self.engine.embed)

    async def _answered(
        self,
        request: Request,
        model: type[ScoreRequest] | type[EmbedRequest],
        ask: Callable[[Any, float], Future[Answer]],
    ) -> Response:
        arrived, kind = time.monotonic(), _kind_of(request)
        body = await request.body()
        asked = await run_in_threadpool(read_request, body, kind, model, self.limits)
        self._check(asked)
        deadline = arrived + asked.deadline_s
        answer = await _awaited(await run_in_threadpool(ask, asked, deadline), deadline, request)
        if kind == MSGPACK:
            return Response(await run_in_threadpool(answer.packed), media_type=MSGPACK)
        return JSONResponse(await run_in_threadpool(answer.as_json))

    def _check(self, asked: ScoreRequest | EmbedRequest) -> None:
        """Refuse what is meant for another teacher or another corpus."""
        if asked.identity not in (None, self.info.identity):
            raise RefusedError(
                409, f"the teacher {asked.identity} is meant, but this one is {self.info.identity} (see /info)"
            )
        own = self.info.corpus and self.info.corpus.fingerprint
        by_row = asked.image_ids is not None or asked.text_ids is not None
        if by_row and asked.corpus != own:
            has = f"this service has {own}" if own else "this service has none"
            raise RefusedError(409, f"ids are of corpus {asked.corpus}, but {has}: send pictures and texts themselves")


async def _awaited(future: Future[Answer], deadline: float, request: Request) -> Answer:
    """The engine's answer; what has not begun is taken back when the client leaves or the deadline passes."""
    answer: asyncio.Future[Any] = asyncio.wrap_future(future)
    left: asyncio.Future[Any] = asyncio.ensure_future(_has_left(request))
    try:
        timeout = deadline - time.monotonic() + _GRACE_S
        await asyncio.wait({answer, left}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return cast("Answer", answer.result())
        raise ClientDisconnect if left.done() else TooLateError
    finally:
        left.cancel()
        answer.cancel()


async def _has_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _kind_of(request: Request) -> str:
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack"):
        return MSGPACK
    if sent == JSON:
        return JSON
    raise HTTPException(415, f"send {MSGPACK} or {JSON}; got {sent[:80] or 'no content type'}")


def _add_routes(app: FastAPI, service: _Service) -> None:
    @app.post("/score", responses=_problems(ScoreAnswer), openapi_extra=_body(ScoreRequest), response_class=Response)
    async def score(request: Request) -> Response:
        """Raw scores of pairs, by the teacher or from its store. Answered in the kind that was sent."""
        return await service.score(request)

    @app.post("/embed", responses=_problems(EmbedAnswer), openapi_extra=_body(EmbedRequest), response_class=Response)
    async def embed(request: Request) -> Response:
        """Unit vectors by the teacher's contrastive head, where it has one."""
        return await service.embed(request)

    @app.get("/info", responses={401: _PROBLEMS[401]})
    async def info() -> Info:
        """Which teacher this is, what it knows, what a request may hold."""
        return service.info

    @app.get("/health", responses={503: _PROBLEMS[503]})
    async def health() -> Health:
        """Whether requests would be answered."""
        if not service.engine.alive:
            raise EndedError
        return Health()

    @app.get("/metrics", response_class=Response, responses={401: _PROBLEMS[401]})
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _problems(answer: type[Any]) -> dict[int | str, dict[str, Any]]:
    packed = {MSGPACK: {"schema": {"type": "string", "format": "binary"}}}
    schema = {"schema": answer.model_json_schema()}
    return _PROBLEMS | {200: {"description": "The answer.", "content": {JSON: schema} | packed}}


def _body(model: type[Any]) -> dict[str, Any]:
    """A request body in JSON or msgpack, for OpenAPI."""
    packed = {"schema": {"type": "string", "format": "binary"}}
    content = {JSON: {"schema": model.model_json_schema()}, MSGPACK: packed}
    return {"requestBody": {"required": True, "content": content}}


def _answer_errors(app: FastAPI) -> None:
    def answer(status: int, told: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"error": told}, status, headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), cast("dict[str, str] | None", error.headers))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return answer(error.status, str(error))

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        return answer(429, "too many pairs wait; try again later", {"Retry-After": str(math.ceil(error.seconds))})

    @app.exception_handler(EndedError)
    async def ended(_: Request, error: EndedError) -> Response:
        return answer(503, "the service takes nothing any more: it ends, or its log says why", {"Retry-After": "5"})

    @app.exception_handler(TooLateError)
    async def late(_: Request, error: TooLateError) -> Response:
        return answer(504, "the request's deadline has passed; what was scored by then is kept")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return answer(400, "the request broke off")  # nobody hears it, but it is counted

    @app.exception_handler(DataError)
    async def lost(_: Request, error: DataError) -> Response:
        log.error("%s", error)
        return answer(500, "a picture of the corpus cannot be read; the service's log says which")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(500, "something went wrong here; the service's log says what", SAFE_HEADERS)  # outside the guards
