"""How many cores and threads this process may use."""

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
