"""Whether an artefact ranks as the float32 student did in training: measured on real queries, and judged by gates.

The reference is the run's own student in torch with the preparation it was trained with. A route starts from the same
image files and sentences and does everything else itself, so that another resize filter or another mean shows as well
as another weight.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact
from distill.export.odd import ODD_TEXTS, odd_pictures
from distill.export.routes import open_picture
from distill.inference import batches_of, evaluating
from distill.metrics import ranks_from_embeddings, summarise
from distill.protocols import DIRECTIONS, SIDES, sides_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distill.data.corpus import Corpus
    from distill.exact import Vectors
    from distill.export.layout import Precision
    from distill.export.routes import Encode, Route
    from distill.protocols import Ids, Side, Student

BATCH = 32
_TRIED_BATCHES = (1, 3, 17)
_NORM = 2e-3  # half precision rounds a length by half of that
_RECALLS = tuple(f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5, 10))


@dataclass(frozen=True)
class Gate:
    """What an artefact must reach.

    Attributes:
        cosine: Least cosine with the reference vector over all items, odd ones included; None: not asked.
        recall: Most points that any of the six recalls may change; of int8 only a drop counts.
    """

    cosine: float | None
    recall: float


GATES: Mapping[Precision, Gate] = {
    "fp32": Gate(0.9999, 0.1),
    "fp16": Gate(0.999, 0.2),
    "int8": Gate(None, 1.0),
}


@dataclass(frozen=True)
class Agreement:
    """How one artefact's vectors of one side (or of both) agree with the reference; the other side is the reference's.

    Attributes:
        largest_difference: Of any number of any vector.
        least_cosine: Over the sample's items.
        mean_cosine: Over the sample's items.
        top1: Share of queries whose best item is the same.
        top10: Share of the reference's ten best items that are among the ten best.
        recall_change: Points that each recall changes by.
        norm_error: Largest distance of a vector's length from 1.
        odd: Cosine by kind of odd picture or text.
        batches: Least cosine of a vector with itself in batches of 1, 3 and 17.
    """

    largest_difference: float
    least_cosine: float
    mean_cosine: float
    top1: float
    top10: float
    recall_change: Mapping[str, float]
    norm_error: float
    odd: Mapping[str, float] = field(default_factory=dict)
    batches: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


_NAN = math.nan
NOTHING = Agreement(_NAN, _NAN, _NAN, _NAN, _NAN, {}, _NAN)
"""Of what has no vectors to compare."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Real items that artefacts are judged on, and the reference's vectors of them."""

    corpus: Corpus
    ids: Mapping[Side, Ids]
    reference: Mapping[Side, Vectors]
    odd: Mapping[Side, Vectors]  # of odd pictures and texts

    @classmethod
    def of(cls, student: Student, corpus: Corpus, ids: Mapping[Side, Ids]) -> Sample:
        """Embed the items of ``ids`` (each with a match among the others) by a student in float32 on the CPU."""
        from distill.data.pictures import decode_image

        encode: dict[Side, Encode] = {
            "image": lambda items: _of_student(student, "image", student.prepare_images(items)),
            "text": lambda items: _of_student(student, "text", student.prepare_texts(items)),
        }
        with evaluating(student):
            reference: dict[Side, Vectors] = {
                "image": _in_batches(lambda rows: encode["image"](corpus.load_images(rows)), ids["image"]),
                "text": _in_batches(lambda rows: encode["text"](_texts(corpus, rows)), ids["text"]),
            }
            pictures = [decode_image(content) for content in odd_pictures().values()]
            odd: dict[Side, Vectors] = {
                "image": np.concatenate([encode["image"]([one]) for one in pictures]),
                "text": np.concatenate([encode["text"]([one]) for one in ODD_TEXTS]),
            }
        return cls(corpus, dict(ids), reference, odd)

    @cached_property
    def recalls(self) -> Mapping[str, float]:
        """The reference's own, in percent."""
        return self._recalls(self.reference)

    @cached_property
    def nearest(self) -> Mapping[Side, Ids]:
        """The reference's ten best items of the other side, (N, 10) ids, of every item of a side."""
        return {side: self._nearest(self.reference, side) for side in SIDES}

    def embed(self, route: Route) -> Vectors:
        """The sample's vectors by a route, from image files and sentences."""
        return _in_batches(lambda rows: route.encode(self.items(route.side, rows)), self.ids[route.side])

    def items(self, side: Side, rows: Ids) -> Sequence[Any]:
        """Sentences, or pictures opened from their files as the model card says."""
        if side == "text":
            return _texts(self.corpus, rows)
        return [open_picture(content) for content in self.corpus.pictures.encoded(rows)]

    def agreement(self, vectors: Mapping[Side, Vectors]) -> Agreement:
        """Of vectors of one side or of both."""
        cosines = np.concatenate([_cosines(found, self.reference[side]) for side, found in vectors.items()])
        largest = max(float(np.abs(found - self.reference[side]).max()) for side, found in vectors.items())
        both = {**self.reference, **vectors}
        recalls = self._recalls(both)
        top1, top10 = self._overlap(both, asking=tuple(vectors))
        change = {name: round(recalls[name] - self.recalls[name], 4) for name in _RECALLS}
        lengths = np.concatenate([np.linalg.norm(found, axis=1) for found in vectors.values()])
        error = float(np.abs(lengths - 1).max())
        return Agreement(largest, float(cosines.min()), float(cosines.mean()), top1, top10, change, error)

    def measure(self, route: Route, vectors: Vectors) -> Agreement:
        """Of a route, with odd items and batches of several sizes."""
        found = self.agreement({route.side: vectors})
        kinds = list(odd_pictures()) if route.side == "image" else [_short(text) for text in ODD_TEXTS]
        items: Sequence[Any] = (
            [open_picture(content) for content in odd_pictures().values()] if route.side == "image" else ODD_TEXTS
        )
        odd = np.concatenate([route.encode([item]) for item in items])
        cosines = _cosines(odd, self.odd[route.side])
        by_kind = dict(zip(kinds, cosines.tolist(), strict=True))
        return replace(found, odd=by_kind, batches=self._batches(route, vectors))

    def _batches(self, route: Route, vectors: Vectors) -> dict[str, float]:
        rows = self.ids[route.side][: max(_TRIED_BATCHES)]
        found = {}
        for size in _TRIED_BATCHES:
            again = _in_batches(lambda part: route.encode(self.items(route.side, part)), rows, size=size)
            found[str(size)] = float(_cosines(again, vectors[: len(rows)]).min())
        return found

    def _recalls(self, vectors: Mapping[Side, Vectors]) -> dict[str, float]:
        ranks = {}
        for direction in DIRECTIONS:
            query, item = sides_of(direction)
            ranks[direction] = ranks_from_embeddings(
                vectors[query],
                vectors[item],
                query_ids=self.ids[query],
                item_ids=self.ids[item],
                matches=self.corpus.matches,
                direction=direction,
            )
        found = summarise(ranks["i2t"], ranks["t2i"]).as_dict()
        return {name: found[name] for name in _RECALLS}

    def _overlap(self, vectors: Mapping[Side, Vectors], *, asking: Sequence[Side]) -> tuple[float, float]:
        """Shares of the same best item and of the same ten best, over the queries of the sides that ask."""
        firsts, tens = [], []
        for side in asking:
            before, now = self.nearest[side], self._nearest(vectors, side)
            firsts.append(before[:, 0] == now[:, 0])
            tens.append((before[:, :, None] == now[:, None, :]).any(axis=2).mean(axis=1))
        return float(np.concatenate(firsts).mean()), float(np.concatenate(tens).mean())

    def _nearest(self, vectors: Mapping[Side, Vectors], side: Side) -> Ids:
        other: Side = "text" if side == "image" else "image"
        k = min(10, len(self.ids[other]))
        return exact.search(vectors[side], vectors[other], k, ids=self.ids[other])[1]


