"""What the proof measures, against slow loops; and what its gates let through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distill.export.odd import odd_pictures
from distill.export.proof import GATES, Agreement, Gate, Sample, faults
from tests.toys import toy_corpus

GOOD = Agreement(1e-7, 1.0, 1.0, 1.0, 1.0, {"i2t_r1": 0.0, "t2i_r10": 0.0}, 1e-7, {"plain": 1.0}, {"1": 1.0})


def unit(rng, n, width=6):
    found = rng.normal(size=(n, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def sample():
    corpus, rng = toy_corpus(40, captions=3), np.random.default_rng(0)
    ids = corpus.split("test").ids
    reference = {side: unit(rng, len(rows)) for side, rows in ids.items()}
    return Sample(corpus, ids, reference, {side: unit(rng, 3) for side in ids})


def slow_recalls(sample, images, texts):
    found = {}
    similarity = images.astype(np.float64) @ texts.T.astype(np.float64)
    truth = np.array(
        [
            [text in sample.corpus.matches.texts_of(image) for text in sample.ids["text"]]
            for image in sample.ids["image"]
        ]
    )
    for way, table, true in (("i2t", similarity, truth), ("t2i", similarity.T, truth.T)):
        ranks = []
        for row, right in zip(table, true, strict=True):
            best = max(value for value, yes in zip(row, right, strict=True) if yes)
            ranks.append(1 + sum(value >= best for value, yes in zip(row, right, strict=True) if not yes))
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
    return found


@pytest.mark.parametrize("sides", [("text",), ("image",), ("text", "image")])
def test_agreement_is_what_a_slow_loop_finds(sample, sides):
    rng = np.random.default_rng(1)
    noisy = {}
    for side in sides:
        moved = sample.reference[side] + rng.normal(0, 0.2, sample.reference[side].shape).astype(np.float32)
        noisy[side] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    found = sample.agreement(noisy)
    cosines = [float(a @ b) for side in sides for a, b in zip(noisy[side], sample.reference[side], strict=True)]
    assert found.least_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert found.mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert found.largest_difference == pytest.approx(
        max(np.abs(noisy[side] - sample.reference[side]).max() for side in sides)
    )
    both = {**sample.reference, **noisy}
    before = slow_recalls(sample, sample.reference["image"], sample.reference["text"])
    after = slow_recalls(sample, both["image"], both["text"])
    assert found.recall_change == pytest.approx({name: after[name] - before[name] for name in after}, abs=1e-3)
    assert any(found.recall_change.values())  # else this would show nothing
    firsts, tens = [], []
    for side in sides:
        other = "text" if side == "image" else "image"
        for row, was in zip(noisy[side], sample.reference[side], strict=True):
            now_best = np.argsort(-(both[other] @ row), kind="stable")[:10]
            was_best = np.argsort(-(sample.reference[other] @ was), kind="stable")[:10]
            firsts.append(now_best[0] == was_best[0])
            tens.append(len(set(now_best) & set(was_best)) / len(was_best))
    assert (found.top1, found.top10) == pytest.approx((np.mean(firsts), np.mean(tens)))
    assert 0 < found.top1 < 1


def test_the_reference_agrees_with_itself(sample):
    found = sample.agreement(sample.reference)
    assert found.least_cosine == pytest.approx(1, abs=1e-6)
    assert (found.top1, found.top10) == (1, 1)
    assert not any(found.recall_change.values())
    assert not faults(found, GATES["fp32"], precision="fp32")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"least_cosine": 0.99989}, "least cosine 0.999890, wanted 0.9999"),
        ({"least_cosine": float("nan")}, "least cosine nan"),
        ({"odd": {"grey": 0.99}}, "on 'grey'"),
        ({"odd": {"grey": float("nan")}}, "on 'grey'"),
        ({"batches": {"17": 0.99}}, "between batches of 17"),
        ({"norm_error": 0.01}, "length is off by 0.0100"),
        ({"norm_error": float("nan")}, "length is off"),
        ({"recall_change": {"t2i_r5": -0.11}}, "text→image R@5 changes by -0.11 points, allowed 0.1"),
        ({"recall_change": {"i2t_r10": 0.11}}, "image→text R@10 changes by +0.11"),
    ],
)
def test_each_gate_of_float32_stops_what_it_is_for(change, word):
    assert not faults(GOOD, GATES["fp32"], precision="fp32")
    said = faults(replace(GOOD, **change), GATES["fp32"], precision="fp32")
    assert len(said) == 1
    assert word in said[0]


def test_int8_is_judged_by_drops_of_recall_alone():
    found = replace(GOOD, least_cosine=0.9, recall_change={"i2t_r1": 3.0, "t2i_r1": -1.0}, odd={"grey": 0.5})
    assert not faults(found, GATES["int8"], precision="int8")
    worse = replace(found, recall_change={"i2t_r1": 3.0, "t2i_r1": -1.01})
    assert faults(worse, GATES["int8"], precision="int8") == ["text→image R@1 changes by -1.01 points, allowed 1"]
    assert faults(worse, Gate(None, 2.0), precision="int8") == []


def test_odd_pictures_are_as_odd_as_they_say():
    import io

    import PIL.Image

    opened = {kind: PIL.Image.open(io.BytesIO(content)) for kind, content in odd_pictures().items()}
    assert {kind: image.mode for kind, image in opened.items()} == {
        "plain": "RGB",
        "grey": "L",
        "RGBA": "RGBA",
        "palette": "P",
        "16-bit grey": "I;16",
        "CMYK": "CMYK",
        "EXIF-rotated": "RGB",
        "1 x 1": "RGB",
        "700 x 3": "RGB",
        "3 x 700": "RGB",
        "1025 x 769": "RGB",
    }
    assert opened["EXIF-rotated"].getexif()[0x0112] == 6
    assert np.asarray(opened["16-bit grey"]).max() > 255
    assert opened["RGBA"].getchannel("A").getextrema() == (0, 255)
    assert odd_pictures() == odd_pictures()
