"""The experiments as data: every run is a valid command, and scales differ in sizes alone."""

import functools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_tables import finish

from commands import timing
from commands.costs import Costs
from commands.options import parse
from machine.status import duration
from masks import RULES
from study import experiments, gpu
from study.experiments import SCALES, at_scale
from study.scales import SIZES
from study.tables import Experiment, Row, given
from train import COMMANDS

TABLES = [(scale, name) for scale in SCALES for name in at_scale(scale)]
BRIEF = tuple(at_scale("smoke"))
TINY = ("--data", "synthetic", "--rounds", "1", "--clients", "10", "--threads", "1")


@functools.cache
def parsed(cell):
    """Return the options of a cell's command, by name."""
    commands = {cell.command: COMMANDS[cell.command]}
    return SimpleNamespace(**parse([*cell.arguments], commands).stored)


def all_cells(experiment):
    return [row.cell(lr, row.seeds[0]) for row in experiment.rows for lr in row.rates]


@pytest.mark.parametrize(("scale", "name"), TABLES)
def test_every_run_is_a_valid_command_of_its_own(scale, name):
    cells = all_cells(at_scale(scale)[name])
    assert len({cell.name for cell in cells}) == len({(*c.arguments,) for c in cells}) == len(cells)
    for cell in cells:
        options = parsed(cell)
        assert options.seed == cell.seed and getattr(options, "lr", None) == cell.lr
        if scale in ("cpu", "smoke", "gpu-64px", "gpu-smoke"):
            assert options.threads == 1  # the bits of a run must not depend on the machine's cores


def test_runs_of_one_folder_and_name_are_the_same_runs():
    for scale in SCALES:
        known = {}
        for name, experiment in at_scale(scale).items():
            for cell in all_cells(experiment):
                key = experiment.folder or name, cell.name
                assert known.setdefault(key, vars(parsed(cell))) == vars(parsed(cell))


@pytest.mark.parametrize("name", BRIEF)
def test_scales_have_the_same_rows_and_the_smallest_every_value_of_every_column(name):
    scales = ("paper", "colab", "cpu", "smoke")
    rows = {scale: {(r.key, r.command) for r in at_scale(scale)[name].rows} for scale in scales}
    assert rows["paper"] == rows["cpu"] == rows["colab"] >= rows["smoke"]
    values = [{x for key, _ in rows[scale] for x in enumerate(key)} for scale in ("smoke", "paper")]
    assert values[0] == values[1]


def test_masked_rows_say_whether_their_rates_are_dense_training_s():
    def given(scale):
        cells = all_cells(at_scale(scale)["rules"])
        return {parsed(c).mask_lr for c in cells if "--mask-rule" in c.options}

    assert given("gpu") == given("colab") == {"matched"} and given("cpu") == {None}  # None: raw
    rates = {row.rates for row in at_scale("gpu")["rules"].rows if row.key[0] == "nc5"}
    assert len(rates) == 1  # a grid for every mask


def test_every_client_is_expected_twice_where_local_steps_are_compared():
    for scale in ("gpu", "colab", "paper"):
        for cell in all_cells(at_scale(scale)["heterogeneity"]):
            o = parsed(cell)
            assert o.train == "head" or o.rounds * o.fraction >= 2


def test_the_tables_of_masks_have_the_smallest_image_size_near_the_largest(tmp_path):
    size = SIZES["gpu"]
    rows = gpu.image_size(size).rows
    assert gpu.decided(size, tmp_path).pixels == 224 and at_scale("gpu")["image-size"].decides
    accuracies = {"224": 0.85, "160": 0.83, "128": 0.821, "112": 0.80}
    for row in rows:
        cell = row.cell(row.rates[0], 0)
        finish(tmp_path / "image-size", cell, accuracies[row.key[0]], **given(cell))
    assert gpu.decided(size, tmp_path / "image-size").pixels == 128
    tables = at_scale("gpu", tmp_path)
    assert {parsed(cell).image_size for cell in all_cells(tables["rates"])} == {128}
    assert all("128px" in cell.name for cell in all_cells(tables["query-key"]))


def test_the_rules_are_compared_at_equal_steps_on_the_same_shards():
    experiment = at_scale("cpu")["rules"]
    options = [parsed(cell) for cell in all_cells(experiment)]
    assert len({(o.rounds, o.J, o.batch_size, o.clients, o.image_size) for o in options}) == 1
    assert {o.nc for o in options} == {None, 1}
    assert {o.mask_rule for o in options} == {None, *RULES}
    assert {o.sparsity for o in options if o.mask_rule} == {0.5, 0.9, 0.99}
    assert {o.calibration_rounds for o in options} == {None, 4}
    assert len({row.seeds for row in experiment.rows}) == 1


