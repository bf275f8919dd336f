"""What a teacher keeps of the texts of a scoring: encoded once where that fits a budget of bytes, else unit by unit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from distill.inference import batches_of, bytes_of, joined, prefetched, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from distill.protocols import Ids, Inputs, Memory, Teacher
    from distill.score import ScoreOptions

_LOG = logging.getLogger(__name__)


class TextMemory:
    """Memory of the texts that were needed so far, with what shares their batches.

    Batches are cut over all texts of the work, so that a text is always encoded beside the same ones, whichever of the
    units a process has. Whether all of them would fit is judged by the first batch, which is the same for every
    process too; beyond the budget nothing is held.
    """

    def __init__(
        self, teacher: Teacher, source: Callable[[Ids], Inputs], options: ScoreOptions, every_text: Ids
    ) -> None:
        """``every_text``: ascending ids of all texts of the work."""
        self._teacher, self._source, self._options = teacher, source, options
        self._every = every_text
        self.beyond = False
        self._memory: Memory | None = None
        self._rows = np.full(len(every_text), -1, np.int64)  # where each text stands in the memory

    @property
    def held(self) -> tuple[Memory | None, Callable[[Ids], Ids]]:
        """The memory, and what gives the rows in it of text ids; None where nothing is held."""
        return self._memory, lambda ids: self._rows[np.searchsorted(self._every, ids)]

    def hold(self, needed: Sequence[Ids]) -> None:
        """Encode what is not held yet of these text ids, if the memory of all texts fits the budget."""
        size, count = self._options.texts_per_batch, len(self._every)
        if self.beyond or not needed:
            return
        wanted = np.unique(np.concatenate([np.searchsorted(self._every, ids) // size for ids in needed]))
        new = [number for number in wanted.tolist() if self._rows[number * size] < 0]
        if not new:
            return
        if self._memory is None:
            new = sorted({0, *new})  # by the first batch the size of all is judged
        places = [np.arange(number * size, min((number + 1) * size, count)) for number in new]
        parts: list[Mapping[str, Tensor]] = [] if self._memory is None else [self._memory]
        for memory in self._encode([self._every[at] for at in places]):
            parts.append(memory)
            so_far = sum(bytes_of(part) for part in parts)
            first = so_far / len(places[0]) * count if len(parts) == 1 else 0
            if max(first, so_far) > self._options.text_memory_bytes:
                _LOG.info("the memory of %d texts is beyond the budget; texts are encoded unit by unit", count)
                self.beyond, self._memory = True, None
                return
        before = int((self._rows >= 0).sum())
        at = np.concatenate(places)
        self._rows[at] = np.arange(before, before + len(at))
        self._memory = joined(parts)

    def encoded(self, text_ids: Ids) -> tuple[Memory, Callable[[Ids], Ids]]:
        """Memory of these ascending ids alone, which is not kept, and what gives the rows in it."""
        batches = batches_of(text_ids, self._options.texts_per_batch)
        return joined(list(self._encode(batches))), lambda ids: np.searchsorted(text_ids, ids)

    def _encode(self, batches: list[Ids]) -> Iterator[Memory]:
        for _, inputs in prefetched(self._source, batches):
            yield self._teacher.encode_texts(to_device(inputs, self._options.device))
