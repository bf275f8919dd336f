"""A Slurm job array: this process writes a script and says how to submit it; each task of the array does its share.

The line of a task is a plain command that knows nothing of Slurm: any scheduler, or a loop in a shell, can run it.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from distill.drivers.driver import DriverName, HandedOver, Task
from distill.durable import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SCRIPT = """#!/bin/bash
#SBATCH --job-name=distill-{kind}
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task={threads}
{gpus}#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output={output}
#SBATCH --open-mode=append
# Task i does every {tasks}-th unit from unit i, passing over those that are there. Told to stop (two minutes before the
# time is up, or when it is preempted) it ends after the unit in hand with exit code 143; submitted again, it goes on.
set -euo pipefail
cd {folder}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"
exec {command} work {plan} --share "${{SLURM_ARRAY_TASK_ID:?number of the task, from 0}}/{tasks}"
"""


class SlurmDriver:
    """An array of ``workers`` tasks, each with ``threads`` cores and ``gpus`` GPUs."""

    name: DriverName = "slurm"

    def __init__(self, workers: int, *, threads: int = 1, gpus: float | None = None) -> None:
        """Raises ValueError where a task would have part of a GPU, which Slurm does not give."""
        if gpus is not None and gpus != int(gpus):
            raise ValueError(f"--gpus-per-worker is {gpus:g}, but a Slurm task has whole GPUs: give a whole number")
        self.workers, self.threads, self.gpus = workers, threads, int(gpus or 0)

    def run(self, task: Task, done: Callable[[int], object]) -> None:
        """Write the script, and hand over."""
        path = self.write(task)
        raise HandedOver(
            [
                f"{len(task.numbers)} units wait in {task.plan.folder}",
                f"submit them:      sbatch {shlex.quote(str(path))}",
                f"without Slurm:    for i in $(seq 0 {self._tasks(task) - 1}); do "
                f"SLURM_ARRAY_TASK_ID=$i bash {shlex.quote(str(path))}; done",
                "when the tasks have ended, this same command says what is left, and uses what is done",
            ]
        )

    def write(self, task: Task) -> Path:
        """The script, beside the plan."""
        plan = task.plan
        path = plan.folder.with_name(f"{plan.folder.name}.sbatch")
        logs = plan.folder.with_name(f"logs-{plan.folder.name}")
        logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its logs
        tasks = self._tasks(task)
        script = _SCRIPT.format(
            kind=plan.kind,
            last=tasks - 1,
            tasks=tasks,
            threads=self.threads,
            gpus=f"#SBATCH --gpus-per-task={self.gpus}\n#SBATCH --ntasks=1\n" if self.gpus else "",
            output=shlex.quote(f"{str(logs).replace('%', '%%')}/slurm-%A_%a.log"),
            folder=shlex.quote(str(plan.working_folder)),
            command=f"{shlex.quote(sys.executable)} -m distill",
            plan=shlex.quote(str(plan.folder)),
        )
        write_atomically(path, lambda file: file.write(script.encode()))
        return path

    def _tasks(self, task: Task) -> int:
        return min(self.workers, len(task.plan.names))
