"""The parts of a recipe that a measurement depends on: a plan for another value of these needs another measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.planning.measured import Measured
    from distill.recipe.experiment import Recipe

# All else only says how often something is done.
_TRAIN = {
    "batch_size", "candidates_per_query", "candidates", "group", "precision", "micro_batch", "gradient_checkpointing",
    "compile", "augment", "matryoshka", "workers",
}  # fmt: skip
_TEACH = {"batch_size", "itm_queries"}
_SHOWN = 8


class OtherRecipeError(ValueError):
    """A measurement of another recipe."""


def meaning_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the cost of an item, a pair or a step, in plain containers."""
    return {
        "teacher": recipe.teacher.model_dump(mode="json"),
        "teach": None if recipe.teach is None else recipe.teach.model_dump(mode="json", include=_TEACH),
        "student": recipe.student.model_dump(mode="json"),
        "shared_losses": [part.model_dump(mode="json") for part in recipe.shared_losses],
        "arms": {name: arm.model_dump(mode="json") for name, arm in recipe.arms.items()},
        "train": recipe.train.model_dump(mode="json", include=_TRAIN),
        "mine": {"factory": recipe.mine.factory, "nprobe": recipe.mine.nprobe},
    }


def check_same(measured: Measured, recipe: Recipe, where: str) -> None:
    """Refuse to plan a recipe with what was measured of another.

    Raises:
        OtherRecipeError: with the keys that differ.
    """
    before, now = _flat(measured.recipe), _flat(meaning_of(recipe))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        listed = "\n".join(f"  {key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in differing[:_SHOWN])
        raise OtherRecipeError(
            f"{where} was measured with another recipe:\n{listed}\nput these back, or measure again: distill plan "
            f"RECIPE --save FILE"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.")
    return flat
