"""What the teacher made of items, kept while it fits a number of bytes, and made anew where it does not.

Items are encoded in batches, in whatever requests they came; the memory of each is kept by the item's content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from distill.inference import joined, to_device
from distill.teacher_service.kept import KeptBatches

if TYPE_CHECKING:
    import torch

    from distill.protocols import Inputs, Memory, Teacher
    from distill.teacher_service.items import Item, Items

Prepared = list[tuple[Sequence["Item"], "Inputs"]]
"""Batches of items and their inputs."""
Parts = list[tuple[list["Item"], "Inputs"]]


class Memories:
    """One side. ``prepare`` may be called by one thread while another one calls the rest."""

    def __init__(
        self,
        items: Items,
        teacher: Teacher,
        *,
        batch: int,
        kept_bytes: int,
        device: torch.device | None,
        threads: int = 4,
    ) -> None:
        """``batch``: items encoded together; ``kept_bytes``: of all memories that are kept together."""
        self._items, self._teacher, self.batch, self._device = items, teacher, batch, device
        self._encode = teacher.encode_images if items.side == "image" else teacher.encode_texts
        self._kept = KeptBatches(kept_bytes)
        self._pool = ThreadPoolExecutor(threads if items.side == "image" else 1, thread_name_prefix=items.side)
        self.encoded = self.found = 0

    @property
    def kept_bytes(self) -> int:
        """Of the memories that are kept."""
        return self._kept.used

    def close(self) -> None:
        """End the threads that prepare."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def forget(self) -> None:
        """Keep nothing from here on but what comes anew."""
        self._kept.clear()

    def prepare(self, items: Sequence[Item], *, anew: bool = False) -> Prepared:
        """Inputs of the distinct items of a request that are not kept; with ``anew`` of all.

        Raises:
            RefusedError: a picture that was sent cannot be read.
            DataError: a picture of the corpus cannot be read.
        """
        distinct = {item.key: item for item in items}.values()
        lacking = [item for item in distinct if anew or item.key not in self._kept]
        of_corpus, sent = ([item for item in lacking if (item.row >= 0) == mine] for mine in (True, False))
        # pictures that are sent are decoded one by one: several large ones at once would take a lot of memory
        size = 1 if self._items.side == "image" else self.batch
        work = [(part, self._items.inputs_of_contents) for part in _batches(sent, size)]
        work += [(part, self._items.inputs_of_rows) for part in _batches(of_corpus, self.batch)]
        made = self._pool.map(lambda one: one[1](one[0]), work)  # tokenizers bear one thread at a time
        return [(part, inputs) for (part, _), inputs in zip(work, made, strict=True)]

    def batches(self, items: Sequence[Item], prepared: Prepared) -> Iterator[tuple[list[Item], Memory]]:
        """The memories of distinct items, in batches: those that are kept first, then the others as they are encoded.

        ``prepared``: what ``prepare`` gave for them, and others; what it lacks is prepared now.
        """
        named = {item.key: item for item in items}
        kept = [([named[key] for key in keys], memory) for keys, memory in self._kept.find(list(named))]
        lacking = {key: item for key, item in named.items() if key not in self._kept}
        self.found += len(named) - len(lacking)
        self.encoded += len(lacking)
        yield from self._merged(kept)
        for some, inputs in self._ready(lacking, prepared):
            made = self._encode(to_device(inputs, self._device))
            self._kept.put([item.key for item in some], made)
            yield some, made

    def all_of(self, items: Sequence[Item], prepared: Prepared) -> tuple[list[Item], Memory]:
        """The memories of distinct items as one, and the order they are in."""
        order: list[Item] = []
        memories: list[Memory] = []
        for some, memory in self.batches(items, prepared):
            order += some
            memories.append(memory)
        return order, joined(memories)

    def _ready(self, lacking: dict[str, Item], prepared: Prepared) -> Iterator[tuple[list[Item], Inputs]]:
        """Inputs of the lacking items in batches; small ones of one kind are put together."""
        waiting = dict(lacking)
        parts: dict[bool, Parts] = {True: [], False: []}
        for some, inputs in prepared:
            places = [place for place, item in enumerate(some) if waiting.pop(item.key, None) is not None]
            if not places:
                continue
            chosen = [some[place] for place in places]
            if len(places) < len(some):
                inputs = {name: tensor[places] for name, tensor in inputs.items()}
            parts[chosen[0].row >= 0].append((chosen, inputs))
        for some, inputs in self.prepare(list(waiting.values())):  # were kept when the request came, and are not now
            parts[some[0].row >= 0].append((list(some), inputs))
        for of_kind in parts.values():
            yield from self._merged(of_kind)

    def _cut(self, parts: Parts) -> Iterator[tuple[list[Item], Inputs]]:
        """Batches may have become smaller since they were prepared."""
        for items, inputs in parts:
            for at in range(0, len(items), self.batch):
                part = slice(at, at + self.batch)
                yield items[part], {name: tensor[part] for name, tensor in inputs.items()}

    def _merged(self, parts: Parts) -> Iterator[tuple[list[Item], Inputs]]:
        waiting: Parts = []
        count = 0
        for part in self._cut(parts):
            if waiting and count + len(part[0]) > self.batch:
                yield _as_one(waiting)
                waiting, count = [], 0
            waiting.append(part)
            count += len(part[0])
        if waiting:
            yield _as_one(waiting)


def _as_one(parts: Parts) -> tuple[list[Item], Inputs]:
    return [item for items, _ in parts for item in items], joined([inputs for _, inputs in parts])


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
