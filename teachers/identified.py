"""A model that says which one it is."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn


class Identified(nn.Module):
    """What all teachers of this package share: an identity that follows the weights, or is kept while they are fixed.

    A subclass gives ``_identity_now``, a fingerprint of all that a score depends on. ``trains`` False: it stays in eval
    mode whatever is asked.
    """

    trains: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._fixed_identity: str | None = None

    @property
    def identity(self) -> str:
        """Computed from every weight at each call, or as ``fix_identity`` left it."""
        return self._fixed_identity or self._identity_now()

    def fix_identity(self) -> str:
        """Compute the identity once and keep it until the next ``train()``: for weights that no longer change."""
        self._fixed_identity = self._identity_now()
        return self._fixed_identity

    def train(self, mode: bool = True) -> Self:
        """Set training mode; weights may change from here on, so that a fixed identity is forgotten."""
        if mode:
            self._fixed_identity = None
        return super().train(mode and self.trains)

    def _identity_now(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} gives no identity")
