"""One training for several widths: the loss on the first numbers of every vector too.

Matryoshka representations (Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, arXiv 2205.13147, eq. 1
with equal weights): at each width the vectors are cut to their first numbers and normalised again, the whole weighted
loss is computed on those, and the losses are averaged. The paper sums; the mean keeps what ``grad_clip`` and the logged
loss mean. The teacher's scores, the student's learned scale and a learned map of its scores are the same at every
width.

What a loss reads beside the similarities decides how it counts:

- the batch's own vectors and the momentum keys are cut as the similarities are. The momentum model's own similarities
  stay whole: they are the target, and the whole vectors order better than the cut ones.
- attention maps have no width: such a part has one value, which counts in the loss of every width.
- vectors of the teacher's towers have an order of their own, whose first numbers tell no more than the others:
  ``embedding_match`` compares whole vectors with whole ones, and counts like an attention part. ``affinity``, which
  compares similarities, is computed at every width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn.functional import normalize

from distill.companion import CUT_KEYS
from distill.extras import ATTENTION, FOLLOWED, OWN_VECTORS

if TYPE_CHECKING:
    from torch import Tensor

    from distill.losses.combine import Weighted
    from distill.protocols import Embeddings, Scored

_SMALLEST = 1e-6  # length below which a cut vector is not stretched to 1: its gradient would be without bounds


def cut(vectors: Tensor, width: int) -> Tensor:
    """The first ``width`` numbers of vectors (N, D), normalised again: (N, width) float32."""
    return normalize(vectors.float()[:, :width], dim=-1, eps=_SMALLEST)


def cut_embeddings(out: Embeddings, width: int) -> Embeddings:
    """Both sides cut; the scale stays."""
    images, texts = (None if side is None else cut(side, width) for side in (out.images, out.texts))
    return replace(out, images=images, texts=texts)


def narrowed(scored: Scored, similarity: Tensor, width: int) -> Scored:
    """What losses see at a width.

    Args:
        scored: of the whole vectors.
        similarity: (B, K) of the cut ones.
        width: numbers that are left.
    """
    extras = dict(scored.extras)
    for name in OWN_VECTORS & extras.keys():
        extras[name] = cut(extras[name], width)
    if extras.keys() >= CUT_KEYS:
        queries, keys = (cut(extras[name], width) for name in ("keys_queries", "keys_vectors"))
        extras["keys_student"] = queries @ keys.T
    return replace(scored, student=similarity, extras=extras)


def without_width(losses: Weighted) -> frozenset[str]:
    """Names of the parts that have one value for all widths: that of the whole vectors."""
    return frozenset(part.name for part in losses.parts if part.needs & (ATTENTION | FOLLOWED))
