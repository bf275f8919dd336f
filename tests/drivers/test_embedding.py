"""Vectors by units: equal to those that one process computes together, resumable, and joined into what others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from distill.cli import app
from distill.driver_commands import driver_of, embedded
from distill.drivers.driver import HandedOver, Task
from distill.drivers.embedding import Embedder, EmbedJob, Wanted, join_all, plan_vectors, units_of
from distill.drivers.local import LocalDriver
from distill.drivers.plan import PlanError
from distill.drivers.slurm import SlurmDriver
from distill.drivers.vectors import BadVectorsError
from distill.drivers.worker import open_job
from distill.index import VectorIndex
from tests.drivers.noting import experiment
from tests.test_wrong_recipes import ROOT

SIDES = ("image", "text")


def trained(folder: Path, *settings: str):
    """An experiment whose arm ``plain`` has a student."""
    x = experiment(folder, "evaluate.batch_size=16", *settings)
    home = x.folder / "arms" / "plain" / "student"
    if not home.is_dir():
        home.mkdir(parents=True)
        x.fresh_student().save_pretrained(home)
        (home / "done.json").write_text(json.dumps({"arm": "plain"}))
    return x


def every(x, side):
    return np.arange(x.corpus.n_images if side == "image" else x.corpus.n_texts)


def vectors(features):
    return features.get(features.rows)["vectors"].numpy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The vectors of all items as one process makes them, by whose they are and side."""
    x = trained(tmp_path_factory.mktemp("whole"))
    student = x.saved_student(x.folder / "arms" / "plain" / "student")
    found = {("plain", side): x.embed(student, side, every(x, side)) for side in SIDES}
    of_teacher = x.scorer.vectors({side: every(x, side) for side in SIDES})
    return {**found, **{("", side): of_teacher[side] for side in SIDES}}


