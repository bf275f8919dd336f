"""Dual-encoders: two towers, one dot product."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from students.dual import DualEncoder
    from students.options import DualOptions

__all__ = ["DualEncoder", "DualOptions"]


def __getattr__(name: str) -> object:
    # Late: naming the package must not load torch.
    if name == "DualEncoder":
        from students.dual import DualEncoder

        return DualEncoder
    if name == "DualOptions":
        from students.options import DualOptions

        return DualOptions
    raise AttributeError(f"module 'students' has no attribute {name!r}; it has {', '.join(__all__)}")
