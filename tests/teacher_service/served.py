"""A toy teacher behind an engine, and behind a socket of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from distill.embed import live_source
from distill.protocols import SIDES
from distill.serving.server import bound_socket
from distill.store import ScoreStore
from distill.teacher_service.app import build_app
from distill.teacher_service.engine import Engine, EngineSettings
from distill.teacher_service.items import Items
from distill.teacher_service.requests import EmbedRequest, ScoreRequest
from distill.teacher_service.schemas import CorpusInfo, Info, LimitsInfo
from distill.wire import Limits


def store_of(teacher: Any, corpus: Any, folder: Path) -> ScoreStore:
    return ScoreStore(
        folder,
        teacher_identity=teacher.identity,
        corpus_fingerprint=corpus.fingerprint,
        score_kind=teacher.score_kind,
        n_images=corpus.n_images,
        n_texts=corpus.n_texts,
    )


@contextmanager
def engine_of(
    teacher: Any, corpus: Any = None, folder: Path | None = None, *, max_pixels: int = 10_000, **settings: Any
) -> Iterator[Engine]:
    items = {
        side: Items(
            side,
            teacher,
            corpus=corpus,
            source=None if corpus is None else live_source(corpus, side, teacher),
            max_pixels=max_pixels,
        )
        for side in SIDES
    }
    store = None if folder is None else store_of(teacher, corpus, folder)
    engine = Engine(teacher, items, store, EngineSettings(**settings))
    try:
        yield engine
    finally:
        engine.close()


def info_of(teacher: Any, corpus: Any, limits: Limits) -> Info:
    known = None
    if corpus is not None:
        known = CorpusInfo(
            name=corpus.name, fingerprint=corpus.fingerprint, images=corpus.n_images, texts=corpus.n_texts
        )
    return Info(
        version="0",
        teacher=type(teacher).__name__,
        identity=teacher.identity,
        score_kind=teacher.score_kind,
        dim=2,
        corpus=known,
        limits=LimitsInfo(**asdict(limits)),
    )


@contextmanager
def served(
    teacher: Any,
    corpus: Any = None,
    folder: Path | None = None,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    port: int = 0,
    **settings: Any,
) -> Iterator[str]:
    """The URL of a service in a thread of this process."""
    limits = limits or Limits()
    with engine_of(teacher, corpus, folder, **settings) as engine, bound_socket("127.0.0.1", port, token=True) as bound:
        app = build_app(engine, info_of(teacher, corpus, limits), limits=limits, token=token)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def pairs(corpus: Any, image_ids: Any, text_ids: Any, **more: Any) -> ScoreRequest:
    """A request of pairs (image_ids[p], text_ids[p])."""
    ids = {"image_ids": image_ids, "text_ids": text_ids}
    numbers = {name: np.asarray(list(rows), "<i8").tobytes() for name, rows in ids.items()}
    return ScoreRequest.model_validate({"corpus": corpus.fingerprint, **numbers, **more})


def items(**named: Any) -> EmbedRequest:
    return EmbedRequest.model_validate(named)
