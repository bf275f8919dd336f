"""What a worker does: open a plan and the models it names, once, and do units of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import stopping
from distill.drivers.claims import done_by
from distill.drivers.plan import PLAN, Plan, PlanError
from distill.progress import Progress
from distill.quiet import quieten_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.drivers.claims import Job
    from distill.experiment import Experiment


def open_job(folder: Path) -> Job:
    """The plan's job, its models loaded. Stands in the folder where the plan was made, where that is there.

    Raises:
        PlanError: torn, or of another teacher, student or corpus than is found.
    """
    plan = Plan.open(folder.absolute())
    if plan.working_folder.is_dir():
        os.chdir(plan.working_folder)
    quieten_libraries()
    x = _experiment(plan)
    if plan.kind == "score":
        from distill.drivers.scoring import ScoreJob

        return ScoreJob(plan, x)
    from distill.drivers.embedding import EmbedJob

    return EmbedJob(plan, x)


def _experiment(plan: Plan) -> Experiment:
    from distill.experiment import Experiment
    from distill.recipe.build import builders
    from distill.recipe.load import parse

    recipe = parse(plan.recipe, str(plan.folder / PLAN))
    return Experiment(recipe, builders(recipe), taught=_taught_before)


def _taught_before(x: Experiment) -> Path:
    """A worker teaches no teacher: many would, at once."""
    from distill.pipeline import DONE

    folder = x.folder / "teacher"
    if not (folder / DONE).is_file():
        raise PlanError(
            f"{folder} holds no taught teacher, which the plan was made with: the command that made it does"
        )
    return folder


def units_of_share(units: int, share: str) -> range:
    """Numbers of the units that ``INDEX/COUNT`` has: every COUNT-th, from INDEX.

    Raises:
        ValueError: no such share.
    """
    index, _, count = share.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"a share is INDEX/COUNT with 0 <= INDEX < COUNT, such as 0/8; got {share!r}")
    return range(int(index), units, int(count))


def work_share(folder: Path, share: str) -> tuple[int, int, int]:
    """Do a share of a plan's units; returns how many units were done here, were there, and the items done here."""
    job = open_job(folder)
    plan = job.plan
    numbers = units_of_share(len(plan.names), share)
    there = job.there()
    left = [number for number in numbers if plan.names[number] not in there]
    units = items = 0
    total = sum(plan.size(number) for number in left)
    with Progress(total, f"share {share}: {len(left)} of {len(numbers)} units to do", unit=unit_of(plan)) as progress:
        for _, size, here in done_by(job, left):
            progress.advance(size)
            units, items = units + here, items + size * here
    return units, len(numbers) - units, items


def unit_of(plan: Plan) -> str:
    """What its units count."""
    return "pairs" if plan.kind == "score" else "items"


def serve(folder: Path) -> None:
    """Do the units whose numbers come as JSON lists on standard input, a line each; says what is done, as JSON lines.

    Ends when the input does, and after the unit in hand when the process that started it is gone.
    """
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        job = open_job(folder)
        say(ready=True)
        for line in sys.stdin:
            _serve(job, json.loads(line), say, parent)
            say(ready=True)
    except BrokenPipeError:
        raise SystemExit(1) from None  # nobody listens
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        say(failed=str(error))
        raise


def _serve(job: Job, numbers: Sequence[int], say: Any, parent: int) -> None:
    for number, _, here in done_by(job, numbers):
        say(done=number, here=here)
        stopping.heed()
        if os.getppid() != parent:
            raise SystemExit(1)
