"""Plans on disk, and units of them done in this process: what is refused, what is passed over, what is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distill.driver_commands import Asking
from distill.drivers.claims import Claims, done_by
from distill.drivers.driver import DriverError, Task
from distill.drivers.plan import PLAN, Plan, PlanError, write_plan
from distill.drivers.ranks import RanksDriver
from distill.drivers.scoring import ScoreJob, plan_scores
from distill.drivers.slurm import SlurmDriver
from distill.drivers.worker import open_job, units_of_share
from distill.durable import NotWrittenError
from distill.work import unit_names, work_of
from tests.drivers.noting import experiment, notes, pairs, units


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Scores and units as one process makes them."""
    x = experiment(tmp_path_factory.mktemp("whole"))
    return x.ask(*pairs(x)), units(x)


def planned(x) -> tuple[Plan, list[int]]:
    plan, numbers, _ = plan_scores(x, x.scorer, *pairs(x))
    assert plan is not None
    return plan, numbers


def written(folder: Path, **changed) -> Plan:
    about = {
        "kind": "score",
        "identity": {"teacher_identity": "a", "n_images": 3},
        "options": {"member": ""},
        "recipe": {"name": "x"},
        "arrays": {"images": np.arange(5), "texts": np.arange(5)},
        "cuts": [(0, 0, 2), (0, 2, 5)],
        "names": ["0" * 32, "1" * 32],
    }
    return write_plan(folder, **{**about, **changed})


def test_a_plan_is_read_as_it_was_written_and_its_arrays_stay_on_disk(tmp_path):
    plan = written(tmp_path / "plan")
    again = Plan.open(tmp_path / "plan")
    assert again.names == ("0" * 32, "1" * 32)
    assert again.cuts.tolist() == [[0, 0, 2], [0, 2, 5]]
    assert (again.kind, again.identity, again.recipe) == ("score", plan.identity, {"name": "x"})
    assert again.working_folder == Path.cwd()
    assert isinstance(again.arrays["images"], np.memmap)
    assert [again.size(number) for number in range(2)] == [2, 3]
    assert json.loads((tmp_path / "plan" / PLAN).read_text())["counts"] == {"units": 2, "items": 5}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / PLAN
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / PLAN).unlink(), "is no plan"),
        (lambda folder: (folder / PLAN).write_text("{"), "is no JSON"),
        (lambda folder: (folder / PLAN).write_text("{}"), "lacks what a plan has"),
        (lambda folder: flip(folder / "texts.npy"), "does not match its digest"),
        (lambda folder: (folder / "cuts.npy").write_bytes(b"\x93NUMPY"), "has 6 bytes where the plan says"),
        (lambda folder: (folder / "units.npy").unlink(), "is not there"),
        (lambda folder: rename(folder, "texts.npy", "../texts.npy"), "names other files than a plan has"),
    ],
)
def test_a_torn_plan_is_refused_with_what_to_do(tmp_path, spoil, message):
    folder = written(tmp_path / "plan").folder
    spoil(folder)
    with pytest.raises(PlanError, match=message):
        Plan.open(folder)


def test_a_plan_of_another_version_is_refused(tmp_path):
    path = written(tmp_path / "plan").folder / PLAN
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(PlanError, match="format 99, this version reads 1"):
        Plan.open(path.parent)


def test_a_plan_of_something_else_is_refused_with_what_differs(tmp_path):
    plan = written(tmp_path / "plan")
    plan.check({"teacher_identity": "a"})
    with pytest.raises(PlanError, match="teacher_identity: the plan is of a, here is b\n.*n_images.* 3, here is 4"):
        plan.check({"teacher_identity": "b", "n_images": 4})


def test_a_plan_that_fits_no_more_on_the_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWrittenError, match="no room is left"):
        written(tmp_path / "plan")
    assert not list(tmp_path.glob("*plan*"))


def test_units_are_those_of_one_process_in_any_order_and_in_shares(tmp_path, whole):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    assert [int(numbers[0]), len(numbers)] == [0, 15]
    for share in ("1/2", "0/2"):
        job = open_job(plan.folder)
        own = units_of_share(len(plan.names), share)
        assert [number for number, _, here in done_by(job, list(own)) if here] == list(own)
        assert [here for _, _, here in done_by(job, list(own))] == [False] * len(own)  # passed over
    assert units(x) == whole[1]
    np.testing.assert_array_equal(x.ask(*pairs(x)), whole[0])
    assert set(notes(tmp_path).values()) == {1}


