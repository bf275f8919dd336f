"""``distill compare RECIPE``: several losses over several seeds, on the same candidates, with statistics and a page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.compare import Comparison
    from distill.comparing import Plan
    from distill.experiment import Experiment
    from distill.recipe.experiment import ArmRecipe, Recipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value, e.g. --set train.steps=400")
]
Losses = Annotated[
    list[str],
    typer.Option(
        "--loss",
        metavar="LOSS",
        help="an arm of the recipe, or [LABEL=]NAME[:KEY=VALUE,...][+NAME...]; all arms of the recipe when absent",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="how many, from the recipe's seed upward")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="cells trained at a time, each with its share of the cores")]
Out = Annotated[Path | None, typer.Option("--out", help="folder; runs/NAME-compare when absent")]
Redo = Annotated[
    list[str], typer.Option("--redo", metavar="ARM[/SEED]", help="train these cells anew, whatever they left behind")
]
GapQueries = Annotated[
    int, typer.Option("--gap-queries", min=1, help="queries a direction that the teacher re-ranks for the gap report")
]


@dataclass(frozen=True)
class Opening:
    """How an experiment is made: of a recipe's name and overrides, or of a recipe."""

    by_name: Callable[[str, list[str]], Experiment]
    of: Callable[[Recipe], Experiment]


def compare_command(opening: Opening) -> Callable[..., None]:
    """The command; ``opening`` makes experiments."""

    def compare(
        recipe: RecipeName,
        losses: Losses = [],  # noqa: B006  (typer copies it)
        seeds: Seeds = 3,
        jobs: Jobs = 1,
        out: Out = None,
        overrides: Overrides = [],  # noqa: B006
        redo: Redo = [],  # noqa: B006
        gap_queries: GapQueries = 200,
    ) -> None:
        """Losses over seeds, alike in all else, with statistics; ends with a page, Markdown and JSON.

        What is finished is not done again: after a kill, a failure or with another --loss, the same command goes on.
        """
        from distill.cells import run_cells
        from distill.comparing import gather
        from distill.report.time_table import show_time

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("compare starts its own processes: run it without a launcher, and say how many by --jobs")
        command = _command(recipe, losses=losses, seeds=seeds, overrides=overrides, out=out)
        x = opening.by_name(recipe, overrides)
        plan = replace(_plan(opening, x, losses, seeds=seeds, out=out), command=command, gap_queries=gap_queries)
        _forget(plan, redo)
        timings, folder = x.timings, plan.first.folder.parent
        with timings.kept_in(folder):
            with timings.stage("cells"):
                run_cells(plan.waves(), jobs=jobs)
            with timings.stage("evaluate"):
                found = gather(plan)
            with timings.stage("report"):
                _report(found, folder)
        show_time(folder, name=folder.name)
        raise typer.Exit(1 if found.failed else 0)

    return compare


def _plan(opening: Opening, base: Experiment, losses: list[str], *, seeds: int, out: Path | None) -> Plan:
    """Everything checked and every run folder claimed; the teacher is taught first where it has to be."""
    from distill.comparing import Plan
    from distill.pipeline import taught_teacher
    from distill.preflight import check, claim
    from distill.recipe.comparison import comparison_recipe, describe, seed_recipe
    from distill.room import check_folders, check_room

    recipe, plain = comparison_recipe(base.recipe, losses)
    folder = out or recipe.runs / f"{recipe.name}-compare"
    x = opening.of(recipe)
    check_folders(x)
    x.timings = base.timings  # one clock for the whole command
    with x.timings.stage("check"):
        check(x)
    teacher = taught_teacher(x) if recipe.teach is not None else None
    runs = {}
    for seed in range(recipe.seed, recipe.seed + seeds):
        own = seed_recipe(recipe, seed, folder=folder, teacher=teacher)
        runs[seed] = opening.of(own.model_copy(update={"arms": _earlier_arms(own.folder) | own.arms}))
        runs[seed].timings = base.timings
        runs[seed].corpus = x.corpus  # the same in all
    check_room(*runs.values())
    for run in runs.values():
        claim(run, resume=True)
    return Plan(runs, {name: describe(arm) for name, arm in recipe.arms.items()}, plain)


def _earlier_arms(run: Path) -> dict[str, ArmRecipe]:
    """Arms of an earlier comparison in the same folder: they stay there, whether they are asked for now or not."""
    from distill.recipe.load import load_recipe

    path = run / "recipe.yaml"
    return dict(load_recipe(str(path)).arms) if path.is_file() else {}


def _forget(plan: Plan, redo: list[str]) -> None:
    from distill.cells import forget

    for given in redo:
        arm, _, number = given.partition("/")
        seeds = [seed for seed in plan.runs if number in ("", str(seed))]
        if arm not in plan.arms or not seeds:
            raise typer.BadParameter(
                f"{given!r} is no cell; arms: {', '.join(plan.arms)}; seeds: {', '.join(map(str, plan.runs))}",
                param_hint="--redo",
            )
        for seed in seeds:
            forget(plan.runs[seed].folder, arm)


def _report(found: Comparison, folder: Path) -> None:
    from distill.analysis import analyse
    from distill.report.compare_page import show, write_report

    analysis = analyse(found)
    write_report(found, analysis, folder)
    show(found, analysis)
    typer.echo(f"page: {folder / 'compare.html'}, Markdown and JSON beside it")
    for cell in found.failed:
        typer.echo(f"failed: {cell.arm}, seed {cell.seed}: {cell.reason}", err=True)


def _command(recipe: str, *, losses: list[str], seeds: int, overrides: list[str], out: Path | None) -> str:
    parts = ["distill", "compare", recipe, *(f"--loss={loss}" for loss in losses), f"--seeds={seeds}"]
    parts += [f"--set={item}" for item in overrides]
    return shlex.join(parts if out is None else [*parts, f"--out={out}"])
