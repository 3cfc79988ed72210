"""Runs become rows: what differs is a column, seeds are a mean, what is no good is named."""

import pytest
from past import leave

from study import history


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
    assert heading == [
        *("sharding", "lr", "validation %", "test %", "best validation %", "test % there", "seeds")
    ]
    assert rows[0] == ["iid", "0.1", *["31.00 ± 1.41", "15.50 ± 0.71"] * 2, "2"]
    assert [row[:2] for row in rows[1:]] == [["iid", "0.3"], ["nc1", "0.1"], ["nc5", "0.3"]]


def test_by_shows_the_rate_that_is_best_by_validation(runs):
    chosen, names, tuned = history.arranged(runs, "nc")
    assert (names, tuned) == (["sharding"], ["lr"])
    rows = history.lines(chosen, names, tuned)[1:]
    assert [row[:3] for row in rows] == [
        *(["iid", "0.1", "31.00 ± 1.41"], ["nc1", "0.1", "12.00"], ["nc5", "0.3", "10.00"])
    ]
    with pytest.raises(ValueError, match="--by nonsense: no such option; .* sharding, lr"):
        history.arranged(runs, "nonsense")


def test_an_option_that_follows_from_others_is_told_and_no_column(tmp_path):
    leave(tmp_path / "a", 0.3, J=4, rounds=4)
    leave(tmp_path / "b", 0.3, J=8, rounds=2)
    runs = history.read_all([tmp_path])
    assert history.columns(runs) == ["J"]
    assert history.mixed(runs, ["J"]) == ["along with these columns differ: rounds"]
    assert "runs that differ in" in history.mixed(runs, ["train"])[0]


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
    assert history.label(["sharding", "J"], ["nc5", "4"]) == "$N_c$ = 5, J 4"
    assert history.label(["sharding", "mask_rule"], ["nc5", "-"], plain=True) == "nc5, dense"
    assert history.label(["scaffold", "lr"], ["yes", "0.1"]) == "scaffold, lr 0.1"
