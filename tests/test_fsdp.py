"""FSDP: processes that share the weights train as one that has them all, and either goes on where the other stopped.

Accelerate shards on GPUs alone; torch's FSDP2, which it calls, does so on CPUs too, through gloo: ``fsdp_on_cpu``.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoint import latest_checkpoint
from tests.test_ranks import ARMS, LITTLE_MEMORY, RUN, ended, launch, lines

FSDP = {  # as `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` sets it
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # the launcher's default, which would leave other processes' models empty
}
SPREAD = "lie spread over 2 processes"
PARTS = ("shared", *(f"arms/{arm}" for arm in ARMS))


def start(folder: Path, *settings: str, sharded: bool):
    if not sharded:
        return launch(folder, 1, *settings)
    return launch(folder, 2, *settings, module="tests.fsdp_on_cpu", environment=FSDP | {"SHARD_ON_CPU": "1"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does with it all."""
    folder = tmp_path_factory.mktemp("whole")
    ended(start(folder, sharded=False))
    return folder


def stop_in(folder: Path, arm: str, processes) -> list[str]:
    """SIGTERM to the last of them once the arm has a checkpoint."""
    checkpoints = folder / RUN / "arms" / arm / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")):
        assert processes[0].poll() is None, processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[-1].send_signal(signal.SIGTERM)
    return ended(processes, code=143)


@pytest.mark.parametrize(
    ("arm", "first_sharded"), [("distilled", True), pytest.param("plain", False, marks=pytest.mark.slow)]
)
def test_either_goes_on_where_the_other_stopped_and_ends_as_one_process_does(
    whole: Path, tmp_path: Path, arm: str, first_sharded: bool
) -> None:
    settings = () if first_sharded else LITTLE_MEMORY
    said = stop_in(tmp_path, arm, start(tmp_path, *settings, sharded=first_sharded))
    assert "Warning" not in said[0]
    left = latest_checkpoint(tmp_path / RUN / "arms" / arm / "checkpoints")
    assert left is not None
    optimizer = torch.load(left / "trainer.pt", weights_only=True)["optimizer"]
    assert (SPREAD in said[0]) is first_sharded
    said = ended(start(tmp_path, *settings, sharded=not first_sharded))
    assert "Warning" not in said[0]
    assert (SPREAD in said[0]) is not first_sharded
    assert f"goes on from {left}" in said[0]
    for part in PARTS:
        one, both = lines(whole, part), lines(tmp_path, part)
        assert [line["step"] for line in one] == [line["step"] for line in both]
        for ours, theirs in zip(both, one, strict=True):
            for name in theirs:
                if name.startswith("loss") or name in ("scale", "grad_norm"):
                    # the learned map of logit_mse is stepped by Adam, which makes of a gradient's rounding a whole step
                    close = 1e-3 if name == "loss/logit_mse" else 1e-5
                    assert ours[name] == pytest.approx(theirs[name], rel=close, abs=1e-5), (part, theirs["step"], name)
    assert max(line["grad_norm"] for part in PARTS for line in lines(whole, part)) > 1.5  # so that it was clipped
    end = latest_checkpoint(whole / RUN / "arms" / arm / "checkpoints")
    assert end is not None
    expected = torch.load(end / "trainer.pt", weights_only=True)["optimizer"]
    assert optimizer["state"].keys() == expected["state"].keys()
    for place, state in expected["state"].items():
        assert {name: value.shape for name, value in optimizer["state"][place].items()} == {
            name: value.shape for name, value in state.items()
        }
    for name in ARMS:
        weights = RUN / "arms" / name / "student" / "model.safetensors"
        one, both = load_file(whole / weights), load_file(tmp_path / weights)
        assert one.keys() == both.keys()
        for key, tensor in one.items():
            if not key.endswith("k_proj.bias"):  # no softmax sees it: its gradient is rounding
                torch.testing.assert_close(both[key], tensor, rtol=0, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({}, [], "Accelerate was asked for FSDP, which it does not do here (MULTI_CPU:"),
        *(
            pytest.param(*refused, marks=pytest.mark.slow)
            for refused in (
                ({"SHARD_ON_CPU": "1", "FSDP_VERSION": "1"}, [], "version 1, whose checkpoints no other run could go"),
                (
                    {"SHARD_ON_CPU": "1"},
                    ["train.compile=true"],
                    "train.compile cannot be used under FSDP: leave it out",
                ),
                ({"SHARD_ON_CPU": "1"}, ["train.precision=fp16"], "train.precision fp16 cannot be used under FSDP"),
            )
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path, environment, settings, message: str) -> None:
    processes = launch(tmp_path, 2, *settings, module="tests.fsdp_on_cpu", environment=FSDP | environment)
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert 2 in [process.returncode for process in processes]
    assert message in "".join(said)
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "runs").exists()
