"""Parts of the user's own: from ``module:Name`` to the object."""

from __future__ import annotations

import importlib
from typing import Any


class BuildError(ValueError):
    """A part of the recipe that cannot be built; the message says what to change."""


def import_target(target: str) -> Any:
    """The object that ``module:Name`` names.

    Raises:
        BuildError: the module cannot be imported or has no such name.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BuildError(f"{target}: {error}") from error
