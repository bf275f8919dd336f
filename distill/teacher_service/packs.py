"""Scoring a pack: the pairs of several requests as one, each distinct pair once, an image's pairs side by side."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Ids, Memory, Teacher
    from distill.store import ScoreStore
    from distill.teacher_service.items import Item
    from distill.teacher_service.memories import Memories, Prepared
    from distill.wire import Numbers

log = logging.getLogger(__name__)
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one request and what was prepared for them."""

    images: Sequence[Item]
    texts: Sequence[Item]
    image_rows: Ids  # (P,) places among the images
    text_rows: Ids  # (P,) places among the texts
    prepared: tuple[Prepared, Prepared]  # of images, of texts


@dataclass(frozen=True)
class Found:
    """What a request gets."""

    scores: Numbers  # (P,)
    asked: int  # of the teacher, for this request first


class KnownScores:
    """Scores that were computed before: the store's, those on their way into it, and of items without a row."""

    def __init__(self, store: ScoreStore | None, *, pairs_per_unit: int, remembered: int) -> None:
        """``pairs_per_unit`` go into one file of the store; ``remembered`` pairs without rows are kept in memory."""
        self._store, self._per_unit, self._most = store, pairs_per_unit, remembered
        self._changed = 0  # when the store's folder was, at the last look
        self._waiting: dict[tuple[int, int], float] = {}  # (image row, text row), for the store
        self._remembered: OrderedDict[tuple[str, str], float] = OrderedDict()

    def find(self, pairs: Sequence[tuple[Item, Item]]) -> Numbers:
        """Scores (P,); NaN where there is none."""
        found = np.full(len(pairs), np.nan, np.float32)
        stored = np.array([self._has_rows(*pair) for pair in pairs], np.bool_)
        if self._store is not None and stored.any():
            rows = np.array([(image.row, text.row) for image, text in pairs], np.int64)[stored]
            found[stored] = self._stored(self._store, rows[:, 0], rows[:, 1])
        for place in np.flatnonzero(np.isnan(found)).tolist():
            image, text = pairs[place]
            if stored[place]:
                found[place] = self._waiting.get((image.row, text.row), np.nan)
            elif (image.key, text.key) in self._remembered:
                self._remembered.move_to_end((image.key, text.key))
                found[place] = self._remembered[image.key, text.key]
        return found

    def keep(self, pairs: Sequence[tuple[Item, Item]], scores: Numbers) -> None:
        """Take over scores; those that are not finite are nobody's."""
        for (image, text), score in zip(pairs, scores.tolist(), strict=True):
            if not np.isfinite(score):
                continue
            if self._has_rows(image, text):
                self._waiting[image.row, text.row] = score
            else:
                self._remembered[image.key, text.key] = score
        while len(self._remembered) > self._most:
            self._remembered.popitem(last=False)
        if len(self._waiting) >= self._per_unit:
            self.flush()

    def flush(self) -> None:
        """Write what waits into the store; where that cannot be done, it goes on waiting, up to a bound."""
        if self._store is None or not self._waiting:
            return
        rows = np.array(list(self._waiting), np.int64)
        try:
            self._store.write_unit(rows[:, 0], rows[:, 1], np.array(list(self._waiting.values()), np.float32))
        except OSError as error:
            log.error("scores cannot be written to the store: %s", error)
            if len(self._waiting) > 16 * self._per_unit:
                log.error("%d scores that could not be written are dropped, and will be computed anew", len(rows))
                self._waiting.clear()
            return
        self._waiting.clear()

    def _stored(self, store: ScoreStore, images: Ids, texts: Ids) -> Numbers:
        """The store's scores; those that another process has written meanwhile are seen before any is asked for."""
        found = store.lookup(images, texts)
        if np.isnan(found).any() and (changed := store.folder.stat().st_mtime_ns) != self._changed:
            self._changed = changed
            store.refresh()
            found = store.lookup(images, texts)
        return found

    def _has_rows(self, image: Item, text: Item) -> bool:
        return self._store is not None and image.row >= 0 and text.row >= 0


