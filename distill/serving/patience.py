"""Connections that only hold on: uvicorn's protocol with an end to waiting for a client that sends or takes nothing.

uvicorn itself waits for ever for the head of a first request, for the rest of a body after the answer, and for a
client that does not read. Each takes one of the connections that there may be, and nobody needs a token for it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD_S = 30.0  # for the head of a request, and for what is left of a body after the answer
READ_S = 30.0  # for an answer to be taken, and what LEAST_READ takes for it
LEAST_READ = 16 << 10  # bytes a second


class _Timer:
    """Calls something after a while, unless it is ended before."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], object]) -> None:
        self.end()
        self._handle = loop.call_later(seconds, then)

    def end(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class PatientProtocol(H11Protocol):
    """Drops a connection whose client neither has a request in hand nor takes its answer, after a while."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head, self._read = _Timer(), _Timer()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, for a while."""
        super().connection_made(transport)
        self._head.start(self.loop, HEAD_S, self._drop)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._head.end()
        self._read.end()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """A request whose head is there has limits of its own, in ``distill.serving.guards``."""
        super().handle_events()
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn's annotation says
        if cycle is not None and not cycle.response_complete:
            self._head.end()

    def on_response_complete(self) -> None:
        """Wait for what is left of the body, and for the next request."""
        self._head.start(self.loop, HEAD_S, self._drop)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """More of the answer waits for the client than the system holds for it."""
        super().pause_writing()
        self._read.start(self.loop, READ_S + self.transport.get_write_buffer_size() / LEAST_READ, self._drop)

    def resume_writing(self) -> None:
        """The client has taken it."""
        self._read.end()
        super().resume_writing()

    def _drop(self) -> None:
        self.transport.abort()  # closing would first wait for what the client does not take
