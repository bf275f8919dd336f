"""Suspected false negatives: which they are, of what kind, and what a training step makes of them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.batches import Batches, PairScores
from distill.data.hashes import Hashes
from distill.data.matches import Matches
from distill.detection import detections, holds, round_margins
from distill.false_negatives import (
    KINDS,
    Likeness,
    NearLabelled,
    Revision,
    SameContent,
    Suspects,
    judged,
    plain_caption,
    suspects,
)
from distill.losses import MarginMSE
from distill.protocols import DIRECTIONS, Candidates
from distill.sampler import BatchSampler, CandidateSampler
from distill.step_loss import scored_of

N_IMAGES, CAPTIONS = 20, 2
N_TEXTS = N_IMAGES * CAPTIONS
ROWS = np.arange(N_TEXTS)
MATCHES = Matches(ROWS // CAPTIONS, ROWS, n_images=N_IMAGES, n_texts=N_TEXTS)
SCORES = np.random.default_rng(7).normal(size=(N_IMAGES, N_TEXTS)).astype(np.float32)
TRUTH = np.random.default_rng(8).random(SCORES.shape) < 0.2


def score(images, texts):
    return SCORES[images, texts]


def never(images, texts):
    return np.zeros(len(images), bool)


def mined(direction: str, k: int = 5) -> Candidates:
    """k non-matches a query in random order; one query has fewer."""
    rng = np.random.default_rng(3)
    n_queries, n_items = (N_IMAGES, N_TEXTS) if direction == "i2t" else (N_TEXTS, N_IMAGES)
    ids = np.full((n_queries, k), -1, np.int64)
    for query in range(n_queries):
        others = [item for item in range(n_items) if not is_match(direction, query, item)]
        ids[query] = rng.choice(others, k, replace=False)
    ids[4, 3:] = -1
    return Candidates(direction, np.arange(n_queries), ids, np.zeros(ids.shape, np.float32), np.zeros(ids.shape, bool))


def is_match(direction: str, query: int, item: int) -> bool:
    image, text = (query, item) if direction == "i2t" else (item, query)
    return text // CAPTIONS == image


def slow_suspects(found: Candidates, margin: float) -> list[tuple[int, int, float, float]]:
    listed = []
    for row, query in enumerate(found.query_ids.tolist()):
        for item in found.item_ids[row].tolist():
            if item < 0:
                continue
            pair = (query, item) if found.direction == "i2t" else (item, query)
            if found.direction == "i2t":
                best = max(SCORES[query, query * CAPTIONS + n] for n in range(CAPTIONS))
            else:
                best = SCORES[query // CAPTIONS, query]
            if SCORES[pair] > best + np.float32(margin):
                listed.append((query, item, float(SCORES[pair]), float(best)))
    return listed


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("margin", [0.0, 0.5, -0.25])
def test_suspects_are_those_of_a_loop(direction: str, margin: float) -> None:
    found = suspects(judged(mined(direction), score, MATCHES), direction, margin=margin, same=never, near=never)
    expected = slow_suspects(mined(direction), margin)
    assert list(zip(found.query_ids, found.item_ids, found.scores, found.labelled, strict=True)) == expected
    assert len(expected) > 3
    assert found.candidates == int((mined(direction).item_ids >= 0).sum())
    assert found.counts() == {"same_image": 0, "near_duplicate": 0, "disagreement": len(expected)}
    pairs = found.image_ids * N_TEXTS + found.text_ids
    assert not np.isin(pairs, MATCHES.keys).any()


def test_a_match_among_the_candidates_is_no_suspect() -> None:
    found = mined("i2t")
    ids, positive = found.item_ids.copy(), found.positive.copy()
    best = [max((0, 1), key=lambda n, q=query: SCORES[q, 2 * q + n]) + 2 * query for query in range(N_IMAGES)]
    ids[:, 0], positive[:, 0] = best, True
    some = judged(replace(found, item_ids=ids, positive=positive), score, MATCHES)
    assert not MATCHES.is_match(some.query_ids, some.item_ids).any()


def test_a_query_without_a_scored_match_is_an_error() -> None:
    known = PairScores.of(np.array([0]), np.array([5]), np.array([1.0], np.float32), N_TEXTS)
    with pytest.raises(ValueError, match="score"):
        judged(mined("i2t"), known.lookup, MATCHES)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_same_content_is_a_labelled_pair_in_other_rows() -> None:
    contents = ["a", "b", "a", "c"]  # images 0 and 2 are copies
    texts = ["A dog.", "two  cats", "a dog", "Two cats!", "a dog runs"]
    labelled = Matches(np.array([0, 1, 3, 2, 2]), np.array([0, 1, 2, 3, 4]), n_images=4, n_texts=5)
    same = SameContent(labelled, contents, texts)
    for image in range(4):
        for text in range(5):
            expected = any(
                contents[i] == contents[image] and plain_caption(texts[t]) == plain_caption(texts[text])
                for i, t in labelled.pairs().tolist()
            )
            assert bool(same(np.array([image]), np.array([text]))[0]) == expected, (image, text)
    assert same(np.array([0, 2, 3, 1]), np.array([4, 2, 0, 0])).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A dog.", "a  dog", True),
        ("a dog", "a cat", False),
        ("un cafe\u0301", "un caf\u00e9 .", True),
        ("a dog?", "a dog", False),
    ],
)
def test_captions_are_equal_to_a_reader(one: str, other: str, equal: bool) -> None:
    assert (plain_caption(one) == plain_caption(other)) is equal


def test_a_near_duplicate_is_near_any_picture_of_its_caption() -> None:
    bits = np.array([0b0000, 0b0001, 0b1111, 0b0011], np.uint64)
    hashes = Hashes(np.arange(4), bits, np.array([False, False, False, False]))
    labelled = Matches(np.array([0, 2, 2]), np.array([0, 0, 1]), n_images=4, n_texts=2)
    near = NearLabelled(labelled, Likeness(hashes, 1))
    # caption 0 is of pictures 0 and 2; 1 differs from 0 in one bit, 3 from both in two
    assert near(np.array([1, 3, 1]), np.array([0, 0, 1])).tolist() == [True, False, False]
    assert NearLabelled(labelled, Likeness(hashes, 2))(np.array([3, 3]), np.array([0, 1])).tolist() == [True, True]
    flat = replace(hashes, flat=np.ones(4, bool))
    assert not NearLabelled(labelled, Likeness(flat, 64))(np.array([1, 3]), np.array([0, 0])).any()


def test_vectors_tell_near_duplicates_too() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    alike = Likeness(vectors=vectors, vector_rows=np.array([1, 4, 6]), cosine=0.9)
    one, other = np.array([1, 4, 1, 4, 0]), np.array([4, 6, 6, 4, 1])
    assert alike(one, other).tolist() == [False, True, False, True, False]
    hashes = Hashes(np.array([1, 4]), np.zeros(2, np.uint64), np.zeros(2, bool))
    assert replace(alike, hashes=hashes)(one, other).tolist() == [True, True, False, True, False]


def test_kinds_go_from_the_surest_to_the_least() -> None:
    everything = judged(mined("t2i"), score, MATCHES)
    found = suspects(
        everything,
        "t2i",
        margin=0,
        same=lambda images, texts: images % 3 == 0,
        near=lambda images, texts: (images + texts) % 2 == 0,
    )
    for image, text, kind in zip(found.image_ids, found.text_ids, found.kinds, strict=True):
        expected = "same_image" if image % 3 == 0 else "near_duplicate" if (image + text) % 2 == 0 else "disagreement"
        assert KINDS[kind] == expected
    assert min(found.counts().values()) > 0
    assert sum(found.counts().values()) == len(found.kinds)


# --- against the truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_precision_and_recall_are_those_of_a_count_by_hand(direction: str) -> None:
    truth = Matches(*np.nonzero(TRUTH), n_images=N_IMAGES, n_texts=N_TEXTS)
    everything = judged(mined(direction), score, MATCHES)
    true = holds(everything, direction, truth)
    for margin, one in zip((0.0, 0.8), detections(everything, true, (0.0, 0.8)), strict=True):
        hits = {(query, item) for query, item, _, _ in slow_suspects(mined(direction), margin)}
        right = 0
        hidden = 0
        for row, query in enumerate(mined(direction).query_ids.tolist()):
            for item in mined(direction).item_ids[row].tolist():
                pair = (query, item) if direction == "i2t" else (item, query)
                if item >= 0 and TRUTH[pair]:
                    hidden += 1
                    right += (query, item) in hits
        assert (one.margin, one.suspected, one.true, one.both) == (margin, len(hits), hidden, right)
        assert one.precision == right / len(hits)
        assert one.recall == right / hidden
        assert 0 < right < hidden
    (none,) = detections(everything, true, [1e9])
    assert (none.precision, none.recall, none.suspected) == (None, 0.0, 0)
    (empty,) = detections(everything, np.zeros(len(true), bool), [0.0])
    assert (empty.precision, empty.recall) == (0.0, None)


def test_margins_hold_the_own_one() -> None:
    margins = round_margins([judged(mined("i2t"), score, MATCHES)], 0.123)
    assert margins == sorted(set(margins))
    assert 0.123 in margins
    assert 6 <= len(margins) <= 14


# --- in a step --------------------------------------------------------------------------------------------------------


def source(rows: np.ndarray) -> dict[str, torch.Tensor]:
    return {"row": torch.from_numpy(rows.copy())}


def found_in_both(kinds_of) -> list[Suspects]:
    """Suspects of both directions; their kinds are a function of the pair."""
    made = []
    for direction in DIRECTIONS:
        found = suspects(judged(mined(direction), score, MATCHES), direction, margin=0, same=never, near=never)
        kinds = np.array([kinds_of(i, t) for i, t in zip(found.image_ids, found.text_ids, strict=True)], np.int8)
        made.append(replace(found, kinds=kinds))
    return made


@pytest.fixture(scope="module")
def plain() -> Batches:
    lists = [mined(direction) for direction in DIRECTIONS]
    asked = [found.pairs() for found in lists] + [(MATCHES.pairs()[:, 0], MATCHES.pairs()[:, 1])]
    images, texts = (np.concatenate(side) for side in zip(*asked, strict=True))
    known = PairScores.of(images, texts, score(images, texts), N_TEXTS)
    samplers = tuple(CandidateSampler(found, 3, 0) for found in lists)
    return Batches(BatchSampler(MATCHES.pairs(), 12, 0), source, source, MATCHES, known, samplers)


def cells(batches: Batches, step: int):
    """(direction, image, text, grid, row, column) of every cell of a step."""
    made = batches[step]
    for direction, grid in made.grids.items():
        queries, items = (made.image_ids, made.text_ids) if direction == "i2t" else (made.text_ids, made.image_ids)
        for r, query in enumerate(queries[grid.rows.numpy()].tolist()):
            for c, item in enumerate(items.tolist()):
                pair = (query, item) if direction == "i2t" else (item, query)
                yield direction, *pair, grid, r, c


def test_each_cell_of_a_suspect_is_treated_and_no_other(plain: Batches) -> None:
    found = found_in_both(lambda image, text: (image + text) % 3)
    kind_of = {
        (i, t): KINDS[k] for part in found for i, t, k in zip(part.image_ids, part.text_ids, part.kinds, strict=True)
    }
    revision = Revision.of(found, ("mask", "promote", "keep"), n_texts=N_TEXTS, keep_share=0.5, seed=0)
    revised = pickle.loads(pickle.dumps(replace(plain, revision=revision)))
    treated = {"mask": set(), "promote": set()}
    for step in range(4):
        unrevised = plain[step].grids
        for direction, image, text, grid, r, c in cells(revised, step):
            kind = kind_of.get((image, text))
            assert bool(grid.valid[r, c]) == (kind != "same_image")
            assert bool(grid.positive[r, c]) == (kind == "near_duplicate" or text // CAPTIONS == image)
            assert np.array_equal(grid.teacher[r, c], unrevised[direction].teacher[r, c], equal_nan=True)
            for name, of in (("mask", "same_image"), ("promote", "near_duplicate")):
                if kind == of:
                    treated[name].add((direction, bool(grid.in_batch[r, c])))
    everywhere = {(direction, own) for direction in DIRECTIONS for own in (True, False)}
    assert treated == {"mask": everywhere, "promote": everywhere}


def test_keeping_all_changes_no_bit(plain: Batches) -> None:
    kept = Revision.of(
        found_in_both(lambda i, t: 2), ("mask", "promote", "keep"), n_texts=N_TEXTS, keep_share=0.5, seed=0
    )
    assert len(kept.arrays[0]) == 0
    for step in range(3):
        for direction, grid in plain[step].grids.items():
            assert grid.valid is None
            other = replace(plain, revision=kept)[step].grids[direction]
            for name in ("rows", "teacher", "positive", "in_batch"):
                assert torch.equal(getattr(grid, name).nan_to_num(9), getattr(other, name).nan_to_num(9))
            assert bool(other.valid.all())


def test_a_down_weighted_pair_is_there_in_its_share_of_the_steps() -> None:
    found = found_in_both(lambda image, text: 2)
    revision = Revision.of(found, ("keep", "keep", "down_weight"), n_texts=N_TEXTS, keep_share=0.3, seed=5)
    keys, _ = revision.arrays
    steps, masked = 400, {"i2t": np.zeros(len(keys)), "t2i": np.zeros(len(keys))}
    for step in range(steps):
        of_step = {}
        for direction, count in (("i2t", N_IMAGES), ("t2i", N_TEXTS)):
            queries = np.arange(count)
            offsets, items, promoted = revision.of_queries(direction, queries, step)
            assert not promoted.any()
            rows = np.repeat(queries, np.diff(offsets))
            pairs = rows * N_TEXTS + items if direction == "i2t" else items * N_TEXTS + rows
            masked[direction][np.searchsorted(keys, pairs)] += 1
            of_step[direction] = set(pairs.tolist())
            alone = [revision.of_queries(direction, np.array([query]), step)[1].tolist() for query in queries]
            assert items.tolist() == sum(alone, [])  # whatever else the step holds
        assert of_step["i2t"] == of_step["t2i"]
    assert np.array_equal(masked["i2t"], masked["t2i"])
    shares = masked["i2t"] / steps
    assert abs(shares.mean() - 0.7) < 4 * np.sqrt(0.21 / steps / len(keys))
    assert np.abs(shares - 0.7).max() < 5 * np.sqrt(0.21 / steps)
    other = Revision.of(found, ("keep", "keep", "down_weight"), n_texts=N_TEXTS, keep_share=0.3, seed=6)
    assert (
        other.of_queries("i2t", np.arange(N_IMAGES), 0)[1].tolist()
        != revision.of_queries("i2t", np.arange(N_IMAGES), 0)[1].tolist()
    )


@pytest.mark.parametrize(("share", "there"), [(0.0, False), (1.0, True)])
def test_the_ends_of_down_weighting_are_mask_and_keep(plain: Batches, share: float, there: bool) -> None:
    found = found_in_both(lambda image, text: 2)
    revision = Revision.of(found, ("keep", "keep", "down_weight"), n_texts=N_TEXTS, keep_share=share, seed=0)
    listed = set(revision.arrays[0].tolist())
    for _, image, text, grid, r, c in cells(replace(plain, revision=revision), 1):
        assert bool(grid.valid[r, c]) == (there or image * N_TEXTS + text not in listed)


def test_losses_see_the_mask_and_a_sum_over_negatives_is_weighted_on_average(plain: Batches) -> None:
    found = found_in_both(lambda image, text: 2)
    revision = Revision.of(found, ("keep", "keep", "down_weight"), n_texts=N_TEXTS, keep_share=0.4, seed=1)
    listed = set(revision.arrays[0].tolist())
    similarity = torch.from_numpy(np.random.default_rng(2).normal(size=(N_IMAGES, N_TEXTS)).astype(np.float32))
    sums, expected = [], []
    for step in range(300):
        batch = replace(plain, revision=revision)[step]
        here = similarity[batch.image_ids][:, batch.text_ids]
        scored = scored_of(here[batch.grids["i2t"].rows], batch, "i2t", torch.ones(()))
        assert torch.equal(scored.valid, batch.grids["i2t"].valid)
        negative = scored.valid & ~scored.positive
        sums.append(float((scored.student.exp() * negative).sum()))
        keys = batch.image_ids[batch.grids["i2t"].rows][:, None] * N_TEXTS + batch.text_ids
        weight = torch.from_numpy(np.where(np.isin(keys, list(listed)), 0.4, 1.0))
        expected.append(float((scored.student.exp() * weight * ~scored.positive).sum()))
        without = replace(scored, teacher=scored.teacher.masked_fill(~scored.valid, float("nan")))
        assert torch.equal(MarginMSE()(scored), MarginMSE()(without))
    differences = np.array(sums) - np.array(expected)
    assert np.std(differences) > 0
    assert abs(differences.mean()) < 4 * np.std(differences) / np.sqrt(len(differences))
    assert abs(differences.mean()) < 0.02 * np.mean(expected)
