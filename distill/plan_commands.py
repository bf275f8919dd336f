"""``distill plan RECIPE``: what a run will cost, before anybody pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from distill.experiment import Experiment
    from distill.planning.measured import Measured
    from distill.planning.plan import Plan, Wish
    from distill.recipe.experiment import Recipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value, e.g. --set mine.k=8")
]
Number = Annotated[str, typer.Option("--images", metavar="N", help="training images, e.g. 1e8; the corpus when absent")]
Texts = Annotated[str, typer.Option("--texts", metavar="N", help="training texts; as many an image when absent")]
GpuName = Annotated[str, typer.Option("--gpu", help="plan for this GPU, e.g. h200; this machine when absent")]
Speedup = Annotated[
    float | None,
    typer.Option("--speedup", help="how many times as fast its models are as measured; by table if absent"),
]
Workers = Annotated[int, typer.Option("--workers", "--gpus", help="processes, each with a GPU where there are any")]
Rate = Annotated[float | None, typer.Option("--rate", help="money an hour of a worker, e.g. of a GPU")]
Budget = Annotated[float | None, typer.Option("--budget", help="money: say what fits; takes --rate")]
Hours = Annotated[float | None, typer.Option("--hours", help="of one worker: say what fits")]
Memory = Annotated[float | None, typer.Option("--memory", help="GiB of the machine that mines; this one when absent")]
Fresh = Annotated[float | None, typer.Option("--fresh", help="share of a later round's candidates that are new")]
Seconds = Annotated[float, typer.Option("--seconds", min=1, help="of measuring, about, beside loading models")]
MeasuredFile = Annotated[
    Path | None, typer.Option("--measured", help="plan with a file of --save: nothing is measured")
]
Save = Annotated[Path | None, typer.Option("--save", help="keep what was measured in this file")]
AgainstRun = Annotated[Path | None, typer.Option("--against", help="a run's folder: predicted beside measured")]
Clock = Annotated[
    Literal["wall", "processor"], typer.Option("--clock", help="processor: seconds of processors, for a busy machine")
]
AsJson = Annotated[bool, typer.Option("--json", help="the plan as JSON")]


def plan_command(open_experiment: Callable[[str, list[str]], Experiment]) -> Callable[..., None]:
    """The command; ``open_experiment`` makes the experiment of a recipe and its overrides."""

    def plan(
        recipe: RecipeName,
        overrides: Overrides = [],  # noqa: B006
        images: Number = "",
        texts: Texts = "",
        gpu: GpuName = "",
        speedup: Speedup = None,
        workers: Workers = 2,
        rate: Rate = None,
        budget: Budget = None,
        hours: Hours = None,
        memory: Memory = None,
        fresh: Fresh = None,
        seconds: Seconds = 60,
        measured: MeasuredFile = None,
        save: Save = None,
        against: AgainstRun = None,
        clock: Clock = "wall",
        as_json: AsJson = False,
    ) -> None:
        """Hours, money, bytes and teacher calls of every stage, and what fits a budget, from a short measurement."""
        from distill.planning.plan import Wish, check_wish
        from distill.report.plan_tables import show

        wish = Wish(
            images=whole_number(images, "--images"),
            texts=whole_number(texts, "--texts"),
            gpu=gpu or None,
            speedup=speedup,
            workers=workers,
            rate=rate,
            budget=budget,
            hours=hours,
            memory_gib=memory,
            fresh=fresh,
        )
        check_wish(wish)
        read, known = _measured(open_experiment, recipe, overrides, wish, measured, seconds, clock)
        if save is not None:
            known.save(save)
        made = _planned(read, known, wish, against)
        if as_json:
            typer.echo(json.dumps(made.as_dict(), indent=2))
        else:
            show(made)

    return plan


def whole_number(text: str, option: str) -> int | None:
    """Such as 100000000 or 1e8; None of nothing.

    Raises:
        ValueError: it is no whole number, or below 1.
    """
    if not text:
        return None
    try:
        value = float(text.replace("_", "").replace(",", ""))
        number = int(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{option} is {text!r}: give a whole number such as 100000000 or 1e8") from None
    if number != value or number < 1:
        raise ValueError(f"{option} is {text!r}: give a whole number, at least 1")
    return number


def _measured(
    open_experiment: Callable[[str, list[str]], Experiment],
    recipe: str,
    overrides: list[str],
    wish: Wish,
    file: Path | None,
    seconds: float,
    clock: str,
) -> tuple[Recipe, Measured]:
    """The recipe, and what its work costs: from the file, which takes neither data nor models, else measured now."""
    from distill.planning.meaning import check_same
    from distill.planning.measured import Measured

    if file is not None:
        from distill.recipe.load import load_recipe

        read, known = load_recipe(recipe, overrides), Measured.load(file)
        check_same(known, read, str(file))
        return read, known
    from distill.planning.measure import measure

    x = open_experiment(recipe, [*overrides, "train.trackers=[]"])
    return x.recipe, measure(x, seconds=seconds, images=wish.images, by_processor=clock == "processor")


def _planned(recipe: Recipe, known: Measured, wish: Wish, against: Path | None) -> Plan:
    from distill.planning.against import Against
    from distill.planning.plan import make_plan

    made = make_plan(recipe, known, wish)
    return (
        made
        if against is None
        else replace(made, against=Against.of(made.stages, against, by_processor=known.machine.clock == "processor"))
    )
