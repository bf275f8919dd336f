"""Which teacher a run had, in its folder: for whoever has the run without it, and for the run when it goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from distill.durable import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from distill.protocols import ScoreKind

TEACHER_NOTE = "teacher.json"


def note_teacher(folder: Path, identity: str, score_kind: ScoreKind) -> None:
    """Write the teacher's identity and kind of score."""
    told = {"identity": identity, "score_kind": score_kind}
    write_atomically(folder / TEACHER_NOTE, lambda file: file.write(json.dumps(told).encode()))


def noted_teacher(folder: Path) -> dict[str, str] | None:
    """What was noted; None where nothing was."""
    path = folder / TEACHER_NOTE
    if not path.is_file():
        return None
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found
