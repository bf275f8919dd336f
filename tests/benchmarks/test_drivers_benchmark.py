"""The benchmark of drivers runs, all its ways end with the same store, and another one stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import drivers
from benchmarks.drivers import Run, Sizes, measure

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'cross2dual[ray]'")


@pytest.mark.slow
def test_the_whole_run_prints_a_table_and_writes_every_way(tmp_path):
    command = [sys.executable, "-m", "benchmarks.drivers", "--quick", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "160"}
    )
    assert "960 pairs, 64 a unit" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    for way in ("ranks", "local", "ray"):
        assert figures[f"{way}_whole_s"] >= figures[f"{way}_first_s"] > 0
        assert figures[f"{way}_pairs_per_s"] > 0
    assert figures["ratio_local"] == 1


def test_the_better_of_all_rounds_counts_and_other_stores_stop_it(tmp_path, monkeypatch):
    rates = iter([10.0, 20.0, 5.0, 30.0, 10.0, 8.0])  # each way in turn, twice

    def run(folder, way, sizes):
        rate = next(rates)
        return Run(first_s=1 / rate, whole_s=100 / rate, pairs_per_s=rate, files={"unit": b"scores"})

    monkeypatch.setattr(drivers, "run", run)
    figures = measure(tmp_path, Sizes(rounds=2))
    assert [figures[f"{way}_pairs_per_s"] for way in ("ranks", "local", "ray")] == [30, 20, 8]
    assert figures["ratio_ray"] == 0.4
    assert figures["local_whole_s"] == 5
    monkeypatch.setattr(drivers, "run", lambda folder, way, sizes: Run(1, 2, 3, {"unit": way.encode()}))
    with pytest.raises(RuntimeError, match="different stores"):
        measure(tmp_path, Sizes(rounds=1))
