"""What a run takes is what is measured here, as often as its options say."""

from commands import timing
from commands.costs import Costs
from commands.timing import Times
from study.tables import Experiment, Row

DATA = ("--data", "synthetic", "--threads", "1")


def test_a_measurement_is_kept_in_a_file_for_this_machine(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(timing, "costs", lambda line: measured.append(line) or Costs(round=2.0))
    cell = Row(("a",), (*DATA, "--rounds", "1", "--eval-every", "1")).cell(None, 0)
    path = tmp_path / "new" / "times.json"
    for _ in range(2):
        assert Times(path, []).seconds_of(cell) == 2
    assert len(measured) == 1
    monkeypatch.setattr(timing, "processor", lambda device: "another")
    Times(path, []).seconds_of(cell)
    assert len(measured) == 2


def test_finished_runs_of_this_machine_correct_the_estimates(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "costs", lambda line: Costs(step=1.0))
    rows = [
        Row((n,), (*DATA, "--J", n, "--rounds", "1", "--C", "0.01", "--batch-size", "1"))
        for n in "24"
    ]
    times = Times(tmp_path / "times.json", [Experiment(("J",), tuple(rows), at=tmp_path)])
    assert [times.seconds_of(row.cell(None, 0)) for row in rows] == [2, 4]
    times.__dict__.pop("measured"), times.__dict__.pop("correction")
    times.measured = {("fedavg", rows[0].options): 6.0}
    assert [times.seconds_of(row.cell(None, 0)) for row in rows] == [6, 12]


def test_a_setting_is_measured_once_whatever_a_run_counts(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(timing, "costs", lambda line: lines.append(line) or Costs(feature=1.0))
    times = Times(tmp_path / "times.json", [])
    mask = ("--mask-rule", "lowest-magnitude", "--sparsity", "0.5")
    for options in (DATA, (*DATA, "--J", "9"), (*DATA, *mask), (*DATA, "--train", "blocks.1")):
        assert times.estimate("fedavg", options) == 0  # features are counted apart
    assert len(lines) == 1
    times.estimate("fedavg", (*DATA, "--train", "head"))
    assert [line.stored["train"] for line in lines] == ["all", "head"]
    assert {line.stored["threads"] for line in lines} == {1}
    rows = {("ridge", DATA), ("fedavg", (*DATA, "--head", "ridge")), ("fedavg", DATA)}
    assert times.features(rows) == 25_000


def test_a_model_of_other_weights_than_the_default_s_is_timed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "costs", lambda line: Costs(step=float(line.stored["batch_size"])))
    monkeypatch.setattr(timing, "parsed", timing.parsed.__wrapped__)
    times = Times(tmp_path / "times.json", [])
    options = ("--model", "vit_ti16", "--weights", "none", "--rounds", "1", "--C", "0.01")
    assert times.estimate("fedavg", (*options, "--J", "1")) > 0
