"""The arithmetic of timing in rounds, on made times; what the teacher's tasks do, on toys; indexes by brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom

from distill.bench import rounds, teacher_costs
from distill.bench.indexes import Factory, factories, index_bytes, index_rows
from distill.bench.rounds import Stage, Task, Timed, calls_within, cost_of, costs, ratio_of, takes_part, time_rounds
from distill.bench.sample import drawn_queries
from distill.bench.surroundings import cores, limited_threads
from distill.bench.tasks import TOP, query_tasks
from distill.bench.teacher_costs import Setting, TeacherTasks
from distill.bench.ways import torch_ways
from distill.faiss_setup import faiss_module
from distill.index import VectorIndex
from distill.score import ScoreOptions
from tests.toys import ToyStudent, ToyTeacher, expected_scores, toy_corpus

# --- arithmetic -------------------------------------------------------------------------------------------------------


def timed(total, *, taken=None, queries=1) -> Timed:
    total = np.asarray(total, float)
    return Timed(queries, np.arange(len(total)) if taken is None else np.asarray(taken), {"all": total}, {"all": total})


def slow_percentile(values, share: float) -> float:
    """By the definition: between the two order statistics around (n - 1) * share."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


@pytest.mark.parametrize("queries", [1, 32])
def test_a_cost_is_in_milliseconds_a_query(queries):
    values = np.random.default_rng(3).exponential(0.02, 37)
    found = cost_of(values, 0.5 * values, queries=queries)
    for name, share in (("median", 0.5), ("p90", 0.9), ("p95", 0.95)):
        assert getattr(found, name) == pytest.approx(1000 * slow_percentile(values.tolist(), share) / queries)
    assert found.cpu == pytest.approx(found.median / 2)
    with pytest.raises(ValueError, match="no call"):
        cost_of(values[:0], values[:0])


def test_a_ratio_is_taken_within_rounds_so_that_noise_that_hits_both_goes():
    noise = np.random.default_rng(0).lognormal(0, 2, 101)
    base = timed(0.001 * noise)
    own = timed(0.003 * noise[5::10], taken=np.arange(101)[5::10])
    found = ratio_of(own, base)
    assert (found.median, found.rounds) == (pytest.approx(3), 10)
    apart = cost_of(own.total, own.total).median / cost_of(base.total, base.total).median
    assert abs(apart - 3) > 0.3  # what the medians alone would have said
    assert ratio_of(timed(0.003 * noise, queries=32), base).median == pytest.approx(3 / 32)
    with pytest.raises(ValueError, match="both took part"):
        ratio_of(timed([1.0], taken=[7]), timed([1.0], taken=[8]))


@pytest.mark.parametrize("n", [4, 6, 40, 41])
def test_the_interval_of_a_ratio_is_that_of_order_statistics(n):
    values = np.sort(np.random.default_rng(n).exponential(1, n))
    found = ratio_of(timed(values), timed(np.ones(n)))
    # the widest pair of order statistics, each end of which is beyond the median with at most 2.5 % probability
    below = [place for place in range(n) if binom.cdf(place, n, 0.5) <= 0.025]
    if not below:
        assert (found.low, found.high) == (None, None)
    else:
        assert found.low == pytest.approx(values[below[-1]])
        assert found.high == pytest.approx(values[n - 1 - below[-1]])


@pytest.mark.parametrize(("calls", "of"), [(1, 1), (3, 400), (7, 20), (199, 200), (50, 50)])
def test_a_slow_task_is_spread_evenly_over_the_rounds(calls, of):
    taken = [number for number in range(of) if takes_part(number, calls, of)]
    assert len(taken) == calls
    assert taken[0] == 0
    gaps = {after - before for before, after in pairwise(taken)}
    assert len(gaps) <= 2
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_calls_are_as_many_as_fit_within_bounds():
    assert [calls_within(2.0, one) for one in (0.1, 1e-6, 60.0)] == [20, 400, 3]


