"""Cross-encoders that read an image and a text together: one file per family.

Importing this package imports no model code; each name below is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.blip import BlipTeacher
    from teachers.blip2 import Blip2Options, Blip2Teacher
    from teachers.blip_options import BlipOptions
    from teachers.bridgetower import BridgeTowerOptions, BridgeTowerTeacher
    from teachers.classifier import ClassifierOptions, PairClassifierTeacher
    from teachers.fragment import FragmentTeacher
    from teachers.fragment_options import FragmentDesign, FragmentOptions
    from teachers.fusion import FusionTeacher
    from teachers.fusion_options import FusionDesign, FusionOptions
    from teachers.vilt import ViltOptions, ViltTeacher

__all__ = [
    "Blip2Options",
    "Blip2Teacher",
    "BlipOptions",
    "BlipTeacher",
    "BridgeTowerOptions",
    "BridgeTowerTeacher",
    "ClassifierOptions",
    "FragmentDesign",
    "FragmentOptions",
    "FragmentTeacher",
    "FusionDesign",
    "FusionOptions",
    "FusionTeacher",
    "PairClassifierTeacher",
    "ViltOptions",
    "ViltTeacher",
]

_HOMES = {
    "Blip2Options": "teachers.blip2",
    "Blip2Teacher": "teachers.blip2",
    "BlipOptions": "teachers.blip_options",
    "BlipTeacher": "teachers.blip",
    "BridgeTowerOptions": "teachers.bridgetower",
    "BridgeTowerTeacher": "teachers.bridgetower",
    "ClassifierOptions": "teachers.classifier",
    "FragmentDesign": "teachers.fragment_options",
    "FragmentOptions": "teachers.fragment_options",
    "FragmentTeacher": "teachers.fragment",
    "FusionDesign": "teachers.fusion_options",
    "FusionOptions": "teachers.fusion_options",
    "FusionTeacher": "teachers.fusion",
    "PairClassifierTeacher": "teachers.classifier",
    "ViltOptions": "teachers.vilt",
    "ViltTeacher": "teachers.vilt",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module attribute is, is not known here
    """Import the file that holds ``name`` on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
