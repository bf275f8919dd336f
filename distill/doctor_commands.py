"""``distill doctor`` looks at the installation, ``distill doctor teacher RECIPE`` at a teacher on the user's data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distill.checkup.advice import LossAdvice
    from distill.checkup.anatomy import Anatomy
    from distill.checkup.figures import Figures
    from distill.checkup.findings import Finding
    from distill.doctor_teacher import Examination
    from distill.experiment import Experiment
    from distill.recipe.experiment import Recipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value, e.g. --set teacher.enc_token=cls")
]
Images = Annotated[int, typer.Option("--images", min=8, help="pictures to look at; negatives are sought among them")]
Out = Annotated[
    Path | None, typer.Option("--out", help="folder for teacher.png and teacher.json; the run's own when absent")
]


def doctor_app(open_experiment: Callable[[str, list[str]], Experiment]) -> typer.Typer:
    """The command group; ``open_experiment`` makes the experiment of a recipe and its overrides."""
    app = typer.Typer()

    @app.callback(invoke_without_command=True)
    def installation(context: typer.Context) -> None:
        """Versions, devices and what is missing; ``doctor teacher RECIPE``: a closer look at a teacher."""
        if context.invoked_subcommand is None:
            from distill.doctor import diagnose

            report = diagnose()
            typer.echo(report.text)
            raise typer.Exit(0 if report.healthy else 1)

    @app.command()
    def teacher(recipe: RecipeName, overrides: Overrides = [], images: Images = 100, out: Out = None) -> None:  # noqa: B006
        """How well the recipe's teacher tells true pairs from hard ones, and which losses suit its scores."""
        x = open_experiment(recipe, [*overrides, "train.trackers=[]"])
        _refuse_untaught(x, ["distill", "teach", recipe, *(f"--set={item}" for item in overrides)])
        healthy = examine_teacher(x, images=images, folder=out or x.folder / "doctor")
        raise typer.Exit(0 if healthy else 1)

    return app


def examine_teacher(x: Experiment, *, images: int, folder: Path) -> bool:
    """Measure, write ``teacher.png`` and ``teacher.json`` into the folder, print the page; False where a fault is."""
    from distill.checkup.advice import arm_findings, loss_advice, training_warnings
    from distill.checkup.anatomy import Anatomy, anatomy
    from distill.checkup.figures import measure
    from distill.checkup.findings import findings
    from distill.doctor_teacher import examine
    from distill.recipe.variants import variants
    from distill.report.teacher_page import plot, show

    own, *others = variants(x.recipe).items() or [("teacher", x.recipe)]
    otherwise = {label: partial(_asked_otherwise, x, recipe) for label, recipe in others}
    e = examine(x, otherwise, label=own[0], images=images)
    figures = measure(e, x.corpus, seed=x.recipe.seed)
    captions = [x.corpus.texts[row] for row in e.sample.texts.tolist()]
    body = Anatomy("an ensemble") if x.builders.ensemble is not None else anatomy(x.teacher, captions)
    found, advised = findings(e, figures, body, x.corpus), list[Any]()
    if figures.losses is not None:
        advised = loss_advice(e, figures.losses)
        found += training_warnings(e)
        found += arm_findings(e, figures.losses, {name: arm.losses for name, arm in x.recipe.arms.items()})
    title = f"{x.recipe.name}: the teacher on {len(e.sample.true)} pictures of {x.corpus.name}, {e.sample.split} split"
    plot(e, figures, folder / "teacher.png", title=title)
    _write_json(folder / "teacher.json", _as_dict(x, e, figures, body, found, advised))
    show(e, figures, body=body, found=found, advised=advised, title=title)
    typer.echo(f"picture: {folder / 'teacher.png'}, numbers: {folder / 'teacher.json'}")
    return not any(finding.level == "FAULT" for finding in found)


def _refuse_untaught(x: Experiment, command: list[str]) -> None:
    from distill.checkup.sample import DoctorError
    from distill.pipeline import DONE

    if x.recipe.teach is not None and not (x.folder / "teacher" / DONE).is_file():
        raise DoctorError(
            f"{x.folder} has no taught teacher yet, and the recipe's teacher is of no use before: run\n"
            f"  {shlex.join(command)}\nfirst, which can take long"
        )


def _asked_otherwise(x: Experiment, recipe: Recipe) -> Any:
    """The same weights under another recipe of the teacher."""
    from distill.pipeline import taught_teacher
    from distill.recipe.build import builders

    folder = taught_teacher(x) if x.recipe.teach is not None else None
    return builders(recipe).teacher(x.corpus, folder).to(x.accelerator.device).eval().requires_grad_(False)


def _as_dict(
    x: Experiment,
    e: Examination,
    figures: Figures,
    body: Anatomy,
    found: list[Finding],
    advised: list[LossAdvice],
) -> dict[str, Any]:
    return {
        "recipe": x.recipe.name,
        "corpus": {"name": x.corpus.name, "fingerprint": x.corpus.fingerprint},
        "teacher": {"identity": e.identity, "score_kind": e.score_kind, **asdict(body)},
        "sample": {
            "split": e.sample.split,
            "seed": x.recipe.seed,
            "images": len(e.sample.true),
            "captions": len(e.sample.texts),
            "pairs": len(e.answers.pairs),
            "hard_negatives_by": list(e.questions.hard),
            "hard_negatives_a_query": int(next(iter(e.questions.hard.values())).shape[1]),
        },
        "figures": asdict(figures),
        "losses": [asdict(advice) for advice in advised],
        "findings": [asdict(finding) for finding in found],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from distill.durable import write_atomically

    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