class Clock:
    """Time that only work moves; the processor works half of it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log: list[tuple[str, int]] = []
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(rounds.time, "process_time", lambda: self.now / 2)

    def stage(self, part: str, seconds: float, *, task: str, scale: float = 1.0) -> Stage:
        def work(state):
            self.log.append((task, state["number"]))
            self.now += seconds

        return Stage(part, work, scale)


def test_rounds_are_interleaved_and_the_base_is_in_all_of_them(monkeypatch):
    clock = Clock(monkeypatch)
    names = {"base": 0.02, "quick": 0.01, "slow": 0.5}
    tasks = [Task(name, (clock.stage("work", seconds, task=name),)) for name, seconds in names.items()]
    found = time_rounds(tasks, base="base", seconds=2.0)
    # 200 calls of the quickest are 200 rounds; the base, of which 100 would fit, is in all of them
    assert {name: len(one.rounds) for name, one in found.items()} == {"base": 200, "quick": 200, "slow": 4}
    assert found["slow"].rounds.tolist() == [0, 50, 100, 150]
    counted = clock.log[3 * 3 :]  # after three warm-ups each
    assert [number for _, number in counted] == sorted(number for _, number in counted)
    firsts = {task for (task, number), (_, before) in zip(counted[1:], counted, strict=False) if number != before}
    assert firsts == {"base", "quick"} | ({"slow"} & firsts)  # nobody always goes first
    assert ratio_of(found["slow"], found["base"]).median == pytest.approx(25)
    assert ratio_of(found["quick"], found["base"]).median == pytest.approx(0.5)


def test_what_was_done_for_a_sample_is_multiplied_and_the_rest_is_not(monkeypatch):
    clock = Clock(monkeypatch)
    stages = (
        clock.stage("query", 0.25, task="x"),
        clock.stage("query", 0.25, task="x"),
        clock.stage("score", 0.125, task="x", scale=40),
    )
    total, parts = costs(time_rounds([Task("x", stages)], seconds=1.0)["x"])
    assert {name: one.median for name, one in parts.items()} == {"query": 500, "score": 5000}
    assert (total.median, total.cpu) == (5500, 2750)


def test_a_call_that_takes_longer_than_its_share_warms_up_once(monkeypatch):
    clock = Clock(monkeypatch)
    time_rounds([Task("x", (clock.stage("work", 10.0, task="x"),))], seconds=1.0)
    assert [number for _, number in clock.log] == [0, 0, 1, 2]


def test_tasks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own"):
        time_rounds([Task("x", ()), Task("x", ())], seconds=1.0)


def test_threads_are_set_alike_and_put_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    faiss_module()
    before = torch.get_num_threads()
    with threadpool_limits(2), limited_threads(1):
        assert torch.get_num_threads() == 1
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        assert any("faiss" in pool["filepath"] for pool in threadpool_info())
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match=f"this process may use {cores()} core"), limited_threads(cores() + 1):
        pass


# --- the teacher's tasks ----------------------------------------------------------------------------------------------


def ran(task: Task, number: int) -> dict:
    state = {"number": number}
    for stage in task.stages:
        stage.work(state)
    return state


class Toys:
    """A split of 12 images and 24 texts, a student that has indexed them, and a teacher that lists what it reads."""

    def __init__(self, query: str, *, memory: int = 1 << 20):
        self.corpus = toy_corpus(48)
        self.split = self.corpus.split("test")
        self.teacher, self.student = ToyTeacher(), ToyStudent()
        self.queries = drawn_queries(self.corpus, self.split, most=6, seed=0)[query]
        self.items = "image" if query == "text" else "text"
        self.item_ids = self.split.ids[self.items]
        ways = {way.side: way for way in torch_ways(self.student, torch.device("cpu"))}
        self.way = ways[query]
        items = ways[self.items]
        raw = self.corpus.load_images(self.item_ids) if self.items == "image" else list(map(self.text, self.item_ids))
        with torch.no_grad():
            self.index = VectorIndex.build(items.tower(items.prepare(raw)), self.item_ids)
        options = ScoreOptions(images_per_batch=3, image_memory_bytes=memory, text_memory_bytes=memory)
        setting = Setting(self.teacher, torch.device("cpu"), self.corpus, options)
        with torch.no_grad():
            self.tasks = TeacherTasks(setting, self.queries, self.way, index=self.index, depths=(4, 8), seed=0)

    def text(self, row) -> str:
        return self.corpus.texts[int(row)]

    def read(self) -> list[int]:
        return self.teacher.images if self.items == "image" else self.teacher.texts

    def scores(self, query: int, items: np.ndarray) -> np.ndarray:
        return expected_scores(items, query) if self.items == "image" else expected_scores(query, items)


@pytest.mark.parametrize("query", ["text", "image"])
@pytest.mark.parametrize("items", ["beforehand", "on the spot"])
def test_the_teacher_orders_the_students_first_few(query, items):
    toys = Toys(query)
    with torch.no_grad():
        for number in (0, 1, 5, 7):
            place = number % toys.tasks.timed
            vector = toys.way.tower(toys.way.prepare(toys.queries.items(place, 1)))
            best = np.argsort(-(vector @ toys.index.vectors().T)[0], kind="stable")[:8]
            ids = toys.item_ids[best]
            expected = ids[np.argsort(-toys.scores(int(toys.queries.ids[place]), ids), kind="stable")]
            toys.read().clear()
            answer = ran(toys.tasks.reranking(8, items), number)["answer"]
            assert answer.tolist() == expected.tolist()
            assert sorted(toys.read()) == (sorted(ids.tolist()) if items == "on the spot" else [])


@pytest.mark.parametrize("query", ["text", "image"])
def test_the_teacher_alone_is_timed_on_a_sample(query, monkeypatch):
    monkeypatch.setattr(teacher_costs, "ALONE_OF", 5)
    toys = Toys(query)
    count = len(toys.item_ids)
    task = toys.tasks.alone("on the spot")
    scales = {stage.part: stage.scale for stage in task.stages}
    assert scales == {"query": 1.0, "items": count / 5, "score": count / 5}
    toys.read().clear()
    toys.teacher.pairs.clear()
    with torch.no_grad():
        answer = ran(task, 1)["answer"]
        kept = ran(toys.tasks.alone("beforehand"), 1)["answer"]
    assert sorted(toys.read()) == sorted(answer.tolist())
    assert (len(answer), len(toys.teacher.pairs)) == (5, 10)
    assert answer.tolist() == kept.tolist()
    scores = toys.scores(int(toys.queries.ids[1 % toys.tasks.timed]), answer)
    assert (np.diff(scores) <= 0).all()


def test_no_more_queries_are_timed_than_their_items_have_room():
    each = Toys("text").tasks.bytes_each
    assert each == 8 + 2 * 4  # a number and a unit vector of two
    assert [Toys("text", memory=8 * each * n).tasks.timed for n in (0.5, 1, 3, 99)] == [1, 1, 3, 6]


@pytest.mark.parametrize("query", ["text", "image"])
def test_a_query_ends_with_the_nearest_items(query):
    toys = Toys(query)
    (task,) = query_tasks(toys.queries, [toys.way], toys.index, batch=4)
    with torch.no_grad():
        state = ran(task, 1)  # queries 4, 5, then 0, 1 again
    assert toys.queries.places(1, 4) == [4, 5, 0, 1]
    order = np.argsort(-(state["vectors"] @ toys.index.vectors().T), axis=1, kind="stable")[:, :TOP]
    assert state["found"].tolist() == toys.item_ids[order].tolist()
    assert task.queries == 4


# --- indexes ----------------------------------------------------------------------------------------------------------


def test_recall_and_memory_of_indexes_by_brute_force():
    made = np.random.default_rng(0)
    vectors, queries = (made.standard_normal((n, 16)).astype(np.float32) for n in (700, 50))
    ids = np.arange(700) * 3
    chosen = [Factory("Flat"), Factory("IVF16,Flat", 1), Factory("IVF16,Flat", 4), Factory("SQ8")]
    rows = {row.factory: row for row in index_rows(vectors, ids, queries, items="image", seconds=0.01, chosen=chosen)}
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :10] * 3
    for one in chosen:
        index = VectorIndex.build(vectors, ids, factory=one.text, nprobe=one.nprobe)
        found = index.search(queries, 10)[1]
        share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)])
        assert rows[one.label].recall == pytest.approx(share), one
    recalls = [rows[label].recall for label in ("IVF16,Flat nprobe 1", "IVF16,Flat nprobe 4", "Flat")]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.9
    assert recalls[-1] == 1
    exact = 700 * 16 * 4
    assert 0 <= rows["Flat"].bytes - exact < 200
    assert rows["Flat"].vectors_bytes == 0
    assert 0 <= rows["SQ8"].bytes - exact // 4 < 400
    assert 0 <= rows["SQ8"].vectors_bytes - exact < 200
    assert rows["Flat"].ratio[1].median == 1


def test_the_vectors_beside_an_index_count():
    vectors = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    own, beside = index_bytes(VectorIndex.build(vectors, np.arange(64), factory="HNSW32"))
    assert own > 64 * 8 * 4
    assert beside >= 64 * 8 * 4


@pytest.mark.parametrize("count", [12, 156, 1000, 10_000, 1_000_000])
def test_indexes_are_those_that_faiss_can_train(count):
    chosen = factories(count, 64)
    assert chosen[0] == Factory("Flat")
    assert len({one.label for one in chosen}) == len(chosen)
    lists = {int(one.text[3:].split(",")[0]) for one in chosen if one.text.startswith("IVF")}
    assert len(lists) <= 1
    for one in lists:
        assert 39 * one <= count
    assert all(one.nprobe is None or one.nprobe < max(lists) for one in chosen)
    assert ("PQ8" in {one.text for one in chosen}) == (count >= 39 * 256)
    assert "PQ" not in "".join(one.text for one in factories(count, 30))
