"""``kill -9`` between every two steps by which the store changes a file, each point tried.

A child process counts its steps (creating, each half of a write, fsync, rename, removing) and kills itself after a
given one. Children are forked from a server that has imported everything and started no thread: each costs little.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.durable import TEMPORARY_PREFIX
from distill.score import ScoreOptions, score_pairs
from distill.store import ScoreStore
from distill.store_tools import verify_store
from distill.unit import read_unit
from tests.toys import ToyTeacher, expected_scores, toy_caption

ROOT = Path(__file__).resolve().parents[1]
N_IMAGES, N_TEXTS, ASKED = 12, 20, 150
OPTIONS = ScoreOptions(pairs_per_unit=40, images_per_batch=2, show_progress=False)


def open_store(folder, **options) -> ScoreStore:
    return ScoreStore(
        folder,
        teacher_identity=ToyTeacher().identity,
        corpus_fingerprint="toy",
        score_kind=ToyTeacher.score_kind,
        n_images=N_IMAGES,
        n_texts=N_TEXTS,
        **options,
    )


def block(*image_ids):
    """All pairs of the images."""
    images, texts = np.meshgrid(image_ids, np.arange(N_TEXTS), indexing="ij")
    return images.ravel(), texts.ravel()


def every_score(store):
    return store.lookup(np.arange(N_IMAGES)[:, None], np.arange(N_TEXTS))


def asked_pairs():
    return np.divmod(np.random.default_rng(0).choice(N_IMAGES * N_TEXTS, ASKED, replace=False), N_TEXTS)


def score_all(folder, teacher):
    """A whole scoring run, and the compaction that its first look-up makes."""
    store = open_store(folder, overlay_pairs=ASKED // 2)
    report = score_pairs(
        teacher,
        store,
        *asked_pairs(),
        image_source=lambda rows: {"shade": torch.from_numpy(rows)[:, None]},
        text_source=lambda rows: teacher.prepare_texts([toy_caption(row) for row in rows.tolist()]),
        options=OPTIONS,
    )
    store.require(*asked_pairs())
    return report.asked


# ---- what a child does


def write_second_unit(folder):
    open_store(folder).write_unit(*block(4, 5), expected_scores(*block(4, 5)))


def rewrite_unit(folder):
    open_store(folder).write_unit(*block(1, 2), expected_scores(*block(1, 2)) + 1)


def compact(folder):
    open_store(folder).compact()


def score(folder):
    return score_all(folder, ToyTeacher())


def score_beside_another(folder):
    """Both processes see an empty store before either writes to it."""

    class Waiting(ToyTeacher):
        def score(self, *arguments):
            (folder.parent / f"here-{os.getpid()}").touch()
            deadline = time.monotonic() + 20
            while len(list(folder.parent.glob("here-*"))) < 2:
                assert time.monotonic() < deadline, "the other process never came"
                time.sleep(0.001)
            return super().score(*arguments)

    return score_all(folder, Waiting())


SCENARIOS = {work.__name__: work for work in (write_second_unit, rewrite_unit, compact, score, score_beside_another)}


class Steps:
    """Notes each step by which this process changes files, and kills it right after step number ``kill_after``."""

    def __init__(self, kill_after):
        self.taken, self._kill_after = [], kill_after

    def take(self, name):
        self.taken.append(name)
        if len(self.taken) == self._kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        for name in ("mkdir", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "link", "truncate", "utime"):
            setattr(os, name, self._then(name, getattr(os, name)))
        plain_open, plain_io = os.open, io.open

        def open_descriptor(path, flags, *args, **kwargs):
            descriptor = plain_open(path, flags, *args, **kwargs)
            if flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY):
                self.take("create")
            return descriptor

        def open_file(file, mode="r", *args, **kwargs):
            opened = plain_io(file, mode, *args, **kwargs)
            if not set(mode) & set("wax+"):
                return opened
            if not isinstance(file, int):  # else it was created before
                self.take("create")
            return Halved(opened, self)

        os.open = open_descriptor
        builtins.open = io.open = open_file  # os.fdopen and pathlib go through the latter

    def _then(self, name, call):
        def called(*args, **kwargs):
            result = call(*args, **kwargs)
            self.take(name)
            return result

        return called


class Halved:
    """A file whose every write reaches the system in two halves, a step each."""

    def __init__(self, file, steps):
        self._file, self._steps = file, steps

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        whole = content if isinstance(content, str) else bytes(content)
        for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            self._file.write(half)
            self._file.flush()
            self._steps.take("write")
        return len(whole)


def serve():
    """For each line {scenario, folder, kill_after: [...]}: runs as many children at once, replies how they ended."""
    import pyarrow.parquet  # noqa: F401  (once here in place of once a child)

    for line in sys.stdin:
        job = json.loads(line)
        children = [fork(job["scenario"], Path(job["folder"]), kill_after) for kill_after in job["kill_after"]]
        replies = []
        for child, answer in children:
            with os.fdopen(answer, "rb") as file:
                said = file.read()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            replies.append({"code": code, **json.loads(said or "{}")})
        print(json.dumps(replies), flush=True)


def fork(scenario, folder, kill_after):
    assert len(os.listdir("/proc/self/task")) == 1, "forking is safe without threads only"
    answer, reply = os.pipe()
    child = os.fork()
    if child:
        os.close(reply)
        return child, answer
    try:
        steps = Steps(kill_after)
        steps.watch()
        result = SCENARIOS[scenario](folder)
        os.write(reply, json.dumps({"steps": steps.taken, "result": result}).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# ---- what the tests ask


@pytest.fixture(scope="module")
def children():
    """Runs a scenario in children: children(scenario, folder, kill_after...) -> their replies."""
    command = [sys.executable, "-m", "tests.test_store_kills"]
    quiet = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # starts no thread
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as server:

        def run(work, folder, *kill_after):
            job = {"scenario": work.__name__, "folder": str(folder), "kill_after": kill_after}
            server.stdin.write(json.dumps(job).encode() + b"\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


def undisturbed(children, work, before, folder):
    """Steps of the scenario on a copy of the store ``before``, and the copy."""
    shutil.copytree(before, folder)
    (reply,) = children(work, folder, None)
    assert reply["code"] == 0
    assert len(reply["steps"]) > 3
    return reply["steps"], folder


def killed_copies(children, work, before, steps, tmp_path):
    """(folder, steps done) for each point: a copy of the store ``before`` that the scenario was killed in."""
    for n in range(1, len(steps) + 1):
        folder = tmp_path / f"killed-{n}"
        shutil.copytree(before, folder)
        (reply,) = children(work, folder, n)
        assert reply == {"code": -signal.SIGKILL}, f"step {n}: {steps[n - 1]}"
        yield folder, steps[:n]
        shutil.rmtree(folder)


def contents(folder):
    """Pairs and scores of every unit, and the arrays of the table, by name of the file."""
    origin = open_store(folder).origin
    found = {}
    for path in folder.rglob("unit-*.parquet"):
        unit = read_unit(path, origin)
        found[path.name] = unit.keys.tobytes(), unit.scores.tobytes()
    for path in folder.rglob("*.npy"):
        assert path.name not in found, "two tables are left"
        found[path.name] = path.read_bytes()
    assert found
    return found


def assert_sound(folder):
    store = open_store(folder)
    assert not list(store.folder.glob(f"{TEMPORARY_PREFIX}*"))
    assert verify_store(store.folder.resolve()).faults == ()


@pytest.fixture
def one_unit(tmp_path):
    store = open_store(tmp_path / "before")
    store.write_unit(*block(1, 2), expected_scores(*block(1, 2)))
    return tmp_path / "before"


def test_a_unit_is_there_whole_once_it_has_its_name_and_not_at_all_before(children, tmp_path, one_unit):
    steps, done = undisturbed(children, write_second_unit, one_unit, tmp_path / "done")
    assert steps[-6:] == ["create", "write", "write", "fsync", "replace", "fsync"]
    for folder, taken in killed_copies(children, write_second_unit, one_unit, steps, tmp_path):
        expected = np.full((N_IMAGES, N_TEXTS), np.nan, np.float32)
        for images, texts in [block(1, 2)] + [block(4, 5)] * ("replace" in taken):
            expected[images, texts] = expected_scores(images, texts)
        np.testing.assert_array_equal(every_score(open_store(folder)), expected)
        assert_sound(folder)
        write_second_unit(folder)
        assert contents(folder) == contents(done)


def test_a_unit_written_anew_is_the_old_one_or_the_new_one(children, tmp_path, one_unit):
    open_store(one_unit).compact()  # a table that knows the old one is no reason to serve it
    steps, _ = undisturbed(children, rewrite_unit, one_unit, tmp_path / "done")
    for folder, taken in killed_copies(children, rewrite_unit, one_unit, steps, tmp_path):
        found = open_store(folder).require(*block(1, 2))
        np.testing.assert_array_equal(found, expected_scores(*block(1, 2)) + ("replace" in taken))
        assert_sound(folder)


def test_compacting_loses_nothing_wherever_it_is_killed(children, tmp_path, one_unit):
    store = open_store(one_unit)
    store.compact()
    store.write_unit(*block(4, 5), expected_scores(*block(4, 5)))
    store.write_unit(*block(2, 4), expected_scores(*block(2, 4)) + 1)  # overlaps both
    expected = every_score(open_store(one_unit))
    assert np.isfinite(expected).sum() == 4 * N_TEXTS
    steps, done = undisturbed(children, compact, one_unit, tmp_path / "done")
    assert {"mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir"} <= set(steps)
    for folder, _ in killed_copies(children, compact, one_unit, steps, tmp_path):
        np.testing.assert_array_equal(every_score(open_store(folder)), expected)
        assert_sound(folder)
        compact(folder)
        assert contents(folder) == contents(done)


def test_a_scoring_run_killed_anywhere_loses_the_unit_in_hand_alone(children, tmp_path):
    (tmp_path / "before").mkdir()
    steps, done = undisturbed(children, score, tmp_path / "before", tmp_path / "done")
    assert steps.count("replace") == len(list(done.rglob("unit-*"))) == 4
    every_pair = set(zip(*(ids.tolist() for ids in asked_pairs()), strict=True))
    for folder, taken in killed_copies(children, score, tmp_path / "before", steps, tmp_path):
        assert len(list(folder.rglob("unit-*.parquet"))) == taken.count("replace")
        store = open_store(folder)
        images, texts = np.nonzero(np.isfinite(every_score(store)))
        np.testing.assert_array_equal(store.require(images, texts), expected_scores(images, texts))
        assert_sound(folder)
        teacher = ToyTeacher()
        score_all(folder, teacher)
        kept = set(zip(images.tolist(), texts.tolist(), strict=True))
        assert sorted(teacher.pairs) == sorted(every_pair - kept)
        compact(folder)
        assert contents(folder) == contents(done)


@pytest.mark.parametrize("kill_after", [(None, None), (None, 16)], ids=["both live", "one is killed"])
def test_two_processes_scoring_the_same_plan_end_with_the_store_of_one(children, tmp_path, kill_after):
    for name in ("one", "two"):
        (tmp_path / name / "store").mkdir(parents=True)
    (alone,) = children(score, tmp_path / "one" / "store", None)
    replies = children(score_beside_another, tmp_path / "two" / "store", *kill_after)
    assert [reply["code"] for reply in replies] == [0 if point is None else -signal.SIGKILL for point in kill_after]
    assert [reply["result"] for reply in (alone, *replies) if reply["code"] == 0] == [ASKED] * (
        1 + kill_after.count(None)
    )
    assert_sound(tmp_path / "two" / "store")
    compact(tmp_path / "two" / "store")
    assert contents(tmp_path / "two" / "store") == contents(tmp_path / "one" / "store")
    assert score_all(tmp_path / "two" / "store", ToyTeacher()) == 0


if __name__ == "__main__":
    serve()
