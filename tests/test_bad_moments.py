"""Bad moments, each provoked: a clear message, nothing done before is lost, and what goes on ends bit-equal."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from distill import durable, room
from distill.batches import Batches
from distill.checkpoint import _is_complete, latest_checkpoint, save_checkpoint, step_of
from distill.cli import _open, app
from distill.data.manifest import load_manifest
from distill.durable import NotWrittenError, append_line, staged_folder, writing
from distill.embed import live_source
from distill.loading import LoadingError
from distill.losses import Contrastive, Part, Weighted
from distill.protocols import Scored
from distill.sampler import BatchSampler
from distill.step_loss import TrainingError
from distill.train import Phase, train
from tests.fragile import LOSS, STUDENT, TEACHER, happening
from tests.test_ranks import ended
from tests.test_stopping import untimed
from tests.test_train import SETTINGS, NoisyStudent, batches, run
from tests.test_wrong_recipes import ROOT
from tests.toys import ToyStudent, toy_corpus

ARMS = ("plain", "distilled")
RUN = Path("runs") / "moments"


# --- a small run of the command line --------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Pictures and a manifest: the toy corpus as files."""
    corpus = toy_corpus(24)
    folder.mkdir()
    for row, image in enumerate(corpus.load_images(np.arange(corpus.n_images))):
        image.save(folder / f"{row}.png")
    split_of = {int(row): split.name for split in corpus.splits.values() for row in split.images}
    rows = [
        {"image": f"{image}.png", "caption": corpus.texts[text], "split": split_of[image]}
        for image, text in corpus.pairs.tolist()
    ]
    write_rows(folder, rows)


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def recipe(folder: Path, **train: object) -> Path:
    """Shared steps, then two arms of 16 steps; the pictures are decoded anew at every step."""
    settings = {"steps": 24, "batch_size": 6, "lr": 0.05, "shared": 0.34, "candidates_per_query": 2}
    losses = [{"name": "contrastive"}, {"name": "kl"}, {"name": "custom", "target": LOSS, "label": "mine"}]
    path = folder / "moments.yaml"
    whole = {
        "name": "moments",
        "runs": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "data": {"source": "manifest", "file": str(folder / "data/pairs.jsonl"), "images": str(folder / "data")},
        "prepared_gib": 0,
        "teacher": {"kind": "custom", "target": TEACHER},
        "student": {"kind": "custom", "target": STUDENT},
        "arms": {"plain": {"losses": losses[:1]}, "distilled": {"losses": losses}},
        "mine": {"k": 4},
        "score": {"pairs_per_unit": 40},
        "train": {**settings, "checkpoint_every": 3, "log_every": 1, **train},
    }
    path.write_text(json.dumps(whole))  # JSON is YAML
    return path


def trained(folder: Path, *arguments: str) -> None:
    """``distill train --resume`` in this process; errors come as the command line gets them."""
    app(["train", str(folder / "moments.yaml"), "--resume", *arguments], standalone_mode=False)


