"""What the service does, without HTTP: embed, search, re-rank, each part with its time.

Shape key: ``K`` items found, ``N`` items embedded, ``D`` width.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.pictures import decode_image
from distill.protocols import Distant

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distill.exact import Vectors
    from distill.export.runtime import OnnxStudent
    from distill.protocols import Ids, Image, Side
    from distill.serving.catalog import Catalog
    from distill.serving.pictures import PictureSource
    from distill.serving.rerank import Reranker

PARTS = ("preprocess", "embed", "search", "rerank")


@dataclass(frozen=True)
class Found:
    """An answer: items in order, and what it took."""

    side: Side
    query: str | Image
    ids: Ids  # (K,)
    scores: Vectors  # (K,) of the student
    before: Ids  # (K,) place in the student's order, from 1
    teacher: Vectors  # (K,) raw; NaN = not asked
    milliseconds: dict[str, float] = field(default_factory=dict)
    reranked: int = 0  # how many items the teacher read


@dataclass(frozen=True)
class Engine:
    """The parts of a service; ``catalog``, ``pictures`` and ``reranker`` are None where they are not there."""

    student: OnnxStudent
    catalog: Catalog | None = None
    pictures: PictureSource | None = None
    reranker: Reranker | None = None
    rerank: int = 32  # items of a shortlist that the teacher reads

    def close(self) -> None:
        """End what waits for a teacher elsewhere."""
        if self.reranker is not None and isinstance(self.reranker.teacher, Distant):
            self.reranker.teacher.close()

    def search(self, query: str | bytes, find: Side, *, depth: int) -> Found:
        """The ``depth`` items that are most similar to a sentence, or to an encoded picture.

        Raises:
            UnreadableImageError: the picture cannot be decoded.
        """
        assert self.catalog is not None
        took: dict[str, float] = {}
        with _timed(took, "preprocess"):
            asked = decode_image(query) if isinstance(query, bytes) else query
            inputs = self._prepared(asked)
        with _timed(took, "embed"):
            vector = self.student.run("text" if isinstance(asked, str) else "image", inputs)
        with _timed(took, "search"):
            index = self.catalog.index[find]
            scores, ids = index.search(vector, min(depth, len(index)))  # (1, K) each
        there = ids[0] >= 0
        places = np.arange(1, int(there.sum()) + 1)
        unasked = np.full(len(places), np.nan, np.float32)
        return Found(find, asked, ids[0][there], scores[0][there], places, unasked, took)

    def reordered(self, found: Found) -> Found:
        """The first items by the teacher's scores, the rest after them as they were."""
        assert self.reranker is not None
        took = dict(found.milliseconds)
        head = found.ids[: self.rerank]
        teacher = found.teacher.copy()
        with _timed(took, "rerank"):
            teacher[: len(head)] = self.reranker.scores(found.query, found.side, head)
            order = np.arange(len(found.ids))
            order[: len(head)] = np.argsort(-teacher[: len(head)], kind="stable")
        return replace(
            found,
            ids=found.ids[order],
            scores=found.scores[order],
            before=found.before[order],
            teacher=teacher[order],
            milliseconds=took,
            reranked=len(head),
        )

    def embed(self, items: Sequence[str] | Sequence[bytes]) -> tuple[Vectors, dict[str, float]]:
        """Unit vectors (N, D) of sentences, or of encoded pictures, and the milliseconds of the parts.

        Raises:
            UnreadableImageError: a picture cannot be decoded; the message says which.
        """
        took: dict[str, float] = {}
        texts = [item for item in items if isinstance(item, str)]
        with _timed(took, "preprocess"):
            if texts:
                inputs = self.student.prepare_texts(texts)
            else:
                inputs = _stacked([self._picture(item, n) for n, item in enumerate(items) if isinstance(item, bytes)])
        with _timed(took, "embed"):
            return self.student.run("text" if texts else "image", inputs), took

    def _picture(self, content: bytes, place: int) -> dict[str, Any]:
        """One at a time, since pixels take far more room than what the tower reads."""
        from distill.data.pictures import UnreadableImageError

        try:
            return self._prepared(decode_image(content))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"picture {place + 1}: {error}") from error

    def _prepared(self, asked: str | Image) -> dict[str, Any]:
        return self.student.prepare_texts([asked]) if isinstance(asked, str) else self.student.prepare_images([asked])


def _stacked(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}


@contextmanager
def _timed(took: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    took[part] = (time.perf_counter() - started) * 1000
