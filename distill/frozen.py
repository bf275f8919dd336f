"""A model's frozen tower: its outputs are a function of the item alone, and are kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.inference import device_of, to_device
from distill.protocols import Freezable, fingerprint

if TYPE_CHECKING:
    from distill.data.corpus import Corpus
    from distill.protocols import Inputs, Side


def frozen_mark(corpus: Corpus, side: Side, model: object, *, dtype: str | None = None) -> str | None:
    """Identity of a frozen tower's outputs; None where the side's tower is not frozen."""
    if not isinstance(model, Freezable) or (identity := model.frozen_identity(side)) is None:
        return None
    return fingerprint("frozen", side, identity, corpus.fingerprint, dtype)


def frozen_place(
    corpus: Corpus, side: Side, model: object, cache_dir: str | Path, *, dtype: str | None = None
) -> tuple[Path, str] | None:
    """Folder and identity of a frozen tower's outputs, there or not; None where the side's tower is not frozen."""
    mark = frozen_mark(corpus, side, model, dtype=dtype)
    if mark is None:
        return None
    return Path(cache_dir) / "features" / f"frozen-{side}s-{mark}", mark


@dataclass(frozen=True)
class FrozenTower:
    """A model's frozen tower as a function of prepared inputs."""

    model: Freezable
    side: Side

    def __call__(self, inputs: Inputs) -> Inputs:
        return self.model.freeze(self.side, to_device(inputs, device_of(self.model)))
