"""The teacher's opinion of a shortlist: it reads the query together with each item found.

Teachers encode an item once for any number of pairs; what they made of items that were found before is kept, up to a
number of bytes. Shape key: ``K`` items of a shortlist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from distill.serving.cache import ByteCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from distill.exact import Vectors
    from distill.protocols import Ids, Image, Memory, Side, Teacher

KEPT_BYTES = 512 << 20
_AT_ONCE = 8  # items; on a CPU pictures by the dozen are faster than by the hundred, and memories can be large


class Reranker:
    """Scores a query with items by a teacher. One thread at a time."""

    def __init__(
        self,
        teacher: Teacher,
        load: Mapping[Side, Callable[[Ids], Sequence[Any]]],
        *,
        device: Any = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """A teacher beside its items.

        Args:
            teacher: Frozen, in evaluation mode, on ``device``.
            load: Pictures and texts of corpus rows.
            device: Where the teacher computes.
            kept_bytes: Of encoded items, all together.
        """
        self.teacher, self._load, self._device = teacher, load, device
        self._kept: ByteCache[tuple[Side, int], dict[str, Tensor]] = ByteCache(kept_bytes)

    def scores(self, query: str | Image, side: Side, ids: Ids) -> Vectors:
        """Raw scores (K,) float32 of the query with items (K,) of ``side``, which is not the query's own.

        Raises:
            DataError: an item's picture cannot be read.
        """
        import torch

        from distill.inference import evaluating, joined

        found = []
        with evaluating(self.teacher):
            asked = self._encode("text" if side == "image" else "image", [query])
            for start in range(0, len(ids), _AT_ONCE):
                some = [int(one) for one in ids[start : start + _AT_ONCE]]
                items = joined(self._memories(side, some))
                rows = torch.arange(len(some), device=self._device)
                images, texts = (items, asked) if side == "image" else (asked, items)
                pairs = (rows, rows * 0) if side == "image" else (rows * 0, rows)
                found.append(self.teacher.score(images, texts, *pairs).float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _memories(self, side: Side, ids: list[int]) -> list[Memory]:
        from distill.inference import bytes_of

        known = {one: self._kept.get((side, one)) for one in ids}
        lacking = [one for one, memory in known.items() if memory is None]
        if lacking:
            made = self._encode(side, self._load[side](np.array(lacking, np.int64)))
            for row, one in enumerate(lacking):
                own = {name: tensor[row : row + 1].clone() for name, tensor in made.items()}
                known[one] = own
                self._kept.put((side, one), own, size=bytes_of(own))
        return [memory for one in ids if (memory := known[one]) is not None]

    def _encode(self, side: Side, items: Sequence[Any]) -> Memory:
        from distill.inference import to_device

        if side == "image":
            return self.teacher.encode_images(to_device(self.teacher.prepare_images(items), self._device))
        return self.teacher.encode_texts(to_device(self.teacher.prepare_texts(items), self._device))
