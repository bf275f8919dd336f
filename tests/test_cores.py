"""How many threads a process takes."""

from __future__ import annotations

import pytest

from distill.cores import cores, own_threads


@pytest.mark.parametrize(
    ("asked", "threads"), [("1", 1), ("2", 2), ("64", 3), ("0", 3), ("", 3), ("many", 3), ("-1", 3)]
)
def test_threads_are_those_asked_for_and_never_more_than_the_cores(monkeypatch, asked, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5, 6})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores() == 3
    assert own_threads() == threads


def test_a_system_that_cannot_tell_has_all_its_cores(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert cores() == 5
