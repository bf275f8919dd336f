"""A proxy before a service that spoils answers as it is told to."""

from __future__ import annotations

import gzip
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np

from distill.wire import packed, unpacked

Fault = Callable[[bytes], tuple[int, bytes, dict[str, str]] | None]
"""From the right answer to what is sent in its place; None closes the connection."""


@dataclass
class Meddler:
    """What the next posts get in place of the answer, and what was asked."""

    url: str
    faults: deque[Fault] = field(default_factory=deque)
    asked: list[bytes] = field(default_factory=list)


def changed(**values: object) -> Fault:
    """Other values in the answer."""

    def fault(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
        return 200, packed({**unpacked(answer), **values}), {}

    return fault


def without_a_pair(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
    found = unpacked(answer)
    return 200, packed({**found, "scores": np.frombuffer(found["scores"], "<f4")[:-1]}), {}


def cut_short(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
    return 200, answer[: len(answer) // 2], {}


def broken_off(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
    return 200, answer[: len(answer) // 2], {"Content-Length": str(len(answer))}


def garbage(_: bytes) -> tuple[int, bytes, dict[str, str]]:
    return 200, b"<html>a proxy's page</html>", {}


def without_an_end(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Small on the way, and four times what is taken when it is unpacked."""
    return 200, gzip.compress(answer + bytes(256 << 20), compresslevel=1), {"Content-Encoding": "gzip"}


def closed(_: bytes) -> None:
    return None


def status(code: int, **headers: str) -> Fault:
    said = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: (code, b'{"error": "told"}', said)


@contextmanager
def meddling(url: str) -> Iterator[Meddler]:
    meddler = Meddler("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.pass_on(httpx2.get(url + self.path, timeout=30), None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            meddler.asked.append(body)
            fault = meddler.faults.popleft() if meddler.faults else None
            headers = {"Content-Type": self.headers["Content-Type"]}
            self.pass_on(httpx2.post(url + self.path, content=body, headers=headers, timeout=30), fault)

        def pass_on(self, answer: httpx2.Response, fault: Fault | None) -> None:
            sent = (answer.status_code, answer.content, {}) if fault is None else fault(answer.content)
            if sent is None:
                self.close_connection = True
                return
            code, content, headers = sent
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = headers.get("Content-Length") is not None

        def log_message(self, *_: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # clients that leave
            return

    with Server(("127.0.0.1", 0), Handler) as server:
        meddler.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield meddler
        finally:
            server.shutdown()
            thread.join(10)
