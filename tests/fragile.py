"""Parts of a user's own to which something happens: in this process by ``happening``, in a command by its environment.

MOMENT=what:where and MOMENT_STEP=when: ``break:FILE`` or ``remove:FILE`` a picture at a training step, ``kill:`` a
loader worker at a training step, ``nan:`` in the loss at a step, ``score:`` NaN from the teacher for a pair.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.protocols import Scored
from tests.test_train import NoisyStudent
from tests.toys import ToyTeacher

TEACHER = "tests.fragile:FragileTeacher"
STUDENT = "tests.fragile:FragileStudent"
LOSS = "tests.fragile:nan_at"


@dataclass
class Moment:
    what: str
    where: str
    step: int
    losses: int = 0  # computed so far

    @classmethod
    def of(cls, text: str, step: int) -> Moment:
        what, _, where = text.partition(":")
        return cls(what, where, step)


now = Moment.of(os.environ.get("MOMENT", ""), int(os.environ.get("MOMENT_STEP", "-1")))


@contextmanager
def happening(text: str, step: int) -> Iterator[None]:
    global now
    before, now = now, Moment.of(text, step)
    try:
        yield
    finally:
        now = before


class FragileTeacher(ToyTeacher):
    def __init__(self) -> None:
        super().__init__(bad_pair=(5, 10) if now.what == "score" else None)


class FragileStudent(NoisyStudent):
    """Counts its training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, images=None, texts=None, *, attention_pairs=None):
        if self.training:
            if self.steps == now.step:
                self.happen()
            self.steps += 1
        return super().forward(images, texts, attention_pairs=attention_pairs)

    def happen(self) -> None:
        if now.what == "break":
            Path(now.where).write_bytes(b"junk")
        elif now.what == "remove":
            Path(now.where).unlink()
        elif now.what == "kill":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(20)  # until the system tells of it


def nan_at(scored: Scored) -> torch.Tensor:
    """0, but NaN in the second direction of one step of its arm."""
    now.losses += 1
    bad = now.what == "nan" and now.losses == 2 * now.step + 2
    return scored.student.sum() * (float("nan") if bad else 0.0)
