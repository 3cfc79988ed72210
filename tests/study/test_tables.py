"""An experiment's table: what runs, in which order, and that its figures are those of the logs."""

import json

import pytest

from study import packed
from study.measures import TEST, VALIDATION, Measure, gain
from study.past import Past
from study.tables import LADDER, Experiment, Row, best_rate, beyond, done, given, place, same

KEYS = (("iid", "dense", "0"), ("nc1", "random", "0.9"), ("iid", "random", "0.9"))
ROWS = tuple(Row(key, ("--J", "4"), (0.01, 0.1), (0, 1), widened=0) for key in KEYS)
COLUMNS = ("sharding", "rule", "sparsity")
EXPERIMENT = Experiment(COLUMNS, ROWS, baseline=("dense", "0"))


def finish(folder, cell, val_acc, processor=None, **options):
    (folder / cell.name).mkdir(parents=True)
    stored = {"command": cell.command, "lr": cell.lr, "seed": cell.seed, "J": 4} | options
    figures = {"final": {"val_acc": val_acc, "test_acc": 0.5}, "wall_seconds": 60.0}
    config = {"format": 1, "options": stored, "processor": processor}
    (folder / cell.name / "config.json").write_text(json.dumps(config))
    (folder / cell.name / "summary.json").write_text(json.dumps(figures))


def at(experiment, folder):
    return experiment._replace(at=folder)


def names(cells):
    return [cell.name for cell in cells]


def test_every_row_has_a_figure_before_any_tries_its_second_rate(tmp_path):
    cells = at(EXPERIMENT, tmp_path).missing()
    assert [(c.lr, c.seed) for c in cells] == [(0.01, 0)] * 3 + [(0.1, 0)] * 3
    assert [c.row for c in cells[:3]] == ["-".join(key) for key in KEYS]
    finish(tmp_path, cells[0], 0.3)
    assert at(EXPERIMENT, tmp_path).missing() == cells[1:]


def test_the_other_seeds_run_the_rate_that_validated_best_on_the_first(tmp_path):
    dense = ROWS[0]
    finish(tmp_path, dense.cell(0.01, 0), 0.30)
    assert not any(c.seed for c in at(EXPERIMENT, tmp_path).missing())
    finish(tmp_path, dense.cell(0.1, 0), 0.31)
    others = [c for c in at(EXPERIMENT, tmp_path).missing() if c.seed]
    assert others == [dense.cell(0.1, 1)]
    finish(tmp_path, dense.cell(0.1, 1), 0.01)  # another seed does not change what was chosen
    assert at(EXPERIMENT, tmp_path).best(dense)[0] == 0.1
    assert dict(at(EXPERIMENT, tmp_path).left()) == {dense: 0, ROWS[1]: 3, ROWS[2]: 3}


def test_a_rate_that_failed_is_not_waited_for(tmp_path):
    dense = ROWS[0]
    finish(tmp_path, dense.cell(0.01, 0), 0.30)
    failed = {dense.cell(0.1, 0).name}
    missing = at(EXPERIMENT, tmp_path).missing(failed)
    assert dense.cell(0.01, 1) in missing and dense.cell(0.1, 0) not in missing


def test_a_table_shows_the_best_rate_against_dense_seed_by_seed_and_what_is_missing(tmp_path):
    accuracies = {0.01: ((0.30, 0.32), (0.28, 0.30)), 0.1: ((0.29, 0.31), (0.33, 0.34))}
    for lr, (dense, random) in accuracies.items():
        for seed in (0, 1):
            finish(tmp_path, ROWS[0].cell(lr, seed), dense[seed])
            finish(tmp_path, ROWS[2].cell(lr, seed), random[seed])
    lines = at(EXPERIMENT, tmp_path).table().splitlines()
    columns = "lr | of the rates tried | validation % | test % | "
    assert lines[0].startswith(f"| sharding | rule | sparsity | {columns}")
    assert lines[2:] == [
        "| iid | dense | 0 | 0.01 | the lowest | 31.00 ± 1.41 | 50.00 ± 0.00 |  | 2 | 0.1: 30.0 |",
        "| nc1 | random | 0.9 | not run |  |  |  |  |  |  |",
        "| iid | random | 0.9 | 0.1 | the highest | 33.50 ± 0.71 | 50.00 ± 0.00 | +3.00, +2.00 | "
        "2 | 0.01: 29.0 |",
    ]
    assert {line.count("|") for line in lines} == {11}


def seeds(*accuracies):
    return {seed: run_of({"final": {"val_acc": x}}) for seed, x in enumerate(accuracies)}


def run_of(summary):
    return Past("a", {}, summary, [])


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        # 2 with a deviation of 1 over three seeds: 4.303 / sqrt 3 = 2.48
        ((0.31, 0.32, 0.33), (0.30, 0.30, 0.30), "+2.00 [-0.48, +4.48]"),
        ((0.31, 0.32), (0.30, 0.30), "+1.00, +2.00"),
        ((0.31,), (0.30,), "+1.00"),
        ((0.302,), (0.30,), "none (+0.20)"),
        ((0.302, 0.302, 0.302), (0.30, 0.30, 0.30), "none (+0.20 [+0.20, +0.20])"),
        ((0.31,), (), ""),
    ],
)
def test_a_difference_has_an_interval_from_three_seeds_and_is_none_below_the_noise(
    here, there, said
):
    assert gain(VALIDATION, seeds(*here), seeds(*there)) == said


