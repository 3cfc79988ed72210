"""Progress: a rate that means something, and lines where nobody watches a terminal."""

import pytest

from machine import status
from machine.status import Status, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_of_what_was_done_here(clock):
    fresh, resumed = Status("round", 10), Status("round", 10, done=4)
    assert fresh.line(0) == "round 0/10" and resumed.line(4, "x") == "round 4/10  x"
    clock[0] += 2
    assert fresh.line(1) == "round 1/10  2.0 s each  18 s left"
    assert resumed.line(8) == "round 8/10  2.0/s  1 s left"


def test_a_long_job_writes_a_line_every_tenth_into_a_pipe(clock, capsys):
    job, quick, plain = (Status("images", 100, tenths=tenths) for tenths in (True, True, False))
    for done in range(1, 101):
        quick.show(done)
    for done in range(1, 101):
        clock[0] += 1
        job.show(done)
        plain.show(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in range(10, 101, 10)]


def test_nothing_to_do_is_shown_too():
    Status("images", total=0).show(0)


def test_durations_are_read_by_people():
    times = (0.2, 42, 59.7, 185, 3725, 10 * 86_400 + 3600)
    expected = ["0 s", "42 s", "1 min 0 s", "3 min 5 s", "1 h 2 min", "10 days 1 h"]
    assert [duration(s) for s in times] == expected
