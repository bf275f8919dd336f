"""Ray Data: actors on the machines of a Ray cluster, as many as the work and the cluster bear.

Numbers of units travel, never pictures or scores: an actor opens plan and models itself, once, and writes the units'
files to a file system that all machines share, under the same paths. A unit's file is the checkpoint: an actor that is
killed is started again, and what it had in hand is done again.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import uuid
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import stopping
from distill.cores import cores
from distill.drivers.claims import done_by
from distill.drivers.driver import DriverError, DriverName, Task
from distill.drivers.worker import open_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
TRIES = 4  # of a few units by as many actors: machines are taken away, but a fault that kills comes again
NICENESS = "RAY_worker_niceness"  # Ray's own spelling
_OBJECT_STORE = 80 << 20  # bytes of a local cluster; numbers are all that travels


_MENDABLE = (ValueError, OSError, ImportError, ArithmeticError, DriverError)


class MissingRayError(ImportError):
    """Ray is not installed."""


class UnitActor:
    """What Ray starts: a plan's job, kept between calls."""

    def __init__(self, plan: str, tries: str) -> None:
        """``tries``: folder of this call's notes of what was begun."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        self._tries, self._failure = Path(tries), ""
        try:
            self._job = open_job(Path(plan))
        except _MENDABLE as error:
            self._failure = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``units``: lists of numbers. Gives the numbers that are done, and beside a -1 what the user has to mend.

        As data, for Ray wraps an error into so many others that what it says is lost.
        """
        numbers, found = [int(number) for some in batch["units"] for number in some], list[int]()
        if not self._failure:
            try:
                with _tried(self._tries, numbers):
                    found.extend(number for number, _, _ in done_by(self._job, numbers))
            except _MENDABLE as error:
                self._failure = str(error)
        if self._failure:
            return {"unit": np.asarray([*found, -1], np.int64), "failed": [*("" for _ in found), self._failure]}
        return {"unit": np.asarray(found, np.int64), "failed": ["" for _ in found]}


class RayDriver:
    """From ``least`` to ``most`` actors, each with ``threads`` cores and ``gpus`` GPUs, which may be part of one."""

    name: DriverName = "ray"

    def __init__(
        self, least: int, most: int, *, threads: int | None = None, gpus: float | None = None, address: str = ""
    ) -> None:
        """``address`` of a cluster; empty: one on this machine, for the time of the work. Raises MissingRayError."""
        self.least, self.most, self.gpus, self.address = least, most, gpus or 0.0, address
        self.threads = threads or threads_each(most, address)
        if not address:
            settle_own_cluster()
        self._ray = ray_module()

    def run(self, task: Task, done: Callable[[int], object]) -> None:
        """Until every unit is there.

        Raises:
            DriverError: an actor says why the work cannot go on, or died too often.
        """
        with cluster(self._ray, self.address):  # a signal drops what is in hand: Ray may be waiting for a machine
            check_room(self._ray, self.least, "workers", threads=self.threads, gpus=self.gpus, address=self.address)
            try:
                for number in self._numbers(task):
                    done(number)
            except self._ray.exceptions.RayError as error:
                raise DriverError(f"Ray: {error}\nUnits that are done are kept; the same command goes on") from error

    def _numbers(self, task: Task) -> Iterator[int]:
        """Numbers of units as they are done. Ray starts an actor again however often it dies."""
        folder = task.plan.folder
        tries = folder.with_name(f"logs-{folder.name}") / f"tries-{uuid.uuid4().hex}"
        data = importlib.import_module("ray.data")
        parts = task.parts(self.most)
        least, most = min(self.least, len(parts)), min(self.most, len(parts))
        with _quiet(data):
            rows = data.from_items([{"units": part} for part in parts], override_num_blocks=len(parts))
            found = rows.map_batches(
                UnitActor,
                fn_constructor_args=(str(folder), str(tries)),
                batch_size=1,  # one go of units
                compute=data.ActorPoolStrategy(min_size=least, max_size=most),
                num_cpus=self.threads,
                num_gpus=self.gpus or None,
                runtime_env={"env_vars": environment(self.threads)},
            )
            for batch in found.iter_batches(batch_size=None, prefetch_batches=0):
                for number, failed in zip(batch["unit"], batch["failed"], strict=True):
                    if number < 0:
                        raise DriverError(f"{failed}\nUnits that are done are kept; the same command goes on")
                    yield int(number)


def threads_each(count: int, address: str) -> int:
    """Cores of each of ``count`` where nobody says: a share of this machine's, on a cluster 1."""
    return 1 if address else max(1, cores() // count)


def check_room(ray: Any, count: int, what: str, *, threads: int, gpus: float, address: str) -> None:
    """Ray waits without end for what a cluster does not have: one of this machine, which cannot grow, is refused.

    Raises:
        DriverError: ``count`` of ``what`` with so many cores and GPUs each do not fit.
    """
    there = ray.cluster_resources()
    for name, each in (("CPU", float(threads)), ("GPU", gpus)):
        have = float(there.get(name, 0.0))
        if each * count > have:
            said = f"{count} {what} with {each:g} {name} each do not fit the Ray cluster, which has {have:g}"
            if not address:
                raise DriverError(f"{said}: take fewer {what}, or less for each")
            log.warning("%s as it is now: they wait for it to grow", said)


@contextmanager
def _tried(folder: Path, numbers: list[int]) -> Iterator[None]:
    """Note that these units are begun, and forget it when they are done; a process that is killed leaves its note.

    Raises:
        DriverError: they were begun too often in vain.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(TRIES):
        note = folder / f"from-{numbers[0]}-{number}"
        with suppress(FileExistsError):
            note.touch(exist_ok=False)
            break
    else:
        raise DriverError(
            f"{TRIES} actors in turn died of units {numbers[0]} to {numbers[-1]}: is their memory too small? What they "
            "said is in Ray's logs"
        )
    yield
    for note in folder.glob(f"from-{numbers[0]}-*"):
        note.unlink(missing_ok=True)


def ray_module() -> Any:
    """Ray, if it is installed; raises MissingRayError with the command that installs it."""
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingRayError(
            f"--driver ray needs Ray, which cannot be imported ({error}): pip install 'cross2dual[ray]', or take "
            "--driver local"
        ) from error


def environment(threads: int) -> dict[str, str]:
    """Of the actors: where this package and a recipe's own modules are found, as they are here."""
    own = Path(__file__).resolve().parents[2]
    paths = [os.getcwd(), str(own), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def settle_own_cluster() -> None:
    """How a cluster that this process starts is to be. Before Ray is imported: it looks at its environment only then.

    Later, this process would know of no token, and the cluster that it starts would ask it for one.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports listen on every interface
    os.environ.setdefault(NICENESS, "0")  # as the local driver's workers; Ray's 15 starves beside others


@contextmanager
def cluster(ray: Any, address: str) -> Iterator[None]:
    """Connected to a cluster in here: the one of this process where there is one, that of the address, or a new one."""
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    about: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address:
        about["address"] = address
    else:
        if "RAY_AUTH_MODE" not in os.environ:
            raise DriverError(
                "Ray was imported before it could be told that its cluster is to ask for a token: set "
                "RAY_AUTH_MODE=token in the environment of this command"
            )
        # "local", or Ray would join whatever cluster somebody has started on this machine
        about |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(**about)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DriverError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(data: Any) -> Iterator[None]:
    """No progress bars and notices of Ray Data beside our own."""
    loud = logging.getLogger("ray.data")
    level = loud.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its context reads its own deprecated settings
        context = data.DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    loud.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        loud.setLevel(level)
