"""Several worker processes on this machine.

Each is ``python -m distill work PLAN --serve`` with a share of the threads, and of the GPUs where there are any; it
gets a few units at a time on its standard input and says on its standard output what is done. One that dies is noticed:
its units go to the others, and some that died are started again.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill import stopping
from distill.cores import own_threads, without_launcher
from distill.drivers.driver import DriverError, DriverName, Task
from distill.durable import writing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)
RESTARTS = 3  # in one call
GRACE_S = 60.0  # for the unit in hand, when told to stop
_LAST_WORDS = 600  # characters


@dataclass
class _Worker:
    """A process, and what it was given that it has not said to be done."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    in_hand: list[int] = field(default_factory=list)
    said: bytes = b""  # the beginning of a line
    ready: bool = False

    def give(self, numbers: list[int]) -> None:
        assert self.process.stdin is not None
        self.in_hand, self.ready = list(numbers), False
        try:
            self.process.stdin.write(json.dumps(numbers).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has died: the end of its output says so

    def last_words(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.is_file() else ""
        return text[-_LAST_WORDS:] or "it said nothing"


class LocalDriver:
    """``workers`` processes; each with ``threads`` of its own, and ``gpus`` GPUs, which may be part of one."""

    name: DriverName = "local"

    def __init__(self, workers: int, *, threads: int | None = None, gpus: float | None = None) -> None:
        """``threads`` and ``gpus`` None: what there is, shared out."""
        self.workers, self.gpus = workers, gpus
        self.threads = threads or max(1, own_threads() // workers)

    def run(self, task: Task, done: Callable[[int], object]) -> None:
        """Until every unit is there.

        Raises:
            DriverError: all workers died too often, or one says why the work cannot go on; with its words.
        """
        crew = _Crew(task, done, self)
        with stopping.finishing():
            try:
                crew.work()
            finally:
                crew.end()


class _Crew:
    """The workers of one call."""

    def __init__(self, task: Task, done: Callable[[int], object], driver: LocalDriver) -> None:
        self._task, self._done, self._driver = task, done, driver
        self._parts = deque(task.parts(driver.workers))
        self._size = min(driver.workers, len(self._parts))
        self._restarts = RESTARTS
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failure = ""

    def work(self) -> None:
        for number in range(self._size):
            self._start(number)
        while (self._parts or any(worker.in_hand for worker in self._workers)) and not stopping.told():
            for key, _ in self._selector.select(timeout=0.5):
                self._hear(key.data)
            self._feed()
            if self._failure:
                raise DriverError(f"{self._failure}\nUnits that are done are kept; the same command goes on")

    def end(self) -> None:
        """No worker outlives this: they finish the unit in hand, or are ended."""
        for worker in self._workers:
            if worker.process.stdin is not None:
                with suppress(BrokenPipeError):
                    worker.process.stdin.close()
            if worker.in_hand or not worker.ready:
                _signal(worker, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        try:
            for worker in self._workers:
                try:
                    worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.warning("worker %d does not end and is ended", worker.number)
        finally:  # a second signal comes here
            for worker in self._workers:
                _signal(worker, signal.SIGKILL)
                worker.process.wait()
                if worker.process.stdout is not None:
                    worker.process.stdout.close()
            self._selector.close()

    def _start(self, number: int) -> None:
        folder = self._task.plan.folder
        path = folder.with_name(f"logs-{folder.name}") / f"worker-{number}.log"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        with file:
            process = subprocess.Popen(
                command(folder, str(number)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment(number, threads=self._driver.threads, gpus=self._driver.gpus),
                start_new_session=True,  # Ctrl-C is for this process, which tells the workers
            )
        assert process.stdout is not None
        worker = _Worker(number, process, path)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _hear(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        said = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not said:
            self._bury(worker)
            return
        *lines, worker.said = (worker.said + said).split(b"\n")
        for line in lines:
            self._heed(worker, json.loads(line))

    def _heed(self, worker: _Worker, said: dict[str, Any]) -> None:
        if "failed" in said:
            self._failure = str(said["failed"])
        elif "done" in said:
            if said["done"] in worker.in_hand:
                worker.in_hand.remove(said["done"])
            self._done(said["done"])
        elif "ready" in said:
            worker.ready = True

    def _feed(self) -> None:
        """Whoever waits gets what is left, which may be what another died of."""
        for worker in self._workers:
            if worker.ready and self._parts:
                worker.give(self._parts.popleft())

    def _bury(self, worker: _Worker) -> None:
        """A worker is gone: its units go back, and another takes its place while restarts are left."""
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        self._workers.remove(worker)
        code = worker.process.wait()
        if worker.process.stdin is not None:
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
        if self._failure or stopping.told():
            return
        if worker.in_hand:
            self._parts.appendleft(worker.in_hand)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        log.warning(
            "worker %d died (%s) with %d units in hand, which are done again; its last words (%s):\n%s",
            worker.number,
            how,
            len(worker.in_hand),
            worker.log,
            worker.last_words(),
        )
        if self._restarts:
            self._restarts -= 1
            self._start(worker.number)
        elif not self._workers:
            raise DriverError(
                f"every worker died, the last one by {how}, and {RESTARTS} were started again; its last words "
                f"({worker.log}):\n{worker.last_words()}\nUnits that are done are kept; the same command goes on"
            )
        else:
            log.warning("%d workers go on without it", len(self._workers))


def command(plan: Path, number: str) -> list[str]:
    """What worker ``number`` is."""
    return [sys.executable, "-m", "distill", "work", str(plan), "--serve"]


def environment(number: int, *, threads: int, gpus: float | None) -> dict[str, str]:
    """For worker ``number``: its share of the threads, and of the GPUs that this process sees; ``gpus`` 0: none."""
    found = {**without_launcher(), "OMP_NUM_THREADS": str(threads)}
    if gpus == 0:
        return {**found, "CUDA_VISIBLE_DEVICES": ""}
    if visible := visible_gpus():
        each = 1.0 if gpus is None else gpus
        first = int(number * each)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(
            visible[(first + one) % len(visible)] for one in range(max(1, round(each)))
        )
    return found


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name.strip() for name in asked.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _signal(worker: _Worker, number: signal.Signals) -> None:
    if worker.process.poll() is None:
        worker.process.send_signal(number)
