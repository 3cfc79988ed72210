"""The experiments as data: every run is a valid command, and tables say what the logs say."""

import json

import pytest

import experiments
import train
from experiments import Cell, Experiment, Row
from masks import RULES

TINY = ("--data", "synthetic", "--rounds", "1", "--clients", "10", "--threads", "1")


def parsed(cell: Cell):
    return train.resolve(train.build_parser().parse_args(["fedavg", *cell.arguments]))


def finish(folder, cell: Cell, val_acc: float) -> None:
    (folder / cell.name).mkdir(parents=True)
    figures = {"final": {"val_acc": val_acc, "test_acc": 0.5}, "bytes_to_dense": 0.25}
    (folder / cell.name / "summary.json").write_text(json.dumps(figures | {"wall_seconds": 60.0}))


def all_cells(experiment: Experiment, folder) -> list[Cell]:
    """Return all runs of an experiment, whose searches come out for the first rate."""
    for cell in experiment.cells(folder):
        finish(folder, cell, 0.5)
    return experiment.cells(folder)


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_run_is_a_valid_command_of_its_own(name, tmp_path):
    experiment = experiments.EXPERIMENTS[name]
    cells = all_cells(experiment, tmp_path)
    assert len(cells) == experiment.size
    assert len({cell.name for cell in cells}) == len({(*c.arguments,) for c in cells}) == len(cells)
    for cell in cells:
        options = parsed(cell)
        assert (options.lr, options.seed) == (cell.lr, cell.seed)
        assert options.threads == 1  # the bits of a run must not depend on the machine's cores


def test_the_rules_are_compared_at_equal_steps_on_the_same_shards(tmp_path):
    cells = all_cells(experiments.EXPERIMENTS["rules"], tmp_path)
    options = [parsed(cell) for cell in cells]
    assert len({(o.rounds, o.J, o.batch_size, o.clients, o.image_size) for o in options}) == 1
    assert {o.nc for o in options} == {None, 1}
    assert {o.mask_rule for o in options} == {None, *RULES}
    assert {o.sparsity for o in options if o.mask_rule} == {0.5, 0.9, 0.99}
    assert {o.calibration_rounds for o in options} == {None, 1, 2, 4, 8}
    for seed in {cell.seed for cell in cells}:
        assert {c.row for c in cells if c.seed == seed} == {c.row for c in cells}


def test_the_best_rate_on_the_first_seed_is_run_on_the_others(tmp_path):
    row = Row(("iid", "dense", "0"), (), (0.01, 0.1))
    experiment = Experiment(("sharding", "rule", "sparsity"), (row,), (0, 1), ("dense", "0"))
    first, second = experiment.missing(tmp_path, set())
    assert [(c.lr, c.seed) for c in (first, second)] == [(0.01, 0), (0.1, 0)]
    finish(tmp_path, first, 0.30)
    assert experiment.missing(tmp_path, set()) == [second]
    assert experiment.missing(tmp_path, {second.name}) == []
    assert "not run" in experiment.table(tmp_path)
    finish(tmp_path, second, 0.31)
    assert [(c.lr, c.seed) for c in experiment.missing(tmp_path, set())] == [(0.1, 1)]


def test_a_table_compares_with_dense_seed_by_seed_and_says_what_is_missing(tmp_path):
    keys = (("iid", "dense", "0"), ("iid", "random", "0.9"), ("nc1", "random", "0.9"))
    rows = tuple(Row(key, (), (0.01, 0.1)) for key in keys)
    experiment = Experiment(("sharding", "rule", "sparsity"), rows, (0, 1), ("dense", "0"))
    for row, figures in zip(rows, ((0.30, 0.29, 0.32), (0.28, 0.33, 0.34)), strict=False):
        for cell, value in zip((row.cell(0.01, 0), row.cell(0.1, 0)), figures, strict=False):
            finish(tmp_path, cell, value)
        finish(tmp_path, row.cell(experiment.chosen(tmp_path, row), 1), figures[2])
    lines = experiment.table(tmp_path).splitlines()
    assert lines[2:] == [
        "| iid | dense | 0 | 0.01 | 31.00 ± 1.41 | 50.00 ± 0.00 |  | 2 | 0.250 | 0.1: 29.0 |",
        "| iid | random | 0.9 | 0.1 | 33.50 ± 0.71 | 50.00 ± 0.00 | +2.50 ± 0.71 | 2 | 0.250 | "
        "0.01: 28.0 |",
        "| nc1 | random | 0.9 | not run |  |  |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {11}


def test_a_sweep_runs_what_is_missing_and_goes_on_past_a_failure(cli, small_data, monkeypatch):
    rows = (
        Row(("a",), TINY, (0.1,)),
        Row(("b",), (*TINY, "--head", "ridge", "--val-fraction", "0"), (0.1,)),
        Row(("c",), TINY, (0.1, 0.2)),
    )
    experiment = Experiment(("which",), rows, (0, 1), ())
    monkeypatch.setitem(experiments.EXPERIMENTS, "rules", experiment)
    status, out, err = cli("sweep", "rules", "--list")
    assert status == 0 and "0 of 7 runs done, time left: unknown" in out
    assert not (small_data / "results").exists()
    status, out, err = cli("sweep", "rules", "--jobs", 3)
    assert status == 2 and "1 runs failed: b-lr0.1-seed0" in err
    assert "a-lr0.1-seed0: done" in out and "needs validation data" in out
    status, out, err = cli("sweep", "rules", "--list")
    assert status == 0 and "5 of 7 runs done" in out
    assert "| a | 0.1 |" in (small_data / "results" / "rules" / "table.md").read_text()
