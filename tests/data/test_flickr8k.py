"""The real Flickr8k, where it is at hand."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from distill.data.karpathy import load_karpathy
from distill.data.reading import ReadOptions
from distill.data.summary import describe

SHARED = Path(os.environ.get("CROSS2DUAL_SHARED") or Path(__file__).resolve().parents[3] / "shared")
FOLDER = SHARED / "data" / "flickr8k-160"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "dataset_flickr8k.json").is_file(), reason=f"no Flickr8k at {FOLDER} (set CROSS2DUAL_SHARED)"
)


def test_flickr8k_is_whole_and_loads_fast_the_second_time(tmp_path):
    options = ReadOptions(cache=tmp_path)
    corpus = load_karpathy(FOLDER / "dataset_flickr8k.json", FOLDER / "images", options=options)
    assert (corpus.n_images, corpus.n_texts, len(corpus.pairs)) == (8_000, 40_000, 40_000)
    assert {name: (len(split.images), len(split.texts)) for name, split in corpus.splits.items()} == {
        "train": (6_000, 30_000),
        "val": (1_000, 5_000),
        "test": (1_000, 5_000),
    }
    assert corpus.skipped == ()
    found = describe(corpus)
    assert (found.captions_per_image.least, found.captions_per_image.most) == (5, 5)
    assert found.matches >= 40_000
    images = corpus.load_images(corpus.split("test").images[:8])
    assert all(np.asarray(image).shape == (160, 160, 3) for image in images)
    start = time.perf_counter()
    again = load_karpathy(FOLDER / "dataset_flickr8k.json", FOLDER / "images", options=options)
    assert time.perf_counter() - start < 10  # about 1 s on a quiet machine
    assert again.fingerprint == corpus.fingerprint
