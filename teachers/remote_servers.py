"""The servers of one teacher: which of them is asked, and what becomes of answers that do not come or cannot be used.

Asking twice changes nothing, so what may go well is tried again, by whichever server is well; what cannot is said at
once. Every answer says which teacher gave it, and another one ends the work.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from distill.wire import MSGPACK, TOKEN_VARIABLE, NoAnswerError, WireError, carried, packed

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # another try may go well; asking twice changes nothing
_FAULTS_OF_SERVER = 3  # answers 500 to the same request, after which it is given up
_MOST_ANSWERED = 64 << 20  # bytes, unpacked; vectors of 1024 items take a quarter of it at the most
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0


class RemoteTeacherError(NoAnswerError):
    """The service cannot be asked, or gives no answer that can be used."""


class TooLargeError(RemoteTeacherError):
    """More than a request may hold."""


class OtherTeacherError(RemoteTeacherError):
    """Another teacher answers than the one that was asked first."""


@dataclass(frozen=True)
class RemoteOptions:
    """How a service is asked.

    pairs_per_request: at most.
    connections: requests at a time, for each server.
    deadline_s: that the service has for one request, from its arrival.
    patience_s: without any answer, after which it is given up.
    """

    pairs_per_request: int = 512
    connections: int = 4
    deadline_s: float = 120.0
    patience_s: float = 600.0


class _Server:
    """One URL: how many requests it has, and whether it is let rest after a failure."""

    def __init__(self, url: str) -> None:
        self.url, self.in_hand, self.rests_until, self.failures = url.rstrip("/"), 0, 0.0, 0


class Servers:
    """One or several, of the same teacher. Threads may share one; a copy in another process connects where it asks."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        identity: str | None,
        token: str | None,
        options: RemoteOptions,
        heed: Callable[[], object],
    ) -> None:
        """Connect; arguments and errors are those of ``RemoteTeacher``."""
        if not urls:
            raise ValueError("give the URL of a teacher's service, such as http://127.0.0.1:8000")
        self.options = options
        self._token, self._heed = _token(token), heed
        self._servers = [_Server(url) for url in urls]
        self._lock = threading.Lock()
        self._pausing, self._ended, self._answered_at = 0, False, time.monotonic()
        self._open()
        try:
            self._connect(identity)
        except BaseException:
            self.close()
            raise

    def _connect(self, identity: str | None) -> None:
        found = self._connected()
        self.infos = list(found.values())  # what each that answered says of itself
        self.identity: str = identity or str(self.infos[0]["identity"])
        for server in self._servers:
            if server in found:
                self._check_identity(server, str(found[server]["identity"]))
            else:
                log.warning("no teacher answers at %s: going on without it", server.url)

    def __str__(self) -> str:
        return ", ".join(server.url for server in self._servers)

    def _open(self) -> None:
        try:
            import httpx2
            import msgpack  # noqa: F401  (what requests are packed with)
        except ImportError as error:
            raise ImportError(f'{error.name} is not installed: pip install "cross2dual[remote]"') from None
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        count = self.options.connections * len(self._servers)
        limits = httpx2.Limits(max_connections=count, max_keepalive_connections=count)
        self._client = httpx2.Client(
            headers=headers, timeout=self._timeout(), limits=limits, follow_redirects=False, trust_env=False
        )
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="remote-teacher")

    def _timeout(self) -> Any:
        import httpx2

        return httpx2.Timeout(10.0, read=self.options.deadline_s + 10.0, write=30.0)

    def __getstate__(self) -> dict[str, Any]:
        """To loader processes goes what preparing items takes; they connect only where they ask."""
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_pool", "_lock", "_heed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _heed=lambda: None)
        for server in self._servers:
            server.in_hand = 0
        self._open()

    def answer_within(self, seconds: float) -> None:
        """Give up after about so long from now on: somebody waits for every answer."""
        own = self.options
        self.options = replace(own, deadline_s=min(seconds, own.deadline_s), patience_s=min(seconds, own.patience_s))
        self._client.timeout = self._timeout()

    def close(self) -> None:
        """End the connections; who waits to ask again, does not."""
        with self._lock:
            self._ended = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        # what is in hand would not notice that its connection is closed, and wait for its answer all the longer
        until = time.monotonic() + self.options.deadline_s + 20.0
        while any(server.in_hand for server in self._servers) and time.monotonic() < until:
            time.sleep(0.02)
        self._client.close()

    def each(self, ask: Callable[[Any], None], parts: Sequence[Any]) -> None:
        """Several at a time; the first error ends it, and what has not begun is taken back."""
        if len(parts) == 1:
            ask(parts[0])
            return
        waiting = [self._pool.submit(ask, part) for part in parts]
        try:
            for future in waiting:
                while not future.done():
                    wait([future], timeout=0.5)
                    if self._pausing:  # what is answered in time is waited for
                        self._heed()
                future.result()
        except BaseException as error:
            if not isinstance(error, Exception):  # the process ends: nobody tries again
                self._ended = True
            raise
        finally:
            for future in waiting:
                future.cancel()

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], tuple[str, Answer]]) -> Answer:
        """The answer to a request, by whichever server gives one first; tried again where that is safe.

        ``read`` makes identity and answer of what came, and raises WireError where it is spoiled.

        Raises:
            RemoteTeacherError: refused, or nobody answered for as long as patience lasts.
            TooLargeError: refused for its size.
            OtherTeacherError: another teacher answered.
        """
        content = packed({**body, "identity": self.identity, "deadline_s": self.options.deadline_s})
        pauses, began, faults = _pauses(), time.monotonic(), 0
        while True:
            server = self._next_server()
            try:
                status, said, again = self._post(server, path, content)
                if status == 200:
                    identity, answer = read(said)
                    self._check_identity(server, identity)
                    self._went_well(server)
                    return answer
                told = _told(said)
                if status == 409 and "teacher" in told:
                    raise OtherTeacherError(f"{server.url} has another teacher by now: {told}. {_KEPT}")
                faults += status == 500
                if status == 413:
                    raise TooLargeError(f"{server.url}{path} answered {status}: {told}")
                if status not in _TRANSIENT or faults >= _FAULTS_OF_SERVER:
                    raise RemoteTeacherError(f"{server.url}{path} answered {status}: {told}{_advice(status)}")
                problem = f"{status}: {told}"
            except WireError as error:
                problem, again = f"an answer that cannot be used ({error})", None
            except _transport_errors() as error:
                problem, again = f"{type(error).__name__}: {error}", None
            self._went_badly(server)
            pause = next(pauses) if again is None else again * random.uniform(1.0, 1.5)  # noqa: S311  (not a secret)
            if len(self._servers) > 1 and any(one.rests_until <= time.monotonic() for one in self._servers):
                pause = 0.0  # another one may do
            if time.monotonic() + pause > max(began, self._answered_at) + self.options.patience_s:
                raise RemoteTeacherError(
                    f"no answer from {self} for {self.options.patience_s:g} s; "
                    f"the last try: {problem}. Start the service again with distill serve teacher. {_KEPT}"
                )
            log.info("teacher at %s: %s; trying again", server.url, problem)
            self._sleep(pause)

    def _post(self, server: _Server, path: str, content: bytes) -> tuple[int, bytes, float | None]:
        """Status, body and, where the server says when to come again, seconds."""
        with self._lock:
            if self._ended:
                raise RemoteTeacherError(_ENDS)
            server.in_hand += 1
        try:
            kind = {"Content-Type": MSGPACK}
            with self._client.stream("POST", server.url + path, content=content, headers=kind) as answer:
                said = _bounded(answer.iter_bytes())
                after = answer.headers.get("retry-after", "")
                again = min(float(after), _LONGEST_PAUSE_S) if after.isdigit() else None
                return answer.status_code, said, again
        finally:
            with self._lock:
                server.in_hand -= 1

    def _next_server(self) -> _Server:
        """The one with the least to do among those that are well, else the one that has rested longest."""
        now = time.monotonic()
        with self._lock:
            well = [server for server in self._servers if server.rests_until <= now]
            if well:
                return min(well, key=lambda server: server.in_hand)
            return min(self._servers, key=lambda server: server.rests_until)

    def _went_well(self, server: _Server) -> None:
        with self._lock:
            server.failures, server.rests_until, self._answered_at = 0, 0.0, time.monotonic()

    def _went_badly(self, server: _Server) -> None:
        with self._lock:
            server.failures += 1
            # bounded before it is a power: one that stays away fails thousands of times while another one answers
            server.rests_until = time.monotonic() + min(_LONGEST_PAUSE_S, 0.5 * 2 ** min(server.failures, 10))

    def _check_identity(self, server: _Server, identity: str) -> None:
        if identity != self.identity:
            raise OtherTeacherError(
                f"{server.url} has the teacher {identity}, but {self.identity} is meant: scores of different teachers "
                f"are never mixed. {_KEPT}"
            )

    def _connected(self) -> dict[_Server, dict[str, Any]]:
        """What the servers say of themselves, of those that answer; waits until one does."""
        pauses, gives_up_at = _pauses(), time.monotonic() + self.options.patience_s
        while True:
            found, problems = dict[_Server, dict[str, Any]](), list[str]()
            for server in self._servers:
                try:
                    found[server] = self._info_of(server)
                except _NotYetError as error:
                    problems.append(f"{server.url}: {error}")
                    self._went_badly(server)
            if found:
                return found
            pause = next(pauses)
            if time.monotonic() + pause > gives_up_at:
                raise RemoteTeacherError(
                    f"no teacher answers ({'; '.join(problems)}): start one with distill serve teacher RECIPE, or "
                    "correct teacher.urls"
                )
            log.info("waiting for a teacher (%s)", "; ".join(problems))
            self._sleep(pause)

    def _info_of(self, server: _Server) -> dict[str, Any]:
        """What the server says of itself; raises _NotYetError where it may do so later."""
        try:
            answer = self._client.get(f"{server.url}/info", timeout=10.0)
        except _transport_errors() as error:
            raise _NotYetError(f"{type(error).__name__}: {error}") from None
        if answer.status_code == 200:
            return _checked_info(server, answer)
        problem = f"{answer.status_code}: {_told(answer.content)}"
        if answer.status_code in _TRANSIENT:
            raise _NotYetError(problem)
        raise RemoteTeacherError(f"{server.url}/info answered {problem}{_advice(answer.status_code)}")

    def _sleep(self, seconds: float) -> None:
        """In steps, so that the process ends when it is told to."""
        until = time.monotonic() + seconds
        with self._lock:
            self._pausing += 1
        try:
            while (rest := until - time.monotonic()) > 0:
                if threading.current_thread() is threading.main_thread():
                    self._heed()
                if self._ended:
                    raise RemoteTeacherError(_ENDS)
                time.sleep(min(rest, 0.2))
        finally:
            with self._lock:
                self._pausing -= 1


