"""From ``--loss`` and ``--seeds`` to the recipes of a comparison: one a seed, alike in all but the seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.recipe.experiment import ArmRecipe, Recipe
from distill.recipe.load import RecipeError, parse
from distill.recipe.losses import LossPart

PLAIN = "plain"
"""Name of the undistilled arm where the recipe has none."""
_RETRIEVAL = ("contrastive", "siglip", "hinge", "momentum")  # one of these stands in every sum
_LABEL = re.compile(r"^([A-Za-z0-9][A-Za-z0-9_.-]*)=(?=[A-Za-z_])")


def comparison_recipe(recipe: Recipe, losses: Sequence[str]) -> tuple[Recipe, str]:
    """The recipe with the arms that are compared, and the name of the undistilled one.

    Args:
        recipe: Its arms can be named. Its first undistilled arm always joins; where it has none, ``plain`` does, which
            goes on with the shared losses.
        losses: Each the name of an arm of the recipe, or ``[LABEL=]LOSS[:KEY=VALUE,...][+LOSS...]`` with losses and
            options as a recipe has them; a contrastive part joins where no part is a retrieval loss. None: all arms.

    Raises:
        RecipeError: An unknown loss or option, with what is allowed; a label given twice.
    """
    arms = dict(recipe.arms) if not losses else {}
    for given in losses:
        name, arm = (given, recipe.arms[given]) if given in recipe.arms else _arm_of(given, recipe)
        if name in arms:
            raise RecipeError(f"--loss {given!r}: there are two arms {name!r}; tell them apart: --loss OTHER={given}")
        arms[name] = arm
    own = next((name for name, arm in recipe.arms.items() if not arm.distils), None)
    plain = own or PLAIN
    if own is None and plain in arms:
        raise RecipeError(f"an arm {plain!r} is distilled, but that is the name of the undistilled student: rename it")
    undistilled = recipe.arms[own] if own else ArmRecipe(losses=recipe.shared_losses)
    return recipe.model_copy(update={"arms": {plain: undistilled} | arms}), plain


def seed_recipe(recipe: Recipe, seed: int, *, folder: Path, teacher: Path | None) -> Recipe:
    """The recipe of all cells of one seed, whose run lies below ``folder``.

    ``teacher``: folder of the taught teacher that all seeds have in common; None where the recipe's is used as it is.
    """
    changed: dict[str, Any] = {"seed": seed, "runs": folder, "name": f"seed-{seed}"}
    if teacher is not None:
        changed |= {
            "teach": None,
            "teacher": recipe.teacher.model_copy(update={"checkpoint": str(teacher)}),
        }
    return recipe.model_copy(update=changed)


def describe(arm: ArmRecipe) -> str:
    """One line: each part with the options that are not its defaults."""
    return " + ".join(_part_line(part) for part in arm.losses)


def _part_line(part: LossPart) -> str:
    said = part.model_dump(mode="json", exclude={"name", "weight"}, exclude_defaults=True)
    options = [f"{key}: {value if not isinstance(value, dict) else _flow(value)}" for key, value in said.items()]
    weight = "" if part.weight == 1 else f"{part.weight:g} × "
    return f"{weight}{part.name}" + (f" ({', '.join(options)})" if options else "")


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()


def _arm_of(given: str, recipe: Recipe) -> tuple[str, ArmRecipe]:
    """Label and arm of a loss in short form."""
    labelled = _LABEL.match(given)
    text = given[labelled.end() :] if labelled else given
    parts = [_part_of(part, given) for part in re.split(r"\+(?=[A-Za-z_])", text)]
    if not any(part["name"] in _RETRIEVAL for part in parts):
        parts.insert(0, {"name": "contrastive"})
    label = labelled.group(1) if labelled else re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
    raw = recipe.model_dump(mode="json")
    raw["arms"] = {label: {"losses": parts}}
    hint = "" if ":" in given or "=" in given else f"; the recipe's own arms: {', '.join(recipe.arms)}"
    return label, parse(raw, f"--loss {given!r}{hint}").arms[label]


def _part_of(text: str, given: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    part: dict[str, Any] = {"name": name.strip()}
    for option in re.split(r",(?=\s*[A-Za-z_]+\s*=)", options) if options else []:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"--loss {given!r}: expected [LABEL=]LOSS[:KEY=VALUE,...], for example kl:weight=0.5, got {option!r}"
            )
        part[key.strip()] = yaml.safe_load(value)
    return part