class Packs:
    """Answers packs by a teacher. One thread."""

    def __init__(
        self, teacher: Teacher, images: Memories, texts: Memories, known: KnownScores, *, pairs_per_call: int
    ) -> None:
        """``images`` and ``texts``: what the teacher makes of items; ``known``: what needs no teacher."""
        self._teacher, self._images, self._texts, self.known = teacher, images, texts, known
        self.pairs_per_call = pairs_per_call

    def answer(self, requests: Sequence[Pairs]) -> list[Found]:
        """The scores of each request."""
        images, image_places = _distinct([request.images for request in requests])
        texts, text_places = _distinct([request.texts for request in requests])
        codes = [
            image_of[request.image_rows] * len(texts) + text_of[request.text_rows]
            for request, image_of, text_of in zip(requests, image_places, text_places, strict=True)
        ]
        distinct, first, places = np.unique(np.concatenate(codes), return_index=True, return_inverse=True)
        rows = np.stack(np.divmod(distinct, len(texts)), axis=1)  # (D, 2) ascending in the image
        pairs = [(images[image], texts[text]) for image, text in rows.tolist()]
        scores = self.known.find(pairs)
        asked = np.isnan(scores)
        if asked.any():
            prepared = [[one for request in requests for one in request.prepared[side]] for side in (0, 1)]
            scores[asked] = self._asked(images, texts, rows[asked], (prepared[0], prepared[1]))
            self.known.keep([pair for pair, new in zip(pairs, asked, strict=True) if new], scores[asked])
        ends = np.cumsum([len(code) for code in codes])
        of_request = np.searchsorted(ends, first[asked], side="right")  # that asked for it first
        counts = np.bincount(of_request, minlength=len(requests))
        return [
            Found(scores[mine], int(count)) for mine, count in zip(np.split(places, ends[:-1]), counts, strict=True)
        ]

    def _asked(self, images: list[Item], texts: list[Item], rows: Ids, prepared: tuple[Prepared, Prepared]) -> Numbers:
        """The teacher's scores (P,) of pairs of places (P, 2), ascending in the image."""
        import torch

        wanted = np.unique(rows[:, 1])
        order, memory = self._texts.all_of(_once(texts[place] for place in wanted.tolist()), prepared[1])
        text_row = _rows_of(order, texts)
        found = np.empty(len(rows), np.float32)
        needed = _once(images[place] for place in np.unique(rows[:, 0]).tolist())
        for some, of_images in self._images.batches(needed, prepared[0]):
            image_row = _rows_of(some, images)
            mine = image_row[rows[:, 0]] >= 0
            pairs = image_row[rows[mine, 0]], text_row[rows[mine, 1]]
            device = next(iter(of_images.values())).device
            image_rows, text_rows = (torch.from_numpy(one).to(device) for one in pairs)
            parts = range(0, len(image_rows), self.pairs_per_call)
            scores = [
                self._score(
                    of_images,
                    memory,
                    image_rows[at : at + self.pairs_per_call],
                    text_rows[at : at + self.pairs_per_call],
                )
                for at in parts
            ]
            found[mine] = torch.cat(scores).float().cpu().numpy()
        return found

    def _score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        scores = self._teacher.score(images, texts, image_rows, text_rows)
        if scores.shape != image_rows.shape:
            raise ValueError(f"the teacher gave {tuple(scores.shape)} scores for {len(image_rows)} pairs")
        return scores


def _distinct(lists: Sequence[Sequence[Item]]) -> tuple[list[Item], list[Ids]]:
    """The distinct items of all lists, and for each list the place of its items among them.

    Copies in the corpus are distinct: each of their pairs has a place of its own in the store.
    """
    found: dict[str | int, int] = {}
    items: list[Item] = []
    places = []
    for some in lists:
        own = np.empty(len(some), np.int64)
        for place, item in enumerate(some):
            name = item.key if item.row < 0 else item.row
            if name not in found:
                found[name] = len(items)
                items.append(item)
            own[place] = found[name]
        places.append(own)
    return items, places


def _once(items: Iterable[Item]) -> list[Item]:
    """Of copies the first."""
    return list({item.key: item for item in items}.values())


def _rows_of(some: Sequence[Item], among: Sequence[Item]) -> Ids:
    """For each place of ``among`` the row in ``some``; -1 where it is not there."""
    row = {item.key: place for place, item in enumerate(some)}
    return np.array([row.get(item.key, -1) for item in among], np.int64)
