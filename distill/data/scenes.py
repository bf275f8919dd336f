"""Made pictures of coloured shapes with captions, and the exact table of which caption is true of which picture.

A data set that needs no download, is hard for one vector a side and easy for a model that reads picture and caption
together: the pictures come in families that differ in one attribute or in who stands where, so that captions must be
read as bindings, not as bags of words.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from distill.data.corpus import Corpus, DataError, build_corpus
from distill.data.pictures import pictures_of_bytes
from distill.data.scene_drawing import draw_scene, png
from distill.data.scene_truth import truth_table as truth_table
from distill.data.scene_words import (
    COLOURS,
    GRID,
    SHAPES,
    SIZES,
    Caption,
    Description,
    Scene,
    Thing,
    full_captions,
)
from distill.data.scene_words import hard_negatives as hard_negatives

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SceneMix:
    """What the scenes are like.

    Attributes:
        least: Fewest things in a scene.
        most: Most things in a scene.
        family: Pictures that are near twins of one another; all but the first of each family are made from it by one
            change. 1 makes none, 2 makes half of the pictures twins.
        vague: Share of captions that leave out one attribute.
        conjunctions: Share of captions that say only "and", where that tells the picture from its twins.
    """

    least: int = 2
    most: int = 4
    family: int = 2
    vague: float = 0.0
    conjunctions: float = 0.15

    def __post_init__(self) -> None:
        if not 2 <= self.least <= self.most <= GRID * GRID:
            raise DataError(f"a scene holds 2 to {GRID * GRID} things, got least={self.least}, most={self.most}")
        if self.family < 1:
            raise DataError(f"family must be at least 1, got {self.family}")
        for name, share in (("vague", self.vague), ("conjunctions", self.conjunctions)):
            if not 0.0 <= share <= 1.0:
                raise DataError(f"{name} is a share between 0 and 1, got {share}")


@dataclass(frozen=True, eq=False)
class World:
    """A corpus of made scenes with what its pictures and captions mean, row by row."""

    corpus: Corpus
    scenes: tuple[Scene, ...]
    captions: tuple[Caption, ...]


def make_scenes(
    *,
    images: int = 8000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
    captions_per_image: int = 2,
    size: int = 48,
    mix: SceneMix | None = None,
    labelled_only: bool = False,
) -> Corpus:
    """The corpus of ``make_world``, which see."""
    return make_world(
        images=images,
        val=val,
        test=test,
        seed=seed,
        captions_per_image=captions_per_image,
        size=size,
        mix=mix,
        labelled_only=labelled_only,
    ).corpus


def make_world(
    *,
    images: int = 8000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
    captions_per_image: int = 2,
    size: int = 48,
    mix: SceneMix | None = None,
    labelled_only: bool = False,
) -> World:
    """Draws scenes and writes their captions; the same arguments give the same bytes.

    A picture and its captions depend on the seed, the split and the number within the split, not on how many there are.

    Args:
        images: Training pictures.
        val: Validation pictures.
        test: Test pictures.
        seed: Start of all randomness.
        captions_per_image: Captions written for each picture.
        size: Height and width in pixels.
        mix: What the scenes are like.
        labelled_only: Only the picture that a caption was written for counts as its match, copies neither: as in found
            data, other true pairs are then false negatives. ``Corpus.truth`` holds every true pair in either case.

    Raises:
        DataError: A count or size that makes no picture.
    """
    mix = mix or SceneMix()
    counts = {"train": images, "val": val, "test": test}
    if min(counts.values()) < 0 or not sum(counts.values()) or captions_per_image < 1 or size < 24 or seed < 0:
        raise DataError(
            "scenes need images, val, test >= 0 with one above 0, captions_per_image >= 1, size >= 24 and seed >= 0; "
            f"got {counts}, captions_per_image={captions_per_image}, size={size}, seed={seed}"
        )
    made = [
        _made(_Place(seed, number, row), captions_per_image, size=size, mix=mix)
        for number, count in enumerate(counts.values())
        for row in range(count)
    ]
    scenes = tuple(scene for scene, _, _ in made)
    captions = tuple(caption for _, written, _ in made for caption in written)
    names = [f"{split}-{row:06d}" for split, count in counts.items() for row in range(count)]
    splits = [split for split, count in counts.items() for _ in range(count)]
    rows = np.arange(len(captions), dtype=np.int64)
    contents = [content for _, _, content in made]
    truth = truth_table(scenes, captions)
    corpus = build_corpus(
        "scenes",
        pictures_of_bytes(contents, names=names, fingerprints=[hashlib.sha256(c).hexdigest() for c in contents]),
        texts=[str(caption) for caption in captions],
        pairs=np.stack([rows // captions_per_image, rows], axis=1),
        image_splits=splits,
        extra_matches=None if labelled_only else truth.pairs(),
        copies_match=not labelled_only,
    )
    return World(replace(corpus, truth=truth), scenes, captions)


@dataclass(frozen=True)
class _Place:
    """Which picture of which split: all its randomness derives from here."""

    seed: int
    split: int
    row: int

    def rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, self.split, self.row, purpose]))


_SYMBOLS, _PIXELS, _WORDS = 0, 1, 2


def _made(place: _Place, n_captions: int, *, size: int, mix: SceneMix) -> tuple[Scene, list[Caption], bytes]:
    first = place.row - place.row % mix.family
    base = _base_scene(replace(place, row=first).rng(_SYMBOLS), mix)
    family = [base] + [_twin(base, replace(place, row=first + n).rng(_SYMBOLS)) for n in range(1, mix.family)]
    scene = family.pop(place.row - first)
    captions = _write_captions(scene, family, n_captions, place.rng(_WORDS), mix)
    return scene, captions, png(draw_scene(scene, place.rng(_PIXELS), size=size))


def _base_scene(rng: np.random.Generator, mix: SceneMix) -> Scene:
    count = int(rng.integers(mix.least, mix.most + 1))
    looks = rng.choice(len(SHAPES) * len(COLOURS) * len(SIZES), size=count, replace=False)
    cells = rng.choice(GRID * GRID, size=count, replace=False)
    things = []
    for look, cell in zip(looks.tolist(), cells.tolist(), strict=True):
        rest, shape = divmod(look, len(SHAPES))
        size, colour = divmod(rest, len(COLOURS))
        things.append(Thing(SHAPES[shape], COLOURS[colour], SIZES[size], cell % GRID, cell // GRID))
    return Scene(tuple(things))


def _twin(base: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed, two colours exchanged, or two things in each other's place."""
    while True:
        changed = (_other_attribute, _exchange_colours, _exchange_places)[int(rng.integers(3))](base, rng)
        looks = {(thing.shape, thing.colour, thing.size) for thing in changed.things}
        if len(looks) == len(changed.things) and set(changed.things) != set(base.things):
            return changed


