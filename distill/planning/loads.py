"""How many items one step of a student's training encodes, and how many pairs a round asks the teacher: counting only.

Items are drawn, so numbers are expectations. Mined candidates crowd: some items are among the hardest of many queries
and others of none. A number of equally likely items that would give as few distinct ones is the *effective* number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.planning.measured import Measured, Shape, Source
from distill.planning.ranges import Range
from distill.recipe.experiment import Recipe

# Of the items of a side, how many are effectively drawn among; stated, not measured: see docs/scale.md.
CROWDING = Range(0.4, 0.65, 1.0)
# Of the pairs that both directions mine, how many are distinct; the labelled ones never are among them.
DISTINCT = Range(0.85, 0.93, 1.0)
# Of a later round's candidates, how many the round before had not.
FRESH = Range(0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Load:
    """Distinct items that a step encodes, and those it only looks at beside them."""

    images: float
    texts: float

    @property
    def items(self) -> float:
        """Both sides together."""
        return self.images + self.texts


def sources_of(recipe: Recipe, shape: Shape, measured: Measured) -> tuple[Source, ...]:
    """As measured, but that prepared inputs which would not fit ``prepared_gib`` are made anew at each use."""
    budget = recipe.prepared_gib * 2**30

    def of(source: Source) -> Source:
        items = shape.all_images if source.side == "image" else shape.all_texts
        fits = source.kind != "prepared" or source.input_bytes * items <= budget
        return source if fits else source.model_copy(update={"kind": "live", "bytes": 0})

    return tuple(map(of, measured.sources))


def drawn(draws: float, among: float) -> float:
    """Distinct ones of so many draws among so many equally likely items."""
    return among * -math.expm1(-draws / among) if among > 0 else 0.0


def own_load(shape: Shape, batch_size: int) -> Load:
    """Of a batch of labelled pairs, each once an epoch."""
    size = min(batch_size, shape.pairs)
    share = size / shape.pairs

    def distinct(items: int) -> float:
        each = shape.pairs / items  # pairs of an item
        return min(items, items * (1 - (1 - share) ** each)) if share < 1 else float(items)

    return Load(distinct(shape.images), distinct(shape.texts))


def step_load(recipe: Recipe, shape: Shape, *, crowding: float, sides: tuple[str, ...] = ("image", "text")) -> Load:
    """Of a step with mined candidates of these sides.

    With ``train.candidates: memory`` mined items are not encoded, and with ``in_batch`` there are none beside the
    batch's own.
    """
    own, train = own_load(shape, recipe.train.batch_size), recipe.train
    if train.candidates != "encode":
        return own
    found = {"image": own.images, "text": own.texts}
    asking, items = {"image": own.texts, "text": own.images}, {"image": shape.images, "text": shape.texts}
    for side in sides:
        fresh = drawn(asking[side] * train.candidates_per_query, crowding * items[side])
        found[side] += fresh * (1 - found[side] / items[side])
    return Load(found["image"], found["text"])


def asked_first(recipe: Recipe, shape: Shape) -> Range:
    """Distinct pairs that the first round asks the teacher: labelled ones, and the candidates of both directions."""
    if recipe.train.candidates == "in_batch":
        of_groups = shape.pairs * (recipe.train.group - 1) * recipe.train.groupings
        return DISTINCT * of_groups + shape.pairs
    return DISTINCT * mined_pairs(recipe, shape) + shape.pairs


def own_subset(recipe: Recipe) -> float:
    """Share of the candidates that the recipe itself has the teacher asked about."""
    subset = recipe.mine.subset
    return 1.0 if subset is None else subset.share


def asked_share(recipe: Recipe) -> float:
    """Of the distinct candidates, those that either direction draws: by query each draws a pair for itself."""
    share, subset = own_subset(recipe), recipe.mine.subset
    if subset is None or subset.unit == "pair":
        return share  # by hardness somewhat more, as far as the directions differ
    both = 1.0 if recipe.train.candidates == "in_batch" else 1 / DISTINCT.mid - 1  # of the pairs, in both directions
    return share + both * share * (1 - share)


def mined_pairs(recipe: Recipe, shape: Shape) -> float:
    """Candidates of both directions together, a pair that both have counted twice."""
    return recipe.mine.k * (float(shape.images) + shape.texts)


def asked_later(recipe: Recipe, shape: Shape, fresh: Range) -> Range:
    """Distinct pairs that a later round of one arm asks: what of its candidates is new."""
    return (asked_first(recipe, shape).less(shape.pairs)) * fresh
