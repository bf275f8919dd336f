"""The service over a socket: clients that send or read slowly, without end or half, and many of them.

The server is the one that ``distill serve teacher`` runs, in a thread, with its patience cut short.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn

from distill.serving import guards, patience, server
from distill.serving.server import bound_socket
from distill.teacher_service.app import build_app
from distill.wire import MSGPACK, Limits, packed
from tests.teacher_service.toy_service import AnyTextTeacher, known_corpus, toy_engine

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105
LIMITS = Limits(body_bytes=4 << 20)
AUTHORISED = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {MSGPACK}\r\n"


class Wide(AnyTextTeacher):
    """Its vectors are wide, so that an answer is larger than what the system holds for a client that does not read."""

    def encode_texts(self, inputs: Any) -> Any:
        memory = super().encode_texts(inputs)
        return {**memory, "embedding": memory["embedding"].repeat(1, 512)}


class Service:
    """A running one."""

    def __init__(self, port: int, engine: Any, corpus: Any) -> None:
        self.port, self.engine, self.corpus = port, engine, corpus
        self.uvicorn: list[uvicorn.Server] = []
        self.client = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def body(self, **more: Any) -> bytes:
        rows = {"image_ids": np.array([1]), "text_ids": np.array([2])}
        return packed({"corpus": self.corpus.fingerprint, **rows, **more})

    def works(self) -> bool:
        answer = self.client.post("/score", content=self.body(), headers={"Content-Type": MSGPACK})
        return answer.status_code == 200 and self.client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    corpus = known_corpus()
    engine, info = toy_engine(corpus, teacher=Wide(), limits=LIMITS)
    with pytest.MonkeyPatch.context() as patch, bound_socket("127.0.0.1", 0, token=True) as bound:
        patch.setattr(guards, "PATIENCE_S", 0.3)
        patch.setattr(patience, "HEAD_S", 1.0)
        patch.setattr(patience, "READ_S", 0.3)
        patch.setattr(patience, "LEAST_READ", 50 << 20)
        patch.setattr(server, "MOST_CONNECTIONS", 30)
        found = Service(bound.getsockname()[1], engine, corpus)
        start = server._Server.__init__

        def noted(self: Any, config: Any) -> None:
            start(self, config)
            found.uvicorn.append(self)

        patch.setattr(server._Server, "__init__", noted)
        patch.setattr(server._Server, "capture_signals", uvicorn.Server.capture_signals)  # not in the main thread
        app = build_app(engine, info, limits=LIMITS, token=TOKEN)
        thread = threading.Thread(target=server.serve, args=(app, bound), kwargs={"grace_s": 2})
        thread.start()
        with found.client:
            yield found
        found.uvicorn[0].should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert not engine.alive


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """Status and body of the one answer that comes."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            if length and len(body) >= int(length[0].split(b":")[1]):
                break
    if not received:
        return 0, ""
    return int(received.split(b" ")[1]), received.partition(b"\r\n\r\n")[2].decode()


def ends(connection: socket.socket, within: float = 5) -> bool:
    """Whether the other side closes the connection."""
    connection.settimeout(within)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_a_client_that_sends_nothing_is_dropped(service: Service) -> None:
    with closing(service.connect()) as connection:
        began = time.monotonic()
        assert ends(connection)
        assert 0.8 < time.monotonic() - began < 4
    assert service.works()


def test_a_head_that_trickles_is_dropped(service: Service) -> None:
    with closing(service.connect()) as connection:
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            for letter in b"POST /score HTTP/1.1\r\nX: " + b"a" * 1000:
                connection.sendall(bytes([letter]))
                time.sleep(0.02)
        assert time.monotonic() - began < 5
        assert ends(connection)
    assert service.works()


def test_a_body_that_trickles_is_refused(service: Service) -> None:
    with closing(service.connect()) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\n{AUTHORISED}Content-Length: 1000000\r\n\r\n".encode())
        began = time.monotonic()
        stop = threading.Event()

        def trickle() -> None:
            with suppress(OSError):
                while not stop.wait(0.03):
                    connection.sendall(b"\x81")

        sender = threading.Thread(target=trickle)
        sender.start()
        status, said = answer_of(connection)
        stop.set()
        sender.join()
        assert (status, "too slowly" in said) == (408, True)
        assert time.monotonic() - began < 3
    assert service.works()