def _other_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    which = int(rng.integers(len(scene.things)))
    thing, attribute = scene.things[which], int(rng.integers(3))
    value = int(rng.integers(len((SHAPES, COLOURS, SIZES)[attribute])))
    if attribute == 0:
        return _with(scene, {which: replace(thing, shape=SHAPES[value])})
    if attribute == 1:
        return _with(scene, {which: replace(thing, colour=COLOURS[value])})
    return _with(scene, {which: replace(thing, size=SIZES[value])})


def _exchange_colours(scene: Scene, rng: np.random.Generator) -> Scene:
    a, b = rng.choice(len(scene.things), size=2, replace=False).tolist()
    one, other = scene.things[a], scene.things[b]
    return _with(scene, {a: replace(one, colour=other.colour), b: replace(other, colour=one.colour)})


def _exchange_places(scene: Scene, rng: np.random.Generator) -> Scene:
    a, b = rng.choice(len(scene.things), size=2, replace=False).tolist()
    one, other = scene.things[a], scene.things[b]
    return _with(
        scene,
        {a: replace(one, column=other.column, row=other.row), b: replace(other, column=one.column, row=one.row)},
    )


def _with(scene: Scene, changes: dict[int, Thing]) -> Scene:
    return Scene(tuple(changes.get(number, thing) for number, thing in enumerate(scene.things)))


def _write_captions(
    scene: Scene, siblings: Sequence[Scene], count: int, rng: np.random.Generator, mix: SceneMix
) -> list[Caption]:
    """Captions true of the scene and, if there are such, of none of its siblings; about different things first."""
    written: list[Caption] = []
    chosen: list[Caption] = []
    candidates = full_captions(scene)
    candidates = [candidates[number] for number in rng.permutation(len(candidates)).tolist()]
    mistaken = {caption: sum(caption.holds(sibling) for sibling in siblings) for caption in candidates}
    for _ in range(count):
        wants_and = bool(rng.random() < mix.conjunctions)
        said = [{caption.first, caption.second} for caption in chosen]
        mirrors = [caption.mirrored() for caption in chosen]

        def cost(caption: Caption) -> tuple[bool, int, bool, bool, int]:
            about = said.count({caption.first, caption.second})  # noqa: B023
            wrong_kind = (caption.relation == "and") != wants_and  # noqa: B023
            return caption in chosen, mistaken[caption], wrong_kind, caption in mirrors, about  # noqa: B023

        chosen.append(min(candidates, key=cost))
        written.append(_vaguer(chosen[-1], siblings, rng) if rng.random() < mix.vague else chosen[-1])
    return written


def _vaguer(caption: Caption, siblings: Sequence[Scene], rng: np.random.Generator) -> Caption:
    """The caption without one size or colour, if it then still tells the scene from its siblings."""
    first, second = caption.first, caption.second
    ways = [replace(caption, first=_without(first, name)) for name in ("size", "colour")]
    ways += [replace(caption, second=_without(second, name)) for name in ("size", "colour")]
    ways = [way for way in ways if not any(way.holds(sibling) for sibling in siblings)]
    return ways[int(rng.integers(len(ways)))] if ways else caption


def _without(description: Description, name: str) -> Description:
    return replace(description, size=None) if name == "size" else replace(description, colour=None)
