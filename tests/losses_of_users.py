"""Losses as a user would bring them, by import path."""

from __future__ import annotations

from distill.protocols import Scored


def breaks(scored: Scored) -> None:
    raise ValueError("a loss of the user's own fell over")
