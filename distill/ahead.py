"""The next round's candidates, mined and scored by a second process while training goes on (``mine.ahead``).

They are those that the student finds which it is so many steps before its round ends, whichever process is the faster:
what a training comes to does not depend on it. Where the second process fails, the next round finds the same itself.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from distill.checkpoint import save_weights
from distill.cores import without_launcher
from distill.durable import exclusively, staged_folder, write_atomically
from distill.mined import kept
from distill.recipe.load import dump

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distill.experiment import Experiment
    from distill.mined import Round

log = logging.getLogger(__name__)


def snapshot(of: Round) -> Path:
    """Folder of the student that mines a round, where it is another than the one that begins it."""
    return of.home / f"miner-{of.number}"


def keep_snapshot(of: Round, student: Any) -> None:
    """Keep the student as it is now for mining a round."""
    with staged_folder(snapshot(of)) as staged:
        save_weights(staged, student)


def forget_snapshot(of: Round) -> None:
    """When the round's candidates are kept."""
    shutil.rmtree(snapshot(of), ignore_errors=True)


def alone(of: Round) -> AbstractContextManager[int]:
    """One second process at a time: one that a killed training left behind ends first."""
    return exclusively(of.home / f"ahead-{of.number}", notice="waits for the process of a training that was killed")


@contextmanager
def preparing(x: Experiment, of: Round, *, arm: str) -> Iterator[None]:
    """A second process mines and scores a round in here, and has ended when the block has.

    It goes on by the recipe of the run and writes its log to ``ahead-N.log``. Where the block raises, it is stopped.
    """
    if kept(of) is not None:
        yield
        return
    recipe, said = of.home / f"ahead-{of.number}.yaml", of.home / f"ahead-{of.number}.log"
    plain = x.recipe.model_copy(update={"train": x.recipe.train.model_copy(update={"trackers": ()})})
    write_atomically(recipe, lambda file: file.write(dump(plain).encode()))
    command = [sys.executable, "-m", "distill", "mine", str(recipe), "--ahead", f"{arm}:{of.number}"]
    with said.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=without_launcher())
    log.info("round %d: a second process mines it while training goes on; it says the rest to %s", of.number, said)
    try:
        yield
        with x.timings.stage("mine"):
            code = process.wait()
    finally:
        if process.poll() is None:  # what it has scored is kept: it ends as any command does that is told to
            process.terminate()
            process.wait()
    if code:
        log.warning("round %d: what mined it ended with exit code %d, see %s; it is mined here", of.number, code, said)
    else:
        recipe.unlink(missing_ok=True)
