"""The same name, another formula: options that make a loss the one that a public toolkit computes.

``docs/loss-conventions.md`` has the table. A convention is a set of fixed options, no second implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from distill.losses.numeric import check_choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)

OWN = "own"


@dataclass(frozen=True)
class Convention:
    """What a toolkit's loss is, in our options. None knows a learned scale: a free ``temperature`` must be given.

    Attributes:
        fixes: options that it decides.
        free: options that it leaves to the user; every other one must stay as it is by default.
    """

    fixes: Mapping[str, Any]
    free: frozenset[str] = frozenset()


def check_convention(loss: DataclassInstance, name: str, known: Mapping[str, Convention]) -> None:
    """Raise ValueError unless the name is known and no option contradicts it."""
    check_choice("convention", name, (OWN, *known))
    if name == OWN:
        return
    convention = known[name]
    for option in fields(loss):
        if option.name == "convention" or option.name in convention.free:
            continue
        if getattr(loss, option.name) != option.default:
            decided = convention.fixes.get(option.name, option.default)
            raise ValueError(f"convention={name!r} has {option.name}={decided!r}: leave {option.name} out")
    if "temperature" in convention.free and getattr(loss, "temperature", None) is None:
        raise ValueError(f"convention={name!r} knows no learned scale: give a number for temperature")


def following(loss: Options, name: str, known: Mapping[str, Convention]) -> Options:
    """The loss with what the convention fixes filled in."""
    return loss if name == OWN else replace(loss, convention=OWN, **known[name].fixes)
