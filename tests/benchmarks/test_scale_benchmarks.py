"""The benchmarks of mining in shards and of asking about a part: they run, and a difference stops the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sharded_mining
from benchmarks.child import Phase
from benchmarks.sharded_mining import Sizes, made, measure
from benchmarks.subset import students

ROOT = Path(__file__).resolve().parents[2]


def test_both_ways_of_mining_find_the_same_and_ties_are_among_it(tmp_path: Path) -> None:
    sizes = Sizes(items=3000, queries=7, width=16, shard_items=700, k=5)
    figures = measure(tmp_path, sizes)
    assert figures["shards_anonymous"] > 0
    assert figures["ratio_resident"] > 0
    block = next(made(sizes))
    assert len(np.unique(block, axis=0)) < len(block)


def test_a_difference_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(items=500, queries=3, width=8, shard_items=200, k=4)

    def wrong(work, folder, sizes):
        ids = np.arange(12).reshape(3, 4) + (work.__name__ == "shards")
        np.savez(folder / f"{work.__name__}.npz", ids=ids, similarity=np.zeros((3, 4)))
        return Phase({"s": 1.0, "before": 0}, 2, 2)

    monkeypatch.setattr(sharded_mining, "in_child", wrong)
    with pytest.raises(AssertionError, match="shards find other ids than one piece"):
        measure(tmp_path, sizes)


def test_every_part_is_a_student_and_fewer_candidates_stand_beside() -> None:
    names = [name for name, _, _ in students("quickstart", [], ["kl=kl", "order=ranknet"])]
    assert names[0] == "plain"
    assert len(names) == len(set(names)) == 1 + 2 * (1 + 3 * 4 + 1)
    assert {"kl/all", "order/10% by query, hardness", "kl/k = 2"} <= set(names)
    in_batch = [name for name, _, _ in students("quickstart", ["train.candidates=in_batch"], ["kl=kl"])]
    assert "kl/group = 8, groupings = 1" in in_batch


@pytest.mark.slow
def test_the_whole_measurement_runs_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.subset", "--quick", "--loss", "kl=kl", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "160"}
    )
    assert "kl/25% by pair, hardness" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert 0 < figures["0/kl/10% by pair, uniform/asked"] < figures["0/kl/all/asked"]
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "RSUM 1" not in again.stdout.split("┏")[0]  # nothing is trained again
