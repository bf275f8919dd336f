"""``distill`` as a command, in a process that is forked from one with everything imported: it begins at once.

Imports are most of what a short command costs. A server is started when it is first needed, one for each number of
threads, and ends with the test process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, folder: Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """``python -m distill`` with these arguments, in a folder."""
    with tempfile.TemporaryDirectory() as place:
        files = {name: str(Path(place) / name) for name in ("out", "err")}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        job = {"arguments": arguments, "folder": str(folder), "environment": environment, **files}
        server = _server(threads)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = [Path(file).read_text(encoding="utf-8") for file in files.values()]
    return subprocess.CompletedProcess(list(arguments), code, *said)


@cache
def _server(threads: int) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": str(threads), "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # starts no thread
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
    )

    def end() -> None:
        server.communicate(timeout=60)

    atexit.register(end)
    return server


def serve() -> None:
    """A child for each line; its exit code as the answer."""
    import accelerate
    import datasets
    import faiss
    import torch
    import transformers

    import distill.cli
    import distill.pipeline
    import distill.results
    import students.dual
    import teachers.blip

    assert all((accelerate, datasets, faiss, torch, transformers, distill, students, teachers))
    answers = os.dup(1)
    os.dup2(2, 1)  # what is printed here is no answer
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "forking is safe without threads only"
        child = os.fork()
        if not child:
            _run(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{code}\n".encode())


def _run(job: dict[str, Any]) -> None:
    from distill.cli import main

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = ["distill", *job["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  (as the interpreter ends a process)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
