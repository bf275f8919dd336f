"""What a round asks of the teacher, and what is said about its answers."""

from __future__ import annotations

import logging

import numpy as np

from distill.asking import labelled_match, warn_of_odd_scores
from distill.batches import PairScores
from distill.losses.combine import Part, Weighted
from distill.protocols import Candidates

PAIRS = np.array([[3, 10], [1, 11], [3, 12], [1, 13], [2, 14]])


def test_the_labelled_match_is_the_first_of_the_query_s_own_pairs():
    assert labelled_match(PAIRS, "i2t", np.array([1, 2, 3, 1])).tolist() == [11, 14, 10, 11]
    assert labelled_match(PAIRS, "t2i", np.array([14, 10, 13])).tolist() == [2, 3, 1]


def mined(items):
    items = np.array(items)
    return {
        "i2t": Candidates(
            "i2t", np.array([1, 2, 3]), items, np.zeros(items.shape, np.float32), np.zeros(items.shape, np.bool_)
        )
    }


def warnings(scores_of_negatives, caplog):
    """Said about labelled pairs that score 5 and candidates that score as given, one row a query."""
    found = mined([[20, 21], [20, 21], [20, 21]])
    images, texts = found["i2t"].pairs()
    scores = np.concatenate([np.full(len(PAIRS), 5.0), np.array(scores_of_negatives).ravel()]).astype(np.float32)
    known = PairScores.of(np.append(PAIRS[:, 0], images), np.append(PAIRS[:, 1], texts), scores, 30)
    losses = Weighted((Part("any", 1.0, lambda scored: scored.student.sum()),))
    with caplog.at_level(logging.WARNING, "distill.asking"):
        warn_of_odd_scores(PAIRS, known, found, losses)
    return caplog.messages


def test_labelled_pairs_that_were_scored_are_not_said_to_be_missing(caplog):
    assert warnings([[1.0, -2.5], [0.5, 3.25], [-4.0, 2.0]], caplog) == []


def test_scores_that_are_all_alike_are_said(caplog):
    said = warnings([[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]], caplog)
    assert any("one and the same teacher score throughout" in message for message in said)
