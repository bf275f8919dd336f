"""The command line. Heavy libraries are imported inside the commands, so that help is quick."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from distill import (
    bench_commands,
    compact_commands,
    compare_commands,
    doctor_commands,
    driver_commands,
    export_commands,
    plan_commands,
    serve_commands,
    shard_commands,
    stopping,
    store_commands,
)
from distill.progress import is_main_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.experiment import Experiment
    from distill.recipe.experiment import Recipe
    from distill.timings import Timings

# What gloo and NCCL say in a process when another one has ended.
_LOST = re.compile(r"gloo.*(closed by peer|reset by peer|Broken pipe|timed out)|ncclRemoteError", re.IGNORECASE)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a fast dual-encoder retriever from a slow image-text cross-encoder.",
)
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value, e.g. --set train.lr=1e-4")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")]
Profile = Annotated[
    str,
    typer.Option(
        "--profile", metavar="START:COUNT", help="trace COUNT steps of every training, after its first START here"
    ),
]


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Resume = False,
    profile: Profile = "",
) -> None:
    """The whole job: teach if need be, mine, score, train every arm, evaluate, compare."""
    from distill.results import finish

    x = _begin(recipe, overrides, resume=resume, profile=profile)
    with _timed(x):
        finish(x)


@app.command()
def teach(recipe: RecipeName, overrides: Overrides = [], profile: Profile = "") -> None:  # noqa: B006
    """Train or fine-tune the teacher, and evaluate it by re-ranking its own shortlist on val."""
    from distill.pipeline import taught_teacher
    from distill.results import report_teacher

    x = _open(recipe, overrides, profile=profile)
    if x.recipe.teach is None:
        raise typer.BadParameter(f"{recipe} has no teach: section, so there is nothing to teach")
    with _timed(x):
        folder = taught_teacher(x)
        report_teacher(x, split="val" if "val" in x.corpus.splits else x.recipe.evaluate.split)
        typer.echo(f"teacher: {folder}")


@app.command()
def data(recipe: RecipeName, overrides: Overrides = []) -> None:  # noqa: B006
    """What the recipe's data holds: counts, splits, duplicates, unreadable files."""
    from distill.data.summary import describe

    typer.echo(describe(_open(recipe, overrides).corpus).render())


@app.command()
def mine(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006
    ahead: Annotated[str, typer.Option("--ahead", metavar="ARM:ROUND", hidden=True)] = "",
) -> None:
    """The shared steps, then the first round's hard candidates."""
    from distill.pipeline import first_candidates, mine_ahead

    if ahead:  # started by a training, beside which it works
        arm, _, number = ahead.rpartition(":")
        mine_ahead(_open(recipe, overrides), arm, int(number))
        return
    x = _begin(recipe, overrides, resume=True, arms=[])
    with _timed(x):
        for direction, found in first_candidates(x).items():
            there = int((found.item_ids >= 0).sum())
            typer.echo(f"{direction}: {there} candidates for {len(found.query_ids)} queries")


@app.command()
def train(
    recipe: RecipeName,
    arm: Annotated[str, typer.Option("--arm", help="which of the recipe's arms; all when absent")] = "",
    overrides: Overrides = [],  # noqa: B006
    resume: Resume = False,
    profile: Profile = "",
) -> None:
    """Train one arm or all, with what has to come before."""
    from distill.pipeline import trained_arm

    x = _begin(recipe, overrides, resume=resume, arms=[arm] if arm else None, profile=profile)
    if arm and arm not in x.recipe.arms:
        raise typer.BadParameter(f"no arm {arm!r}; the recipe has {', '.join(x.recipe.arms)}", param_hint="--arm")
    with _timed(x):
        for name in [arm] if arm else list(x.recipe.arms):
            typer.echo(f"{name}: {trained_arm(x, name)}")


@app.command()
def evaluate(recipe: RecipeName, overrides: Overrides = []) -> None:  # noqa: B006
    """Evaluate the run's trained students and the teacher; writes the summary and the pictures."""
    from distill.results import finish

    x = _begin(recipe, overrides, resume=True, arms=[])
    missing = [name for name in x.recipe.arms if not (x.folder / "arms" / name / "student").is_dir()]
    if missing:
        raise typer.BadParameter(
            f"{x.folder} lacks a trained student for {', '.join(missing)}: distill train {recipe} first"
        )
    with _timed(x):
        finish(x)


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="a run's folder, e.g. runs/quickstart")],
    query: Annotated[str, typer.Argument(help="a sentence, or the path of a picture")],
    arm: Annotated[str, typer.Option("--arm", help="whose student answers; the last arm when absent")] = "",
    top: Annotated[int, typer.Option("--top", "-k", min=1, max=100, help="how many results")] = 10,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write; in the run's folder when absent")] = None,
) -> None:
    """Search the run's test items with a student, and write a contact sheet."""
    from distill.preflight import check_data
    from distill.show import search as find

    x = _open(str(_recipe_of(run)), [])
    check_data(x)
    lines, sheet = find(x, query, arm=arm, top=top, out=out)
    typer.echo("\n".join(lines))
    typer.echo(f"picture: {sheet}")


@app.command("false-negatives")
def false_negatives(
    run: Annotated[Path, typer.Argument(help="a run's folder, e.g. runs/quickstart")],
    margin: Annotated[float | None, typer.Option("--margin", help="instead of the recipe's")] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=2000, help="most entries on the page")] = 100,
) -> None:
    """The run's candidates that the teacher puts above the labelled match: a table, and a page to review them."""
    from distill.false_negatives_review import review

    x = _open_run(run)
    lines, folder = review(x, margin=margin, top=top)
    typer.echo("\n".join(lines))
    typer.echo(f"page: {folder / 'index.html'}, pairs: {folder / 'pairs.csv'}")


