"""What a run takes is what is measured here, as often as its options say."""

import pytest

from commands import timing
from commands.timing import PARTS, Times, counts, parsed
from study.tables import Experiment, Row

DATA = ("--data", "synthetic", "--threads", "1")


def counted(command, *options):
    return counts(command, parsed(command, (*DATA, *options)).stored)


def test_a_run_s_parts_are_counted_by_its_options():
    options = ("--rounds", "10", "--J", "4", "--clients", "50", "--fraction", "0.1")
    dense = counted("fedavg", *options, "--eval-every", "5", "--batch-size", "8")
    assert dense == {"step": 200 * 8, "head": 0, "forward": 3 * 7000, "score": 0}
    mask = ("--mask-rule", "least-sensitive", "--calibration-images", "30")
    assert counted("fedavg", *options, *mask)["score"] == 4 * 50  # each client at least one
    assert counted("fedavg", *options, "--mask-rule", "random")["score"] == 0
    assert counted("fedavg", *options, "--train", "head")["head"] == 40
    assert counted("fedavg", *options, "--train", "head")["step"] == 0
    assert counted("centralized", "--epochs", "2", "--batch-size", "100")["step"] == 2 * 180 * 100
    assert counted("fedavg", *options, "--batch-size", "full")["step"] == 200 * 360


def test_a_measurement_is_kept_in_a_file_for_this_machine(tmp_path, monkeypatch):
    measured = []
    parts = dict.fromkeys(PARTS, 0.0) | {"forward": 2.0}
    monkeypatch.setattr(timing, "measure", lambda o: measured.append(o["model"]) or parts)
    cell = Row(("a",), (*DATA, "--rounds", "1", "--eval-every", "1")).cell(None, 0)
    path = tmp_path / "new" / "times.json"
    for _ in range(2):
        assert Times(path, []).seconds_of(cell) == 2 * 2 * 7000
    assert len(measured) == 1
    monkeypatch.setattr(timing, "processor", lambda device: "another")
    Times(path, []).seconds_of(cell)
    assert len(measured) == 2


def test_finished_runs_of_this_machine_correct_the_estimates(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda o: dict.fromkeys(PARTS, 0.0) | {"step": 1.0})
    rows = [
        Row((n,), (*DATA, "--J", n, "--rounds", "1", "--C", "0.01", "--batch-size", "1"))
        for n in "24"
    ]
    times = Times(tmp_path / "times.json", [(Experiment("T", ("J",), tuple(rows)), tmp_path)])
    assert [times.seconds_of(row.cell(None, 0)) for row in rows] == [2, 4]
    times.__dict__.pop("measured"), times.__dict__.pop("correction")
    times.measured = {("fedavg", rows[0].options): 6.0}
    assert [times.seconds_of(row.cell(None, 0)) for row in rows] == [6, 12]


@pytest.mark.slow  # seconds of measuring
def test_parts_are_measured_on_this_machine():
    parts = timing.measure(parsed("fedavg", (*DATA, "--batch-size", "2")).stored)
    assert parts.keys() == {*PARTS} and all(seconds > 0 for seconds in parts.values())
