"""``distill serve student DIR``: an exported student behind HTTP, with a page to search by."""

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

    return app


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
    if not (run / "recipe.yaml").is_file():
        return open_experiment(name, ["train.trackers=[]", *overrides])
    return open_experiment(str(run / "recipe.yaml"), [*here(run), *overrides])