def test_after_a_kill_the_plan_is_taken_again_and_only_what_is_missing_is_done(tmp_path, whole):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    assert len(list(done_by(ScoreJob(plan, x), numbers[4:9]))) == 5
    x = experiment(tmp_path)
    again, left = planned(x)
    assert again.folder == plan.folder
    assert left == [*numbers[:4], *numbers[9:]]
    x.elsewhere = Asking(x, InProcess())
    np.testing.assert_array_equal(x.ask(*pairs(x)), whole[0])
    assert units(x) == whole[1]
    assert set(notes(tmp_path).values()) == {1}
    assert plan_scores(x, x.scorer, *pairs(x))[0] is None


def test_ranks_do_their_shares_without_a_word_and_wait_for_one_another(tmp_path, whole):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    task = Task(plan, numbers, set)
    waits, done = [], {}
    for index in (1, 0):  # one after the other here
        ranks = SimpleNamespace(index=index, count=2, wait=lambda: waits.append(1))
        RanksDriver(ranks).run(task, done.setdefault(index, []).append)
    assert (done[0], done[1]) == (numbers[0::2], numbers[1::2])
    assert len(waits) == 4
    assert units(x) == whole[1]
    assert set(notes(tmp_path).values()) == {1}


class InProcess:
    name = "local"

    def run(self, task, done):
        for number, _, _ in done_by(open_job(task.plan.folder), task.numbers):
            done(number)


def test_units_of_a_store_that_has_some_pairs_are_what_one_process_would_write(tmp_path):
    stores = []
    for name in ("one", "other"):
        x = experiment(tmp_path / name)
        images, texts = pairs(x)
        x.ask(images[100:300], texts[100:300])
        if name == "other":
            x.elsewhere = Asking(x, InProcess())
        x.ask(images, texts)
        stores.append(units(x))
    assert stores[0] == stores[1]


def test_each_member_of_an_ensemble_is_a_plan_of_its_own(tmp_path):
    member = "{{kind: custom, target: 'tests.drivers.noting:NotingTeacher', options: {{notes: {}, seed: {}}}}}"
    found = []
    for name in ("one", "other"):
        members = ", ".join(member.format(tmp_path / name / "notes", seed) for seed in (0, 1))
        x = experiment(tmp_path / name, f"teacher={{kind: ensemble, members: [{members}]}}")
        if name == "other":
            x.elsewhere = Asking(x, InProcess())
        found.append(x.ask(*pairs(x)))
    np.testing.assert_array_equal(*found)
    assert len(list((tmp_path / "other" / "cache" / "plans").glob("score-*"))) == 2
    assert notes(tmp_path / "one") == notes(tmp_path / "other")


def test_a_plan_whose_units_are_not_those_that_are_missing_now_is_written_anew(tmp_path):
    x = experiment(tmp_path)
    plan, _ = planned(x)
    images, texts = pairs(x)
    x.ask(images[:200], texts[:200])
    again, numbers = planned(x)
    assert again.folder == plan.folder
    assert set(again.names) != set(plan.names)
    work = work_of(x.store, images, texts, 60)
    assert [again.names[number] for number in numbers] == unit_names(work, x.store.origin)


@pytest.mark.parametrize("spoilt", ["teacher", "corpus"])
def test_a_worker_that_finds_another_teacher_or_corpus_does_nothing(tmp_path, spoilt):
    x = experiment(tmp_path)
    plan, _ = planned(x)
    path = plan.folder / PLAN
    about = json.loads(path.read_text())
    if spoilt == "teacher":
        about["recipe"]["teacher"]["options"]["seed"] = 1
    else:
        about["recipe"]["data"]["seed"] = 99
    path.write_text(json.dumps(about))
    what = {"teacher": "teacher_identity: the plan is of", "corpus": "corpus_fingerprint: the plan is of"}[spoilt]
    with pytest.raises(PlanError, match=what):
        open_job(plan.folder)
    assert not units(x)
    assert not notes(tmp_path)


