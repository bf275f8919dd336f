"""The teacher's text→image attention on labelled pairs, computed once and kept on disk for attention distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.features import Features, write_features
from distill.protocols import Ids, MapsTeacher, fingerprint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distill.batches import Source
    from distill.data.corpus import Corpus
    from distill.protocols import Inputs


@dataclass(frozen=True)
class PairMaps:
    """Attention maps by pair."""

    features: Features
    keys: Ids  # (P,) image id * n_texts + text id, sorted; row r of the features belongs to keys[r]
    n_texts: int

    def __call__(self, image_ids: Ids, text_ids: Ids) -> tuple[Tensor, Tensor]:
        """Log-probabilities (P, L, G) and which token rows are real (P, L)."""
        wanted = image_ids * self.n_texts + text_ids
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        if np.any(self.keys[rows] != wanted):
            raise KeyError(f"{int((self.keys[rows] != wanted).sum())} pairs have no attention map")
        inputs = self.features.get(rows)
        return inputs["map"], inputs["map_mask"].bool()


def write_maps(
    folder: Path,
    teacher: MapsTeacher,
    pairs: Ids,
    *,
    images: Source,
    texts: Source,
    corpus: Corpus,
    device: torch.device,
) -> PairMaps:
    """Compute the maps of the pairs (P, 2), or find them on disk."""
    import torch

    n_texts = corpus.n_texts
    keys = np.unique(pairs[:, 0] * n_texts + pairs[:, 1])
    identity = fingerprint("maps", teacher.identity, corpus.fingerprint, keys)

    def produce(rows: Ids) -> Inputs:
        image_ids, text_ids = np.divmod(keys[rows], n_texts)
        with torch.no_grad():
            seen, image_rows = np.unique(image_ids, return_inverse=True)
            image_memory = teacher.encode_images(_to(images(seen), device))
            read = texts(text_ids)
            text_memory = teacher.encode_texts(_to(read, device))
            maps = teacher.attention_maps(
                image_memory,
                text_memory,
                torch.from_numpy(image_rows).to(device),
                torch.arange(len(text_ids), device=device),
            )
        return {"map": maps.cpu(), "map_mask": read["attention_mask"][:, : maps.shape[1]]}

    write_features(folder / identity, identity, len(keys), produce, batch_size=128)
    return PairMaps(Features.open(folder / identity, identity), keys, n_texts)


def _to(inputs: Inputs, device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
