"""Runs become rows: what differs is a column, seeds are a mean, what is no good is named."""

import pytest
from past import leave

from machine import safe_files
from study import history, packed
from study.past import Past
from training import naming, run_folder


@pytest.fixture
def runs(tmp_path):
    """Two shardings of two rates, one with two seeds."""
    leave(tmp_path / "a", 0.30)
    leave(tmp_path / "b", 0.32, seed=1, threads=2)
    leave(tmp_path / "c", 0.20, lr=0.3)
    leave(tmp_path / "d", 0.10, nc=5, lr=0.3)
    leave(tmp_path / "e", 0.12, nc=1)
    return history.read_all([str(tmp_path)])


def test_a_row_is_what_differs_and_a_mean_over_seeds(runs):
    names = history.columns(runs)
    assert names == ["sharding", "lr"]
    heading, *rows = history.lines(runs, names)
    figures = ["validation %", "test %", "best validation %", "test % at best"]
    assert heading == ["sharding", "lr", *figures, "seeds"]
    assert rows[0] == ["iid", "0.1", *["31.00 ± 1.41", "15.50 ± 0.71"] * 2, "2"]
    assert [row[:2] for row in rows[1:]] == [["iid", "0.3"], ["nc1", "0.1"], ["nc5", "0.3"]]


