"""From what an engine found to what is sent."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from distill.serving.engine import PARTS
from distill.serving.schemas import (
    Find,
    Hit,
    Info,
    Milliseconds,
    SearchAnswer,
    Searched,
    StudentInfo,
    TeacherInfo,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.protocols import Side
    from distill.serving.catalog import Catalog
    from distill.serving.engine import Engine, Found

SIDE_OF: dict[Find, Side] = {"images": "image", "texts": "text"}
_FIND_OF: dict[Side, Find] = {"image": "images", "text": "texts"}


def answer_of(engine: Engine, found: Found, *, k: int) -> SearchAnswer:
    """The first ``k`` of what was found, with names, captions and pictures."""
    assert engine.catalog is not None
    index = engine.catalog.index[found.side]
    corpus = engine.student.report.get("corpus", {})
    return SearchAnswer(
        hits=[_hit(engine.catalog, found, place) for place in range(min(k, len(found.ids)))],
        milliseconds=milliseconds_of(found.milliseconds),
        searched=Searched(
            find=_FIND_OF[found.side],
            items=len(index),
            exact=index.exact,
            corpus=str(corpus.get("name", "")),
            split=str(corpus.get("split", "")),
            reranked=found.reranked,
        ),
    )


def milliseconds_of(took: Mapping[str, float]) -> Milliseconds:
    """Of each part and together, to a thousandth."""
    parts: dict[str, Any] = {part: round(took[part], 3) for part in PARTS if part in took}
    return Milliseconds(**parts, total=round(sum(took.values()), 3))


def info_of(engine: Engine, version: str) -> Info:
    """What a service is."""
    report, catalog, reranker = engine.student.report, engine.catalog, engine.reranker
    student, corpus = report["student"], report.get("corpus", {})
    teacher = None
    if reranker is not None:
        asked = reranker.teacher
        teacher = TeacherInfo(identity=asked.identity, score_kind=asked.score_kind, rerank=engine.rerank)
    return Info(
        version=version,
        student=StudentInfo(
            identity=str(student.get("identity", "")),
            class_=str(student.get("class", "")),
            dim=engine.student.dim,
            run=PurePath(str(student.get("run", ""))).name,  # where the run lay is nobody's business
            arm=str(student.get("arm", "")),
            precision={side: str(precision) for side, precision in engine.student.precisions.items()},
        ),
        teacher=teacher,
        corpus=str(corpus.get("name", "")),
        split=str(corpus.get("split", "")),
        items=None if catalog is None else {find: len(catalog.index[side]) for find, side in SIDE_OF.items()},
        pictures=engine.pictures is not None,
    )


def _hit(catalog: Catalog, found: Found, place: int) -> Hit:
    item, teacher = int(found.ids[place]), float(found.teacher[place])
    is_image = found.side == "image"
    pictures = [item] if is_image else catalog.images_of(item)
    return Hit(
        kind=_FIND_OF[found.side],
        id=item,
        score=float(found.scores[place]),
        teacher_score=teacher if math.isfinite(teacher) else None,
        rank=place + 1,
        rank_before=int(found.before[place]),
        name=catalog.name(pictures[0]) if pictures else None,
        text=None if is_image else catalog.text(item),
        picture=pictures[0] if pictures else None,
        captions=catalog.captions_of(item) if is_image else [],
    )
