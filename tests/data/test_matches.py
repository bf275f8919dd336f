"""Matches against a set of pairs and double loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.matches import Matches, copies_too


@st.composite
def pair_sets(draw):
    n_images, n_texts = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    pair = st.tuples(st.integers(0, n_images - 1), st.integers(0, n_texts - 1))
    return n_images, n_texts, draw(st.lists(pair, max_size=30))


def matches_of(n_images, n_texts, pairs):
    rows = np.asarray(pairs, np.int64).reshape(-1, 2)
    return Matches(rows[:, 0], rows[:, 1], n_images=n_images, n_texts=n_texts)


@given(pair_sets())
@settings(max_examples=60, deadline=None)
def test_every_view_equals_the_set_of_pairs(made):
    n_images, n_texts, pairs = made
    matches, true = matches_of(*made), set(pairs)
    images, texts = np.arange(-1, n_images)[:, None], np.arange(-1, n_texts)[None, :]
    table = matches.is_match(images, texts)
    assert table.shape == (n_images + 1, n_texts + 1)
    for image in range(-1, n_images):
        for text in range(-1, n_texts):
            assert table[image + 1, text + 1] == ((image, text) in true)
    assert len(matches) == len(true)
    assert [tuple(pair) for pair in matches.pairs().tolist()] == sorted(true)
    for image in range(n_images):
        assert matches.texts_of(image).tolist() == sorted(t for i, t in true if i == image)
    for text in range(n_texts):
        assert matches.images_of(text).tolist() == sorted(i for i, t in true if t == text)


@given(pair_sets(), st.data())
@settings(max_examples=60, deadline=None)
def test_slices_equal_one_look_up_a_query(made, data):
    n_images, n_texts, _ = made
    matches = matches_of(*made)
    for direction, count, one in (("i2t", n_images, matches.texts_of), ("t2i", n_texts, matches.images_of)):
        queries = data.draw(st.lists(st.integers(0, count - 1), max_size=6))
        offsets, items = matches.of(direction, np.asarray(queries, np.int64))
        assert offsets.shape == (len(queries) + 1,)
        assert offsets[-1] == len(items)
        for place, query in enumerate(queries):
            assert items[offsets[place] : offsets[place + 1]].tolist() == one(query).tolist()


def test_rows_outside_the_corpus_are_refused():
    with pytest.raises(ValueError, match=r"image ids must lie in 0\.\.1, got 0\.\.2"):
        matches_of(2, 2, [(0, 0), (2, 1)])
    matches = matches_of(2, 2, [(0, 0)])
    with pytest.raises(ValueError, match="text id 2 is outside the corpus, which has 2 texts"):
        matches.is_match(np.asarray([0]), np.asarray([2]))
    with pytest.raises(ValueError, match=r"take -1 \(no item\) out"):
        matches.of("i2t", np.asarray([0, -1]))
    with pytest.raises(ValueError, match=r"got 0\.\.5|got 5\.\.5"):
        matches.images_of(5)
    with pytest.raises(ValueError, match=r"must both be \(P,\), got \(1,\) and \(2,\)"):
        Matches(np.asarray([0]), np.asarray([0, 1]), n_images=1, n_texts=2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_copies_match_whatever_their_originals_match(pairs, data):
    images = data.draw(st.lists(st.sampled_from("abcd"), min_size=6, max_size=6))
    texts = data.draw(st.lists(st.sampled_from("pqrst"), min_size=8, max_size=8))
    true = {(images[i], texts[t]) for i, t in pairs}
    slow = {(i, t) for i in range(6) for t in range(8) if (images[i], texts[t]) in true}
    found = copies_too(np.asarray(pairs, np.int64), images, texts)
    assert {tuple(pair) for pair in found.tolist()} == slow
