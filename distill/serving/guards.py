"""What stands before the routes, as plain ASGI: who may ask, how much may be sent, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from distill.serving.metrics import RequestMetrics

PATIENCE_S = 30.0  # for the next piece of a body
LEAST_RATE = 16 << 10  # bytes a second of a body on the whole, once patience has passed
_SAFE = {"GET", "HEAD", "OPTIONS"}
SAFE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def guard(
    app: Starlette,
    *,
    token: str | None,
    open_paths: Collection[str],
    hosts: Collection[str],
    body_bytes: int,
    metrics: RequestMetrics,
    bytes_in_hand: int | None = None,
) -> None:
    """Put the guards before an app's routes.

    Args:
        app: whose routes they are.
        token: that requests have to carry, but for ``open_paths``.
        open_paths: for which no token is asked.
        hosts: names under which the service may be asked; ``*`` is any.
        body_bytes: of a request.
        metrics: told of every request.
        bytes_in_hand: of all requests together; None: no bound.
    """
    app.add_middleware(Doorkeeper, token=token, open_paths=open_paths)
    app.add_middleware(BodyLimit, limit=body_bytes)
    if bytes_in_hand is not None:
        app.add_middleware(BytesInHand, limit=bytes_in_hand, each=body_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(SafeHeaders)
    app.add_middleware(Counted, metrics=metrics)


class SafeHeaders:
    """Every answer says what a browser may do with it: nothing from elsewhere, no framing, no guessing of types."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers to the answer."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SAFE_HEADERS)
            await send(message)

        await self.app(scope, receive, sent)


class Counted:
    """Tells the metrics of every request."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Time one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # not the path asked for: its values have no end
            self.metrics.request(route, status, time.perf_counter() - started)


class Doorkeeper:
    """Refuses requests without the token, and posts that another site's page makes a browser send."""

    def __init__(self, app: ASGIApp, *, token: str | None, open_paths: Collection[str]) -> None:
        self.app, self._open = app, frozenset(open_paths)
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 401 or 403."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self._known(scope["path"], headers):
                told = "this service needs a token: send the header Authorization: Bearer TOKEN"
                refusal = JSONResponse({"error": told}, 401, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
            if scope["method"] not in _SAFE and _from_elsewhere(headers):
                told = "a page of another site sent this; use this service's own page, or no browser"
                await JSONResponse({"error": told}, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _known(self, path: str, headers: Headers) -> bool:
        if self._token is None or path in self._open:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        return kind.lower() == "bearer" and right


def _from_elsewhere(headers: Headers) -> bool:
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return True
    origin = headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc != headers.get("host")
    except ValueError:  # no URL at all
        return True


class BodyLimit:
    """Bounds a request's body, by its stated length before it is read and by its bytes as they come.

    What is left of a body after the answer is taken and dropped by uvicorn: a client that is still sending when the
    connection closes would not see why.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 at once, or let the request through with its body counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (_stated(scope) or 0) > self.limit:
            await JSONResponse({"error": too_large(self.limit)}, 413)(scope, receive, send)
            return
        await self.app(scope, _Body(receive, self.limit).receive, send)


class _Body:
    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._taken, self._ended = 0, False
        self._began = time.monotonic()

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HTTPException: 413, more than the limit has come; 408, nothing comes, or a little now and then.
        """
        if self._ended:  # what may still come is word that the client has gone
            return await self._receive()
        late = self._began + PATIENCE_S + self._taken / LEAST_RATE - time.monotonic()
        try:
            message: Message = await asyncio.wait_for(self._receive(), max(0.0, min(PATIENCE_S, late)))
        except TimeoutError:
            told = f"nothing more of the request came for {PATIENCE_S:.0f} seconds"
            if late < PATIENCE_S and self._taken:
                told = f"the request comes too slowly: send at least {LEAST_RATE >> 10} KiB a second"
            raise HTTPException(408, told) from None
        self._taken += len(message.get("body", b""))
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._taken > self._limit:
            raise HTTPException(413, too_large(self._limit))
        return message


class BytesInHand:
    """Bounds what the bodies of all requests in hand hold together, by what they state before anything is read."""

    def __init__(self, app: ASGIApp, *, limit: int, each: int) -> None:
        """``limit``: of all together; ``each``: what a request without a length is taken for."""
        self.app, self.limit, self.each = app, limit, each
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 429, or let the request through and count it while it lasts."""
        if scope["type"] != "http" or scope["method"] in _SAFE:
            await self.app(scope, receive, send)
            return
        stated = _stated(scope)
        size = self.each if stated is None else min(stated, self.each)  # a larger one is refused before it is read
        if self._taken and self._taken + size > self.limit:
            told = "the requests in hand hold as many bytes as may be; try again in a moment"
            await JSONResponse({"error": told}, 429, {"Retry-After": "1"})(scope, receive, send)
            return
        self._taken += size
        try:
            await self.app(scope, receive, send)
        finally:
            self._taken -= size


def _stated(scope: Scope) -> int | None:
    """The length that a request states; None where it states none."""
    stated = Headers(scope=scope).get("content-length", "")
    return int(stated) if stated.isascii() and stated.isdigit() and len(stated) <= 20 else None


def too_large(limit: int) -> str:
    """Words for a body above the limit."""
    return f"too much was sent: a request may hold {limit / 2**20:g} MiB"
