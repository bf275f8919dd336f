"""The other ways in which a recipe's teacher could be asked, to be measured against the recipe's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.recipe.schema import BlipTeacherRecipe

if TYPE_CHECKING:
    from distill.recipe.experiment import Recipe


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Label -> recipe of each way to ask the teacher, the recipe's own first; empty where there is no choice.

    A BLIP's image-grounded text encoder was trained with [ENC] in place of the first token; transformers' forward
    leaves [CLS] there, and either works without complaint.
    """
    teacher = recipe.teacher
    if not isinstance(teacher, BlipTeacherRecipe) or teacher.score_kind == "cosine":  # reads no fused token
        return {}
    labels = {"original": "[ENC]", "cls": "[CLS]"}
    found = {labels.get(str(teacher.enc_token), f"token {teacher.enc_token}"): recipe}
    for choice, label in labels.items():
        if label not in found:
            other = teacher.model_copy(update={"enc_token": choice})
            found[label] = recipe.model_copy(update={"teacher": other})
    return found
