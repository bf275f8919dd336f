"""The command: one teacher served, students trained elsewhere by it, and what ends and comes again in between."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

from distill.data.scenes import make_scenes
from distill.embed import embed, live_source
from distill.preflight import PreflightError, claim
from distill.store import ScoreStore
from distill.wire import MSGPACK, packed, read_scored
from students.dual import DualEncoder
from tests.serving import environment, started
from tests.teacher_service.served import served
from tests.test_groups import experiment
from tests.test_wrong_recipes import distill
from tests.toys import ToyTeacher

ARMS = ("plain", "distilled", "beside")
DATA = ["data.train=120", "data.val=20", "data.test=24"]
TEACHER = ["teacher.vision.layers=1", "teacher.text.layers=1", "teach.steps=30", "teach.batch_size=16"]
STUDENT = [
    "train.batch_size=16",
    "train.steps=24",
    "train.shared=0.4",
    "train.log_every=3",
    "train.checkpoint_every=3",
    "mine.k=6",
    "evaluate.rerank=8",
    "score.pairs_per_unit=200",
    "student.vision.layers=1",
    "student.text.layers=1",
    "arms.distilled={losses: [{name: contrastive}, {name: kl, teacher_temperature: 2.0}]}",
    "arms.beside={losses: [{name: contrastive}, {name: embedding_match}, {name: margin_mse, weight: 0.01}]}",
]


def settings(*some: str) -> list[str]:
    return [f"--set={one}" for one in some]


@contextmanager
def service(folder: Path, *options: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``distill serve teacher`` of the run in ``folder``: address and process."""
    command = ["serve", "teacher", str(folder / "runs" / "quickstart"), "--port", str(port), *options]
    own = settings(f"cache={folder / 'served'}")
    with started([sys.executable, "-m", "distill", *command, *own]) as found:
        yield found


def remote(url: str) -> list[str]:
    return [f"teacher={{kind: remote, urls: ['{url}'], patience_s: 120}}", "teach=null"]


