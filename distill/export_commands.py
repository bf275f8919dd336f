"""``distill export RUN --to DIR``: a student as one folder that common loaders take, with proof that it ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.experiment import Experiment
    from distill.export.layout import Precision
    from distill.export.proof import Gate
    from distill.exporting import ExportSettings

Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, e.g. runs/quickstart")]
To = Annotated[Path | None, typer.Option("--to", metavar="DIR", help="RUN/arms/ARM/export when absent")]
Arm = Annotated[str, typer.Option("--arm", help="whose student; the last arm's when absent")]
With = Annotated[list[str], typer.Option("--with", metavar="ARTEFACT", help="add torch-export or openvino")]
Without = Annotated[
    list[str],
    typer.Option(
        "--without", metavar="ARTEFACT", help="leave out transformers, sentence-transformers, onnx, fp16, int8"
    ),
]
Index = Annotated[
    str,
    typer.Option("--index", metavar="SPLIT", help="whose vectors to index: a split, all, none; the evaluated split"),
]
Gates = Annotated[
    list[str],
    typer.Option(
        "--gate",
        metavar="PRECISION.WHAT=VALUE",
        help="e.g. int8.recall=0.5 (points) or fp16.cosine=0.9995; see the report for those in force",
    ),
]
Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        min=2,
        help="most pictures, with their captions, that artefacts are judged on; when absent 1000, with --check as many "
        "as at the export",
    ),
]
Seconds = Annotated[
    float, typer.Option("--seconds", min=0, help="for which each tower and batch size is timed; 0 leaves times out")
]
Replace = Annotated[
    bool, typer.Option("--replace", help="take the place of an exported folder, once this one is whole")
]
Check = Annotated[bool, typer.Option("--check", help="prove the folder that is there anew; nothing is written")]


def export_command(opened: Callable[[Path], Experiment]) -> Callable[..., None]:
    """The command; ``opened`` gives the experiment of a run's folder."""

    def export(
        run: Run,
        to: To = None,
        arm: Arm = "",
        more: With = [],  # noqa: B006  (typer copies it)
        less: Without = [],  # noqa: B006
        index: Index = "",
        gate: Gates = [],  # noqa: B006
        images: Images = None,
        seconds: Seconds = 1.5,
        replace_it: Replace = False,
        check: Check = False,
    ) -> None:
        """One folder for transformers, sentence-transformers, ONNX Runtime and FAISS, proven artefact by artefact.

        What does not rank as the student did is left out, and said. Exit code 1: something in float32 failed, or, with
        --check, anything.
        """
        from distill import exporting
        from distill.report.export_page import show_proof

        settings = replace(_settings(more, less, gate), index=index, seconds=seconds)
        if images is not None:
            settings = replace(settings, images=images)
        x = opened(run)
        x.use_cpu()
        name = arm or list(x.recipe.arms)[-1]
        folder = to or x.folder / "arms" / name / "export"
        if check:
            gates, known = exporting.judged_by(folder)
            settings = replace(settings, gates=_gates(gate, gates), images=images or known)
            found = [one.as_dict() for one in exporting.check_export(x, name, folder, settings)]
            failed = [one for one in found if not one["passed"]]
        else:
            report = exporting.export(x, name, folder, settings, replace=replace_it)
            found = report["artefacts"]
            failed = [one for one in found if not one["passed"] and one["precision"] == "fp32"]
        title = f"{folder}: each artefact against the float32 student, shares in percent"
        show_proof(found, title=title, failed="fails" if check else "left out")
        if not check:
            typer.echo(f"exported: {folder}, report: {folder / 'report.html'}, model card: {folder / 'README.md'}")
        if failed:
            raise typer.Exit(1)

    return export


def _settings(more: list[str], less: list[str], gates: list[str]) -> ExportSettings:
    from distill.export.proof import GATES
    from distill.export.write import ARTEFACTS, BY_DEFAULT
    from distill.exporting import ExportSettings

    for option, names in (("--with", more), ("--without", less)):
        for name in names:
            if name not in ARTEFACTS:
                raise typer.BadParameter(f"{name!r} is none of {', '.join(ARTEFACTS)}", param_hint=option)
    wanted = (BY_DEFAULT | set(more)) - set(less)
    if "transformers" not in wanted:
        wanted -= {"sentence-transformers"}  # it reads the same weights
    if not wanted:
        raise typer.BadParameter("nothing would be left to export", param_hint="--without")
    return ExportSettings(artefacts=frozenset(wanted), gates=_gates(gates, GATES))


def _gates(given: list[str], usual: Mapping[Precision, Gate]) -> Mapping[Precision, Gate]:
    from distill.export.proof import Gate

    found = dict(usual)
    names = [field.name for field in fields(Gate)]
    for one in given:
        key, _, value = one.partition("=")
        precision, _, what = key.partition(".")
        try:
            if precision not in found or what not in names:
                raise ValueError
            number = float(value)
            if not math.isfinite(number):  # no number compares with NaN, and JSON has no infinity
                raise ValueError
        except ValueError:
            allowed = ", ".join(f"{name}.{what}" for name, gate in found.items() for what in asdict(gate))
            raise typer.BadParameter(
                f"{one!r} is no gate; give one of {allowed} with a number, such as int8.recall=0.5", param_hint="--gate"
            ) from None
        found[precision] = replace(found[precision], **{what: number})
    return found
