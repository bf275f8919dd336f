import io

import pytest

from distill.progress import Progress, clock_time, is_main_process, track


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(total, steps, *, stream, seconds=1.0, **options):
    clock = Clock()
    with Progress(total, "scoring", unit="pairs", stream=stream, clock=clock, **options) as progress:
        for _ in range(steps):
            clock.now += seconds
            progress.advance(10)
    return progress


def test_plain_lines_come_every_ten_seconds_with_count_rate_and_time_left():
    stream = io.StringIO()
    progress = run(300, 30, stream=stream, show=True)
    assert progress.done == 300
    assert stream.getvalue().splitlines() == [
        "scoring: 100/300 (33 %) pairs, 10.0 pairs/s, 0:20 left",
        "scoring: 200/300 (67 %) pairs, 10.0 pairs/s, 0:10 left",
        "scoring: 300/300 (100 %) pairs, 10.0 pairs/s, 0:00 left",
        "scoring: 300/300 (100 %) pairs, 10.0 pairs/s, done after 0:30",
    ]


def test_quick_phase_says_nothing_and_unknown_total_has_no_time_left():
    stream = io.StringIO()
    run(30, 3, stream=stream, show=True, seconds=0.1)
    assert stream.getvalue() == ""
    run(None, 12, stream=stream, show=True)
    assert stream.getvalue().splitlines()[0] == "scoring: 100 pairs, 10.0 pairs/s"


def test_error_ends_with_stopped():
    stream, clock = io.StringIO(), Clock()

    def fail():
        with Progress(5, "scoring", stream=stream, show=True, clock=clock) as progress:
            clock.now = 61.0
            progress.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert stream.getvalue().splitlines()[-1].endswith("stopped after 1:01")


@pytest.mark.parametrize(
    ("environment", "main"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"LOCAL_RANK": "1"}, False),
     ({"RANK": "0", "LOCAL_RANK": "0"}, True), ({"RANK": "8", "LOCAL_RANK": "0"}, False)],
)  # fmt: skip
def test_other_ranks_are_silent(monkeypatch, environment, main):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    run(100, 30, stream=stream)
    assert is_main_process() is main
    assert bool(stream.getvalue()) is main


def test_terminal_gets_a_bar():
    stream = Terminal()
    run(300, 30, stream=stream, show=True)
    assert "scoring" in stream.getvalue()
    assert "300/300" in stream.getvalue()
    assert "pairs/s" in stream.getvalue()
    assert "left" not in stream.getvalue()


def test_track_yields_all_and_counts(capsys):
    assert list(track(range(5), "reading", show=False)) == [0, 1, 2, 3, 4]
    assert list(track((letter for letter in "abc"), "reading", show=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_clock_time():
    assert [clock_time(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
