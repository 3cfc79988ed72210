"""Every figure in a table of the READMEs is the one in the logs that its row links to."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT

from commands.options import parse
from train import COMMANDS

PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)\)")


def tables(page):
    """Yield (header cells, row cells) of every row of every table."""
    header = None
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def figure(folder, column):
    """Return what a column's name promises of a run, from its log or summary, or None."""
    summary = json.loads((folder / "summary.json").read_text())
    if column == "seconds":
        return summary["wall_seconds"]
    key = {"validation %": "val_acc", "test %": "test_acc"}.get(column.split(" at round ")[0])
    if key is None:
        return None
    if " at round " in column:
        records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        wanted = int(column.split(" at round ")[1])
        return next(100 * r[key] for r in records if r.get("round") == wanted and key in r)
    return 100 * summary.get("final", summary)[key]


CHECKED = [
    (page, header, row)
    for page in PAGES
    for header, row in tables(page)
    if any(column.startswith(("validation %", "test %", "seconds")) for column in header)
]


@pytest.mark.parametrize(("page", "header", "row"), CHECKED, ids=lambda x: str(x)[:40])
def test_a_rows_figures_are_those_of_its_logs(page, header, row):
    folders = [page.parent / target for target in LINK.findall(row[-1])]
    assert folders and len(row) == len(header)
    for column, cell in zip(header, row, strict=True):
        if (found := re.fullmatch(r"[\d.]+", cell)) and cell:
            values = [figure(folder, column) for folder in folders]
            if None not in values:
                digits = len(found[0].partition(".")[2])
                assert float(cell) == pytest.approx(np.mean(values), abs=0.5001 * 10**-digits), (
                    column
                )


def test_the_tables_hold_figures():
    assert len(CHECKED) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_notebook_calls_commands_that_exist():
    cells = json.loads((ROOT / "docs" / "colab.ipynb").read_text())["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in c["source"]]
    commands = [line.split()[2:] for line in lines if line.startswith("!python train.py")]
    assert len(commands) >= 3
    for command in commands:
        assert parse(command, COMMANDS).command == command[0]
