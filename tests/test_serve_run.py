"""The service as a process: how it starts, ends, and what does not bring it down."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.exported import made_export
from tests.serving import command, environment, served

HUGE = 200 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_export(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[tuple[str, int]]:
    with served(place / "student", "--data", str(place / "run")) as (address, process):
        yield address, process.pid


def memory_of(pid: int) -> int:
    """Most bytes that a process had in memory."""
    told = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert told is not None
    return int(told[1]) * 1024


def works(address: str) -> bool:
    return len(httpx2.post(f"{address}/search", json={"text": "a star", "k": 3}).json()["hits"]) == 3


def blocks(size: int) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
    for _ in range(size >> 20):
        yield bytes(1 << 20)


@pytest.mark.parametrize("stated", [True, False])
def test_two_hundred_megabytes_are_refused_and_never_in_memory(service: tuple[str, int], stated: bool) -> None:
    address, pid = service
    before = memory_of(pid)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if stated:
        headers["Content-Length"] = str(sum(len(block) for block in blocks(HUGE)))
    answer = httpx2.post(f"{address}/search", content=blocks(HUGE), headers=headers, timeout=60)
    assert (answer.status_code, "20 MiB" in answer.json()["error"]) == (413, True)
    assert memory_of(pid) - before < 60 << 20
    assert works(address)


def test_who_sends_everything_before_reading_is_told_too(service: tuple[str, int]) -> None:
    address, _ = service
    where = urlsplit(address)
    size = 40 << 20
    with socket.create_connection((where.hostname, where.port), timeout=20) as asked:
        head = f"POST /search HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        asked.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        for _ in range(size >> 20):
            asked.sendall(bytes(1 << 20))
            time.sleep(0.002)
        assert asked.recv(1000).startswith(b"HTTP/1.1 413")
    assert works(address)


def test_who_asks_before_sending_is_told_at_once(service: tuple[str, int]) -> None:
    address, _ = service
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=10) as asked:
        head = f"POST /search HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        asked.sendall(f"{head}Content-Length: {HUGE}\r\nExpect: 100-continue\r\n\r\n".encode())
        told = b"".join(iter(lambda: asked.recv(1000), b""))  # to the end, which comes at once
        assert told.startswith(b"HTTP/1.1 413")
        assert b"100 Continue" not in told
    assert works(address)


def test_a_client_that_breaks_off_leaves_nothing(place: Path) -> None:
    with served(place / "student") as (address, process):
        _break_off(address)
        process.terminate()
        assert "Traceback" not in process.communicate(timeout=30)[1]


def _break_off(address: str) -> None:
    where = urlsplit(address)
    head = f"POST /search HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    begun = f"{head}Content-Length: 99\r\n\r\n{{"
    for sent in (b"", b"GARBAGE\r\n\r\n", begun.encode()):
        with socket.create_connection((where.hostname, where.port), timeout=20) as asked:
            asked.sendall(sent)
    assert works(address)
    metrics = httpx2.get(f"{address}/metrics").text
    assert re.search(r'distill_inside{gate="student"} 0.0', metrics)


def test_another_hosts_name_is_refused(service: tuple[str, int]) -> None:
    where = urlsplit(service[0])
    connection = http.client.HTTPConnection(where.netloc, timeout=20)
    connection.request("GET", "/info", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_is_in_hand_is_answered(place: Path, number: int) -> None:
    texts = {"texts": ["a small red ring above a large blue square and a star"] * 256}
    answers = []
    with served(place / "student") as (address, process):
        httpx2.post(f"{address}/embed", json=texts)
        asking = [
            threading.Thread(target=lambda: answers.append(httpx2.post(f"{address}/embed", json=texts, timeout=30)))
            for _ in range(6)
        ]
        for one in asking:
            one.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # until all have arrived: one that comes later finds nobody
            told = re.search(r'gate="student"} (\d+)', httpx2.get(f"{address}/metrics").text)
            if told and int(told[1]) + len(answers) >= len(asking):
                break
        process.send_signal(number)
        for one in asking:
            one.join()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert [answer.status_code for answer in answers] == [200] * 6
    assert err.splitlines()[-1] == "ended"
    assert "Traceback" not in err + out


def refused(folder: Path, *options: str, **more: str) -> str:
    done = subprocess.run(
        command(folder, *options), capture_output=True, text=True, env=environment(**more), timeout=120, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_what_cannot_be_served_is_one_line(place: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(place / "student", "--port", port)
        assert said.startswith(f"error: port {port} of 127.0.0.1 is in use: end what listens there")
        assert "\n" not in said
    said = refused(place / "student", "--host", "0.0.0.0")
    assert said.startswith("error: 0.0.0.0 can be reached from other machines, so a token is needed: set DISTILL_TOKEN")
    assert refused(tmp_path).startswith(f"error: {tmp_path} holds no export_report.json")
    assert "has no int8 tower" in refused(place / "student", "--precision", "int8")


def test_with_a_token_it_may_be_asked_from_elsewhere(place: Path) -> None:
    token = "0123456789abcdef0123"
    with served(place / "student", "--host", "0.0.0.0", DISTILL_TOKEN=token) as (address, _):
        address = address.replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{address}/info").status_code == 401
        named = {"Authorization": f"Bearer {token}", "Host": "search.example"}
        assert json.loads(httpx2.get(f"{address}/info", headers=named).text)["pictures"] is False
