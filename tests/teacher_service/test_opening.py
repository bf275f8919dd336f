"""From a recipe's experiment to a running engine, here or on a cluster."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from distill.serving.opening import ServingError
from distill.teacher_service import on_ray
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


@pytest.fixture
def refused(monkeypatch):
    """Why replicas are not served on a cluster of so much, where Ray Serve says so of itself."""

    def why(placed, *, resources, status=None):
        serve, ray = SimpleNamespace(), SimpleNamespace(cluster_resources=lambda: resources)
        if status is not None:
            serve.status = lambda: status  # whatever else is asked of it is an AttributeError
        monkeypatch.setattr(on_ray, "serve_module", lambda address: serve)
        monkeypatch.setattr(on_ray, "cluster", lambda ray, address: nullcontext())
        monkeypatch.setattr(on_ray.importlib, "import_module", lambda name: ray)
        front = on_ray.Front("127.0.0.1", 8000, None, ("*",), 5)
        with (
            pytest.raises(ServingError) as raised,
            on_ray.replicas(lambda: None, placed, EngineSettings(), Limits(), front),
        ):
            pytest.fail("nothing is to be served there")
        return str(raised.value)

    return why


def test_a_cluster_where_serve_runs_is_left_as_it_is(refused):
    running = SimpleNamespace(applications={"somebody's": None}, proxies={"node": None})
    told = refused(on_ray.OnRay(2, address="auto"), resources={}, status=running)
    assert "runs on the cluster auto already (applications: somebody's)" in told


@pytest.mark.parametrize(
    ("placed", "told"),
    [
        (on_ray.OnRay(2, threads=3), "2 replicas with 3 CPU each do not fit the Ray cluster, which has 4"),
        (on_ray.OnRay(1, gpus=1), "1 replicas with 1 GPU each do not fit the Ray cluster, which has 0"),
    ],
)
def test_replicas_that_do_not_fit_are_refused_and_not_waited_for(refused, placed, told):
    assert told in refused(placed, resources={"CPU": 4.0})
