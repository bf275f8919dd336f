"""A service in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "distill", "serve", "student", str(folder), "--port", "0", *options]


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name != "DISTILL_TOKEN"}
    return known | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


@contextmanager
def served(folder: Path, *options: str, **more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A student's service."""
    with started(command(folder, *options), **more) as found:
        yield found


@contextmanager
def started(command: list[str], **more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address, without its last slash, and the process, which is ended."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(**more),
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " at http" not in line:
                process.kill()
                raise AssertionError(f"{line}{process.communicate()[1]}")
            yield line.split(" at ")[1].split()[0].rstrip("/"), process
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=60)