def test_runs_that_a_sweep_has_packed_are_runs_like_others(runs, tmp_path):
    def table(folder):
        pasts = history.read_all([folder])
        return history.numbers(pasts, history.columns(pasts))

    expected = table(tmp_path)
    for name in "abde":
        packed.pack(tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", packed.FILE]
    assert table(tmp_path) == expected
    packed.pack(tmp_path, "c", keep=True)
    assert table(tmp_path) == expected  # in both places: once


def test_a_best_rate_at_an_end_is_named(runs, tmp_path):
    (line,) = history.at_ends(runs, ["sharding"])
    assert line.endswith("beyond which to try: iid (the lowest)")
    leave(tmp_path / "f", 0.25, lr=0.03)
    assert history.at_ends(history.read_all([tmp_path]), ["sharding"]) == []


def test_a_best_rate_is_best_by_the_mean_of_its_seeds_there_too(tmp_path):
    """One seed of the highest rate is the best of all runs."""
    for lr, accuracies in ((0.1, (0.60, 0.50)), (0.01, (0.58, 0.58)), (0.001, (0.40, 0.40))):
        for seed, accuracy in enumerate(accuracies):
            leave(tmp_path / f"{lr}-{seed}", accuracy, lr=lr, seed=seed)
    runs = history.read_all([tmp_path])
    assert history.best_rates(runs, ["sharding"])[0].options["lr"] == 0.01
    assert history.at_ends(runs, ["sharding"]) == []


def test_a_masks_rate_is_dense_trainings_times_a_factor(tmp_path):
    for name, factor in (("a", 14.64), ("b", 1.0)):
        leave(tmp_path / name, 0.3, lr=0.01, mask_rule="random")
        run = history.read(tmp_path / name)
        run = run._replace(summary=run.summary | {"lr_factor": factor})
        assert history.rate_of(run) == ("0.01 x 14.6" if factor > 1 else "0.01")


def test_by_shows_the_rate_that_is_best_by_validation(runs):
    chosen, names, tuned = history.arranged(runs, "nc")
    assert (names, tuned) == (["sharding"], ["lr"])
    rows = history.lines(chosen, names, tuned)[1:]
    assert [row[:3] for row in rows] == [
        *(["iid", "0.1", "31.00 ± 1.41"], ["nc1", "0.1", "12.00"], ["nc5", "0.3", "10.00"])
    ]
    with pytest.raises(ValueError, match="--by nonsense: no such option; .* sharding, lr"):
        history.arranged(runs, "nonsense")


def test_a_row_of_by_holds_seeds_alone(tmp_path):
    leave(tmp_path / "a", 0.3, J=4)
    leave(tmp_path / "b", 0.2, J=8)
    chosen, names, tuned = history.arranged(history.read_all([tmp_path]), "nc")
    assert (names, tuned) == (["sharding", "J"], [])
    assert history.split_by(chosen, "nc", names) == [
        "--by nc: runs differ in J too, which is told as well"
    ]
    assert history.split_by(chosen, "nc,J", names) == []


def test_a_seed_counts_once(tmp_path):
    leave(tmp_path / "a", 0.3, eval_every=5, reached=2)
    leave(tmp_path / "b", 0.2, eval_every=1)
    leave(tmp_path / "c", 0.1, seed=1)
    chosen, notes = history.distinct(history.read_all([tmp_path]))
    assert [run.name for run in chosen] == ["b", "c"]
    assert notes == [
        f"left out: {tmp_path / 'a'}: {tmp_path / 'b'} has the same options and seed, "
        "and stands for both"
    ]


def test_data_set_and_sharding_are_told_though_another_option_follows_them(tmp_path):
    leave(tmp_path / "a", 0.3, data="synthetic", train="all")
    leave(tmp_path / "b", 0.2, data="cifar100", nc=5)
    assert history.columns(history.read_all([tmp_path])) == ["train", "sharding", "data"]


def test_what_makes_a_run_another_method_is_told_though_another_option_follows_it(tmp_path):
    leave(tmp_path / "a", 0.3, train="all", dp_noise=None)
    leave(tmp_path / "b", 0.2, train="head", dp_noise=1.0)
    leave(tmp_path / "c", 0.4, command="centralized", train="all")
    names = history.columns(history.read_all([tmp_path]))
    assert names[:2] == ["command", "train"] and "dp_noise" in names


def test_a_mask_option_that_its_rule_does_not_use_is_not_told_along(tmp_path):
    for rule in ("random", "least-sensitive"):
        leave(tmp_path / rule, 0.3, mask_rule=rule, calibration_rounds=4, damp=0.1)
    assert history.along(history.read_all([tmp_path]), ["mask_rule"]) == []


def test_an_option_that_follows_from_others_is_told_and_no_column(tmp_path):
    leave(tmp_path / "a", 0.3, J=4, rounds=4)
    leave(tmp_path / "b", 0.3, J=8, rounds=2)
    runs = history.read_all([tmp_path])
    assert history.columns(runs) == ["J"]
    assert history.along(runs, ["J"]) == [
        "not among the columns, as they change along with them: rounds"
    ]
    assert history.along(runs, ["J"], "labels") == [
        "not among the labels, as they change along with them: rounds"
    ]


def test_what_is_damaged_or_not_finished_is_named(tmp_path):
    leave(tmp_path / "a", 0.3)
    leave(tmp_path / "b", 0.3, reached=1)
    leave(tmp_path / "c", 0.3)
    (tmp_path / "c" / "summary.json").write_text("{")
    leave(tmp_path / "d", 0.3)
    (tmp_path / "d" / "config.json").write_text("")
    good, notes = history.usable(history.read_all([tmp_path, tmp_path / "none"]))
    assert [run.folder.name for run in good] == ["a"]
    assert notes[0] == f"left out: {tmp_path / 'b'}: round 1 of 3"
    assert ["summary.json" in notes[1], "config.json" in notes[2]] == [True, True]
    assert "no run folder" in notes[3] and len(notes) == 4


def test_rows_have_names_that_a_reader_knows():
    assert history.label(["sharding", "J"], ["nc5", "4"]) == "$N_c = 5$, $J = 4$"
    assert history.label(["J", "normalisation"], ["4", "auto"], plain=True) == "J 4"
    assert history.label(["sharding", "mask_rule"], ["nc5", "-"], plain=True) == "nc5, dense"
    assert history.label(["scaffold", "lr"], ["yes", "0.1"]) == "scaffold, lr 0.1"


def test_what_may_change_while_a_run_goes_on_tells_no_row_apart():
    assert history.UNCOMPARED | {"rounds", "epochs"} >= naming.FREE | run_folder.SEARCHES


def test_a_finished_run_has_the_accuracy_of_its_summary(tmp_path):
    leave(tmp_path / "a", 0.3)
    leave(tmp_path / "b", 0.3, reached=1)
    a, b = history.read_all([tmp_path])
    assert [a.accuracy("test_acc"), b.accuracy("test_acc"), b.accuracy("val_acc")] == [
        0.15,
        None,
        0.3,
    ]
    ridge = Past("a", {"options": {"command": "ridge"}}, {"final": {"val_acc": 0.4}}, [])
    assert ridge.accuracy("val_acc") == 0.4


def test_a_given_mask_is_told_by_its_rule_or_its_file_and_is_never_dense(tmp_path):
    given = {"mask": "masks/calibrated/mask.pt", "sparsity": None}
    for name in ("a", "b"):
        leave(tmp_path / name, 0.3, **given)
    origin = {"mask_rule": "least-sensitive", "sparsity": 0.5, "threshold": None}
    safe_files.save_checked(tmp_path / "a" / "mask.pt", {"made": origin})
    whole, absent = (run.options for run in history.read_all([tmp_path]))
    assert (whole["mask_rule"], whole["sparsity"]) == ("least-sensitive", 0.5)
    assert absent["mask_rule"] == history.rule_of(given) == "mask calibrated"


def test_the_path_of_a_mask_is_a_column_where_nothing_else_tells_masks_apart(tmp_path):
    def given(name, **origin):
        leave(tmp_path / name, 0.3, mask=f"{name}.pt", mask_rule=None, sparsity=None)
        content = {"mask_rule": "least-sensitive", "sparsity": 0.5} | origin
        safe_files.save_checked(tmp_path / name / "mask.pt", {"made": content})

    given("a")
    given("b", sparsity=0.9)
    runs = history.read_all([tmp_path])
    assert history.columns(runs) == ["sparsity"] and history.along(runs, ["sparsity"]) == []
    given("c", sparsity=0.9)
    assert history.columns(history.read_all([tmp_path])) == ["sparsity", "mask"]


def test_a_rule_without_scores_has_no_calibration(tmp_path):
    for rule in ("random", "least-sensitive"):
        leave(tmp_path / rule, 0.3, mask_rule=rule, calibration_rounds=4)
    least, drawn = history.read_all([tmp_path])
    assert (least.options["calibration_rounds"], drawn.options["calibration_rounds"]) == (4, None)


def test_options_of_a_single_command_are_not_told_along(tmp_path):
    leave(tmp_path / "a", 0.3)
    leave(tmp_path / "b", 0.3, command="centralized", epochs=3, nesterov=True, lr=0.3)
    runs = history.read_all([tmp_path])
    assert history.along(runs, ["command"]) == [
        "not among the columns, as they change along with them: lr"
    ]