def faults(found: Agreement, gate: Gate, *, precision: Precision) -> list[str]:
    """Why an artefact does not pass its gate, in words; empty where it does."""
    said = []
    if not found.norm_error <= _NORM:
        said.append(f"a vector's length is off by {found.norm_error:.4f}, allowed {_NORM:g}")
    if gate.cosine is not None:
        if not found.least_cosine >= gate.cosine:  # a NaN does not pass
            said.append(f"least cosine {found.least_cosine:.6f}, wanted {gate.cosine:g}")
        said += [
            f"least cosine {value:.6f} on {kind!r}, wanted {gate.cosine:g}"
            for kind, value in found.odd.items()
            if not value >= gate.cosine
        ]
        said += [
            f"least cosine {value:.6f} between batches of {size} and of {BATCH}, wanted {gate.cosine:g}"
            for size, value in found.batches.items()
            if not value >= gate.cosine
        ]
    for name, change in found.recall_change.items():
        beyond = -change if precision == "int8" else abs(change)
        if beyond > gate.recall:
            said.append(f"{_recall_name(name)} changes by {change:+.2f} points, allowed {gate.recall:g}")
    return said


def opened_plainly(route: Route, sample: Sample) -> dict[str, float]:
    """Cosine with the reference by kind of odd picture, where a user opens it by ``PIL.Image.open`` and no more.

    NaN where the route refuses such a picture.
    """
    from io import BytesIO

    import PIL.Image

    found = {}
    for (kind, content), wanted in zip(odd_pictures().items(), sample.odd["image"], strict=True):
        try:
            with PIL.Image.open(BytesIO(content)) as image:
                vector = route.encode([image])
            found[kind] = float(_cosines(vector, wanted[None])[0])
        except Exception:  # whatever a loader makes of it, its users meet
            found[kind] = float("nan")
    return found


def _of_student(student: Any, side: Side, inputs: Any) -> Vectors:
    import torch

    with torch.no_grad():
        out = student(inputs, None).images if side == "image" else student(None, inputs).texts
    vectors: Vectors = out.float().numpy()
    return vectors


def _in_batches(encode: Callable[[Ids], Vectors], rows: Ids, *, size: int = BATCH) -> Vectors:
    return np.concatenate([encode(part) for part in batches_of(rows, size)])


def _texts(corpus: Corpus, rows: Ids) -> list[str]:
    return [corpus.texts[row] for row in rows.tolist()]


def _cosines(found: Vectors, wanted: Vectors) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N,) in double precision; NaN where a vector is none."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        return np.asarray((found * wanted).sum(axis=1) / lengths)


def _short(text: str) -> str:
    if not text:
        return "(empty)"
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text.split())} words)"


def _recall_name(name: str) -> str:
    way, k = name.split("_r")
    return f"{'image→text' if way == 'i2t' else 'text→image'} R@{k}"
