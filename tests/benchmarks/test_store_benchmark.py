"""The benchmark of the score store runs, and what it says of itself holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.child import in_child
from benchmarks.made_pairs import compare, drawn_pairs, made_units, shape
from benchmarks.store import Sizes, measure

ROOT = Path(__file__).resolve().parents[2]


def test_made_pairs_are_distinct_inside_the_corpus_and_what_is_drawn_is_among_them():
    pairs = 300_000
    n_images, n_texts = shape(pairs)
    keys = np.concatenate([images * n_texts + texts for images, texts, _ in made_units(pairs)])
    assert len(keys) == pairs == len(np.unique(keys))
    assert keys.max() < n_images * n_texts
    images, texts = drawn_pairs(pairs, 1000)
    assert np.isin(images * n_texts + texts, keys).all()
    assert (np.diff(images) < 0).sum() > 300  # in random order


def test_a_wrong_score_stops_the_benchmark():
    images, texts, scores = next(made_units(2048))
    compare(scores, images, texts)
    scores[7] += 1
    with pytest.raises(AssertionError, match="1 of 2048"):
        compare(scores, images, texts)


def hold(megabytes: int) -> dict[str, float]:
    held = np.ones(megabytes << 17)
    return {"sum": float(held.sum()) / len(held)}


def test_memory_of_a_phase_is_seen_from_outside():
    small, large = in_child(hold, 1), in_child(hold, 200)
    assert large.result == {"sum": 1.0}
    assert 150e6 < large.anonymous - small.anonymous < 260e6
    assert large.resident >= large.anonymous


def test_a_phase_that_fails_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="hold ended with exit code 1"):
        in_child(hold, -1)
    assert "negative" in capfd.readouterr().err


def test_the_whole_run_prints_tables_writes_json_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.store", "--pairs", "40000", "--json", tmp_path / "out.json"]
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [*command, "--folder", tmp_path / "place"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert "looked up in random order" in done.stdout
    assert "SQLite, one join" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["pairs"], figures["lookups"], figures["write_units"]) == (40_000, 4_000, 1)
    assert all(figures[f"{name}_s"] > 0 for name in ("write", "compact", "open", "lookup", "lookup_cold"))
    assert min(figures["ratio_dict"], figures["ratio_sqlite"], figures["ratio_sqlite_join"]) > 0
    assert 0 < figures["lookup_anonymous"] <= figures["lookup_resident"]
    assert list((tmp_path / "place").iterdir()) == []


def test_sizes_are_what_is_measured(tmp_path):
    figures = measure(tmp_path, Sizes(pairs=5000, lookups=100, rival_pairs=3000, rival_lookups=50))
    assert (figures["rival_pairs"], figures["rival_lookups"]) == (3000, 50)
    assert figures["write_bytes"] > 5000 * 4
