"""The table of rates says what the runs say, and the documents what the table says."""

import csv
import math

import pytest
from conftest import ROOT
from test_readme import tables

import masks
from study import rates
from study.rates import Key, Tried

CPU = ROOT / "results" / "cpu"


@pytest.fixture(scope="module")
def rows():
    return {row.key: row for row in rates.tried(CPU)}


def test_a_row_compares_its_best_rate_with_those_that_follow_the_mask():
    key = Key("iid", "random", 0.75, 0)
    row = Tried(key, {0.1: 0.3, 0.2: 0.5, 0.4: 0.4}, share=0.25, dense=0.05)
    assert row.best == 0.2 and row.bracketed
    assert row.follows("matched") == 0.1 and row.follows("functional") == 0.2
    line = dict(zip(rates.HEADING, row.line(), strict=True))
    assert line["rates"] == "0.1 0.2 0.4" and line["bracketed"] == "yes"
    assert (line["best_to_matched"], line["best_to_functional"]) == ("2", "1")
    assert not row._replace(accuracy={0.1: 0.3, 0.2: 0.5}).bracketed


def test_the_power_is_that_of_the_best_rates():
    def tried(share, best):
        return Tried(key, {best / 3: 0.1, best: 0.2, 3 * best: 0.1}, share, dense=0.01)

    key = Key("iid", "random", 0.75, 0)
    functional = [tried(0.1, 0.1), tried(0.01, 1.0)]
    assert rates.exponent(functional) == pytest.approx(1)
    assert rates.exponent([tried(0.01, 0.1), tried(0.0001, 1.0)]) == pytest.approx(0.5)
    end = tried(0.5, 100.0)._replace(accuracy={100.0: 0.2, 10.0: 0.1})
    assert rates.exponent([*functional, end]) == pytest.approx(1)  # it is not bracketed
    assert math.isnan(rates.exponent([end]))
    lines = [["iid", least, "3", "2", "-1.00", "-1.00", "-1.00"] for least in ("0", "0.0001")]
    assert rates.powers([*functional, end])[1:] == lines
    tiny = [*functional, tried(1e-6, 0.01)]
    every, counted = rates.powers(tiny)[1:]
    assert every[2:4] == ["3", "3"] and -0.5 < float(every[4]) < 0 and every[5] < every[6]
    assert counted[2:5] == ["2", "2", "-1.00"]


def test_the_rates_are_those_of_the_runs(rows):
    row = rows[Key("iid", "least-sensitive", 0.9, 4)]
    assert row.accuracy == {0.03: 0.3164, 0.1: 0.3292, 0.3: 0.327}
    assert row.dense == 0.003 and row.bracketed
    assert rows[Key("iid", "random", 0.9, 0)].follows("matched") == pytest.approx(
        0.003 * math.sqrt(10)
    )


def test_the_file_is_what_the_runs_make(rows):
    with open(CPU / "rates.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rates.lines(list(rows.values()))
    with open(CPU / "rate_powers.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rates.powers(list(rows.values()))


def test_the_documents_quote_the_file(rows):
    (first, *_), *_ = quoted = [
        (heading, row)
        for heading, row in tables(ROOT / "docs" / "results.md")
        if "cpu/rates.csv" in heading[0]
    ]
    assert {row[0] for _, row in quoted} >= {"random", "least sensitive, 4 rounds"}, first
    for heading, (label, *cells) in quoted:
        rule, _, rounds = label.partition(", ")
        name, count = rule.replace(" ", "-"), int(rounds[:1] or 0)
        for column, cell in zip(heading[1:], cells, strict=True):
            sharding, _, frozen = column.replace("N_c = ", "nc").partition(", ")
            row = rows.get(Key(sharding, name, float(frozen), count))
            line = dict(zip(rates.HEADING, row.line(), strict=True)) if row else None
            assert cell == (
                f"{line['best_to_matched']} ({line['best_to_functional']})" if row else ""
            )


def test_the_sentences_of_the_documents_hold(rows):
    """As many masks are bracketed, and the ratios lie, as the text says."""
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    masked = [row for row in rows.values() if row.key.rule != "dense"]
    inside = [row for row in masked if row.bracketed]
    assert f"of {len(inside)} of {len(masked)} masks lies inside the grid" in text
    outliers = ("least-sensitive", 0.99, 1)
    for how in ("matched", "functional"):
        ratios = [row.best / row.follows(how) for row in inside if row.key[1:] != outliers]
        low, high = map(rates.two_digits, (min(ratios), max(ratios)))
        assert f"{low} to {high} times the {how} rate" in text
    followed = [row.best / row.follows("functional") for row in inside if row.key[1:] == outliers]
    lowest = map(rates.two_digits, followed)
    assert f"({' and '.join(lowest)} times the functional rate)" in text
    for sharding, words in (("iid", "for iid clients"), ("nc1", "at N_c = 1")):
        lines = rates.powers([row for row in rows.values() if row.key.sharding == sharding])
        power, low, high = lines[-1][-3:]
        assert f"{power} [{low}, {high}] {words}" in text
    for sharding, lr, best in (("iid", 0.01, 0.1), ("nc1", 0.001, 0.03)):
        row = rows[Key(sharding, "least-sensitive", 0.9, 4)]
        matched, functional = (
            f"{lr * masks.rate_factor(row.share, how):.2g}" for how in ("matched", "functional")
        )
        assert f"{matched} and {functional}, where {best:g} was best" in text and row.best == best
    assert (
        rows[Key("nc1", "least-sensitive", 0.9, 4)].accuracy[0.1] < 0.2904 and "the start" in text
    )


def test_updates_are_as_long_as_the_matched_law_says_within_what_is_said():
    with open(CPU / "update_norms.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert lines == rates.norms(CPU)
    ratios = [float(line[-1]) for line in lines[1:]]
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert f"an update was {min(ratios):.2f} to {max(ratios):.2f} times as long" in text
