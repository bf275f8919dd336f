"""The benchmark of mining runs, all its ways find the same, and a wrong answer stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mining import CAPTIONS, Sizes, check, make_vectors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_whole_run_prints_a_table_and_writes_every_way(tmp_path):
    command = [sys.executable, "-m", "benchmarks.mining", "--images", "200", "--torch", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "COLUMNS": "160"}
    )
    assert "200 images x 1,000 captions" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    for way in ("ours", "numpy", "sentence_transformers", "sentence_transformers_faiss"):
        assert figures[f"{way}_s"] > 0
        assert figures[f"{way}_bytes"] >= 0
    assert figures["ratio_ours"] == 1


def test_a_match_among_the_negatives_and_a_missed_one_stop_it(tmp_path):
    make_vectors(tmp_path, Sizes(images=200, width=16, k=3))
    images, texts = (np.load(tmp_path / f"{name}.npy") for name in ("images", "texts"))
    owner = np.arange(len(texts)) // CAPTIONS
    found = {}
    for direction, query, item, own in (
        ("i2t", images, texts, owner == np.arange(len(images))[:, None]),
        ("t2i", texts, images, owner[:, None] == np.arange(len(images))),
    ):
        found[direction] = np.argsort(-np.where(own, -np.inf, query @ item.T), axis=1)[:, :3]
    check(images, texts, found, 3)
    with_match = found["i2t"].copy()
    with_match[0, 1] = 2  # caption 2 belongs to image 0
    with pytest.raises(AssertionError, match="i2t: query 0 got a match"):
        check(images, texts, {**found, "i2t": with_match}, 3)
    far = found["t2i"].copy()
    far[-1, 0] = (texts[-1] @ images.T).argmin()
    with pytest.raises(AssertionError, match="missed some"):
        check(images, texts, {**found, "t2i": far}, 3)