def test_a_grid_is_widened_on_the_first_seed_until_its_best_rate_lies_inside(tmp_path):
    row = Row(("a",), (), (0.01, 0.003, 0.03), (0, 1))
    experiment = Experiment(("which",), (row,))
    accuracies = {0.01: 0.30, 0.003: 0.2, 0.03: 0.31, 0.1: 0.32, 0.3: 0.29}
    for lr in (0.01, 0.003, 0.03):
        assert at(experiment, tmp_path).grid(row) == row.rates
        finish(tmp_path, row.cell(lr, 0), accuracies[lr], J=None)
    assert at(experiment, tmp_path).place(row) == "the highest"
    for lr in (0.1, 0.3):
        assert [(c.lr, c.seed) for c in at(experiment, tmp_path).missing()] == [(lr, 0)]
        assert dict(at(experiment, tmp_path).left()) == {row: 2}
        finish(tmp_path, row.cell(lr, 0), accuracies[lr], J=None)
    assert at(experiment, tmp_path).place(row) == "inside"
    assert [(c.lr, c.seed) for c in at(experiment, tmp_path).missing()] == [(0.1, 1)]


def test_a_grid_is_widened_by_three_rates_at_most_and_past_no_failure(tmp_path):
    row = Row(("a",), (), (0.01,))
    experiment = Experiment(("which",), (row,))
    for lr, val_acc in ((0.01, 0.1), (0.03, 0.2), (0.1, 0.3), (0.3, 0.4)):
        (cell,) = at(experiment, tmp_path).missing()
        assert cell.lr == lr
        finish(tmp_path, cell, val_acc, J=None)
    assert (
        not at(experiment, tmp_path).missing()
        and at(experiment, tmp_path).place(row) == "the highest"
    )
    (tmp_path / "failing").mkdir()
    finish(tmp_path / "failing", row.cell(0.01, 0), 0.1, J=None)
    failed = {row.cell(0.03, 0).name}
    assert not at(experiment, tmp_path / "failing").missing(failed)


def test_beyond_a_grid_is_the_next_rung_on_the_best_rate_s_side():
    assert beyond({0.003: 1, 0.01: 2, 0.03: 3}) == 0.1 and beyond({0.003: 3, 0.01: 2}) == 0.001
    assert beyond({0.003: 2, 0.01: 3, 0.03: 2}) is None
    assert beyond({0.003: 2, 0.01: 3, 0.03: 3}) == 0.1 and beyond({0.003: 3, 0.01: 3}) == 0.03
    assert beyond({0.003: 3, 0.01: 3, 0.03: 2}) == 0.001
    assert place({0.003: 3, 0.01: 3, 0.03: 2}) == "the lowest"
    assert place({0.01: 3, 0.003: 3, 0.03: 2}) == "level with the lowest"
    assert place({0.01: 3, 0.003: 2, 0.03: 3}) == "level with the highest"
    assert best_rate({0.003: 3, 0.01: 3, 0.03: 2}) == 0.003
    assert beyond(dict(zip(LADDER, range(len(LADDER)), strict=True))) is None
    assert beyond({0.2: 2, 0.1: 1}) == 0.3 and beyond({0.2: 1}) == 0.3


def test_a_table_reads_packed_runs_as_it_reads_their_folders(tmp_path):
    for lr in (0.01, 0.1):
        finish(tmp_path, ROWS[0].cell(lr, 0), lr)
    before = at(EXPERIMENT, tmp_path).table()
    for lr in (0.01, 0.1):
        packed.pack(tmp_path, ROWS[0].cell(lr, 0).name)
    assert [path.name for path in tmp_path.iterdir()] == [packed.FILE]
    assert at(EXPERIMENT, tmp_path).table() == before and "0.1: " not in before


def test_a_run_of_other_options_under_a_cell_s_name_is_refused(tmp_path):
    cell = ROWS[0].cell(0.01, 0)
    finish(tmp_path, cell, 0.3, J=8)
    with pytest.raises(ValueError, match="J is 8 there and 4 here; give another --results"):
        done(tmp_path, cell)
    (tmp_path / cell.name / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: delete it"):
        done(tmp_path, cell)


def test_options_are_compared_as_they_are_stored():
    row = Row(("a",), ("--J", "4", "--scaffold", "--J", "8", "--data", "x", "--fraction", "0.10"))
    assert given(row.cell(None, 3)) == {"J": "8", "data": "x", "fraction": "0.10", "seed": "3"}
    scope = Row(("a",), ("--mask-scope", "*.bias", "norm*")).cell(None, 3)
    assert given(scope)["mask_scope"] == "*.bias norm*" and same(
        ["*.bias", "norm*"], "*.bias norm*"
    )
    assert same(0.1, "0.10") and same("x", "x") and same(3, "3")
    assert not same(None, "3") and not same(0.1, "0.2")


def test_a_measure_that_a_run_lacks_leaves_its_place_empty(tmp_path):
    row = Row(("a",), ())
    finish(tmp_path, row.cell(None, 0), 0.25)
    run = run_of({"final": {"val_acc": 0.25}})
    assert VALIDATION.of(run) == 25.0 and TEST.of(run) is None
    assert VALIDATION.over([run, run_of({})]).values == (25.0,)
    measures = (VALIDATION, Measure("moved", "final/distance"))
    experiment = Experiment(("which",), (row,), measures)
    assert at(experiment, tmp_path).lines()[1] == ["a", "25.00", "", "1: no spread"]


def test_a_run_that_was_told_to_go_on_is_not_done_before_it_gets_there(tmp_path):
    cell = ROWS[0].cell(0.01, 0)
    finish(tmp_path, cell, 0.3, rounds=9)
    path = tmp_path / cell.name / "summary.json"
    figures = json.loads(path.read_text())
    for further, there in (
        ({"round": 2}, False),
        ({"round": 9}, True),
        ({"round": 2, "stopped_early": 3}, True),
    ):
        path.write_text(json.dumps(figures | further))
        assert (done(tmp_path, cell) is not None) == there
