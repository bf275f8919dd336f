"""The socket, the token and uvicorn: how the service starts and how it ends."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from distill.serving.opening import ServingError
from distill.serving.patience import PatientProtocol
from distill.stopping import heard_by
from distill.wire import TOKEN_VARIABLE, carried

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

LEAST_TOKEN = 16  # characters
GRACE_S = 10  # for what is in hand when the service is told to end
MOST_CONNECTIONS = 256


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of ``DISTILL_TOKEN``; None where neither is given.

    Raises:
        ServingError: too short to be one, or with characters that a header cannot carry.
        OSError: the file cannot be read.
    """
    where = TOKEN_VARIABLE if file is None else str(file)
    token = (os.environ.get(TOKEN_VARIABLE) if file is None else file.read_text(encoding="utf-8")) or ""
    token = token.strip()
    if not token and file is None:
        return None
    if len(token) < LEAST_TOKEN or not carried(token):
        raise ServingError(
            f"{where} holds no token that would do: it needs {LEAST_TOKEN} or more ASCII characters without spaces, "
            "such as those of: openssl rand -hex 32"
        )
    return token


def bound_socket(host: str, port: int, *, token: bool) -> socket.socket:
    """A socket of the address, so that a port in use is known before models are loaded; who connects by then waits.

    Raises:
        ServingError: in use, no such address, or other machines could ask without a token.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise ServingError(f"{host}:{port} is no address of this machine ({error}); try --host 127.0.0.1") from error
    if not token and not is_loopback(str(address[0])):
        raise ServingError(
            f"{host} can be reached from other machines, so a token is needed: set {TOKEN_VARIABLE} or give "
            "--token-file, or serve this machine alone with --host 127.0.0.1"
        )
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1)  # only a listening socket finds out that another one listens
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise ServingError(
                f"port {port} of {host} is in use: end what listens there, or give another one with --port (0: any)"
            ) from error
        raise ServingError(f"{host}:{port} cannot be served: {error.strerror}") from error
    return made


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def allowed_hosts(host: str, *, token: bool) -> list[str]:
    """Names in a request's Host header that mean this service; any where a token is asked for, which proves more."""
    if token:
        return ["*"]
    return sorted({"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host})


def address_of(bound: socket.socket, host: str) -> str:
    """URL of the service."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}/"


def serve(app: FastAPI, bound: socket.socket, *, grace_s: int = GRACE_S) -> None:
    """Answer requests until SIGTERM or SIGINT; what is in hand then is answered, for ``grace_s`` at most."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,  # what people search for is theirs; /metrics counts
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=grace_s,
    )
    _Server(config).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends on a signal without passing it on: for a service that is no interruption, but how it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with heard_by(self.handle_exit):
            yield