def begin(folder: Path, *arguments: str, moment: str = "", step: int = -1, **more: str) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MOMENT": moment, "MOMENT_STEP": str(step)}
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "train", str(folder / "moments.yaml"), "--resume", *arguments],
        cwd=folder,
        env={**os.environ, **given, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(folder: Path, *arguments: str, moment: str = "", step: int = -1) -> str:
    """The message of a run that could not go on, which is of a kind that the command line shows alone."""
    with happening(moment, step), pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        trained(folder, *arguments)
    check_left(folder)
    return str(caught.value)


def ended_with(process: subprocess.Popen[str], folder: Path) -> str:
    """The one message of a command that could not go on."""
    began = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert time.monotonic() - began < 60, "it hung before it ended"
    assert process.returncode == 2, said
    assert "Traceback" not in said, said
    (told,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert said.splitlines()[-1] == told, "nothing comes after it"
    check_left(folder)
    return told.removeprefix("error: ")


def check_left(folder: Path) -> None:
    """Nothing half made, and only checkpoints that can be gone on from."""
    assert not [path for path in folder.rglob("*") if path.name.startswith(durable.TEMPORARY_PREFIX)]
    for checkpoint in folder.rglob("step-*"):
        assert _is_complete(checkpoint), checkpoint
        for name, weight in safetensors.torch.load_file(checkpoint / "model.safetensors").items():
            assert bool(weight.isfinite().all()), (checkpoint, name)


def assert_same(folder: Path, other: Path) -> None:
    for arm in ARMS:
        path = RUN / "arms" / arm / "student" / "toy.safetensors"
        assert (folder / path).read_bytes() == (other / path).read_bytes(), arm
    for part in ("shared", *(f"arms/{arm}" for arm in ARMS)):
        assert untimed(folder / RUN / part) == untimed(other / RUN / part), part


def reached(folder: Path, part: str) -> int:
    found = latest_checkpoint(folder / RUN / part / "checkpoints")
    return 0 if found is None else step_of(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    write_data(folder / "data")
    recipe(folder)
    trained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, whole: Path) -> Path:
    """Data and recipe of the whole run, nothing done yet."""
    shutil.copytree(whole / "data", tmp_path / "data")
    recipe(tmp_path)
    return tmp_path


# --- the disk is full -------------------------------------------------------------------------------------------------


@contextmanager
def failing_at(number: int, code: int, below: Path) -> Iterator[list[str]]:
    """From its ``number``-th call below a folder on, whatever changes the disk fails; the calls so far are given."""
    calls: list[str] = []

    def patched(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(target, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if str(below) in path:
                calls.append(name)
                if len(calls) > number:
                    raise OSError(code, os.strerror(code))
            return original(target, *rest, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "rename", "replace"):
            patch.setattr(os, name, patched(name))
        yield calls


@pytest.mark.parametrize(
    ("code", "numbers"),
    # every call of the first two checkpoints, and some of the others
    [(errno.ENOSPC, [*range(20), 24, 31]), *((code, [0, 6, 12]) for code in (errno.EDQUOT, errno.EROFS, errno.EIO))],
)
def test_a_disk_that_fails_at_any_call_leaves_whole_checkpoints_and_the_run_ends_the_same(
    tmp_path: Path, code: int, numbers: list[int]
) -> None:
    whole, met = run(tmp_path / "whole"), set()
    for number in numbers:
        folder = tmp_path / str(number)
        with failing_at(number, code, folder / "checkpoints") as calls:
            told = rf"{folder}/checkpoints.* could not be written: .*--resume"
            with pytest.raises(NotWrittenError, match=told) as caught:
                run(folder)
        assert caught.value.errno == code
        met.add(calls[-1])
        kept = list((folder / "checkpoints").glob("*"))
        assert all(_is_complete(path) for path in kept), "half a checkpoint, or a staging folder"
        assert kept or number < 9, "the checkpoint before must stay"
        resumed = run(folder, student=NoisyStudent(seed=5 if kept else 0))
        for name, value in whole.state_dict().items():
            assert value.equal(resumed.state_dict()[name]), (number, name)
        assert untimed(folder) == untimed(tmp_path / "whole")
    assert met == {"mkdir", "fsync", "rename"} or len(numbers) == 3


@pytest.mark.slow
def test_a_file_that_must_not_grow_stops_every_part_of_a_run_and_loses_nothing(place: Path, whole: Path) -> None:
    """A limit of the system, so that the libraries that write meet it themselves."""
    sizes = {path.name: path.stat().st_size for path in (whole / RUN / "arms/plain").rglob("*") if path.is_file()}
    units = [path.stat().st_size for path in whole.rglob("unit-*.parquet")]
    said = []
    # below what the file checks, the data's note, scores, weights, log, optimizer and random state need
    for limit in (1000, min(units) - 1, 2500, sizes["metrics.jsonl"] - 300, sizes["trainer.pt"] - 1, 14_500):
        done = subprocess.run(
            [sys.executable, "-m", "distill", "train", "moments.yaml", "--resume"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, (limit, done.stderr)
        assert "Traceback" not in done.stderr
        said.append(done.stderr.splitlines()[-1])
        assert "could not be written: it is larger than this process may write" in said[-1], said[-1]
        assert not [path for path in place.rglob("*") if path.name.startswith(durable.TEMPORARY_PREFIX)]
        assert all(_is_complete(path) for path in place.rglob("step-*"))
    assert "/cache/files/images-" in said[0]
    assert "checkpoints/step-" in said[-1]
    trained(place)
    assert_same(place, whole)


@contextmanager
def full_for(part: str) -> Iterator[None]:
    """No room for files whose path holds ``part``."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def test_whatever_a_run_writes_it_says_what_had_no_room_and_goes_on(place: Path, whole: Path) -> None:
    """A disk without room for one kind of file after the other, in the order in which a run writes them."""
    for part, message in (
        ("corpus.npz", "moments/corpus.npz"),
        ("shared/checkpoints", "moments/shared/checkpoints/step-000000003"),
        ("-student", "arms/plain/student"),
        ("candidates-1-t2i", "moments/shared/candidates-1-t2i.npz"),
        ("unit-", r"unit-\w+.parquet"),
        ("arms/distilled/checkpoints", "arms/distilled/checkpoints/step-000000009"),
    ):
        with full_for(part):
            said = refused(place)
        assert re.search(rf"\S+{message} could not be written: no room is left on its device", said), said
        assert re.search(r"\(\d[\d.]* \w?B free", said)
        assert "make room, then the same command goes on (run and train: with --resume)" in said
    trained(place)
    assert_same(place, whole)


def test_feature_files_that_do_not_fit_are_refused_after_the_first_batch(tmp_path: Path, monkeypatch) -> None:
    from distill.features import write_features

    def produce(rows):
        return {"vectors": torch.zeros(len(rows), 1000)}

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(OSError, match=r"2000 items need about 7.7 MB more at .*, which has 5.0 MB free; make room"):
        write_features(tmp_path / "f", "mark", 2000, produce, batch_size=64)
    assert [path.name for path in tmp_path.iterdir()] == [".lock-f"]


@contextmanager
def growing_to(limit: int) -> Iterator[None]:
    """No file of this process gets larger than ``limit`` bytes in here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_by_torch(held: torch.Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(held, file)


@pytest.mark.parametrize("library", ["torch", "safetensors", "numpy", "python"])
def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path: Path, library: str) -> None:
    held = torch.zeros(100_000)
    write = {
        "torch": lambda path: _save_by_torch(held, path),
        "safetensors": lambda path: safetensors.torch.save_file({"held": held}, path),
        "numpy": lambda path: np.save(path.with_suffix(".npy"), held.numpy()),
        "python": lambda path: path.write_bytes(bytes(400_000)),
    }[library]

    def fill() -> None:
        with staged_folder(tmp_path / "out") as staged, growing_to(100_000):
            write(staged / "file")

    with pytest.raises(NotWrittenError, match=r"out could not be written: .*(may write|no room)"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_optimizer_has_no_room_says_so(tmp_path: Path) -> None:
    run(tmp_path, stop=3)
    with growing_to(5000), pytest.raises(NotWrittenError, match=r"step-000000006 could not be written: it is larger"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


def test_a_line_of_a_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    with growing_to(20), pytest.raises(NotWrittenError, match=r"log.jsonl could not be written"):
        append_line(path, {"step": 2, "loss": 0.5})
    assert path.read_text() == '{"step": 1}\n'
    append_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(NotWrittenError, match="no room is left on its device"):
        append_line("/dev/full", {"step": 1})


def test_only_writing_is_put_down_to_what_is_written(tmp_path: Path) -> None:
    """A picture that may not be read while features are written is no fault of the features' folder."""

    def read() -> None:
        with staged_folder(tmp_path / "out"):
            raise ValueError("a picture") from PermissionError(errno.EACCES, "no")

    with pytest.raises(ValueError, match="a picture"):
        read()
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out"):
        (tmp_path / "nothing").read_bytes()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged_folder(tmp_path / "out") as staged:
        (staged / "old").write_text("old")
    rename, done = os.rename, []

    def failing(source, target):
        done.append(target)
        if len(done) == 3:  # there is one, it is moved aside, the new one takes its place
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(NotWrittenError), staged_folder(tmp_path / "out") as staged:
        (staged / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_run_whose_checkpoints_cannot_fit_is_refused_before_it_begins(place: Path, monkeypatch) -> None:
    x = _open(str(place / "moments.yaml"), [])
    weights = sum(weight.numel() * 4 for weight in ToyStudent().parameters())  # all of them train
    # shared steps and two arms keep a checkpoint (weights and two moments) each, two students, one while it is written
    least = 4 * 3 * weights + 2 * weights
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=least))
    room.check_room(x)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=least - 1))
    with pytest.raises(OSError, match=rf"need at least 3\d kB at {place}, which has 3\d kB free \(7.* kB a checkpoint"):
        room.check_room(x)
    room.check_room(x, arms=["plain"])  # less to train
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    room.check_room(x)  # a file system that does not tell
    trained(place)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=0))
    room.check_room(x)  # nothing is left to train


def test_what_killed_processes_left_behind_goes_at_the_next_start(place: Path) -> None:
    trained(place, "--arm", "plain")
    left = [place / RUN / part / ".partial-0-x" for part in ("", "shared", "arms/plain", "shared/checkpoints")]
    for folder in left:
        folder.mkdir()
        (folder / "half").write_bytes(bytes(100))
    trained(place, "--arm", "plain")
    assert not any(folder.exists() for folder in left)


def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_costs_no_later_one(tmp_path: Path, caplog) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=9, settings=replace(SETTINGS, keep_checkpoints=2))
    checkpoints = tmp_path / "cut" / "checkpoints"
    with (checkpoints / "step-000000009" / "trainer.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    assert step_of(latest_checkpoint(checkpoints)) == 6
    assert "step-000000009 is damaged" in caplog.text
    student = NoisyStudent()
    optimizer = torch.optim.AdamW(student.parameters())
    save_checkpoint(checkpoints, step=7, model=student, optimizer=optimizer, meaning="m")
    assert step_of(latest_checkpoint(checkpoints)) == 7, "the damaged one must not push it out"
    shutil.rmtree(checkpoints / "step-000000007")
    run(tmp_path / "again", stop=6)
    resumed = run(tmp_path / "again", student=NoisyStudent(seed=5))
    assert all(value.equal(resumed.state_dict()[name]) for name, value in whole.state_dict().items())


# --- a folder that cannot be written ----------------------------------------------------------------------------------


def nowhere(folder: Path, how: str) -> Path:
    """Where nobody can write, whoever runs the tests."""
    if how == "file":
        (folder / "file").write_text("in the way")
        return folder / "file" / "runs"
    return Path("/sys/cross2dual-runs")  # the system's own


@pytest.mark.parametrize("how", ["file", "system"])
def test_a_run_folder_that_cannot_be_written_is_refused_before_any_work(place: Path, how: str) -> None:
    runs = nowhere(place, how)
    said = refused(place, f"--set=runs={runs}")
    assert re.match(rf"{runs}/moments could not be written: (what should be|its file|this user)", said), said
    assert "choose another folder" in said
    assert not (place / "cache").exists(), "the data was read for nothing"


def test_a_cache_that_can_only_be_read_serves_what_it_has_and_else_is_named(place: Path) -> None:
    said = refused(place, f"--set=cache={nowhere(place, 'file')}")
    assert re.search(r"\S+/file/runs/\S+ could not be written: what should be a folder", said), said
    assert not (place / "runs").exists()


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_a_loss_of_the_user_s_that_gives_nan_names_it_all_and_mended_the_run_ends_the_same(
    place: Path, whole: Path
) -> None:
    said = refused(place, moment="nan:", step=6)  # of its arm, which starts at step 8
    assert re.match(r"step 14, t2i: loss 'mine' is nan: .*; query ids \d+, \d+", said), said
    assert reached(place, "arms/distilled") == 12
    trained(place)
    assert_same(place, whole)


def test_a_teacher_that_gives_nan_is_named_with_its_pairs_and_what_was_scored_stays(place: Path, whole: Path) -> None:
    said = refused(place, moment="score:")
    assert "the first (image, text): (5, 10). Nothing of this unit is kept" in said, said
    trained(place)
    assert_same(place, whole)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done = torch.optim.AdamW.step, []

    def wild(self, closure=None):
        original(self, closure)
        done.append(1)
        if len(done) == 9:
            self.param_groups[0]["params"][0].data[1, 2] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", wild)
    told = r"step 8: 1 of the student's weights are not finite after it \(image_tower\).*lower train.lr"
    with pytest.raises(TrainingError, match=told):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000006"]


def test_infinite_teacher_scores_name_direction_and_queries(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d, i2t: the teacher's scores hold infinities, query ids \d+;"):
        run(tmp_path, bad_score=math.inf)


def test_fp16_that_leaves_out_every_step_ends_with_a_message(tmp_path: Path) -> None:
    def flat(scored: Scored) -> torch.Tensor:
        """0, with a gradient that is not a number."""
        return (scored.student - scored.student.detach()).pow(2).sum().sqrt()

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as accelerate makes one on a GPU
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    try:
        student = NoisyStudent()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        losses = Weighted((Part("contrastive", 1.0, Contrastive()), Part("flat", 1.0, flat)))
        phase = Phase(0, 100, batches(student), losses, "m")
        settings = replace(SETTINGS, steps=100, checkpoint_every=10)
        with pytest.raises(TrainingError, match=r"step 30: with fp16 the gradient is not finite however small"):
            train(student, phase, settings, folder=tmp_path, accelerator=accelerator)
        assert all(value.equal(before[name]) for name, value in student.state_dict().items())
        accelerator.scaler = torch.amp.GradScaler("cpu")
        phase = Phase(0, 100, batches(student), Weighted((Part("contrastive", 1.0, Contrastive()),)), "n")
        train(student, phase, settings, folder=tmp_path / "well", accelerator=accelerator)
    finally:
        accelerator.state._mixed_precision = "no"


# --- a worker is killed -----------------------------------------------------------------------------------------------


def test_a_killed_worker_is_told_by_one_message_and_costs_no_bit(place: Path, whole: Path) -> None:
    said = ended_with(begin(place, "--set=train.workers=2", moment="kill:", step=5), place)
    assert re.match(r"(step 5: )?a loader worker is gone \(.*\)\. Most often memory.*lower train.workers", said), said
    assert reached(place, "shared") >= 3
    trained(place, "--set=train.workers=0")
    assert_same(place, whole)


def program(where_it_fails: str) -> str:
    """A training one of whose two workers kills itself at step 7, and what then becomes of the error."""
    return (
        "import os, signal, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from tests.test_train import SETTINGS, Batches, run\n"
        "original = Batches.__getitem__\n"
        "def dying(self, step):\n"
        "    if step == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, step)\n"
        "Batches.__getitem__ = dying\n"
        "try:\n"
        "    run(Path(sys.argv[1]), settings=replace(SETTINGS, workers=2, checkpoint_every=100))\n"
        "except RuntimeError as error:\n"
        f"    {where_it_fails}\n"
    )


def test_a_worker_that_is_found_dead_between_two_steps_costs_no_step(tmp_path: Path) -> None:
    """In a process of its own: word of the death may come at any moment, also to whatever runs a test."""
    code = program("print(type(error).__name__, error, sep=': ', flush=True); os._exit(0)")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cut"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    told = (
        r"(LoadingError|LostWorkerError): (step (\d+): )?a loader worker is gone \((ended by SIGKILL|.*Killed).*workers"
    )
    said = re.match(told, done.stdout)
    assert said is not None, done
    kept = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    if said[1] == "LoadingError":  # not while a step was computed
        assert int(said[3]) == (0 if kept is None else step_of(kept))
    settings = replace(SETTINGS, checkpoint_every=100)
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "cut", student=NoisyStudent(seed=5 if kept else 0), settings=settings)
    assert all(value.equal(resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_program_that_keeps_the_error_ends_although_workers_outlive_sigterm(tmp_path: Path) -> None:
    code = program("sys.kept = error; print('kept', flush=True)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("kept\n", 0), done.stderr


# --- a picture breaks while a run goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["junk", "gone", "another"])
def test_a_picture_that_breaks_in_the_second_epoch_is_named_and_put_back_costs_nothing(
    tmp_path: Path, how: str, workers: int
) -> None:
    write_data(tmp_path / "data")
    corpus = load_manifest(tmp_path / "data" / "pairs.jsonl")
    broken = tmp_path / "data" / "3.png"
    before, pairs = broken.read_bytes(), corpus.split_pairs("train")
    settings = replace(SETTINGS, workers=workers, checkpoint_every=100, log_every=1)
    epoch = len(pairs) // 6

    class Breaking(NoisyStudent):
        steps = 0

        def forward(self, images=None, texts=None, *, attention_pairs=None):
            if self.steps == epoch:
                if how == "another":
                    PIL.Image.new("L", (4, 4), color=200).save(broken)
                elif how == "junk":
                    broken.write_bytes(b"junk")
                else:
                    broken.unlink()
            self.steps += 1
            return super().forward(images, texts, attention_pairs=attention_pairs)

    def go(folder: Path, student: ToyStudent, last: int = 30) -> ToyStudent:
        sources = [live_source(corpus, side, student) for side in ("image", "text")]
        made = Batches(BatchSampler(pairs, 6, 0), *sources, corpus.matches)
        phase = Phase(0, last, made, Weighted((Part("contrastive", 1.0, Contrastive()),)), "m")
        train(student, phase, replace(settings, steps=30), folder=folder, accelerator=Accelerator(cpu=True))
        return student

    whole = go(tmp_path / "whole", NoisyStudent())
    said = {"junk": "not an image", "gone": "No such file", "another": "another picture"}[how]
    with pytest.raises(LoadingError, match=rf"step \d+: image '3.png' \(row 3, {broken}\) .*{said}.*Put the file back"):
        go(tmp_path / "cut", Breaking())
    done = len(untimed(tmp_path / "cut"))
    assert epoch < done < 30
    assert step_of(latest_checkpoint(tmp_path / "cut" / "checkpoints")) == done, "every finished step is kept"
    broken.write_bytes(before)
    resumed = go(tmp_path / "cut", NoisyStudent(seed=5))
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


@pytest.mark.parametrize("what", ["break", "remove"])
def test_the_command_ends_with_one_message_about_it_and_goes_on(place: Path, whole: Path, what: str) -> None:
    broken = place / "data" / "3.png"
    before = broken.read_bytes()
    said = ended_with(begin(place, "--set=train.workers=2", moment=f"{what}:{broken}", step=3), place)
    assert re.match(rf"step \d+: image '3.png' \(row 3, {broken}\) is not what it was", said), said
    kept = reached(place, "shared")
    assert kept >= 3
    assert re.search(r"pairs.jsonl:7: image '3.png': (not an image|the file does not exist)", refused(place))
    broken.write_bytes(before)
    trained(place)
    assert_same(place, whole)


# --- the data changed between runs ------------------------------------------------------------------------------------


def test_data_that_changed_between_runs_is_refused_with_what_changed_and_put_back_goes_on(
    place: Path, whole: Path
) -> None:
    trained(place, "--arm", "plain")
    data, rows = place / "data", read_rows(place / "data")

    def replaced() -> None:
        PIL.Image.new("L", (4, 4), color=200).save(data / "3.png")

    def edited() -> None:
        write_rows(
            data, [{**row, "caption": row["caption"] + " more"} if n == 4 else row for n, row in enumerate(rows)]
        )

    def removed() -> None:
        write_rows(data, [row for row in rows if row["image"] != "5.png"])

    def reordered() -> None:
        write_rows(data, rows[2:] + rows[:2])

    def resplit() -> None:
        write_rows(data, [{**row, "split": "val"} if row["image"] == "0.png" else row for row in rows])

    order = "the same pictures and captions in another order, in other pairs or in other splits"
    for change, told in (
        (replaced, r"1 picture\(s\) changed \('3.png'\)"),
        (edited, r"1 caption\(s\) are new \('4 word word word word more'\), 1 caption\(s\) are gone"),
        (removed, r"1 picture\(s\) are gone \('5.png'\), 2 caption\(s\) are gone"),
        (reordered, order),
        (resplit, order),
    ):
        change()
        said = refused(place)
        assert re.search(rf"the data is not what {place / RUN} was begun with: {told}; .*--set name=", said), said
        write_rows(data, rows)
        (data / "3.png").write_bytes((whole / "data" / "3.png").read_bytes())
    trained(place)
    assert_same(place, whole)


def test_a_new_name_takes_changed_data_and_mixes_nothing(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    trained(place)
    rows = read_rows(place / "data")
    rows[4] = {**rows[4], "caption": "4 other words"}
    write_rows(place / "data", rows)
    trained(place, "--set=name=other")
    fresh = tmp_path_factory.mktemp("fresh")
    shutil.copytree(place / "data", fresh / "data")
    recipe(fresh)
    trained(fresh, "--set=name=other")
    for arm in ARMS:
        path = Path("runs/other/arms") / arm / "student" / "toy.safetensors"
        assert (place / path).read_bytes() == (fresh / path).read_bytes(), arm


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "step", "says"), [("break", 4, "image '3.png'"), ("nan", 6, "loss 'mine' is nan")])
def test_what_ends_one_of_two_processes_ends_both_and_is_said_once(
    place: Path, moment: str, step: int, says: str
) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where = f"{moment}:{place / 'data' / '3.png'}"
    said = ended(
        [begin(place, moment=where, step=step, **several, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)],
        code=2,
    )
    told = [line for one in said for line in one.splitlines() if line.startswith("error")]
    assert len(told) == 2, said
    assert all(re.match(r"error in process [01] of 2: ", line) for line in told)
    causes = [line for line in told if says in line]
    # a loss is the same in all processes; a picture is one's own
    assert len(causes) == (2 if moment == "nan" else 1), told
    assert all("lost another one" in line for line in told if line not in causes)
    assert "Traceback" not in "".join(said)
