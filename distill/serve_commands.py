"""``distill serve student DIR`` and ``distill serve teacher RECIPE``: what answers over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.experiment import Experiment
    from distill.export.layout import Precision
    from distill.serving.opening import Beside
    from distill.teacher_service.engine import EngineSettings
    from distill.teacher_service.on_ray import OnRay


class Precise(StrEnum):
    """``distill.export.layout.Precision`` as choices."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="what distill export wrote")]
Teacher = Annotated[
    str, typer.Option("--teacher", metavar="RECIPE", help="re-rank with the teacher of a recipe, or of a run's folder")
]
Data = Annotated[
    str, typer.Option("--data", metavar="RECIPE", help="show the pictures of a recipe's data, or of a run's folder")
]
Pictures = Annotated[Path | None, typer.Option("--pictures", metavar="FOLDER", help="show the pictures of a folder")]
Host = Annotated[str, typer.Option("--host", help="address to listen on; others than this machine need a token")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")]
Towers = Annotated[Precise, typer.Option("--precision", help="of the student's towers")]
Rerank = Annotated[int, typer.Option("--rerank", min=1, max=256, help="hits that the teacher reads")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="file with the token to ask for; or set DISTILL_TOKEN")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value of the recipes, e.g. --set device=cpu")
]


Served = Annotated[str, typer.Argument(metavar="RECIPE", help="of the teacher, or the folder of a run that taught one")]
ImageMemory = Annotated[float, typer.Option("--image-memory", min=0, help="GiB of encoded pictures that are kept")]
WaitingPairs = Annotated[int, typer.Option("--waiting-pairs", min=1, help="pairs that may wait; more are answered 429")]
Replicas = Annotated[
    int, typer.Option("--replicas", min=0, help="by Ray Serve, each with a teacher in memory; 0: in this process")
]
Gpus = Annotated[float, typer.Option("--gpus-per-replica", min=0, help="may be part of one")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="of each replica; this machine's shared out, on a cluster 1, when absent"),
]
RayAddress = Annotated[str, typer.Option("--address", help="of a Ray cluster; one on this machine when absent")]
Grace = Annotated[int, typer.Option("--grace", min=0, help="seconds for what waits when it is told to end")]


def serve_app(open_experiment: Callable[[str, list[str]], Experiment]) -> typer.Typer:
    """The command group; ``open_experiment`` makes the experiment of a recipe and its overrides."""
    app = typer.Typer(no_args_is_help=True)

    @app.callback()
    def group() -> None:
        """Answer requests over HTTP."""

    @app.command()
    def student(
        folder: Folder,
        teacher: Teacher = "",
        data: Data = "",
        pictures: Pictures = None,
        host: Host = "127.0.0.1",
        port: Port = 8000,
        precision: Towers = Precise.fp32,
        rerank: Rerank = 32,
        token_file: TokenFile = None,
        overrides: Overrides = [],  # noqa: B006  (typer copies it)
    ) -> None:
        """An exported student: search page at /, POST /search and /embed, GET /health, /info and /metrics."""
        from distill.serving.opening import Beside, check_installed

        check_installed()
        opened = {name: _opened(open_experiment, name, overrides) for name in {teacher, data} - {""}}
        beside = Beside(opened.get(teacher), opened.get(data), pictures, rerank)
        serve_student(folder, beside, precision=precision.value, host=host, port=port, token_file=token_file)

    @app.command()
    def teacher(
        recipe: Served,
        host: Host = "127.0.0.1",
        port: Port = 8000,
        token_file: TokenFile = None,
        image_memory: ImageMemory = 1.0,
        waiting_pairs: WaitingPairs = 32_768,
        grace: Grace = 60,
        replicas: Replicas = 0,
        threads: Threads = None,
        gpus: Gpus = 0.0,
        ray_address: RayAddress = "",
        overrides: Overrides = [],  # noqa: B006  (typer copies it)
    ) -> None:
        """A recipe's teacher for many clients: POST /score and /embed, GET /info, /health and /metrics."""
        from distill.serving.opening import check_installed
        from distill.teacher_service import NEEDED
        from distill.teacher_service.engine import EngineSettings

        ignored = {"--threads": threads, "--gpus-per-replica": gpus, "--address": ray_address}
        if not replicas and any(ignored.values()):
            raise typer.BadParameter(
                "goes with --replicas; without replicas OMP_NUM_THREADS sets the number of threads",
                param_hint=", ".join(name for name, given in ignored.items() if given),
            )
        check_installed(NEEDED)
        settings = EngineSettings(image_memory_bytes=int(image_memory * 2**30), waiting_pairs=waiting_pairs)
        if replicas:
            from distill.drivers.on_ray import threads_each
            from distill.teacher_service.on_ray import OnRay

            threads = threads or threads_each(replicas, ray_address)
            placed = OnRay(replicas, threads=threads, gpus=gpus, address=ray_address)
            opened = partial(_opened, open_experiment, recipe, overrides)
            serve_replicas(opened, placed, settings, host=host, port=port, token_file=token_file, grace_s=grace)
            return
        x = _opened(open_experiment, recipe, overrides)
        serve_teacher(x, settings, host=host, port=port, token_file=token_file, grace_s=grace)

    return app


