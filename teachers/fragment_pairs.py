"""Which fragments are compared at a time: every image with every text of a batch, or pairs that share images.

Shape key: ``N`` images, ``M`` texts, ``P`` pairs, ``G`` grid cells, ``L`` words, ``F`` width of a fragment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from teachers.fragment_pipeline import Fragments, ScanDesign, scan
from teachers.itm import take

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Memory

_MOST_KEPT = 1 << 24  # affinities; beyond it their stages run a second time in the backward pass instead of being kept
_MOST_PADDING = 2.0  # slots a pair; where images differ more in their number of texts, each pair copies its cells


def all_pairs(images: Memory, texts: Memory, design: ScanDesign, *, pairs_per_chunk: int) -> Tensor:
    """Similarities (N, M) float32 of every image with every text, with gradient.

    Texts of like length are compared at a time. Where all affinities together would fill the memory, the backward pass
    computes each part's stages again.

    Args:
        images: ``cells`` (N, G, F), unit vectors.
        texts: ``words`` (M, L, F), unit vectors with padding last, and ``word_mask`` (M, L) bool.
        design: The stages.
        pairs_per_chunk: Images times texts that are compared at a time.
    """
    lengths = texts["word_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)
    cells, words, real = images["cells"], take(texts["words"], order), take(texts["word_mask"], order)
    longest = lengths[order].tolist()
    step = max(1, pairs_per_chunk // max(1, len(cells)))
    again = torch.is_grad_enabled() and len(cells) * cells.shape[1] * real.numel() > _MOST_KEPT
    parts = []
    for start in range(0, len(words), step):
        stop = min(len(words), start + step)
        cut = longest[stop - 1]
        part = cells, words[start:stop, :cut], real[start:stop, :cut], design
        if again:  # nothing is drawn at random in there, so no generator's state need be kept
            parts.append(checkpoint(_compare, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_compare(*part))
    return torch.cat(parts, dim=1).index_select(1, order.argsort())


def given_pairs(
    images: Memory, texts: Memory, rows: tuple[Tensor, Tensor], design: ScanDesign, *, pairs_per_chunk: int
) -> Tensor:
    """Similarities (P,) float32 of the pairs of image and text ``rows``, at least one; memories as in ``all_pairs``."""
    order = rows[0].argsort(stable=True)
    chunks = torch.split(order, pairs_per_chunk)
    parts = [_of_chunk(images, texts, (rows[0][chunk], rows[1][chunk]), design) for chunk in chunks]
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def _of_chunk(images: Memory, texts: Memory, rows: tuple[Tensor, Tensor], design: ScanDesign) -> Tensor:
    """(P,) for pairs that come sorted by image: every image gets as many slots for texts."""
    image_rows, text_rows = rows
    ordinal = torch.arange(len(image_rows), device=image_rows.device)
    used, place, counts = torch.unique_consecutive(image_rows, return_inverse=True, return_counts=True)
    widest = int(counts.max())
    if len(used) * widest > _MOST_PADDING * len(image_rows):
        used, slots, widest = image_rows, ordinal, 1
    else:
        starts = counts.cumsum(0) - counts
        slots = place * widest + ordinal - starts[place]
    of_slot = text_rows[:1].repeat(len(used) * widest).index_copy(0, slots, text_rows)  # empty slots hold any text
    real, words = take(texts["word_mask"], of_slot), take(texts["words"], of_slot)
    cut, shape = int(real.sum(dim=1).max()), (len(used), widest)
    words, real = torch.unflatten(words[:, :cut], 0, shape), torch.unflatten(real[:, :cut], 0, shape)
    found = _compare(take(images["cells"], used), words, real, design)
    return found.flatten()[slots.to(found.device)]


def _compare(cells: Tensor, words: Tensor, real: Tensor, design: ScanDesign) -> Tensor:
    """Similarities (B, M) of B images with M texts, the same for all images or each image's own."""
    with torch.autocast(cells.device.type, enabled=False):  # a length from a Gram matrix wants all its digits
        return scan(Fragments.of(cells.float(), words.to(cells.device).float(), real.to(cells.device)), design)
