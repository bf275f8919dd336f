"""Encoded items, kept in the batches that they were encoded in, while these fit a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.inference import bytes_of

if TYPE_CHECKING:
    from distill.protocols import Memory

BESIDE = (
    600  # bytes that a tensor or a name takes beside its numbers, measured; of short texts they are the larger part
)


def size_of(memory: Memory, items: int) -> int:
    """Bytes of a batch and of what is noted of its items."""
    return bytes_of(memory) + BESIDE * (len(memory) + items)


class KeptBatches:
    """Batches stay whole, so that to keep them costs no copy.

    The batch whose items were used longest ago goes first. One thread changes it; others may look whether a name is in
    it.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: bytes of all batches together; a batch above it is not kept."""
        self.limit, self.used = limit, 0
        self._batches: OrderedDict[int, tuple[Memory, Sequence[str]]] = OrderedDict()
        self._place: dict[str, tuple[int, int]] = {}  # name -> batch, row
        self._count = 0

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def put(self, names: Sequence[str], memory: Memory) -> None:
        """Keep a batch; its items count as it has them, wherever they were before."""
        size = size_of(memory, len(names))
        if size > self.limit:
            return
        self._count += 1
        self._batches[self._count] = memory, names
        self._place.update({name: (self._count, row) for row, name in enumerate(names)})
        self.used += size
        while self.used > self.limit:
            number, (oldest, those) = self._batches.popitem(last=False)
            self.used -= size_of(oldest, len(those))
            for name in those:
                if self._place.get(name, (0, 0))[0] == number:
                    del self._place[name]

    def find(self, names: Sequence[str]) -> list[tuple[list[str], Memory]]:
        """Those that are kept, batch by batch, with their memories; they count as used now."""
        rows: dict[int, list[tuple[int, str]]] = {}
        for name in names:
            if name in self._place:
                number, row = self._place[name]
                rows.setdefault(number, []).append((row, name))
        found = []
        for number, chosen in rows.items():
            self._batches.move_to_end(number)
            memory, those = self._batches[number]
            chosen.sort()
            if len(chosen) < len(those):
                places = [row for row, _ in chosen]
                memory = {part: tensor[places] for part, tensor in memory.items()}
            found.append(([name for _, name in chosen], memory))
        return found

    def clear(self) -> None:
        """Keep nothing."""
        self._batches.clear()
        self._place.clear()
        self.used = 0
