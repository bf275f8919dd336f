"""The exact truth table of scenes and captions, by look-up instead of comparing every pair.

A caption is a number (its pattern); a scene is true of a few hundred patterns. Enumerating those, for all scenes at
once, and looking them up among the captions' numbers costs no more with many captions than with few.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.matches import Matches, ragged_ranges
from distill.data.scene_words import COLOURS, RELATIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distill.data.scene_words import Caption, Description, Scene
    from distill.protocols import Ids

    Flags = np.ndarray[Any, np.dtype[np.bool_]]

_DESCRIPTIONS = len(SHAPES) * (len(COLOURS) + 1) * (len(SIZES) + 1)


def truth_table(scenes: Sequence[Scene], captions: Sequence[Caption]) -> Matches:
    """Which caption holds for which scene, for every pair; equals ``caption.holds(scene)``.

    Args:
        scenes: Image row i shows ``scenes[i]``.
        captions: Text row j says ``captions[j]``.
    """
    if not scenes or not captions:
        nothing = np.zeros(0, np.int64)
        return Matches(nothing, nothing, n_images=len(scenes), n_texts=len(captions))
    codes = np.asarray([_caption_code(caption) for caption in captions], np.int64)
    patterns, pattern_of = np.unique(codes, return_inverse=True)
    members = np.argsort(pattern_of, kind="stable").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(pattern_of, minlength=len(patterns)))]).astype(np.int64)
    found_scenes, found_patterns = [], []
    for rows, stated in _true_patterns(scenes, {_said(caption) for caption in captions}):
        place = np.minimum(np.searchsorted(patterns, stated), len(patterns) - 1)
        hit = patterns[place] == stated
        found_scenes.append(rows[hit])
        found_patterns.append(place[hit])
    images, hits = np.concatenate(found_scenes), np.concatenate(found_patterns)
    offsets, places = ragged_ranges(starts[hits], starts[hits + 1])
    return Matches(np.repeat(images, np.diff(offsets)), members[places], n_images=len(scenes), n_texts=len(captions))


def _true_patterns(scenes: Sequence[Scene], said: set[tuple[bool, ...]]) -> Iterator[tuple[Ids, Ids]]:
    """(scene rows, pattern codes) of all that holds, for each ordered pair of things and way to leave words out."""
    things = _arrays(scenes)  # (scenes, things, 5), -1 where a scene has fewer things
    for a, b in permutations(range(things.shape[1]), 2):
        there = (things[:, a, 0] >= 0) & (things[:, b, 0] >= 0)
        for colour_a, size_a, colour_b, size_b in sorted(said):
            first = _thing_code(things[:, a], colour=colour_a, size=size_a)
            second = _thing_code(things[:, b], colour=colour_b, size=size_b)
            for number, holds in enumerate(_relations(things[:, a], things[:, b])):
                rows = np.flatnonzero(there & holds)
                yield rows, _pattern(first[rows], number, second[rows])


def _relations(a: Ids, b: Ids) -> tuple[Flags, ...]:
    """(S,) bool for each of ``RELATIONS``, in that order; columns 3 and 4 hold grid column and row."""
    return a[:, 3] < b[:, 3], a[:, 3] > b[:, 3], a[:, 4] < b[:, 4], a[:, 4] > b[:, 4], np.ones(len(a), np.bool_)


def _arrays(scenes: Sequence[Scene]) -> Ids:
    most = max(len(scene.things) for scene in scenes)
    absent = [-1] * 5
    rows = []
    for scene in scenes:
        known = [
            [SHAPES.index(t.shape), COLOURS.index(t.colour), SIZES.index(t.size), t.column, t.row] for t in scene.things
        ]
        rows.append(known + [absent] * (most - len(known)))
    return np.asarray(rows, np.int64).reshape(len(scenes), most, 5)


def _thing_code(things: Ids, *, colour: bool, size: bool) -> Ids:
    """(S,) description numbers of the things, with colour and size said or left out (0)."""
    colours = things[:, 1] + 1 if colour else np.zeros(len(things), np.int64)
    sizes = things[:, 2] + 1 if size else np.zeros(len(things), np.int64)
    return np.asarray((sizes * (len(COLOURS) + 1) + colours) * len(SHAPES) + things[:, 0])


def _pattern(first: Ids, relation: int, second: Ids) -> Ids:
    return np.asarray((first * len(RELATIONS) + relation) * _DESCRIPTIONS + second)


def _caption_code(caption: Caption) -> int:
    relation = RELATIONS.index(caption.relation)
    first, second = _description_code(caption.first), _description_code(caption.second)
    return (first * len(RELATIONS) + relation) * _DESCRIPTIONS + second


def _description_code(said: Description) -> int:
    colour = 0 if said.colour is None else COLOURS.index(said.colour) + 1
    size = 0 if said.size is None else SIZES.index(said.size) + 1
    return (size * (len(COLOURS) + 1) + colour) * len(SHAPES) + SHAPES.index(said.shape)


def _said(caption: Caption) -> tuple[bool, ...]:
    """Which attributes the caption states: colour and size of the first thing, colour and size of the second."""
    first, second = caption.first, caption.second
    return first.colour is not None, first.size is not None, second.colour is not None, second.size is not None
