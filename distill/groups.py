"""Batches whose pairs share hard negatives: pairs that are one another's candidates are put together in groups.

Each item then meets its hard negatives among what the batch encodes anyway, and the teacher is asked for every pair
within a group. NGAME (Dahiya et al., WSDM 2023) makes batches of clusters to the same end; here groups grow along mined
candidates, so that they hold what mining found and nothing has to be clustered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distill import exact
from distill.protocols import DIRECTIONS, Candidates, Direction, Ids, sides_of
from distill.sampler import epoch_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distill.data.matches import Matches
    from distill.exact import Mask
    from distill.mined_vectors import SomeVectors
    from distill.protocols import Side

_GROUPING = 2  # sets these draws apart from others of the same seed


@dataclass(frozen=True)
class GroupedSampler:
    """Every group once an epoch, in an order drawn from (seed, epoch): ``batch_size // group`` of them a batch.

    Groupings take turns by epoch. Pairs beyond the last full group of a grouping, and groups beyond the last full batch
    of an epoch, are left out of it.
    """

    pairs: Ids  # (P, 2) image, text
    groupings: Ids  # (T, P) orders of the pairs; each run of ``group`` is a group
    group: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size % self.group:
            raise ValueError(
                f"train.batch_size is {self.batch_size}, no multiple of train.group, which is {self.group}"
            )
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{len(self.pairs)} pairs make {len(self.pairs) // self.group} groups of {self.group}, less than a "
                f"batch of {self.batch_size}: lower train.batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of one epoch."""
        return (len(self.pairs) // self.group) // (self.batch_size // self.group)

    def batch(self, step: int) -> Ids:
        """Pairs (batch_size, 2) of a global step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        members = self.groupings[epoch % len(self.groupings)]
        at_once = self.batch_size // self.group
        order = epoch_order(self.seed, epoch, len(self.pairs) // self.group)
        groups = order[index * at_once : (index + 1) * at_once]
        chosen: Ids = self.pairs[members[(groups[:, None] * self.group + np.arange(self.group)).reshape(-1)]]
        return chosen


def grouped(pairs: Ids, mined: Mapping[Direction, Candidates], *, group: int, count: int, seed: Sequence[int]) -> Ids:
    """Groupings (count, P): orders of the pairs (P, 2) in which each run of ``group`` belongs together.

    A group grows from a pair drawn at random: its query's candidates in both directions join it with a pair of theirs
    that no group has yet, then the candidates of those, until it is full. An image comes once a group, as far as that
    can be had.

    Args:
        pairs: labelled pairs of the split, each image and text in one at least.
        mined: candidates of the split's items.
        group: G, pairs of a group.
        count: groupings that differ in where groups begin and in which candidates they take.
        seed: numbers that the draws are a function of.
    """
    near = _Near.of(pairs, mined)
    return np.stack([_grouping(near, group, np.random.default_rng([*seed, _GROUPING, turn])) for turn in range(count)])


def dense_candidates(
    pairs: Ids, groupings: Ids, group: int, matches: Matches, vectors: Mapping[Side, tuple[Ids, SomeVectors]]
) -> dict[Direction, Candidates]:
    """Candidates by group: for each query of the pairs the items, no matches of its own, that its groups hold.

    Args:
        pairs: (P, 2).
        groupings: (T, P), see ``grouped``.
        group: pairs of a group.
        matches: every true pair of the corpus.
        vectors: of each side ids (N,), ascending, and unit vectors (N, D), from which similarities are computed.
    """
    full = len(pairs) // group * group
    members = pairs[groupings[:, :full].reshape(-1, group)]  # (groups, G, 2)
    images = np.repeat(members[..., 0], group, axis=1).reshape(-1)
    texts = np.tile(members[..., 1], (1, group)).reshape(-1)
    images, texts = np.divmod(np.unique(images * matches.n_texts + texts), matches.n_texts)
    negative = ~matches.is_match(images, texts)
    sides = {"image": images[negative], "text": texts[negative]}
    found: dict[Direction, Candidates] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        ids = np.unique(pairs[:, 0 if query == "image" else 1])
        found[direction] = _listed(direction, ids, sides[query], sides[item], vectors[query], vectors[item])
    return found


def _listed(
    direction: Direction,
    query_ids: Ids,
    queries: Ids,
    items: Ids,
    of_queries: tuple[Ids, SomeVectors],
    of_items: tuple[Ids, SomeVectors],
) -> Candidates:
    """One row a query, hardest first, filled up with -1."""
    rows = np.searchsorted(query_ids, queries)
    order = np.argsort(rows, kind="stable")
    rows, items = rows[order], items[order]
    counts = np.bincount(rows, minlength=len(query_ids))
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((len(query_ids), max(1, int(counts.max(initial=0)))), -1, np.int64)
    ids[rows, columns] = items
    similarity = np.full(ids.shape, -np.inf, np.float32)
    for part in exact.blocks(len(ids), max(1, exact.CELLS // (ids.shape[1] * of_items[1].shape[1]))):
        asking = of_queries[1][np.searchsorted(of_queries[0], query_ids[part])]
        asked = of_items[1][np.searchsorted(of_items[0], np.maximum(ids[part], of_items[0][0]))]
        similarity[part] = np.where(ids[part] >= 0, exact.similarity_rows(asking, asked), -np.inf)
    hardest = np.lexsort((ids, -similarity), axis=1)
    ids, similarity = np.take_along_axis(ids, hardest, axis=1), np.take_along_axis(similarity, hardest, axis=1)
    return Candidates(direction, query_ids, ids, similarity, np.zeros(ids.shape, np.bool_))


@dataclass(frozen=True)
class _Near:
    """What each pair's items were found near."""

    images: Ids  # (P,) of the pairs, as numbers from 0
    texts: Ids  # (P, K) a pair of each candidate text, -1 = none
    images_near: Ids  # (P, K) numbers of the candidate images, -1 = none
    starts: Ids  # (N + 1,) of each image's pairs among all pairs sorted by image

    @classmethod
    def of(cls, pairs: Ids, mined: Mapping[Direction, Candidates]) -> _Near:
        image_ids, images = np.unique(pairs[:, 0], return_inverse=True)
        text_ids, first_pair = np.unique(pairs[:, 1], return_index=True)
        starts = np.searchsorted(np.sort(images), np.arange(len(image_ids) + 1))
        texts, there = _numbered(text_ids, _of_queries(mined["i2t"], pairs[:, 0]))
        near_images, known = _numbered(image_ids, _of_queries(mined["t2i"], pairs[:, 1]))
        return cls(
            images,
            np.where(there, first_pair[texts], -1),
            np.where(known, near_images, -1),
            starts,
        )


def _of_queries(found: Candidates, query_ids: Ids) -> Ids:
    return found.item_ids[np.searchsorted(found.query_ids, query_ids)]


def _numbered(known: Ids, wanted: Ids) -> tuple[Ids, Mask]:
    """Places of the wanted ids among the known ones, which ascend, and which of them are there at all."""
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return places, known[places] == wanted


def _grouping(near: _Near, group: int, rng: np.random.Generator) -> Ids:
    """An order of the pairs: full groups, then what was left over, neighbours still beside one another."""
    growing = _Growing(near, rng)
    full: list[int] = []
    left_over: list[int] = []
    for first in rng.permutation(len(near.images)).tolist():
        if not growing.taken[first]:
            members = growing.grow(first, group)
            (full if len(members) == group else left_over).extend(members)
    return np.array(full + left_over, np.int64)


class _Growing:
    """Groups that grow one after another. Holds lists, since single elements of arrays are slow to read."""

    def __init__(self, near: _Near, rng: np.random.Generator) -> None:
        count, width = len(near.images), near.texts.shape[1] + near.images_near.shape[1]
        self.taken = bytearray(count)
        self._images: list[int] = near.images.tolist()
        self._starts: list[int] = near.starts.tolist()
        self._by_image: list[int] = np.lexsort((rng.permutation(count), near.images)).tolist()
        # one row of codes a pair, in random order: a pair itself, an image by -2 - its number, -1 for none
        codes = np.concatenate([near.texts, np.where(near.images_near < 0, -1, -2 - near.images_near)], axis=1)
        order = rng.permuted(np.broadcast_to(np.arange(width), codes.shape), axis=1)
        self._codes: list[list[int]] = np.take_along_axis(codes, order, axis=1).tolist()

    def grow(self, first: int, size: int) -> list[int]:
        """At most ``size`` pairs that no group had, from the first on; they are taken now."""
        self.taken[first] = 1
        members, images, frontier = [first], {self._images[first]}, deque([first])
        while frontier and len(members) < size:
            for pair in self._free_beside(frontier.popleft()):
                if self._images[pair] not in images:
                    self.taken[pair] = 1
                    images.add(self._images[pair])
                    members.append(pair)
                    frontier.append(pair)
                    if len(members) == size:
                        break
        return members

    def _free_beside(self, pair: int) -> Iterator[int]:
        """Of each candidate of a pair, a pair that no group has."""
        for code in self._codes[pair]:
            beside = [code] if code >= 0 else [] if code == -1 else self._pairs_of(-2 - code)
            free = next((other for other in beside if not self.taken[other]), None)
            if free is not None:
                yield free

    def _pairs_of(self, image: int) -> list[int]:
        return self._by_image[self._starts[image] : self._starts[image + 1]]
