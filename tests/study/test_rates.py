"""The table of rates says what the runs say, and the documents what the table says."""

import csv
import math
import re

import pytest
from conftest import ROOT
from test_readme import tables

from study import rates
from study.rates import Key, Tried

CPU = ROOT / "results" / "cpu"
COLUMNS = ("iid", "nc1")


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
    assert row.accuracy == {0.03: pytest.approx(0.3184, abs=0.02), 0.1: 0.3292}
    assert row.dense == 0.003 and not any(row.bracketed for row in rows.values())
    assert rows[Key("iid", "random", 0.9, 0)].follows("matched") == pytest.approx(
        0.003 * math.sqrt(10)
    )


def test_the_file_is_what_the_runs_make(rows):
    with open(CPU / "rates.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rates.lines(list(rows.values()))


def test_the_documents_quote_the_file(rows):
    quoted = [(h, r) for h, r in tables(ROOT / "docs" / "results.md") if "rates.csv" in h[0]]
    assert quoted
    for heading, (rule, *cells) in quoted:
        for column, cell in zip(heading[1:], cells, strict=True):
            if not cell:
                continue
            sharding, frozen, rounds = re.fullmatch(
                r"(iid|N_c = 1), ([\d.]+)(?:, (\d) rounds?)?", column
            ).groups()
            scored = 4 if "sensitive" in rule else 0
            name = rule.replace(" ", "-").removesuffix("-weights")
            key = Key(sharding.replace("N_c = ", "nc"), name, float(frozen), scored)
            row = rows[key._replace(rounds=int(rounds)) if rounds else key]
            line = dict(zip(rates.HEADING, row.line(), strict=True))
            assert cell == f"{line['best_to_matched']} ({line['best_to_functional']})"
