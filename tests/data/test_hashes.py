"""Perceptual hashes: near for edited copies, far for other pictures, nothing for flat ones; kept on disk."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from distill.data import hashes as module
from distill.data.corpus import build_corpus
from distill.data.hashes import UNLIKE, Hashes, corpus_hashes, perceptual_hashes
from distill.data.pictures import pictures_of_bytes
from distill.protocols import fingerprint

NEAR = 8


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> PIL.Image.Image:
    """A smooth random field in colour, with some grain: what a photograph looks like to a hash."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    field = np.zeros((size[1], size[0], 3))
    for _ in range(30):
        u, v, phase = rng.uniform(-6, 6, 2).tolist() + [rng.uniform(0, 6)]
        field += rng.normal(size=3) * np.cos(2 * np.pi * (u * x + v * y) + phase)[..., None]
    field = 128 + 35 * field / field.std() + rng.normal(scale=3, size=field.shape)
    return PIL.Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


def recoded(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    file = BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return PIL.Image.open(BytesIO(file.getvalue())).convert("RGB")


EDITS = {
    "jpeg": lambda image: recoded(image, 40),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "other proportions": lambda image: image.resize((200, 200)),
    "brighter": lambda image: PIL.ImageEnhance.Brightness(image).enhance(1.1),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_near_and_other_pictures_far(edit: str) -> None:
    originals = [picture(seed) for seed in range(12)]
    bits, flat = perceptual_hashes(originals)
    copies, _ = perceptual_hashes([EDITS[edit](image) for image in originals])
    assert not flat.any()
    apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in copies] for a in bits])
    assert apart.diagonal().max() <= NEAR
    assert apart[~np.eye(12, dtype=bool)].min() > 2 * NEAR


def test_a_bit_says_whether_a_low_frequency_lies_above_the_median() -> None:
    image = picture(3, (32, 32)).convert("L")
    pixels = np.asarray(image, np.float64)
    basis = np.array([[np.cos(np.pi * (2 * n + 1) * k / 64) for n in range(32)] for k in range(32)])
    spectrum = basis @ pixels @ basis.T * np.outer(*2 * [np.where(np.arange(32) == 0, np.sqrt(1 / 32), 0.25)])
    order = sorted((r + c, r, c) for r in range(32) for c in range(32))[1:65]
    low = [spectrum[r, c] for _, r, c in order]
    expected = sum(1 << place for place, value in enumerate(low) if value > np.median(low))
    assert int(perceptual_hashes([image.convert("RGB")])[0][0]) == expected


def test_flat_pictures_have_no_hash_and_are_near_nobody() -> None:
    shades = [PIL.Image.new("RGB", (40, 40), (shade, shade, shade)) for shade in (0, 90, 255)]
    rng = np.random.default_rng(0)
    grain = PIL.Image.fromarray(rng.integers(125, 131, (64, 64, 3), dtype=np.uint8))  # noise of a dark sensor
    bits, flat = perceptual_hashes([*shades, grain, picture(1)])
    assert flat.tolist() == [True, True, True, True, False]
    known = Hashes(np.array([2, 4, 6, 7, 9]), bits, flat)
    assert known.distance(np.array([2, 2, 9, 9]), np.array([4, 2, 2, 9])).tolist() == [UNLIKE, UNLIKE, UNLIKE, 0]


def test_a_row_without_a_hash_is_unlike_all() -> None:
    known = Hashes(np.array([3, 5]), np.array([0b1011, 0b0001], np.uint64), np.zeros(2, bool))
    asked = np.array([3, 3, 4, 9, 5]), np.array([5, 3, 3, 3, 8])
    assert known.distance(*asked).tolist() == [2, 0, UNLIKE, UNLIKE, UNLIKE]
    nobody = Hashes(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, bool))
    assert nobody.distance(np.array([0]), np.array([0])).tolist() == [UNLIKE]
    assert [len(part) for part in perceptual_hashes([])] == [0, 0]


def corpus_of(count: int):
    contents = []
    for seed in range(count):
        file = BytesIO()
        picture(seed, (40, 30)).save(file, format="PNG")
        contents.append(file.getvalue())
    pictures = pictures_of_bytes(
        contents, names=[str(row) for row in range(count)], fingerprints=[fingerprint(content) for content in contents]
    )
    pairs = np.stack([np.arange(count)] * 2, axis=1)
    return build_corpus(
        "hashed", pictures, texts=[f"caption {n}" for n in range(count)], pairs=pairs, image_splits=["train"] * count
    )


def test_hashes_of_a_corpus_are_made_in_blocks_once(tmp_path, monkeypatch) -> None:
    corpus, rows = corpus_of(11), np.arange(1, 11)
    loads = []
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(
        type(corpus), "load_images", lambda self, rows: loads.append(len(rows)) or self.pictures.load(rows)
    )
    made = corpus_hashes(corpus, rows, tmp_path)
    assert loads == [4, 4, 2]
    assert made.bits.tolist() == perceptual_hashes(corpus.pictures.load(rows))[0].tolist()
    again = corpus_hashes(corpus, rows, tmp_path)
    assert loads == [4, 4, 2]
    assert again.bits.tolist() == made.bits.tolist()
    corpus_hashes(corpus, rows[:3], tmp_path)
    assert loads == [4, 4, 2, 3]