def test_a_body_without_end_is_refused_and_the_rest_of_it_is_not_taken_for_ever(service: Service) -> None:
    with closing(service.connect()) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\n{AUTHORISED}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent, began = 0, time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < 10:
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
        assert time.monotonic() - began < 8
        assert sent > LIMITS.body_bytes
    assert service.works()


@pytest.mark.parametrize("stated", ["Content-Length: 100000000000", "Content-Length: 5000000"])
def test_a_body_that_states_too_much_is_refused_before_it_comes(service: Service, stated: str) -> None:
    with closing(service.connect()) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\n{AUTHORISED}{stated}\r\n\r\n".encode())
        status, said = answer_of(connection)
        assert (status, "4 MiB" in said) == (413, True)


BROKEN = {
    "length that is none": "Content-Length: ten\r\n\r\n",
    "negative length": "Content-Length: -1\r\n\r\n",
    "two lengths": "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "digits of elsewhere": "Content-Length: \u00b2\r\n\r\n",
    "chunks of no size": "Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "huge head": "X: " + "a" * 100_000 + "\r\n\r\n",
    "no host": None,
    "other method": "Content-Length: 0\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), BROKEN.items(), ids=BROKEN)
def test_what_is_no_request_is_refused(service: Service, name: str, head: str | None) -> None:
    lines = f"POST /score HTTP/1.1\r\n{AUTHORISED}{head}"
    if head is None:
        lines = "GET /info HTTP/1.1\r\n\r\n"
    if name == "other method":
        lines = lines.replace("POST", "BREW")
    with closing(service.connect()) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(lines.encode("latin-1"))
        assert answer_of(connection)[0] in ((405,) if name == "other method" else (400, 408, 431))
    assert service.works()


def test_a_client_that_goes_in_the_middle_takes_nothing_with_it(service: Service) -> None:
    whole = service.body()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        with closing(service.connect()) as connection:
            head = f"POST /score HTTP/1.1\r\n{AUTHORISED}Content-Length: {len(whole)}\r\n\r\n"
            connection.sendall(head.encode() + whole[:cut])
    assert service.works()
    assert until(lambda: service.engine.waiting == 0)


def test_a_client_that_does_not_read_its_answers_is_dropped(service: Service) -> None:
    body = json.dumps({"texts": [f"text {n}" for n in range(600)]}).encode()
    kind = AUTHORISED.replace(MSGPACK, "application/json")
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.port))
        connection.settimeout(20)
        one = f"POST /embed HTTP/1.1\r\n{kind}Content-Length: {len(body)}\r\n\r\n".encode() + body
        connection.sendall(one * 2)  # the second one waits until the first is taken
        assert until(lambda: stuck(service) == 1)
        assert until(lambda: stuck(service) == 0)
    assert service.works()


def stuck(service: Service) -> int:
    """Connections with an answer that is not taken."""
    with suppress(RuntimeError):  # it may change while it is looked at
        connections: list[Any] = list(service.uvicorn[0].server_state.connections)
        return sum(one.transport.get_write_buffer_size() > 0 for one in connections)
    return -1


def until(true: Callable[[], bool], seconds: float = 15) -> bool:
    by = time.monotonic() + seconds
    while not true() and time.monotonic() < by:
        time.sleep(0.01)
    return true()


def test_connections_beyond_the_limit_are_told_so_and_idle_ones_make_room(service: Service) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(closing(service.connect()))
        with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
            assert client.get("/health").status_code == 503
        time.sleep(1.5)
        with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
            assert client.get("/health").status_code == 200
    assert service.works()


def test_a_connection_is_used_again_after_an_answer(service: Service) -> None:
    with closing(service.connect()) as connection:
        for _ in range(3):
            connection.sendall(f"GET /info HTTP/1.1\r\n{AUTHORISED}\r\n".encode())
            assert answer_of(connection)[0] == 200
            time.sleep(0.15)
