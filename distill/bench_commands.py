"""``distill bench RUN``: what a student costs in use, against its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distill.bench.found import Bench
    from distill.experiment import Experiment

Run = Annotated[Path, typer.Argument(help="a run's folder, e.g. runs/quickstart")]
Arm = Annotated[str, typer.Option("--arm", help="whose student; the last arm when absent")]
Export = Annotated[
    Path | None,
    typer.Option("--export", help="what distill export wrote; RUN/arms/ARM/export when absent, where it is there"),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="for everything; OMP_NUM_THREADS, or all cores of the process, when absent"),
]
Seconds = Annotated[float, typer.Option("--seconds", min=0.01, help="of timing for each row, about")]
Queries = Annotated[
    int, typer.Option("--queries", min=1, help="drawn texts and pictures, which are timed in turn and ranked")
]
Out = Annotated[Path | None, typer.Option("--out", help="folder; RUN/arms/ARM/bench when absent")]
NoTeacher = Annotated[bool, typer.Option("--no-teacher", help="leave the teacher out, which can be slow")]


def bench_command(open_run: Callable[[Path], Experiment]) -> Callable[..., None]:
    """The command; ``open_run`` makes the experiment of a run's folder."""

    def bench(
        run: Run,
        arm: Arm = "",
        export: Export = None,
        threads: Threads = None,
        seconds: Seconds = 2.0,
        queries: Queries = 200,
        out: Out = None,
        no_teacher: NoTeacher = False,
    ) -> None:
        """Time a query, with and without the teacher; try approximate indexes; plot quality against time."""
        from distill.bench.found import Options
        from distill.bench.measure import bench as measured
        from distill.cores import own_threads
        from distill.preflight import check_data
        from distill.report.bench_tables import show

        x = open_run(run)
        name = arm or list(x.recipe.arms)[-1]
        _refuse_untrained(x, name)
        check_data(x)
        exported, missing = _exported(run, x, name, export)
        options = Options(threads or own_threads(), seconds, queries, exported, not no_teacher)
        found = measured(x, name, options, notes=missing)
        folder = out or x.folder / "arms" / name / "bench"
        write(found, folder)
        show(found)
        typer.echo(f"tables: {folder / 'bench.md'}, plot: {folder / 'latency.png'}, numbers: {folder / 'bench.json'}")

    return bench


def write(found: Bench, folder: Path) -> None:
    """``bench.json``, ``bench.md`` and ``latency.png`` into the folder."""
    from distill.durable import write_atomically
    from distill.report.bench_plot import plot
    from distill.report.bench_tables import markdown

    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "bench.json", lambda file: file.write(text.encode()))
    plot(found, folder / "latency.png")
    page = markdown(found, plot="latency.png")
    write_atomically(folder / "bench.md", lambda file: file.write(page.encode()))


def _refuse_untrained(x: Experiment, arm: str) -> None:
    from distill.pipeline import DONE

    if arm not in x.recipe.arms:
        raise typer.BadParameter(f"no arm {arm!r}; the run has {', '.join(x.recipe.arms)}", param_hint="--arm")
    if not (x.folder / "arms" / arm / "student" / DONE).is_file():
        raise FileNotFoundError(
            f"{x.folder} has no trained student of the arm {arm}: train it first (distill train RECIPE --arm {arm})"
        )


def _exported(run: Path, x: Experiment, arm: str, given: Path | None) -> tuple[Path | None, list[str]]:
    """The exported folder; or none, and a line that says how to have one."""
    from distill.export.layout import REPORT

    folder = given or x.folder / "arms" / arm / "export"
    if given is not None or (folder / REPORT).is_file():
        return folder, []
    command = f"distill export {run} --arm {arm} --to {folder}"
    return None, [f"no rows of ONNX and int8, as there is no {folder}: {command} adds them"]