def trainer(folder: Path, url: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    own = [f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"]
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "run", "quickstart", *settings(*DATA, *STUDENT, *remote(url), *own)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment(),
    )


def pairs_of(cache: Path, note: dict[str, str]) -> dict[tuple[int, int], float]:
    """Every pair in a run's store."""
    (folder,) = (cache / "scores" / note["identity"]).iterdir()
    store = ScoreStore(
        cache / "scores",
        teacher_identity=note["identity"],
        corpus_fingerprint=folder.name,
        score_kind="log_odds",
        n_images=164,
        n_texts=328,
    )
    found = {}
    for images, texts, scores in store.pairs():
        found |= dict(zip(zip(images.tolist(), texts.tolist(), strict=True), scores.tolist(), strict=True))
    return found


def note_of(run: Path) -> dict[str, str]:
    return json.loads((run / "teacher.json").read_text())


def assert_same_students(run: Path, other: Path) -> None:
    """Scores differ in their last digits by what they are computed beside; nothing else does.

    Vectors are compared and not weights: attention's key biases have a gradient of rounding alone, which Adam blows up.
    """
    corpus = make_scenes(images=120, val=20, test=24, size=48, captions_per_image=2, seed=0)
    for arm in ARMS:
        ours, theirs = (DualEncoder.load(one / "arms" / arm / "student").eval() for one in (run, other))
        for side, count in (("image", corpus.n_images), ("text", corpus.n_texts)):
            found = [embed(one, live_source(corpus, side, one), np.arange(count), side) for one in (ours, theirs)]
            np.testing.assert_allclose(*found, atol=1e-4, err_msg=f"{arm}: {side}")
    plain = Path("arms") / "plain" / "student" / "model.safetensors"
    assert (run / plain).read_bytes() == (other / plain).read_bytes(), "what reads no scores is the same to the bit"
    ours, theirs = (json.loads((one / "summary.json").read_text()) for one in (run, other))
    assert ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the teacher in its own process."""
    folder = tmp_path_factory.mktemp("whole")
    done = distill("run", "quickstart", folder=folder, settings=[*DATA, *TEACHER, *STUDENT])
    assert done.returncode == 0, done.stderr
    return folder


def counted(url: str) -> dict[str, float]:
    lines = [line for line in httpx2.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_two_trainers_by_one_service_end_as_those_with_the_teacher_at_home(whole: Path, tmp_path: Path) -> None:
    run = whole / "runs" / "quickstart"
    with service(whole) as (url, _):
        trainers = [trainer(tmp_path / name, url) for name in ("one", "two")]
        for one in trainers:
            said, _ = one.communicate(timeout=240)
            assert one.returncode == 0, said
        counts = counted(url)
    expected = pairs_of(whole / "cache", note_of(run))
    for name in ("one", "two"):
        other = tmp_path / name / "runs" / "quickstart"
        assert note_of(other) == note_of(run)
        found = pairs_of(tmp_path / name / "cache", note_of(run))
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-5)
        assert_same_students(other, run)
    assert counts['distill_pairs_total{by="teacher"}'] == len(expected)
    assert counts['distill_pairs_total{by="known"}'] == len(expected)
    assert pairs_of(whole / "served", note_of(run)).keys() == expected.keys(), "ended, it has kept every score"


@pytest.mark.slow
def test_a_service_that_is_killed_amid_requests_and_served_again_costs_no_pair(whole: Path, tmp_path: Path) -> None:
    run = whole / "runs" / "quickstart"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (whole / "served").rename(tmp_path / "served-before") if (whole / "served").exists() else None
    with service(whole, port=port) as (url, process):
        training = trainer(tmp_path / "one", url)
        deadline = time.monotonic() + 120
        while not counted(url).get('distill_pairs_total{by="teacher"}'):
            assert training.poll() is None, training.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with service(whole, port=port):
        said, _ = training.communicate(timeout=240)
    assert training.returncode == 0, said
    found, expected = (pairs_of(folder / "cache", note_of(run)) for folder in (tmp_path / "one", whole))
    assert found.keys() == expected.keys()
    assert_same_students(tmp_path / "one" / "runs" / "quickstart", run)


def test_told_to_end_it_answers_what_it_has_and_keeps_the_scores(whole: Path) -> None:
    run = whole / "runs" / "quickstart"
    images, texts = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(100), indexing="ij"))
    with service(whole) as (url, process):
        corpus = httpx2.get(f"{url}/info").json()["corpus"]["fingerprint"]
        body = {"corpus": corpus, "image_ids": np.arange(100), "text_ids": np.arange(100)}
        with subprocess.Popen(
            [sys.executable, "-c", _POST, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        ) as asking:
            assert asking.stdin is not None
            assert asking.stdout is not None
            asking.stdin.write(packed({**body, "image_rows": images, "text_rows": texts}))
            asking.stdin.close()
            while not counted(url)["distill_waiting_pairs"]:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            answer = read_scored(asking.stdout.read(), 10_000)
            assert asking.wait(30) == 0
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
    assert np.isfinite(answer.scores).all()
    assert said.splitlines()[-1].startswith("ended: ")
    kept = pairs_of(whole / "served", note_of(run))
    np.testing.assert_array_equal(
        [kept[pair] for pair in zip(images.tolist(), texts.tolist(), strict=True)], answer.scores
    )


_POST = f"""
import sys, httpx2
answer = httpx2.post(
    sys.argv[1] + "/score", content=sys.stdin.buffer.read(), headers={{"Content-Type": "{MSGPACK}"}}, timeout=60
)
sys.stdout.buffer.write(answer.content)
"""


def test_what_cannot_be_served_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    untaught = distill("serve", "teacher", "quickstart", "--port", "0", folder=tmp_path, settings=[*DATA])
    assert untaught.returncode == 2
    assert "has no taught teacher yet" in untaught.stderr
    service_already = distill(
        "serve",
        "teacher",
        "quickstart",
        "--port",
        "0",
        folder=tmp_path,
        settings=[*DATA, *remote("http://127.0.0.1:9")],
    )
    assert service_already.returncode == 2
    assert "is a service already" in service_already.stderr
    nothing = distill("serve", "teacher", str(tmp_path), "--port", "0", folder=tmp_path)
    assert nothing.returncode == 2
    assert "has no recipe.yaml" in nothing.stderr
    abroad = distill(
        "serve", "teacher", "quickstart", "--port", "0", "--host", "0.0.0.0", folder=tmp_path, settings=[*DATA]
    )
    assert abroad.returncode == 2
    assert "a token is needed" in abroad.stderr
    alone = distill("serve", "teacher", "quickstart", "--threads", "2", folder=tmp_path)
    assert alone.returncode == 2
    assert "goes with --replicas" in alone.stderr


def test_a_run_goes_on_with_the_teacher_that_it_began_with_wherever_that_is(tmp_path: Path) -> None:
    with (
        served(ToyTeacher()) as here,
        served(ToyTeacher()) as there,
        served(ToyTeacher(name="other")) as other,
    ):

        def claimed(url: str, *own: str, resume: bool) -> dict[str, str]:
            x = experiment(tmp_path, *remote(url), *own)
            try:
                claim(x, resume=resume)
            finally:
                x.teacher.close()
            return note_of(x.folder)

        begun = claimed(here, resume=False)
        assert claimed(there, resume=True) == begun
        assert claimed(there, f"teacher.identity={begun['identity']}", resume=True) == begun
        with pytest.raises(PreflightError, match=r"was begun with \w+: serve that one again"):
            claimed(other, resume=True)
        (recipe,) = tmp_path.rglob("recipe.yaml")
        recipe.unlink()  # as a run leaves its folder that is killed before it has begun
        assert claimed(other, resume=False) != begun
