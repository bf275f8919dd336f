"""Checkpoints: whole or absent, and everything that training needs is in them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint, step_of


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = made()
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer, meaning="m")
    steps(model, optimizer, 4)
    drawn = (random.random(), np.random.rand())  # noqa: NPY002

    other, its_optimizer = made()
    steps(other, its_optimizer, 1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found, model=other, optimizer=its_optimizer, meaning="m") == 3
    steps(other, its_optimizer, 4)
    assert (random.random(), np.random.rand()) == drawn  # noqa: NPY002
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_another_meaning_is_refused(tmp_path: Path) -> None:
    model, optimizer = made()
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, meaning="m")
    with pytest.raises(CheckpointError, match="another name"):
        load_checkpoint(path, model=model, optimizer=optimizer, meaning="n")
    assert load_checkpoint(path, model=model, optimizer=optimizer, meaning=None) == 1


@pytest.mark.parametrize("damage", ["model.safetensors", "trainer.pt", "complete.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    model, optimizer = made()
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, meaning="m", keep=9)
    newest = save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer, meaning="m", keep=9)
    content = bytearray((newest / damage).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / damage).write_bytes(bytes(content[:-1]) if damage == "complete.json" else bytes(content))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert step_of(found) == 1


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    model, optimizer = made()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step=step, model=model, optimizer=optimizer, meaning="m", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]


_WRITER = """
import sys, torch
from pathlib import Path
from distill.checkpoint import save_checkpoint
model = torch.nn.Linear(600, 600)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 600)).sum().backward(); optimizer.step()
for step in range(1, 10_000):
    save_checkpoint(Path(sys.argv[1]), step=step, model=model, optimizer=optimizer, meaning="m")
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(7)
    for round_number in range(4):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()  # one is complete
        time.sleep(draw.uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        found = latest_checkpoint(tmp_path)
        assert found is not None, round_number
        assert step_of(found) >= int(lines[-1] if lines else 1)
