"""The shipped quickstart, as it is shipped: minutes long, so not in the everyday suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_wrong_recipes import distill


@pytest.mark.slow
def test_the_teacher_leads_and_distillation_helps(tmp_path: Path) -> None:
    done = distill("run", "quickstart", folder=tmp_path, settings=[])
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["teacher"]["rsum"] > summary["plain"]["rsum"] + 30
    assert summary["distilled"]["rsum"] > summary["plain"]["rsum"]
