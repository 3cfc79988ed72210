"""train.py runs, table, plot and report --runs on real folders."""

import csv
from io import StringIO
from pathlib import Path

import pytest
from past import leave

from study import packed, plots


@pytest.fixture
def folders(small_data):
    """Two shardings of two seeds, and a run that is not finished."""
    for nc in (1, 5):
        for seed in (0, 1):
            leave(Path("runs") / f"nc{nc}-{seed}", 0.1 * nc, nc=nc, seed=seed)
    leave(Path("runs") / "stopped", 0.1, reached=1)
    return small_data


def test_runs_are_listed_with_what_differs(cli, folders):
    status, out, err = cli("runs")
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("stopped"))
    assert "iid, seed 0" in line and "round 1 of 3" in line and "s ago" in line
    line = next(line for line in out.splitlines() if line.startswith("nc5-0"))
    assert "50.00" in line and "25.00" in line
    assert cli("runs", "nowhere")[0] == 2


def test_a_table_names_what_it_leaves_out(cli, folders):
    status, out, err = cli("table", "runs", "--by", "nc")
    assert status == 0 and "| nc5 | 50.00 ± 0.00 |" in out
    assert "left out: runs/stopped: round 1 of 3" in err
    assert "\\begin{tabular}" in cli("table", "runs", "--format", "tex")[1]
    rows = list(csv.reader(StringIO(cli("table", "runs", "--format", "csv")[1])))
    assert rows[0][:3] == ["sharding", "validation % mean", "validation % deviation"]
    assert rows[2][:3] == ["nc5", "50", "0"] and rows[2][-1] == "runs/nc5-0 runs/nc5-1"
    assert cli("table", "runs/stopped")[0] == 2


def test_rounds_beside_epochs_are_counted_in_passes(cli, small_data, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_bands", lambda curves, path, keys: drawn.update(curves))
    steps = {"data": "synthetic", "val_fraction": 0.1, "fraction": 0.3, "batch_size": 50}
    leave(small_data / "runs" / "a", 0.5, **steps)
    leave(small_data / "runs" / "b", 0.5, command="centralized", **steps)
    for name in ("config.json", "log.jsonl"):
        file = small_data / "runs" / "b" / name
        file.write_text(file.read_text().replace("round", "epoch"))
    assert cli("plot", "runs", "--metric", "val_acc")[0] == 0
    central, federated = (drawn[""][name][0] for name in ("centralized", "fedavg"))
    assert [r["pass"] for r in central] == [0, 1, 2, 3]
    assert [r["pass"] for r in federated] == [j * 3 * 4 * 50 / 18_000 for j in range(4)]


def test_rounds_of_other_lengths_are_counted_in_passes_too(cli, small_data, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "plot_bands", lambda curves, path, keys: drawn.update(curves))
    steps = {"data": "synthetic", "val_fraction": 0.1, "fraction": 0.3, "batch_size": 50}
    for J in (4, 16):
        leave(small_data / "runs" / f"{J}", 0.5, J=J, **steps)
    assert cli("plot", "runs", "--metric", "val_acc")[0] == 0
    passes = {label: [r["pass"] for r in log] for label, (log,) in drawn[""].items()}
    assert passes["$J = 16$"] == [4 * x for x in passes["$J = 4$"]]
    assert cli("plot", "runs/4", "runs/4", "--metric", "val_acc")[0] == 0
    assert "pass" not in next(iter(drawn[""].values()))[0][0]  # alike: rounds are rounds


def test_seeds_are_bands_under_the_names_that_are_given(cli, folders, monkeypatch):
    drawn = {}

    def note(curves, path, keys):
        drawn.update(curves=curves, path=path, keys=keys)
        return path

    monkeypatch.setattr(plots, "plot_bands", note)
    runs = [f"runs/nc{nc}-{seed}" for nc in (1, 5) for seed in (0, 1)]
    assert cli("plot", *runs, "--by", "nc", "--metric", "loss", "--labels", "one", "five")[0] == 0
    assert drawn["keys"] == ["val_loss"] and list(drawn["curves"][""]) == ["one", "five"]
    assert [len(seeds) for seeds in drawn["curves"][""].values()] == [2, 2]
    assert cli("plot", *runs)[0] == 0 and drawn["keys"] == ["val_loss", "val_acc"]
    assert drawn["path"] == "curves.png"
    status, _, err = cli("plot", *runs, "--split", "test")
    assert status == 2 and "--eval-test" in err
    status, _, err = cli("plot", *runs, "--metric", "cosine")
    assert status == 2 and "the figures of these are: val_acc, val_loss" in err
    assert cli("plot", *runs, "--metric", "val_loss")[0] == 0 and drawn["keys"] == ["val_loss"]
    assert "2 curves, which are nc1; nc5" in cli("plot", *runs, "--labels", "one")[2]


def test_a_seed_that_was_run_twice_has_no_deviation(cli, small_data):
    for name in ("a", "b"):
        leave(Path("runs") / name, 0.3, eval_every=len(name))
    status, out, err = cli("table", "runs")
    assert status == 0 and "| 30.00 |" in out and "±" not in out
    assert "left out: runs/a" in err and "runs/b has the same options and seed" in err


def test_a_plot_says_what_does_not_compare_and_where_seeds_end(cli, small_data, monkeypatch):
    monkeypatch.setattr(plots, "plot_bands", lambda curves, path, keys: path)
    leave(Path("runs") / "a", 0.3, data="synthetic")
    leave(Path("runs") / "b", 0.3, data="synthetic", seed=1, reached=2)
    leave(Path("runs") / "c", 0.3, data="cifar100", lr=0.2)
    (Path("runs") / "c" / "log.jsonl").write_text('{"round": 1, "val_acc": 0.1}\n')
    status, _, err = cli("plot", "runs", "--metric", "accuracy", "--by", "data")
    assert status == 0 and "(cifar100, synthetic): these curves do not compare" in err
    assert "synthetic is drawn to round 2" in err
    err = cli("plot", "runs", "--metric", "loss")[2]
    assert "left out: runs/c: no val_loss in its log" in err


def test_a_run_under_a_mask_is_listed_with_it(cli, small_data):
    leave(Path("runs") / "a", 0.3, command="centralized", mask_rule="random", sparsity=0.9)
    assert "random, sparsity 0.9, seed 0" in cli("runs")[1]


def test_the_file_of_a_sweeps_table_is_as_good_as_folders(cli, folders):
    _, table, _ = cli("table", "runs")
    packed.pack(Path("runs"), "nc1-0")
    packed.pack(Path("runs"), "nc5-0")
    assert cli("table", "runs")[1] == table
    assert cli("plot", "runs", "--metric", "val_acc", "--out", "x.png")[0] == 0
    assert cli("plot", "runs/nc1-0", "--metric", "val_acc")[0] == 2  # it is a line of the file
    assert "nc1-0 " in cli("runs")[1]
    status, out, _ = cli("report", "--runs", "runs", "--out", "mine")
    assert status == 0 and "table/fedavg" in out


def test_a_report_of_runs_is_a_folder_and_a_zip(cli, folders):
    status, out, err = cli("report", "--runs", "runs", "--out", "mine")
    assert status == 0 and "table/fedavg" in out and "left out: runs/stopped" in err
    assert Path("mine/report.tex").exists() and Path("mine.zip").exists()
    assert cli("report", "--runs", "runs", "--scale", "cpu")[0] == 2
