"""Gradient checkpointing of a stock model's trained towers, by transformers' own switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.protocols import SIDES
from students.reading import tower_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.protocols import Side


def recompute_layers(model: PreTrainedModel, *, frozen: frozenset[Side]) -> frozenset[Side]:
    """Let each layer of a trained tower keep its input alone in training, and run again in the backward pass.

    A layer draws the same random numbers both times. A tower that has no such layers keeps its activations.

    Returns:
        The sides whose tower recomputes: at least one.

    Raises:
        ValueError: no tower trains that could.
    """
    trained = [side for side in SIDES if side not in frozen]
    able = frozenset(side for side in trained if tower_of(model, side).supports_gradient_checkpointing)
    if not able:
        found = ", ".join(
            f"{side} tower ({tower_of(model, side).config.model_type}) {'cannot' if side in trained else 'is frozen'}"
            for side in SIDES
        )
        raise ValueError(f"no tower can compute its activations anew in the backward pass: {found}")
    for side in able:
        tower = tower_of(model, side)
        # older versions of transformers have it under the name that newer ones warn of
        enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if hasattr(tower, "_require_grads_hook"):  # for adapters over frozen embeddings, which these are not
            tower.disable_input_require_grads()
    return able
