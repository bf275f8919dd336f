"""A service of the toy teacher over the toy corpus, in this process."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image

from distill.data.corpus import Corpus, build_corpus
from distill.embed import live_source
from distill.protocols import SIDES
from distill.store import ScoreStore
from distill.teacher_service.engine import Engine, EngineSettings
from distill.teacher_service.items import Items
from distill.teacher_service.schemas import Info
from distill.wire import Limits
from tests.teacher_service.served import info_of
from tests.toys import ToyTeacher, toy_corpus, toy_tokens


class AnyTextTeacher(ToyTeacher):
    """Takes texts that do not begin with a number, too."""

    def prepare_texts(self, texts: Any) -> Any:
        return toy_tokens([text if _is_caption(text) else f"{500 + zlib.crc32(text.encode()) % 500}" for text in texts])


def _is_caption(text: str) -> bool:
    first = text.split()[0]
    return first.isascii() and first.isdecimal() and len(first) < 4


def known_corpus() -> Corpus:
    """The toy corpus with fingerprints as corpora of files have them, so that its pictures are known by their bytes."""
    toy = toy_corpus()
    contents = toy.pictures.encoded(np.arange(toy.n_images))
    pictures = replace(toy.pictures, fingerprints=[hashlib.sha256(one).hexdigest() for one in contents])
    return build_corpus("toy", pictures, texts=list(toy.texts), pairs=toy.pairs, image_splits=["test"] * toy.n_images)


def toy_engine(
    corpus: Corpus,
    *,
    teacher: Any = None,
    store: ScoreStore | None = None,
    settings: EngineSettings | None = None,
    limits: Limits | None = None,
) -> tuple[Engine, Info]:
    """Running, over all of the corpus."""
    teacher, limits = teacher or AnyTextTeacher(), limits or Limits()
    items = {
        side: Items(
            side,
            teacher,
            corpus=corpus,
            source=live_source(corpus, side, teacher),
            max_pixels=limits.picture_pixels,
            max_pixels_together=limits.pixels,
        )
        for side in SIDES
    }
    return Engine(teacher, items, store, settings or EngineSettings()), info_of(teacher, corpus, limits)


def square(shade: int, size: tuple[int, int] = (5, 5)) -> bytes:
    """A PNG file that is not in the toy corpus, whose squares are smaller."""
    file = BytesIO()
    PIL.Image.new("L", size, shade).save(file, "PNG")
    return file.getvalue()
