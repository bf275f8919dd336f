"""torch.compile as an option: the same scores and the same identity."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.teachers.tiny_teachers import blip, every_pair, fusion, memories

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # of torch's own compiler, on its import
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler: no c++ on PATH"),
]


@pytest.mark.parametrize("make", [blip, fusion])
def test_compiled_blocks_change_no_score_and_no_identity(make):
    plain, compiled = make(), make(compile=True)
    assert compiled.identity == plain.identity
    pairs = every_pair()
    with torch.no_grad():
        expected, got = (teacher.score(*memories(teacher), *pairs) for teacher in (plain, compiled))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    few = torch.tensor([1]), torch.tensor([0])
    with torch.no_grad():
        expected, got = (teacher.score(*memories(teacher), *few) for teacher in (plain, compiled))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
