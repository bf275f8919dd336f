"""From a recipe to a fragment teacher, and to an ensemble's members. Model libraries are imported when one is built."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.ensemble import EnsembleError, EnsembleParts, EnsembleSettings
from distill.recipe.ensemble import EnsembleTeacherRecipe, StudentMember
from distill.recipe.fragment import FragmentTeacherRecipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill.data.corpus import Corpus

_FOLDERS_ONLY = ("fragment", "fusion", "student")  # kinds that are loaded from what this project saved, from no hub


def build_fragment(recipe: FragmentTeacherRecipe, source: str | None) -> Any:
    """A fragment teacher: from the folder ``source``, else over the recipe's two backbones."""
    import torch

    from teachers.fragment import FragmentTeacher
    from teachers.fragment_options import FragmentDesign, FragmentOptions

    options = FragmentOptions(recipe.score_kind, recipe.max_text_length, cosine_weight=recipe.cosine_weight)
    if source is not None:
        return FragmentTeacher.from_pretrained(source, options=options, dtype=getattr(torch, recipe.precision))
    assert recipe.vision is not None, "the recipe was checked"
    assert recipe.text is not None, "the recipe was checked"
    chosen = recipe.model_dump(include=set(FragmentDesign.__dataclass_fields__))
    return FragmentTeacher.from_backbones(
        recipe.vision, recipe.text, design=FragmentDesign.from_json(chosen), options=options
    )


def ensemble_parts(recipe: EnsembleTeacherRecipe, build: Callable[[Any, Corpus], Any]) -> EnsembleParts:
    """What an ensemble is made of; its members are loaded later, one at a time, by ``build`` from their recipes.

    Raises:
        EnsembleError: a member that has not been taught, with the command that does it.
    """
    named: dict[str, Callable[[Corpus], Any]] = {}
    for place, member in enumerate(recipe.members):
        _check_taught(place, member)
        make = partial(_student, member) if isinstance(member, StudentMember) else partial(build, member)
        named[f"teacher.members.{place} ({member.kind})"] = make
    return EnsembleParts(named, EnsembleSettings(recipe.method, recipe.weights, **recipe.calibration.model_dump()))


def _check_taught(place: int, member: Any) -> None:
    if member.kind not in _FOLDERS_ONLY or Path(member.checkpoint).is_dir():
        return
    path = Path(member.checkpoint)
    if member.kind == "student":
        name = path.parents[2].name if len(path.parents) > 3 and path.parents[1].name == "arms" else "RECIPE"
        command = f"distill run {name}"
    else:
        name = path.parent.name if path.name == "teacher" and path.parent.name else "RECIPE"
        command = f"distill teach {name}"
    raise EnsembleError(
        f"teacher.members.{place}: there is no folder {member.checkpoint}: an ensemble's members are taught before it: "
        f"{command} (and give the folder that it writes as checkpoint)"
    )


def _student(member: StudentMember, _: Corpus) -> Any:
    """A saved student in a teacher's place."""
    from distill.student_teacher import StudentTeacher
    from students.dual import DualEncoder

    return StudentTeacher(DualEncoder.load(member.checkpoint))
