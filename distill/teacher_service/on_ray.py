"""The same service on several nodes: each replica of a Ray Serve deployment is the whole of it, teacher included.

Ray starts replicas, restarts those that die and spreads requests over them. What a replica answers, and how much it
lets wait, is the service's own. Replicas share the score store, which any number of processes may write.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.drivers.driver import DriverError
from distill.drivers.on_ray import MissingRayError, check_room, cluster, environment, settle_own_cluster
from distill.serving.opening import ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from distill.experiment import Experiment
    from distill.teacher_service.engine import EngineSettings
    from distill.wire import Limits

_ONGOING = 256  # requests that a replica takes; its own queue says what is too much
_NAME = "cross2dual-teacher"


@dataclass(frozen=True)
class OnRay:
    """How replicas are placed.

    replicas: how many, each with a teacher in memory.
    threads: of each replica.
    gpus: of each replica; parts of one are allowed.
    address: of a Ray cluster; empty: one on this machine, which ends with the command.
    """

    replicas: int
    threads: int = 1
    gpus: float = 0.0
    address: str = ""


@dataclass(frozen=True)
class Front:
    """What a client has to do with: see ``distill.serving.server``."""

    host: str
    port: int
    token: str | None
    hosts: Sequence[str]
    grace_s: int


def serve_module(address: str) -> Any:
    """Ray Serve, if it is installed; raises MissingRayError with the command that installs it."""
    if not address:
        settle_own_cluster()
    try:
        return importlib.import_module("ray.serve")
    except ImportError as error:
        raise MissingRayError(
            f"--replicas needs Ray Serve, which cannot be imported ({error}): pip install 'cross2dual[ray]', or leave "
            "--replicas out"
        ) from error


class Replica:
    """What Ray asks a replica beside requests."""

    app: Any  # that Ray keeps

    def check_health(self) -> None:
        """Raises RuntimeError where nothing is answered any more, so that Ray puts another replica in its place."""
        if not self.app.state.engine.alive:
            raise RuntimeError("the engine has ended; the replica's log says why")


@contextmanager
def replicas(
    open_experiment: Callable[[], Experiment],
    placed: OnRay,
    settings: EngineSettings,
    limits: Limits,
    front: Front,
) -> Iterator[None]:
    """All replicas are ready in here, and end afterwards.

    Args:
        open_experiment: of the recipe; called in each replica, where its files must be too.
        placed: how many replicas, and where.
        settings: of each replica's engine.
        limits: of a request.
        front: where they are asked, and by whom.

    Raises:
        ServingError: replicas do not fit or cannot be started, or Serve is in use on that cluster.
        MissingRayError: Ray Serve is not installed.
    """
    serve = serve_module(placed.address)

    def app() -> Any:
        return replica_app(open_experiment(), settings, limits, front)

    actor = {"num_cpus": placed.threads, "num_gpus": placed.gpus or None}
    ray = importlib.import_module("ray")
    with cluster(ray, placed.address):
        _check_room(ray, placed)
        if placed.address:
            _check_unused(serve.status(), placed.address)
        try:
            serve.start(
                proxy_location="EveryNode" if placed.address else "HeadOnly",
                http_options={"host": front.host, "port": front.port},
            )
            deployment = serve.deployment(
                name="teacher",
                num_replicas=placed.replicas,
                max_ongoing_requests=_ONGOING,
                max_queued_requests=_ONGOING,  # in each proxy; without it as many as come
                graceful_shutdown_timeout_s=front.grace_s,
                ray_actor_options={**actor, "runtime_env": {"env_vars": environment(placed.threads)}},
            )(serve.ingress(app)(Replica))
            try:
                serve.run(deployment.bind(), name=_NAME, route_prefix="/")
            except RuntimeError as error:
                raise ServingError(f"a replica of the teacher could not be started: {error}") from error
            yield
        finally:
            serve.shutdown()


def _check_room(ray: Any, placed: OnRay) -> None:
    try:
        check_room(ray, placed.replicas, "replicas", threads=placed.threads, gpus=placed.gpus, address=placed.address)
    except DriverError as error:
        raise ServingError(str(error)) from None


def _check_unused(status: Any, address: str) -> None:
    """Refuse a cluster where Serve runs: it keeps its own address, and ending this service would end all others."""
    if status.applications or status.proxies:
        names = ", ".join(status.applications) or "none yet"
        raise ServingError(
            f"Ray Serve runs on the cluster {address} already (applications: {names}): end it with serve shutdown, or "
            "give another cluster; distill serve teacher --replicas has Serve for itself while it runs"
        )


def replica_app(x: Experiment, settings: EngineSettings, limits: Limits, front: Front) -> Any:
    """One replica's service, its teacher loaded."""
    from distill.teacher_service.app import build_app
    from distill.teacher_service.opening import open_engine

    engine, info = open_engine(x, settings, limits, say=print)
    return build_app(engine, info, limits=limits, token=front.token, hosts=front.hosts)