def serve_teacher(
    x: Experiment, settings: EngineSettings, *, host: str, port: int, token_file: Path | None, grace_s: int
) -> None:
    """Load the teacher, then answer until told to end; then answer what waits and keep its scores.

    Raises:
        ServingError: something does not fit together, or the address cannot be had.
    """
    from distill.serving.server import address_of, allowed_hosts, bound_socket, read_token, serve
    from distill.teacher_service.app import build_app
    from distill.teacher_service.opening import open_engine
    from distill.wire import Limits

    token, limits = read_token(token_file), Limits()
    with bound_socket(host, port, token=token is not None) as bound:
        engine, info = open_engine(x, settings, limits, say=partial(typer.echo, err=True))
        hosts = allowed_hosts(host, token=token is not None)
        typer.echo(f"serving the teacher of {x.recipe.name} at {address_of(bound, host)} (Ctrl+C ends it)")
        serve(build_app(engine, info, limits=limits, token=token, hosts=hosts), bound, grace_s=grace_s)
    typer.echo(f"ended: {engine.counts.asked} pairs asked, {engine.counts.served} known", err=True)


def serve_replicas(
    opened: Callable[[], Experiment],
    placed: OnRay,
    settings: EngineSettings,
    *,
    host: str,
    port: int,
    token_file: Path | None,
    grace_s: int,
) -> None:
    """The same by Ray Serve, until told to end.

    Raises:
        ServingError: the teacher cannot be served, or the address cannot be had.
        MissingRayError: Ray is not installed.
    """
    import threading

    from distill.serving.server import address_of, allowed_hosts, bound_socket, read_token
    from distill.stopping import heard_by
    from distill.teacher_service.on_ray import Front, replicas, serve_module
    from distill.teacher_service.opening import check_served
    from distill.wire import Limits

    serve_module(placed.address)
    check_served(opened())
    token, told = read_token(token_file), threading.Event()
    with bound_socket(host, port, token=token is not None) as bound:  # Ray's proxies bind it themselves
        address, port = address_of(bound, host), bound.getsockname()[1]
    front = Front(host, port, token, allowed_hosts(host, token=token is not None), grace_s)
    # a signal ends the loading where it stands; later it is waited for
    with replicas(opened, placed, settings, Limits(), front), heard_by(lambda *_: told.set()):
        typer.echo(f"serving the teacher at {address} with {placed.replicas} replicas (Ctrl+C ends it)")
        told.wait()
    typer.echo("ended", err=True)


def serve_student(
    folder: Path, beside: Beside, *, precision: Precision, host: str, port: int, token_file: Path | None
) -> None:
    """Load everything, then answer until told to end.

    Raises:
        ServingError: something does not fit together, or the address cannot be had.
    """
    from distill.serving.app import build_app
    from distill.serving.opening import open_engine
    from distill.serving.server import address_of, allowed_hosts, bound_socket, read_token, serve

    token = read_token(token_file)
    with bound_socket(host, port, token=token is not None) as bound:
        engine = open_engine(folder, beside, precision=precision, say=partial(typer.echo, err=True))
        hosts = allowed_hosts(host, token=token is not None)
        typer.echo(f"serving {folder} at {address_of(bound, host)} (Ctrl+C ends it)")
        serve(build_app(engine, token=token, hosts=hosts), bound)
    typer.echo("ended", err=True)


def _opened(open_experiment: Callable[[str, list[str]], Experiment], name: str, overrides: list[str]) -> Experiment:
    """The experiment of a recipe, or of a run's folder, whose recipe is in it."""
    from distill.recipe.load import here

    run = Path(name)
    if run.is_dir() and not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{run} has no recipe.yaml, which a run leaves in its folder: give the recipe itself")
    if not run.is_dir():
        return open_experiment(name, ["train.trackers=[]", *overrides])
    return open_experiment(str(run / "recipe.yaml"), [*here(run), *overrides])
