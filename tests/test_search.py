"""Answers of an index to one query."""

import numpy as np
import pytest

from distill.index import VectorIndex
from distill.search import Hit, answer, hit_lines


def test_answer_is_best_first_and_as_long_as_the_index_allows():
    index = VectorIndex.build(np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32), np.array([7, 3, 5]))
    hits = answer(index, np.array([0.0, 1.0], np.float32), 10)
    assert [hit.item_id for hit in hits] == [3, 5, 7]
    assert [hit.similarity for hit in hits] == pytest.approx([1.0, 0.8, 0.0])
    assert answer(index, np.array([[0.0, 1.0]], np.float32), 1) == hits[:1]
    with pytest.raises(ValueError, match="like the indexed items"):
        answer(index, np.zeros(3, np.float32), 1)


def test_lines():
    labels = ["a.jpg", "b.jpg", "Zürich – 東京.jpg"]
    hits = [Hit(2, 0.51234), Hit(0, -0.25), *[Hit(1, 0.0)] * 8]
    lines = hit_lines(hits, labels)
    assert lines[:2] == [" 1  +0.512  Zürich – 東京.jpg", " 2  -0.250  a.jpg"]
    assert lines[9] == "10  +0.000  b.jpg"
    assert hit_lines([], labels) == []