@pytest.mark.parametrize("scale", ["paper", "colab", "cpu"])
def test_heterogeneity_takes_the_same_number_of_local_steps_everywhere(scale):
    options = [parsed(cell) for cell in all_cells(at_scale(scale)["heterogeneity"])]
    for what in ("head", "all"):
        assert len({o.J * o.rounds for o in options if o.train == what}) == 1
    assert {(o.nc, o.J) for o in options} == {
        (n, j) for n in (None, 50, 10, 5, 1) for j in (4, 8, 16)
    }


@pytest.fixture
def two_runs(monkeypatch):
    rows = (
        Row(("a",), TINY, (0.1,), widened=0),
        Row(("b",), (*TINY, "--head", "ridge", "--val-fraction", "0"), (0.1,), widened=0),
    )
    tables = {"rules": Experiment(("which",), rows)}
    monkeypatch.setattr(experiments, "at_scale", lambda *scale: tables)


@pytest.mark.slow  # processes
def test_a_sweep_runs_what_is_missing_and_goes_on_past_a_failure(cli, small_data, two_runs):
    status, out, err = cli("sweep", "rules", "--scale", "smoke", "--list")
    assert status == 0 and "0 of 2 runs done" in out and "time left: " in out
    status, out, err = cli("sweep", "rules", "--scale", "smoke", "--jobs", 2)
    assert status == 2 and "1 runs failed: b-lr0.1-seed0" in err
    assert "a-lr0.1-seed0: done" in out and "needs validation data" in out
    status, out, err = cli("sweep", "rules", "--scale", "smoke", "--list")
    assert status == 0 and "1 of 2 runs done" in out
    table = (small_data / "results" / "smoke" / "rules" / "table.md").read_text()
    assert "| a | 0.1 |" in table and "| b | not run |" in table
    (line,) = (small_data / "results" / "smoke" / "rules" / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "a-lr0.1-seed0" and "processor" in json.loads(line)["config"]
    assert not (small_data / "results" / "smoke" / "rules" / "a-lr0.1-seed0").exists()


def test_runs_that_tables_share_count_once_in_the_time_of_all(cli, small_data, monkeypatch):
    shared, own = (Row((name,), (), (0.1, 0.2)) for name in "ab")
    tables = {"rules": Experiment(("which",), (shared,))}
    tables["more"] = Experiment(("which",), (shared, own), folder="rules")
    monkeypatch.setattr(experiments, "at_scale", lambda *scale: tables)
    price = Costs(step=1e-2)
    monkeypatch.setattr(timing, "costs", lambda line: price)
    folder = small_data / "results" / "smoke" / "rules"
    seconds = price.total(timing.parsed("fedavg", ()).stored)

    def left():
        status, out, err = cli("sweep", "--scale", "smoke", "--list")
        assert status == 0, err
        lines = [line for line in out.splitlines() if " left: " in line]
        return {line.split()[0]: line.split("left: ")[1] for line in lines}

    four = duration(4 * seconds)
    assert left() == {"rules": duration(2 * seconds), "more": four, "all": four}
    cell = shared.cell(0.1, 0)
    finish(folder, cell, 0.3, processor="another")  # in a minute, elsewhere
    assert left()["rules"] == f"{duration(seconds)}, 1 of 1 rows not bracketed"
    shutil.rmtree(folder / cell.name)
    finish(folder, cell, 0.3, processor=timing.Times(small_data / "no file", []).processor)
    assert left() == {
        "rules": f"{duration(60)}, 1 of 1 rows not bracketed",
        "more": f"{duration(180)}, 1 of 1 rows not bracketed",
        "all": duration(180),
    }


@pytest.mark.slow  # a process
def test_a_second_sweep_of_the_same_results_is_refused(cli, small_data, two_runs):
    folder = small_data / "results" / "smoke" / "rules"
    folder.mkdir(parents=True)
    code = (
        "import sys; from machine.safe_files import *; lock(Path(sys.argv[1])); print(1); "
        "sys.stdin.read()"
    )
    holder = held_by_another(code, folder)
    try:
        status, _, err = cli("sweep", "rules", "--scale", "smoke")
        assert status == 2 and "is open in another process" in err
        assert sorted(p.name for p in folder.iterdir()) == ["lock"]
    finally:
        holder.communicate("")


def held_by_another(code, folder):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "1\n"
    return holder


def test_an_experiment_that_does_not_exist_is_refused(cli):
    status, _, err = cli("sweep", "rulez")
    assert status == 2 and "rulez" in err and "rules" in err and len(err.splitlines()) == 1
