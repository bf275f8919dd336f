"""What was found about an image is kept, and used only while it is still true."""

import json
import os

import numpy as np
import pytest
from PIL import ImageFile

from distill.data import verify
from distill.data.corpus import DataError

from .making import Source, encoded


@pytest.fixture
def decoded(monkeypatch):
    """Counts of full decodes."""
    seen = []
    real = verify.decode_image

    def counted(content, *, max_pixels):
        seen.append(len(content))
        return real(content, max_pixels=max_pixels)

    monkeypatch.setattr(verify, "decode_image", counted)
    return seen


@pytest.mark.parametrize("kind", ["karpathy", "jsonl", "csv", "hub"])
def test_a_second_load_decodes_nothing_and_is_the_same(tmp_path, decoded, kind):
    source = Source(tmp_path, kind)
    first = source.load(cache=tmp_path / "cache")
    assert len(decoded) == 6
    second = source.load(cache=tmp_path / "cache")
    assert len(decoded) == 6
    assert first.fingerprint == second.fingerprint
    source.load()
    assert len(decoded) == 12  # without a cache folder every image is looked at


def test_changed_files_are_looked_at_again(tmp_path, decoded):
    source, cache = Source(tmp_path, "csv"), tmp_path / "cache"
    first = source.load(cache=cache)
    file = source.images / "img1.png"
    file.write_bytes(encoded(77))
    second = source.load(cache=cache)
    assert len(decoded) == 7
    assert first.fingerprint != second.fingerprint
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    source.load(cache=cache)
    assert len(decoded) == 8
    source.load(cache=cache, max_pixels=10_000)
    assert len(decoded) == 14


def test_reasons_are_kept_too_but_not_of_missing_files(tmp_path, decoded):
    source, cache = Source(tmp_path, "jsonl"), tmp_path / "cache"
    whole = (source.images / "img1.png").read_bytes()
    (source.images / "img1.png").write_bytes(whole[:60])
    (source.images / "img2.png").unlink()
    options = {"cache": cache, "on_bad_item": "skip", "max_skip_rate": 0.5}
    first = source.load(**options)
    second = source.load(**options)
    assert len(decoded) == 5
    assert first.skipped == second.skipped
    assert len(first.skipped) == 2
    (source.images / "img1.png").write_bytes(whole)
    (source.images / "img2.png").write_bytes(encoded(2))
    assert source.load(**options).skipped == ()


@pytest.mark.parametrize("spoil", ["{", "[]", '{"verdicts": {"a": 3}}', "{}", "\x00"])
def test_a_cache_that_cannot_be_read_is_replaced(tmp_path, decoded, spoil):
    source, cache = Source(tmp_path, "csv"), tmp_path / "cache"
    first = source.load(cache=cache)
    (file,) = cache.iterdir()
    file.write_text(spoil)
    assert source.load(cache=cache).fingerprint == first.fingerprint
    assert len(decoded) == 12
    source.load(cache=cache)
    assert len(decoded) == 12


def test_verdicts_of_another_pillow_are_not_used(tmp_path, decoded):
    source, cache = Source(tmp_path, "csv"), tmp_path / "cache"
    source.load(cache=cache)
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "pillow": "0.1"}))
    source.load(cache=cache)
    assert len(decoded) == 12


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    source, cache = Source(tmp_path, "csv"), tmp_path / "cache"
    source.load(cache=cache)
    (file,) = cache.iterdir()
    before = file.read_bytes()
    (source.images / "img1.png").write_bytes(encoded(5))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify.os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        source.load(cache=cache)
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_half_files_must_not_be_allowed_globally(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is set"):
        Source(tmp_path, "csv").load()


def test_progress_counts_every_image(tmp_path):
    from distill.data.manifest import load_manifest

    source, seen = Source(tmp_path, "csv"), []
    source.load()
    load_manifest(tmp_path / "dataset.csv", source.images, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]
    assert np.asarray(seen).shape == (6, 2)
