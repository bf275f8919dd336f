"""Trains the cells of a comparison: each a ``distill`` command in a process of its own, so that one failure costs one.

A cell's command can be typed by hand as well: it works in the seed's run folder, and does nothing twice.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.durable import exclusively, write_atomically
from distill.pipeline import DONE, SHARED
from distill.timings import RSS_UNIT

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)
_REASON_LINES = 12


@dataclass(frozen=True)
class Job:
    """One cell: an arm of one seed, or what all arms of the seed share.

    Attributes:
        run: The seed's run folder, which holds the recipe.
        arm: Name of the arm; ``shared`` for the shared steps with the first round's candidates and scores.
        stage: ``train``, ``score`` or ``mine``: the command that does it.
    """

    run: Path
    arm: str
    stage: str

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.arm}/{self.run.name}"

    @property
    def record(self) -> Path:
        """Where its cost is noted."""
        return self.run / "cells" / f"{self.arm}.json"

    @property
    def log(self) -> Path:
        """What its process said."""
        return self.run / "cells" / f"{self.arm}.log"

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        if self.stage == "train" and not (self.run / "arms" / self.arm / "student" / DONE).is_file():
            return False
        return self.record.is_file() and Cost.load(self.record).finished

    def command(self) -> list[str]:
        """Arguments of ``distill``."""
        recipe = str(self.run / "recipe.yaml")
        if self.stage != "train":
            return [self.stage, recipe]
        return ["train", recipe, "--arm", self.arm, "--resume"]


@dataclass(frozen=True)
class Cost:
    """What a cell took, over all attempts.

    Attributes:
        seconds: Wall clock of its processes, start-up included.
        peak_bytes: Largest resident memory of one of them.
        attempts: Processes that were started.
        finished: The last one ended well.
        reason: Its last words where it did not.
        threads: CPU threads that the last one had.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    attempts: int = 0
    finished: bool = False
    reason: str = ""
    threads: int = 0

    @classmethod
    def load(cls, path: Path) -> Cost:
        """Read from a record; nothing spent where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def save(self, path: Path) -> None:
        """Write a record."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def run_cells(
    waves: Sequence[Sequence[Job]], *, jobs: int, program: Sequence[str] = (sys.executable, "-m", "distill")
) -> dict[str, Cost]:
    """Run the waves one after the other, the jobs of a wave ``jobs`` at a time; cost by label.

    What failed is noted and the others go on; in later waves, jobs of a run whose shared part failed are left out.
    ``program``: what a job's command is given to.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    crew, costs, broken = _Crew(program, threads), dict[str, Cost](), set[Path]()
    total = sum(len(wave) for wave in waves)
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool, crew:  # the crew ends first: else the pool would wait for its processes
        for wave in waves:
            todo = [job for job in wave if job.run not in broken]
            for job, cost in zip(todo, pool.map(crew.run, todo), strict=True):
                costs[job.label] = cost
                if not cost.finished and job.arm == SHARED:
                    broken.add(job.run)
            log.info("cells: %d of %d ended, %.0f s", len(costs), total, time.monotonic() - began)
    return costs


def forget(run: Path, arm: str) -> None:
    """Remove what an arm of a run has left, so that its cell is trained anew."""
    for path in (run / "arms" / arm, run / "evaluation" / arm):
        shutil.rmtree(path, ignore_errors=True)
    for ending in ("json", "log"):
        (run / "cells" / f"{arm}.{ending}").unlink(missing_ok=True)


class _Crew:
    """The processes at work; none of them outlives the ``with`` block."""

    def __init__(self, program: Sequence[str], threads: int) -> None:
        self._program, self._threads = program, threads
        self._lock, self._at_work, self._stopped = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            for process in self._at_work:
                process.terminate()

    def run(self, job: Job) -> Cost:
        """Run one job to its end, unless it is done."""
        busy = (
            f"{job.label}: another process is at work on it, perhaps of a command that was killed; waiting for its end"
        )
        with exclusively(job.record, notice=busy) as lock:
            if job.done:
                log.info("%s: done before", job.label)
                return Cost.load(job.record)
            return self._run(job, lock)

    def _run(self, job: Job, lock: int) -> Cost:
        before = Cost.load(job.record)
        began = time.monotonic()
        log.info("%s: begins; says the rest to %s", job.label, job.log)
        code, peak = self._wait(job, lock)
        seconds = time.monotonic() - began
        cost = Cost(
            before.seconds + seconds,
            max(before.peak_bytes, peak),
            before.attempts + 1,
            code == 0,
            "" if code == 0 else _last_words(job, code),
            self._threads,
        )
        cost.save(job.record)
        if code == 0:
            log.info("%s: done in %.0f s", job.label, seconds)
        else:
            log.warning("%s failed after %.0f s: %s", job.label, seconds, cost.reason.splitlines()[-1])
        return cost

    def _wait(self, job: Job, lock: int) -> tuple[int, int]:
        """Exit code (below 0: minus the signal) and peak resident bytes of the job's process, which holds the lock."""
        command = [*self._program, *job.command()]
        given = {"OMP_NUM_THREADS": str(self._threads)}  # what torch and its matrix library heed
        with job.log.open("ab") as said:
            said.write(f"$ {shlex.join(['distill', *job.command()])}\n".encode())
            said.flush()
            with self._lock:
                if self._stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(
                    command, stdout=said, stderr=said, env={**os.environ, **given}, pass_fds=[lock]
                )
                self._at_work.add(process)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, not by subprocess
            with self._lock:
                self._at_work.discard(process)
        return process.returncode, used.ru_maxrss * RSS_UNIT


def _last_words(job: Job, code: int) -> str:
    with job.log.open(encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in deque(file, _REASON_LINES)]
    errors = [place for place, line in enumerate(lines) if line.startswith(("error:", "Traceback"))]
    said = "\n".join(lines[errors[-1] :] if errors else lines[-3:]).removeprefix("error: ")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said or 'it said nothing'}\n({how}; log: {job.log})"
