"""What fits a budget: a share of the candidates that the teacher is asked about, fewer of them, or fewer pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from distill.planning.estimate import Assumed, Estimator, whole
from distill.planning.loads import own_subset
from distill.planning.measured import Measured, Shape
from distill.planning.ranges import Range
from distill.recipe.experiment import Recipe

HOUR = 3600.0


@dataclass(frozen=True)
class Fit:
    """What fits, each by itself with all else as it is; None where nothing of that kind makes it fit.

    Attributes:
        hours: The budget, in hours of one worker.
        needed: What the whole takes.
        share: Of the candidates that the teacher is asked about.
        k: Candidates a query.
        images: Training pictures, with the same steps of training.
        per_query: Candidates that a step draws; with fewer to choose from, as many as there are.
    """

    hours: float
    needed: Range
    share: float | None
    k: int | None
    images: int | None
    per_query: int

    @property
    def fits(self) -> bool:
        """Whether the whole does, by the middle estimate."""
        return self.needed.mid <= self.hours


def fit(recipe: Recipe, shape: Shape, measured: Measured, assumed: Assumed, *, hours: float) -> Fit:
    """The most of each that takes so many hours of one worker by the middle estimate."""

    def taken(recipe: Recipe, shape: Shape, assumed: Assumed) -> Range:
        return whole(Estimator(recipe, shape, measured, assumed).stages()).wall * (1 / HOUR)

    def with_k(k: int) -> Recipe:
        per_query = min(k, recipe.train.candidates_per_query)
        return recipe.model_copy(
            update={
                "mine": recipe.mine.model_copy(update={"k": k}),
                "train": recipe.train.model_copy(update={"candidates_per_query": per_query}),
            }
        )

    thousandths = _most(lambda n: taken(recipe, shape, replace(assumed, subset=n / 1000)).mid <= hours, 1000)
    k = _most(lambda n: taken(with_k(n), shape, assumed).mid <= hours, recipe.mine.k)
    images = _most(lambda n: taken(recipe, shape.with_images(n), assumed).mid <= hours, shape.images)
    return Fit(
        hours,
        taken(recipe, shape, assumed),
        None if thousandths is None else thousandths / 1000 * own_subset(recipe),
        k,
        images,
        recipe.train.candidates_per_query,
    )


def _most(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to ``most`` that fits, of a cost that rises with it; None where not even 1 does."""
    if not fits(1):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
