"""The table of rates says what the runs say, and the documents what the table says."""

import csv
import math

import pytest
from conftest import ROOT
from test_readme import tables

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


def test_the_rates_are_those_of_the_runs(rows):
    row = rows[Key("iid", "least-sensitive", 0.9, 4)]
    assert row.accuracy == {0.03: 0.3164, 0.1: 0.3292}
    assert row.dense == 0.003 and not any(row.bracketed for row in rows.values())
    assert rows[Key("iid", "random", 0.9, 0)].follows("matched") == pytest.approx(
        0.003 * math.sqrt(10)
    )


def test_the_file_is_what_the_runs_make(rows):
    with open(CPU / "rates.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rates.lines(list(rows.values()))


def test_the_documents_quote_the_file(rows):
    (first, *_), *_ = quoted = [
        (heading, row)
        for heading, row in tables(ROOT / "docs" / "results.md")
        if "rates.csv" in heading[0]
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
    """No best rate is bracketed, and the ratios lie where the text says."""
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    masked = [row for row in rows.values() if row.key.rule != "dense"]
    for how in ("matched", "functional"):
        ratios = {row.best / row.follows(how): row.key for row in masked}
        low, high = min(ratios), max(ratios)
        assert f"{low:.2g} to {high:.2g} times the {how} rate" in text
        furthest = ratios[max(ratios, key=lambda ratio: abs(math.log(ratio)))]
        assert (furthest.rule, furthest.sparsity) == ("least-sensitive", 0.99)
    others = [row for row in masked if row.key[1:3] != ("least-sensitive", 0.99)]
    ranges = []
    for how in ("matched", "functional"):
        ratios = [row.best / row.follows(how) for row in others]
        ranges.append(f"{min(ratios):.2g} to {max(ratios):.2g}")
    assert f"without it the ranges are {' and '.join(ranges)}." in text
    bests = [row.best for row in masked]
    assert f"span a factor of {max(bests) / min(bests):,.0f}" in text
    hundredth = [row for row in masked if row.key[1:] == ("least-sensitive", 0.99, 4)]
    lowest = min(min(row.accuracy) / row.follows("matched") for row in hundredth)
    assert len(hundredth) == 2 and f"no rate below {lowest:.2g} times the matched one" in text
