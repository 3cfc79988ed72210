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


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_run_is_a_valid_command_of_its_own(name):
    cells = experiments.EXPERIMENTS[name].cells()
    assert len({cell.name for cell in cells}) == len({(*c.arguments,) for c in cells}) == len(cells)
    for cell in cells:
        options = parsed(cell)
        assert (options.lr, options.seed) == (cell.lr, cell.seed)
        assert options.threads == 1  # the bits of a run must not depend on the machine's cores


def test_the_rules_are_compared_at_equal_steps_on_the_same_shards():
    cells = experiments.EXPERIMENTS["rules"].cells()
    options = [parsed(cell) for cell in cells]
    assert len({(o.rounds, o.J, o.batch_size, o.clients, o.image_size) for o in options}) == 1
    assert {o.nc for o in options} == {None, 1}
    assert {o.mask_rule for o in options} == {None, *RULES}
    assert {o.sparsity for o in options if o.mask_rule} == {0.5, 0.9, 0.99}
    assert {o.calibration_rounds for o in options} == {None, 1, 2, 4, 8}
    for seed in {cell.seed for cell in cells}:
        assert {c.row for c in cells if c.seed == seed} == {c.row for c in cells}


KEYS = (("iid", "dense", "0"), ("nc1", "random", "0.9"), ("iid", "random", "0.9"))
ROWS = tuple(Row(key, (), (0.01, 0.1)) for key in KEYS)
EXPERIMENT = Experiment(("sharding", "rule", "sparsity"), ROWS, (0, 1), ("dense", "0"))


def test_every_row_has_a_figure_before_any_tries_its_second_rate(tmp_path):
    cells = EXPERIMENT.cells()
    assert [c.lr for c in cells] == [0.01] * 6 + [0.1] * 6
    assert [c.row for c in cells[:6:2]] == list(KEYS) and {c.seed for c in cells[:2]} == {0, 1}
    finish(tmp_path, cells[0], 0.3)
    assert EXPERIMENT.missing(tmp_path) == cells[1:]


def test_a_table_shows_the_best_rate_against_dense_seed_by_seed_and_what_is_missing(tmp_path):
    accuracies = {0.01: ((0.30, 0.32), (0.28, 0.30)), 0.1: ((0.29, 0.31), (0.33, 0.34))}
    for lr, (dense, random) in accuracies.items():
        for seed in (0, 1):
            finish(tmp_path, ROWS[0].cell(lr, seed), dense[seed])
            finish(tmp_path, ROWS[2].cell(lr, seed), random[seed])
    finish(tmp_path, ROWS[1].cell(0.01, 0), 0.9)  # one seed of two is no row
    lines = EXPERIMENT.table(tmp_path).splitlines()
    assert lines[2:] == [
        "| iid | dense | 0 | 0.01 | 31.00 ± 1.41 | 50.00 ± 0.00 |  | 2 | 0.250 | 0.1: 30.0 |",
        "| iid | random | 0.9 | 0.1 | 33.50 ± 0.71 | 50.00 ± 0.00 | +2.50 ± 0.71 | 2 | 0.250 | "
        "0.01: 29.0 |",
        "| nc1 | random | 0.9 | not run |  |  |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {11}


def test_a_sweep_runs_what_is_missing_and_goes_on_past_a_failure(cli, small_data, monkeypatch):
    rows = (
        Row(("a",), TINY, (0.1,)),
        Row(("b",), (*TINY, "--head", "ridge", "--val-fraction", "0"), (0.1,)),
    )
    experiment = Experiment(("which",), rows, (0,), ())
    monkeypatch.setitem(experiments.EXPERIMENTS, "rules", experiment)
    status, out, err = cli("sweep", "rules", "--list")
    assert status == 0 and "0 of 2 runs done, time left: unknown" in out
    assert not (small_data / "results").exists()
    status, out, err = cli("sweep", "rules", "--jobs", 2)
    assert status == 2 and "1 runs failed: b-lr0.1-seed0" in err
    assert "a-lr0.1-seed0: done" in out and "needs validation data" in out
    status, out, err = cli("sweep", "rules", "--list")
    assert status == 0 and "1 of 2 runs done" in out
    assert "| a | 0.1 |" in (small_data / "results" / "rules" / "table.md").read_text()