def test_two_local_workers_give_the_vectors_of_one_process(tmp_path, whole, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    x = trained(tmp_path)
    to = tmp_path / "vectors"
    embedded(x, Wanted(to, "plain", rows_per_unit=40), LocalDriver(2, threads=1), index="Flat")
    plan = plan_vectors(x, Embedder(x, "plain"), Wanted(to, "plain", rows_per_unit=40))
    assert len(plan.names) >= 6
    for side, features in join_all(plan).items():
        np.testing.assert_array_equal(vectors(features), whole["plain", side])
        assert features.folder == to / f"{side}s"
        index = VectorIndex.load(to / f"index-{side}s")
        np.testing.assert_array_equal(index.vectors(), whole["plain", side])


@pytest.mark.parametrize("arm", ["plain", ""])
def test_units_in_this_process_are_equal_too_and_are_not_made_twice(tmp_path, whole, arm, capsys):
    x = trained(tmp_path)
    wanted = Wanted(tmp_path / "vectors", arm, rows_per_unit=33)
    embedded(x, wanted, None)
    assert "images: 100 vectors in" in capsys.readouterr().out
    plan = plan_vectors(x, Embedder(x, arm), wanted)
    assert all(plan.size(number) <= 32 for number in range(len(plan.names)))  # whole batches
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors" / "units").iterdir()}
    assert len(before) == len(plan.names)
    victim = sorted(before)[0]
    victim.unlink()
    embedded(x, wanted, None)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors" / "units").iterdir()}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [victim]
    for side, features in join_all(plan).items():
        np.testing.assert_array_equal(vectors(features), whole[arm, side])


def test_a_split_and_a_side_alone(tmp_path, whole):
    x = trained(tmp_path)
    embedded(x, Wanted(tmp_path / "vectors", "plain", split="test", sides=("text",)), None)
    plan = plan_vectors(x, Embedder(x, "plain"), Wanted(tmp_path / "vectors", "plain", split="test", sides=("text",)))
    features = join_all(plan)["text"]
    rows = x.corpus.split("test").texts
    assert features.rows.tolist() == rows.tolist()
    np.testing.assert_allclose(vectors(features), whole["plain", "text"][rows], atol=1e-6)
    assert not (tmp_path / "vectors" / "images").exists()


def test_an_index_holds_what_was_asked_for_although_more_is_there(tmp_path):
    x = trained(tmp_path)
    embedded(x, Wanted(tmp_path / "vectors", "plain"), None)
    embedded(x, Wanted(tmp_path / "vectors", "plain", split="test"), None, index="Flat")
    for side, rows in (("image", x.corpus.split("test").images), ("text", x.corpus.split("test").texts)):
        index = VectorIndex.load(tmp_path / "vectors" / f"index-{side}s")
        assert sorted(index.ids.tolist()) == sorted(rows.tolist())


def test_the_tasks_of_an_array_embed_too(tmp_path, whole):
    x = trained(tmp_path)
    wanted = Wanted(tmp_path / "vectors", "plain", rows_per_unit=40)
    with pytest.raises(HandedOver):
        embedded(x, wanted, SlurmDriver(2))
    plan = plan_vectors(x, Embedder(x, "plain"), wanted)
    job = open_job(plan.folder)
    done = [number for number, _ in job.do(range(len(plan.names)))]
    assert len(done) == len(plan.names)
    embedded(x, wanted, SlurmDriver(2))  # nothing is left: it joins
    np.testing.assert_array_equal(vectors(join_all(plan)["image"]), whole["plain", "image"])


@pytest.mark.parametrize("spoil", [lambda content: content[:-7], lambda content: content[:99] + b"x" + content[100:]])
def test_a_torn_or_altered_unit_is_refused_by_name(tmp_path, spoil):
    x = trained(tmp_path)
    wanted = Wanted(tmp_path / "vectors", "plain", sides=("text",))
    plan = plan_vectors(x, Embedder(x, "plain"), wanted)
    (unit,) = [number for number, _ in EmbedJob(plan, x).do([0])]
    assert unit == 0
    (path,) = units_of(plan).folder.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(BadVectorsError, match=f"{path}.*delete it"):
        join_all(plan)
    assert not (tmp_path / "vectors" / "texts").exists()


def test_another_student_is_another_plan_and_its_vectors_are_not_mixed_in(tmp_path):
    x = trained(tmp_path)
    wanted = Wanted(tmp_path / "vectors", "plain", sides=("text",))
    embedded(x, wanted, None)
    plan = plan_vectors(x, Embedder(x, "plain"), wanted)
    home = x.folder / "arms" / "plain" / "student"
    student = x.saved_student(home)
    with torch.no_grad():
        next(student.parameters()).add_(0.5)
    student.save_pretrained(home)
    with pytest.raises(PlanError, match="model: the plan is of"):
        open_job(plan.folder)
    with pytest.raises(ValueError, match="holds features of"):
        embedded(x, wanted, None)


def test_faulty_vectors_are_refused_with_the_rows_and_nothing_of_their_unit_is_kept(tmp_path, monkeypatch):
    x = trained(tmp_path)
    embedder = Embedder(x, "")
    encode = embedder.model.encode_images

    def spoilt(inputs):
        found = encode(inputs)
        found["embedding"][3] = float("nan")
        return found

    monkeypatch.setattr(embedder.model, "encode_images", spoilt)
    plan = plan_vectors(x, embedder, Wanted(tmp_path / "vectors", "", sides=("image",)))
    with pytest.raises(ValueError, match=r"vectors are not finite, the first rows: \[3\]"):
        list(EmbedJob(plan, x, embedder).do([0]))
    assert not units_of(plan).there()


def test_a_frozen_tower_is_run_by_the_workers_and_not_by_one_for_all(tmp_path):
    x = trained(tmp_path, "student.freeze=[image]")
    wanted = Wanted(tmp_path / "vectors", "plain", sides=("image",))
    plan = plan_vectors(x, Embedder(x, "plain"), wanted)
    assert plan.options["live"] == ["image"]
    embedded(x, wanted, None)
    assert not list((tmp_path / "cache").glob("features/frozen*"))
    student = x.saved_student(x.folder / "arms" / "plain" / "student")
    expected = x.embed(student, "image", every(x, "image"))
    np.testing.assert_allclose(vectors(join_all(plan)["image"]), expected, atol=1e-6)


def test_an_untrained_arm_is_refused(tmp_path):
    x = experiment(tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained student of the arm plain"):
        Embedder(x, "plain")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "quickstart", "--to", "x", "--teacher", "--arm", "plain"], "give one of both"),
        (["score", "quickstart", "--driver", "local", "--address", "auto"], "only --driver ray has an address"),
        (["score", "quickstart", "--driver", "ray", "--workers", "3:2"], "LEAST:MOST"),
        (["score", "quickstart", "--workers", "8", "--threads", "2"], "--workers, --threads: without --driver"),
        (["score", "quickstart", "--driver", "local", "--workers", "1:2"], "not from 1 to 2"),
        (["score", "quickstart", "--driver", "slurm", "--gpus-per-worker", "0.5"], "a Slurm task has whole GPUs"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert message in " ".join(f"{done.output} {done.exception}".replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_driver_under_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(typer.BadParameter, match="a launcher started this one"):
        driver_of("local", "2", gpus=None, threads=None, address="")
    assert driver_of("ranks", "", gpus=None, threads=None, address="") is None


def test_a_task_lists_what_is_left(tmp_path):
    x = trained(tmp_path)
    plan = plan_vectors(x, Embedder(x, "plain"), Wanted(tmp_path / "vectors", "plain", rows_per_unit=40))
    units = units_of(plan)
    task = Task(plan, list(range(len(plan.names))), units.there)
    assert task.left() == task.numbers
    list(EmbedJob(plan, x).do([1]))
    assert task.left() == [number for number in task.numbers if number != 1]