@app.command()
def recipes() -> None:
    """The shipped recipes, with the comment each opens with."""
    from distill.recipe.load import shipped_recipes

    for name, path in shipped_recipes().items():
        head = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        typer.echo(f"{name}\n" + "".join(f"    {line}\n" for line in head[:6]))


@app.command()
def schema() -> None:
    """JSON Schema of a recipe, for editors."""
    from distill.recipe.experiment import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def main() -> None:
    """Entry point. What the user can mend is one message and exit code 2; DISTILL_TRACEBACK=1 shows more.

    Stopped by SIGTERM or SIGINT, what is done is kept and the exit code is 143 or 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not is_main_process():  # of several: one log
        logging.getLogger().setLevel(logging.ERROR)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)
    for noisy in ("httpx", "faiss", "datasets", "accelerate", "PIL", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with stopping.listening():
            app()
    except SystemExit as ended:
        if isinstance(ended.code, str):  # words for people; Python prints them and gives 1
            raise
        _end(ended.code or 0)
    except stopping.Stopped as stopped:
        typer.echo(
            f"{stopped}; what is done is kept: the same command goes on (run and train: with --resume)", err=True
        )
        _end(stopped.exit_code)
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        typer.echo(_said(error), err=True)
        _end(2)


def _said(error: Exception) -> str:
    """An error for people; of several processes, which one says it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return f"error: {error}"
    who = f"error in process {os.environ.get('RANK', '0')} of {count}"
    if _LOST.search(str(error)):
        return f"{who}: it lost another one, whose own message says why"
    return f"{who}: {error}"


def _end(code: int) -> NoReturn:
    """Leave; of several processes that joined, without waiting for others that may wait for this one."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            if code:  # the others are in the midst of something: the launcher ends them once this one is gone
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            distributed.destroy_process_group()
    raise SystemExit(code) from None


def _open(name: str, overrides: list[str], *, profile: str = "") -> Experiment:
    """The experiment of a recipe, nothing made yet."""
    from distill.quiet import quieten_libraries
    from distill.recipe.load import load_recipe
    from distill.timings import Timings

    timings = Timings()
    with timings.stage("start"):
        quieten_libraries()
        x = _experiment(load_recipe(name, overrides), timings)
        if profile:
            from distill.profiling import Profiler, Window

            x.profiler = Profiler(Window.parse(profile))
    return x


def _experiment(recipe: Recipe, timings: Timings | None = None) -> Experiment:
    from distill.experiment import Experiment
    from distill.pipeline import taught_teacher
    from distill.recipe.build import builders

    return Experiment(recipe, builders(recipe), taught=taught_teacher, timings=timings)


def _recipe_of(run: Path) -> Path:
    found = run / "recipe.yaml"
    if not found.is_file():
        raise FileNotFoundError(f"{run} is not a run's folder: it has no recipe.yaml; give one such as runs/quickstart")
    return found


def _open_run(run: Path) -> Experiment:
    """The experiment of a run's folder, wherever that lies now; refused beside other data than it was begun with."""
    from distill.preflight import check_data
    from distill.recipe.load import here

    x = _open(str(_recipe_of(run)), here(run))
    check_data(x)
    return x


def _begin(
    name: str, overrides: list[str], *, resume: bool, arms: list[str] | None = None, profile: str = ""
) -> Experiment:
    """The experiment of a recipe, checked as far as can be before any work, with its run folder claimed.

    ``arms``: that may be trained; None = all.
    """
    from distill.preflight import check, claim
    from distill.room import check_folders, check_room

    x = _open(name, overrides, profile=profile)
    check_folders(x)
    x.corpus  # noqa: B018  (read before the check that reads it, so that each has its own time)
    with x.timings.stage("check"):
        check(x)
        check_room(x, arms=arms)
    x.ranks.work_alone(lambda: claim(x, resume=resume))
    return x


@contextmanager
def _timed(x: Experiment) -> Iterator[None]:
    """Work on an experiment: where its time goes is kept in the run's folder, and shown at the end."""
    from distill.tracking import trackers_of

    facts = {"name": x.recipe.name, "seed": x.recipe.seed}
    with (
        x.timings.kept_in(x.folder) if x.ranks.first else nullcontext(),
        trackers_of(x.accelerator, x.folder, config=facts),
    ):
        yield
    if x.profiler is not None and x.profiler.window is not None and not x.profiler.trainings and x.ranks.first:
        typer.echo(f"--profile {x.profiler.window}: nothing was left to train, so nothing is recorded", err=True)
    if x.ranks.first:
        from distill.report.time_table import show_time

        show_time(x.folder, name=x.recipe.name)


_driving = driver_commands.Opening(_begin, _open, _timed)
app.command(name="score")(driver_commands.score_command(_driving))
app.command(name="embed")(driver_commands.embed_command(_driving))
app.command(name="work")(driver_commands.work)
app.command(name="compare")(compare_commands.compare_command(compare_commands.Opening(_open, _experiment)))
app.command(name="compact")(compact_commands.compact_command(_open_run))
app.command(name="export")(export_commands.export_command(_open_run))
app.command(name="plan")(plan_commands.plan_command(_open))
app.command(name="bench")(bench_commands.bench_command(_open_run))
app.add_typer(doctor_commands.doctor_app(_open), name="doctor", help="What is installed; a closer look at a teacher.")
app.add_typer(store_commands.app, name="store")
app.add_typer(shard_commands.app, name="shards")
app.add_typer(
    serve_commands.serve_app(_open),
    name="serve",
    help="An exported student with a search page, or a teacher, over HTTP.",
)


if __name__ == "__main__":
    main()
