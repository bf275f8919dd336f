"""Where a run's time went and what its steps spent it on, through the command line: stopped, killed, gone on with."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.store_tools import find_stores, store_facts
from distill.timings import OTHER
from tests.forked import command
from tests.test_run import TINY, checkpoints, stop_when
from tests.test_wrong_recipes import distill

ARMS = "arms={plain: {losses: [{name: contrastive}]}, distilled: {losses: [{name: contrastive}, {name: kl}]}}"
FEW = [*(item for item in TINY if not item.startswith("arms.")), ARMS]
RUN = Path("runs") / "quickstart"


@dataclass(frozen=True)
class Observed:
    folder: Path
    last: subprocess.CompletedProcess[str]  # the session that came to the end
    seconds: list[float]  # wall clock of each session as seen from outside


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """Stopped while it trains the first arm, killed while it trains the second, then let come to its end."""
    folder = tmp_path_factory.mktemp("observed")
    command("recipes", folder=folder)  # what commands are forked from begins before the clock does
    at = [time.monotonic()]
    stop_when(folder, lambda _: checkpoints(folder, "arms/plain") >= 15, signal.SIGTERM, ARMS)
    at.append(time.monotonic())
    stop_when(folder, lambda _: checkpoints(folder, "arms/distilled") >= 12, signal.SIGKILL, ARMS)
    at.append(time.monotonic())
    last = distill("run", "quickstart", "--resume", "--profile", "1:2", folder=folder, settings=FEW)
    assert last.returncode == 0, last.stderr
    at.append(time.monotonic())
    return Observed(folder, last, [after - before for before, after in zip(at, at[1:], strict=False)])


def kept(observed: Observed) -> dict:
    return json.loads((observed.folder / RUN / "timings.json").read_text())


def test_all_sessions_are_summed_and_what_ended_them_is_said(observed: Observed) -> None:
    found = kept(observed)
    assert found["sessions"] == ["stopped by SIGTERM", "no end noted", "done"]
    assert found["resumed"] == 2
    table = observed.last.stdout.splitlines()
    (title,) = (number for number, line in enumerate(table) if "wall time by stage" in line)
    assert "over 3 sessions (resumed 2 times; before: 1 stopped by SIGTERM, 1 no end noted)" in table[title]
    shares = [float(line[: line.index(" %")].split()[-1]) for line in table[title + 2 :] if " %" in line]
    assert shares[-1] == 100
    own = found["own"]
    whole = {path: sum(own[other] for other in own if f"{other}/".startswith(f"{path}/")) for path in own}
    shown = sum(own[path] for path in own if whole[path] >= 0.05 or path == OTHER)  # shorter ones have no row
    assert sum(shares[:-1]) == pytest.approx(100 * shown / found["total"], abs=0.05 * len(shares))
    assert sum(found["own"].values()) == pytest.approx(found["total"])


def test_the_sum_is_the_wall_clock_but_for_the_interpreter_and_what_a_kill_cost(observed: Observed) -> None:
    lines = [json.loads(line) for line in (observed.folder / RUN / "timings.jsonl").read_text().splitlines()]
    by_session = dict[str, float]()
    for line in lines:
        by_session[line["session"]] = by_session.get(line["session"], 0.0) + sum(line["seconds"].values())
    first, killed, last = by_session.values()
    for inside, outside in zip((first, killed, last), observed.seconds, strict=True):
        assert inside < outside
    assert first > 0.5 * observed.seconds[0]
    assert last > 0.5 * observed.seconds[2]


def test_every_stage_has_its_time_and_those_within_others_are_told_apart(observed: Observed) -> None:
    own = kept(observed)["own"]
    trained = ("train shared", "train plain", "train distilled")
    for stage in ("start", "read data", "check", "teach", *trained, "mine", "mine/embed", "score", "evaluate"):
        assert own[stage] > 0, stage
    for stage in ("evaluate/embed", "evaluate/score", "report"):
        assert own[stage] > 0, stage
    for stage in ("teach", *trained):
        assert own[f"{stage}/checkpoint"] > 0
        assert own[f"{stage}/waiting for data"] > 0
    assert list(own)[-1] == "other"
    assert own["other"] < 0.25 * sum(own.values())


def test_no_step_of_a_session_that_was_stopped_is_lost_and_the_teachers_pairs_are_those_of_its_store(
    observed: Observed,
) -> None:
    counts = kept(observed)["counts"]
    assert counts["train plain"]["steps"] == 14  # 24 less the 10 shared ones, in two sessions
    assert counts["train plain"]["items"] >= 14 * 16
    asked = sum(numbers.get("asked", 0) for numbers in counts.values())
    (store,) = find_stores(observed.folder / "cache" / "scores")
    assert asked == store_facts(store).pairs
    assert f"teacher: {asked:,} pairs asked" in observed.last.stdout


def test_the_window_was_recorded_in_the_training_that_was_left(observed: Observed) -> None:
    traces = sorted((observed.folder / RUN).rglob("trace.json.gz"))
    assert {path.relative_to(observed.folder / RUN).parts[:3] for path in traces} == {("arms", "distilled", "profile")}
    for path in traces:  # a round is a training of its own
        assert str(path.relative_to(observed.folder)) in observed.last.stderr
        with gzip.open(path, "rt") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"]]
        assert names.count("step: encode") == 2


def test_a_run_without_anything_to_train_says_that_nothing_was_recorded(observed: Observed) -> None:
    done = distill("train", "quickstart", "--resume", "--profile", "3:2", folder=observed.folder, settings=FEW)
    assert done.returncode == 0, done.stderr
    assert "--profile 3:2: nothing was left to train, so nothing is recorded" in done.stderr
    assert "over 4 sessions" in done.stdout