class _NotYetError(Exception):
    """A server that is not there, or not ready."""


_ENDS = "the process ends, or the teacher was closed"
_KEPT = "What was scored is kept: the same command goes on."


def _pauses() -> Iterator[float]:
    """Full jitter under a bound that doubles, so that many clients do not come again together."""
    longest = _FIRST_PAUSE_S
    while True:
        yield random.uniform(0, longest)  # noqa: S311  (not a secret)
        longest = min(2 * longest, _LONGEST_PAUSE_S)


def _bounded(pieces: Iterator[bytes]) -> bytes:
    """All of an answer; raises WireError where it has no end."""
    said = bytearray()
    for piece in pieces:
        said += piece
        if len(said) > _MOST_ANSWERED:
            raise WireError(f"more than {_MOST_ANSWERED >> 20} MiB")
    return bytes(said)


def _transport_errors() -> tuple[type[Exception], ...]:
    import httpx2

    return (httpx2.TransportError, httpx2.DecodingError)


def _checked_info(server: _Server, answer: Any) -> dict[str, Any]:
    try:
        info: dict[str, Any] = answer.json()
        if not all(info.get(key) for key in ("identity", "score_kind", "teacher", "limits")):
            raise KeyError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RemoteTeacherError(
            f"{server.url} is no teacher's service: its /info names no teacher; start one with distill serve teacher"
        ) from None
    return info


def _told(said: bytes) -> str:
    """The service's own words, or the beginning of whatever came."""
    try:
        return str(json.loads(said)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return said[:200].decode("utf-8", "replace")


def _advice(status: int) -> str:
    if status in (401, 403):
        return f" (set {TOKEN_VARIABLE}, or teacher.token_file, to the service's token)"
    if status == 409:
        return " (it was started with another corpus than the service that was asked first: serve the same recipe)"
    return ""


def _token(given: str | None) -> str | None:
    """The token, else that of the environment; None where there is none. No message holds it."""
    if given is None and not os.environ.get(TOKEN_VARIABLE, "").strip():
        return None
    token = (os.environ[TOKEN_VARIABLE] if given is None else given).strip()
    if not carried(token):
        where = TOKEN_VARIABLE if given is None else "teacher.token_file"
        raise RemoteTeacherError(f"{where} holds no token: ASCII characters without spaces are expected")
    return token
