"""From a recipe's experiment to a running engine."""

from __future__ import annotations

import threading

from distill.teacher_service.engine import EngineSettings
from distill.teacher_service.opening import open_engine
from distill.wire import Limits
from tests.drivers.noting import experiment


def test_no_thread_but_the_engines_own_has_computed_once_it_is_open(tmp_path):
    x, threads = experiment(tmp_path), []
    engine, info = open_engine(x, EngineSettings(), Limits(), say=lambda _: threads.append(threading.current_thread()))
    engine.close()
    assert info.identity == x.teacher.identity
    assert threads
    assert not any(thread.is_alive() for thread in threads), "it keeps OpenMP workers while it lives"
