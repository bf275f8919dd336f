"""Cross-encoders that read an image and a text together: one file per family.

Importing this package imports no model code; each name below is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.blip import BlipTeacher
    from teachers.blip_options import BlipOptions
    from teachers.fusion import FusionTeacher
    from teachers.fusion_options import FusionDesign, FusionOptions

__all__ = ["BlipOptions", "BlipTeacher", "FusionDesign", "FusionOptions", "FusionTeacher"]

_HOMES = {
    "BlipOptions": "teachers.blip_options",
    "BlipTeacher": "teachers.blip",
    "FusionDesign": "teachers.fusion_options",
    "FusionOptions": "teachers.fusion_options",
    "FusionTeacher": "teachers.fusion",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module attribute is, is not known here
    """Import the file that holds ``name`` on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
