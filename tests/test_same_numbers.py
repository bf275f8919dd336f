"""What a run that goes on relies on: the same numbers give the same results, wherever in memory they lie."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.test_wrong_recipes import ROOT

PRODUCTS = """
import sys, numpy as np, torch
import distill

def at(offset, numbers):
    room = np.empty(numbers.numel() * 4 + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    moved = torch.from_numpy(room[start : start + numbers.numel() * 4].view(np.float32)).view(numbers.shape)
    return moved.copy_(numbers)

generator = torch.Generator().manual_seed(0)
for rows in (1, 5, 17):
    left, right = torch.randn(rows, 31, generator=generator), torch.randn(7, 31, generator=generator)
    expected = at(0, left) @ at(0, right).T
    for offsets in ((4, 0), (0, 4), (16, 0), (32, 48)):
        assert torch.equal(at(offsets[0], left) @ at(offsets[1], right).T, expected), (rows, offsets)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch does not multiply with MKL")
def test_a_product_does_not_depend_on_where_its_numbers_lie() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_the_user_says_of_it_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import distill, os; print(os.environ['MKL_CBWR'])"],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "COMPATIBLE"
