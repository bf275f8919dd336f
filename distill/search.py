"""One query against a student's index, and its answer as lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.exact import Vectors
    from distill.index import VectorIndex
    from distill.protocols import Image


@dataclass(frozen=True)
class Hit:
    """One found item: its corpus row and its similarity to the query."""

    item_id: int
    similarity: float


def answer(index: VectorIndex, query_vector: Vectors, k: int) -> tuple[Hit, ...]:
    """The ``k`` most similar items of one query vector (D,), best first; fewer where the index holds fewer.

    Raises:
        ValueError: As :meth:`VectorIndex.search`.
    """
    similarity, ids = index.search(np.atleast_2d(query_vector), k)
    return tuple(Hit(int(one), float(value)) for one, value in zip(ids[0], similarity[0], strict=True) if one >= 0)


def hit_lines(hits: Sequence[Hit], labels: Sequence[str]) -> list[str]:
    """One line a hit: place, similarity, and the item's label (``labels`` is indexed by corpus row)."""
    width = len(str(len(hits)))
    return [
        f"{place:>{width}}  {hit.similarity:+.3f}  {labels[hit.item_id]}" for place, hit in enumerate(hits, start=1)
    ]


def embed_query(student: Any, asked: str | Image, *, device: Any) -> Vectors:
    """Unit vector (D,) of a sentence or a picture by a student."""
    import torch

    from distill.inference import to_device

    with torch.no_grad():
        if isinstance(asked, str):
            found = student(None, to_device(student.prepare_texts([asked]), device)).texts
        else:
            found = student(to_device(student.prepare_images([asked]), device), None).images
    vector: Vectors = found[0].float().cpu().numpy()
    return vector