def test_a_worker_teaches_no_teacher(tmp_path):
    x = experiment(tmp_path)
    plan, _ = planned(x)
    path = plan.folder / PLAN
    about = json.loads(path.read_text())
    about["recipe"]["teach"] = {"steps": 5}
    path.write_text(json.dumps(about))
    with pytest.raises(PlanError, match="holds no taught teacher"):
        open_job(plan.folder)


def test_a_full_disk_ends_the_work_and_keeps_what_is_done(tmp_path, monkeypatch):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    work = done_by(open_job(plan.folder), numbers)
    next(work)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWrittenError, match="no room is left"):
        list(work)
    assert len(units(x)) == 1


def test_a_unit_that_another_process_has_in_hand_is_waited_for_and_taken_over_when_it_dies(tmp_path):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    path = plan.folder.with_name(f".claims-{plan.folder.name}")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'ab+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 2); print('has it',"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code} flush=True); time.sleep(60)", str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "has it\n"
        order = []
        for number, _, here in done_by(open_job(plan.folder), numbers[:4]):
            assert here
            order.append(number)
            if len(order) == 3:
                holder.kill()
                holder.wait()
    finally:
        holder.kill()
        holder.communicate()
    assert order == [0, 1, 3, 2]


def test_no_more_is_claimed_than_is_in_hand_so_that_another_command_does_the_rest(tmp_path):
    x = experiment(tmp_path)
    plan, numbers = planned(x)
    path = plan.folder.with_name(f".claims-{plan.folder.name}")
    code = """
import fcntl, sys
f = open(sys.argv[1], "ab+")
for unit in map(int, sys.argv[2:]):
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
        print(unit)
    except OSError:
        pass
"""
    work = done_by(open_job(plan.folder), numbers)
    assert next(work)[0] == numbers[0]
    told = subprocess.run(
        [sys.executable, "-c", code, str(path), *map(str, numbers)], capture_output=True, text=True, check=True
    )
    assert [int(line) for line in told.stdout.split()] == [numbers[0], *numbers[8:]]
    assert len(numbers) > 10
    assert [number for number, _, here in work if here] == numbers[1:]


def test_claims_are_this_process_own_until_they_are_dropped(tmp_path):
    plan = written(tmp_path / "plan")
    claims = Claims(plan.folder)
    assert claims.take(1)
    assert claims.take(1)
    claims.drop(1)
    claims.close()


def test_a_driver_that_leaves_units_undone_is_an_error(tmp_path):
    class Lazy:
        name = "local"

        def run(self, task, done):
            time.sleep(0)

    x = experiment(tmp_path)
    x.elsewhere = Asking(x, Lazy())
    with pytest.raises(DriverError, match="15 of 15 units are not there"):
        x.ask(*pairs(x))


@pytest.mark.parametrize("share", ["2/2", "-1/2", "x/2", "1", "1/0"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="INDEX/COUNT"):
        units_of_share(5, share)


def test_goes_cover_all_units_once_and_are_small_enough_to_end_together(tmp_path):
    names = [f"{number:032x}" for number in range(100)]
    plan = written(tmp_path / "plan", cuts=[(0, 0, 1)] * 100, names=names)
    for workers in (1, 3, 200):
        parts = Task(plan, list(range(100)), set).parts(workers)
        assert [number for part in parts for number in part] == list(range(100))
        assert max(map(len, parts)) <= 8
        assert len(parts) >= min(100, 3 * workers)


def test_a_slurm_task_has_no_part_of_a_gpu():
    with pytest.raises(ValueError, match="whole GPUs"):
        SlurmDriver(2, gpus=0.5)


def test_nothing_is_driven_where_nothing_is_missing(tmp_path):
    x = experiment(tmp_path)
    x.ask(*pairs(x))
    x = experiment(tmp_path)
    x.elsewhere = Asking(x, None)  # there is no driver to run
    x.ask(*pairs(x))
    assert not list((tmp_path / "cache").glob("plans/*"))


def test_slurm_is_told_a_folder_with_a_blank_and_a_percent_sign_as_such(tmp_path):
    folder = tmp_path / "a b%j"
    folder.mkdir()
    plan = written(folder / "plan")
    text = SlurmDriver(1).write(Task(plan, [0], set)).read_text()
    assert f"#SBATCH --output='{tmp_path}/a b%%j/logs-plan/slurm-%A_%a.log'\n" in text
