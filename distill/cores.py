"""How many cores and threads this process may use, and the environment of the processes it starts."""

from __future__ import annotations

import os


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system can tell
        return os.cpu_count() or 1


def own_threads() -> int:
    """``OMP_NUM_THREADS`` where that is set, at most the cores; else all of them."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), cores()) if asked.isdigit() and int(asked) else cores()


def without_launcher() -> dict[str, str]:
    """The environment for a process that joins no others."""
    joins = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in joins}
