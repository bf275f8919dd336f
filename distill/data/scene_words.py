"""Scenes of coloured shapes as symbols, the captions that speak of them, and when a caption holds.

A caption binds attributes to two things and may relate them: "a small red ring left of a large blue square". It holds
for a scene if two different things of the scene fit the two descriptions and stand in the relation. A thing is left of
another if its grid column is smaller, above it if its grid row is; on a diagonal both are true.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below", "and")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GRID = 3
"""Rows and columns of the grid whose cells hold one thing each."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; (0, 0) is the top left cell."""

    shape: str
    colour: str
    size: str
    column: int
    row: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows; no two things share a cell or look alike."""

    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Description:
    """What a caption says of one thing; None says nothing of that attribute."""

    shape: str
    colour: str | None
    size: str | None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word is not None)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def fits(self, thing: Thing) -> bool:
        """Whether the thing is as described."""
        return self.shape == thing.shape and self.colour in (None, thing.colour) and self.size in (None, thing.size)


@dataclass(frozen=True)
class Caption:
    """Two descriptions and what is said of them together."""

    first: Description
    relation: str
    second: Description

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    def holds(self, scene: Scene) -> bool:
        """Whether the scene has two different things that make the caption true."""
        return any(
            self.first.fits(a) and self.second.fits(b) and related(self.relation, a, b)
            for a, b in permutations(scene.things, 2)
        )

    def mirrored(self) -> Caption:
        """The same statement said from the other thing: "a above b" becomes "b below a"."""
        return Caption(self.second, OPPOSITE.get(self.relation, self.relation), self.first)


def related(relation: str, a: Thing, b: Thing) -> bool:
    """Whether ``a`` stands in the relation to ``b``."""
    if relation == "left of":
        return a.column < b.column
    if relation == "right of":
        return a.column > b.column
    if relation == "above":
        return a.row < b.row
    if relation == "below":
        return a.row > b.row
    return True


def describe_fully(thing: Thing) -> Description:
    """The description that leaves nothing out."""
    return Description(thing.shape, thing.colour, thing.size)


def full_captions(scene: Scene) -> list[Caption]:
    """Every caption without dropped attributes that holds for the scene, in a fixed order."""
    return [
        Caption(describe_fully(a), relation, describe_fully(b))
        for a, b in permutations(scene.things, 2)
        for relation in RELATIONS
        if related(relation, a, b)
    ]


def hard_negatives(caption: Caption) -> list[Caption]:
    """The captions that differ in one thing: an attribute, the relation, or an attribute exchanged between the two.

    None says the same as the caption, none is there twice; the order is fixed. They need not be false of the picture
    that the caption was written for.
    """
    first, relation, second = caption.first, caption.relation, caption.second
    changed = [Caption(other, relation, second) for other in _one_attribute_off(first)]
    changed += [Caption(first, relation, other) for other in _one_attribute_off(second)]
    if relation in OPPOSITE:
        changed += [Caption(first, other, second) for other in OPPOSITE if other != relation]
    for name in ("shape", "colour", "size"):
        a, b = getattr(first, name), getattr(second, name)
        if a is not None and b is not None and a != b:
            changed.append(Caption(replace(first, **{name: b}), relation, replace(second, **{name: a})))
    same = {caption, caption.mirrored()}
    return [other for other in dict.fromkeys(changed) if other not in same]


def _one_attribute_off(description: Description) -> Iterator[Description]:
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        said = getattr(description, name)
        if said is not None:
            for value in values:
                if value != said:
                    yield replace(description, **{name: value})
