"""The same service by Ray Serve: two replicas on this machine, one of which dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.scenes import make_scenes
from distill.embed import DistantSource
from teachers.remote import RemoteTeacher
from teachers.remote_servers import RemoteOptions
from tests.teacher_service.test_run import DATA, STUDENT, TEACHER, pairs_of, service
from tests.test_wrong_recipes import distill

IMAGES, TEXTS = (grid.ravel() for grid in np.meshgrid(np.arange(164), np.arange(30), indexing="ij"))


def replicas_of(driver: int) -> list[int]:
    """Process ids of the replicas of the cluster that a command has started."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    parent = {int(pid): int(ppid) for pid, ppid, _ in rows}

    def is_of(pid: int) -> bool:
        while pid > 1:
            if pid == driver:
                return True
            pid = parent.get(pid, 0)
        return False

    return [int(pid) for pid, _, said in rows if said.startswith("ray::ServeReplica") and is_of(int(pid))]


def scores_by(remote: RemoteTeacher) -> np.ndarray:
    corpus = make_scenes(images=120, val=20, test=24, size=48, captions_per_image=2, seed=0)
    assert remote.knows(corpus.fingerprint)
    images, texts = (DistantSource(corpus, side, remote)(np.arange(n)) for side, n in (("image", 164), ("text", 30)))
    return remote.score(images, texts, torch.from_numpy(IMAGES), torch.from_numpy(TEXTS)).numpy()


@pytest.mark.slow
def test_two_replicas_answer_one_that_dies_is_replaced_and_all_end_when_told(tmp_path: Path) -> None:
    done = distill("mine", "quickstart", folder=tmp_path, settings=[*DATA, *TEACHER, *STUDENT, "train.steps=4"])
    assert done.returncode == 0, done.stderr
    taught = distill("score", "quickstart", folder=tmp_path, settings=[*DATA, *TEACHER, *STUDENT, "train.steps=4"])
    assert taught.returncode == 0, taught.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with service(tmp_path, "--replicas", "2", "--grace", "5", port=port) as (url, process):
        remote = RemoteTeacher([url], options=RemoteOptions(pairs_per_request=64, patience_s=90))
        before = scores_by(remote)
        first, *_ = replicas_of(process.pid)
        os.kill(first, signal.SIGKILL)
        np.testing.assert_allclose(scores_by(remote), before, atol=1e-5)
        deadline = time.monotonic() + 90
        while len([pid for pid in replicas_of(process.pid) if pid != first]) < 2:
            assert time.monotonic() < deadline, "the replica was not replaced"
            time.sleep(0.5)
        remote.close()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    kept = pairs_of(tmp_path / "served", {"identity": remote.identity})
    np.testing.assert_allclose(
        [kept[pair] for pair in zip(IMAGES.tolist(), TEXTS.tolist(), strict=True)], before, atol=1e-5
    )
