"""What a run keeps beside its checkpoints is what it was made from, or is said not to be."""

import json
import shutil

import pytest

import plots

FEDAVG = ("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.2)
FEDAVG += ("--J", 1, "--batch-size", 8, "--head", "ridge", "--mask-rule", "random")


@pytest.mark.parametrize("name", ["head.pt", "mask.pt"])
def test_another_runs_file_is_refused_by_name_and_can_be_deleted(cli, small_data, name):
    for run, seed in (("a", 0), ("b", 1)):
        assert cli(*FEDAVG, "--name", run, "--seed", seed)[0] == 0
    folder, other = (small_data / "runs" / run for run in "ab")
    log = (folder / "log.jsonl").read_bytes()
    shutil.copy(other / name, folder / name)
    command = (*FEDAVG, "--name", "a", "--rounds", 3)
    status, _, err = cli(*command)
    assert status == 2 and f"runs/a/{name}" in err and "delete it to have" in err
    assert (folder / "log.jsonl").read_bytes() == log
    (folder / name).unlink()
    assert cli(*command)[0] == 0


def test_a_damaged_summary_is_named_and_the_end_repeated(cli, small_data):
    assert cli(*FEDAVG, "--name", "a")[0] == 0
    path = small_data / "runs" / "a" / "summary.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"round": 2', '"round": 3'))
    status, out, _ = cli(*FEDAVG, "--name", "a")
    assert status == 0 and "summary.json is damaged or edited" in out
    again = json.loads(path.read_text())
    assert again["final"] == whole["final"] and again["round"] == 2


def test_a_run_counts_as_finished_only_when_its_curves_are_drawn(cli, small_data, monkeypatch):
    def killed(logs, path):
        raise KeyboardInterrupt

    drawn = plots.plot_curves
    monkeypatch.setattr(plots, "plot_curves", killed)
    assert cli(*FEDAVG, "--name", "a")[0] == 130
    monkeypatch.setattr(plots, "plot_curves", drawn)
    assert "is finished" not in cli(*FEDAVG, "--name", "a")[1]
    assert (small_data / "runs" / "a" / "curves.png").exists()
    assert "is finished" in cli(*FEDAVG, "--name", "a")[1]
