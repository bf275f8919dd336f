"""Ray Data on this machine: the units of one process, also where an actor is killed in the middle, or the driver."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from distill.driver_commands import Asking, embedded
from distill.drivers.driver import DriverError, Task
from distill.drivers.embedding import Embedder, Wanted, join_all, plan_vectors
from distill.drivers.on_ray import NICENESS, MissingRayError, RayDriver, environment, ray_module
from distill.drivers.scoring import plan_scores
from tests.drivers.noting import experiment, kill_one_amid_a_call, notes, once, pairs, units, until, workers_at_work
from tests.drivers.test_embedding import every, trained, vectors
from tests.drivers.test_local import IN_HAND, SLOW_S, driving, ended
from tests.test_wrong_recipes import ROOT

pytest.importorskip("ray", reason="Ray is not installed: pip install 'cross2dual[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """One for all tests here, of two cores."""
    ray = ray_module()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ[NICENESS] = "0"  # Ray was imported before: the driver sets it for a cluster of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own making
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20
        )
    yield ray
    ray.shutdown()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    x = experiment(tmp_path_factory.mktemp("whole"))
    return x.ask(*pairs(x)), units(x)


def test_two_actors_make_the_units_of_one_process_though_one_is_killed(cluster, tmp_path, whole):
    (tmp_path / "slow").touch()
    x = experiment(tmp_path, seconds=SLOW_S)
    x.elsewhere = Asking(x, RayDriver(2, 2, threads=1))

    def both_work() -> bool:
        return len(workers_at_work(tmp_path)) == 2 and len(units(x)) >= 1

    thread = once(both_work, lambda: kill_one_amid_a_call(tmp_path))
    np.testing.assert_array_equal(x.ask(*pairs(x)), whole[0])
    thread.join()
    assert units(x) == whole[1]
    asked = notes(tmp_path)
    assert len(asked) == 900
    assert 0 < asked.total() - 900 <= IN_HAND
    assert len(workers_at_work(tmp_path)) == 3, "two actors, and the one in place of the killed"


def test_actors_embed_as_one_process_does(cluster, tmp_path):
    x = trained(tmp_path)
    wanted = Wanted(tmp_path / "vectors", "plain", rows_per_unit=40)
    embedded(x, wanted, RayDriver(1, 2, threads=1))
    student = x.saved_student(x.folder / "arms" / "plain" / "student")
    for side, features in join_all(plan_vectors(x, Embedder(x, "plain"), wanted)).items():
        np.testing.assert_array_equal(vectors(features), x.embed(student, side, every(x, side)))


def test_more_than_a_cluster_has_is_refused_at_once(cluster, tmp_path):
    x = experiment(tmp_path)
    x.elsewhere = Asking(x, RayDriver(2, 2, threads=1, gpus=1))
    with pytest.raises(DriverError, match="2 workers with 1 GPU each do not fit the Ray cluster, which has 0"):
        x.ask(*pairs(x))


@pytest.mark.slow
def test_what_an_actor_cannot_mend_is_said_without_rays_traces(cluster, tmp_path):
    x = experiment(tmp_path, bad=3)
    x.elsewhere = Asking(x, RayDriver(1, 1, threads=1))
    with pytest.raises(DriverError, match=r"^the teacher gave .* scores that are not finite") as raised:
        x.ask(*pairs(x))
    assert "Traceback" not in str(raised.value)


@pytest.mark.slow
def test_an_actor_that_finds_another_teacher_does_nothing(cluster, tmp_path):
    x = experiment(tmp_path)
    plan, numbers, _ = plan_scores(x, x.scorer, *pairs(x))
    path = plan.folder / "plan.json"
    path.write_text(path.read_text().replace('"seed": 0}', '"seed": 1}').replace('"seed": 0,', '"seed": 1,'))
    with pytest.raises(DriverError, match="teacher_identity: the plan is of|corpus_fingerprint: the plan is of"):
        RayDriver(1, 1, threads=1).run(Task(plan, numbers, set), lambda number: None)
    assert not notes(tmp_path)


@pytest.mark.slow
def test_units_that_kill_every_actor_end_the_work(cluster, tmp_path):
    x = experiment(tmp_path, dies=True)
    x.elsewhere = Asking(x, RayDriver(1, 1, threads=1))
    with pytest.raises(DriverError, match=r"4 actors in turn died of units \d+ to \d+"):
        x.ask(*pairs(x))
    assert not units(x)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_stopped_goes_on_to_the_same_store(tmp_path, whole, how):
    (tmp_path / "slow").touch()
    x = experiment(tmp_path, seconds=SLOW_S)
    process = driving(tmp_path, driver="ray")
    until(lambda: len(units(x)) >= 2)
    process.send_signal(how)
    assert process.wait(timeout=60) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how]
    (tmp_path / "slow").unlink()
    again = driving(tmp_path, driver="ray")
    ended(again, tmp_path, 300)
    assert units(x) == whole[1]
    asked = notes(tmp_path)
    assert len(asked) == 900
    assert asked.total() - 900 <= IN_HAND


def test_a_cluster_of_its_own_asks_for_a_token_which_ray_learns_while_it_is_imported(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL", NICENESS):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv(NICENESS)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    seen = []
    monkeypatch.setattr(
        "distill.drivers.on_ray.importlib.import_module", lambda name: seen.append(os.environ.get("RAY_AUTH_MODE"))
    )
    RayDriver(1, 1, address="auto")  # a cluster that is there has its own ways
    RayDriver(1, 1)
    assert seen == [None, None, "token", "token"]
    assert os.environ[NICENESS] == "0", "workers that are nice wait for whatever else runs"


def test_ray_that_was_imported_before_starts_no_cluster_without_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "as it was")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(importlib.import_module("ray"), "is_initialized", lambda: False)
    x = experiment(tmp_path)
    plan, numbers, _ = plan_scores(x, x.scorer, *pairs(x))
    with pytest.raises(DriverError, match="set RAY_AUTH_MODE=token in the environment"):
        RayDriver(1, 1, threads=1).run(Task(plan, numbers, set), lambda number: None)


def test_where_ray_is_missing_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingRayError, match=r"pip install 'cross2dual\[ray\]'"):
        RayDriver(1, 1)


def test_actors_find_what_this_process_finds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    paths = environment(3)["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path), str(Path(importlib.import_module("distill").__file__).parents[1]), "/some/where"]
    assert environment(3)["OMP_NUM_THREADS"] == "3"
