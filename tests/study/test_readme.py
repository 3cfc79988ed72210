"""What README.md and docs/ say holds: figures, links, commands, options, snippets."""

import contextlib
import csv
import itertools
import json
import re
from statistics import median

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import image
from test_house import ROOMS, files

from commands.options import parse
from study.figures import draw_overview, reached
from train import COMMANDS, main

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "bench" / "README.md", ROOT / "results" / "README.md"]
WRAPPED = [page for page in PAGES[:-1] if page.name != "extend.md"]  # it quotes code
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
FIGURE = re.compile(r"-?\d+(\.\d+)?( ± \d+\.\d+)?")


def name(page):
    return page.relative_to(ROOT).as_posix()


def tables(page):
    """Yield (header cells, row cells) of every row of every table."""
    header = None
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def blocks(page):
    """Return {mark: text} of the code blocks that follow a mark, and the Python blocks in order."""
    text = page.read_text()
    marked = dict(re.findall(r"^<!-- (\w+) -->\n```bash\n(.*?)^```", text, re.M | re.S))
    return marked, re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


# ---------------------------------------------------------------------------- figures of runs


def measure(column, title):
    """Return (key of a record, round or None for the end) that a column's heading promises."""
    if column == "seconds":
        return "wall_seconds", None
    keys = {"validation %": "val_acc", "test %": "test_acc"}
    by_round = re.fullmatch(r"(?:round )?(\d+)", column)
    if by_round:  # a table whose title says of what
        column = f"{title.split(', ')[-1]} at round {by_round[1]}"
    heading = re.fullmatch(r"(validation %|test %)(?:, here.*)?(?: at round (\d+))?", column)
    return (keys[heading[1]], heading[2] and int(heading[2])) if heading else None


def figure(folder, key, at):
    """Return one figure of a run, from its log or summary, or None."""
    summary = json.loads((folder / "summary.json").read_text())
    if key == "wall_seconds":
        return summary[key]
    if at is None:
        return 100 * summary.get("final", summary)[key]
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return next(100 * r[key] for r in records if r.get("round") == at and key in r)


def checked_rows():
    """Yield (page, row, [(figure as text, key, round)]) of tables whose rows link to runs."""
    for page in PAGES:
        for header, row in tables(page):
            if header[-1] != "log":
                continue
            cells = zip(header, row, strict=True)
            promised = [(cell.strip("*"), measure(column, header[0])) for column, cell in cells]
            quoted = [(c, *m) for c, m in promised if m and re.fullmatch(r"[\d.]+", c)]
            if quoted:
                yield pytest.param(page, row, quoted, id=f"{name(page)}-{row[0]}"[:60])


@pytest.mark.parametrize(("page", "row", "quoted"), list(checked_rows()))
def test_a_rows_figures_are_those_of_its_logs(page, row, quoted):
    folders = [page.parent / target for target in LINK.findall(row[-1])]
    assert folders
    for text, key, at in quoted:
        digits = len(text.partition(".")[2])
        value = np.mean([figure(folder, key, at) for folder in folders])
        assert float(text) == pytest.approx(value, abs=0.5001 * 10**-digits), (key, at)


def test_the_tables_hold_figures():
    pages = [row.values[0] for row in checked_rows()]
    assert len(pages) > 30
    assert pages.count(ROOT / "docs" / "results.md") == 14


# ---------------------------------------------------------------------------- of experiments


def experiment_rows():
    for header, row in tables(ROOT / "docs" / "results.md"):
        if "table.md" in header[0]:
            yield pytest.param(header, row, id=f"{header[0][:16]}-{row[0]}"[:60])


def rounds_to(cell, quoted):
    """Tell whether a table.md cell, `mean ± deviation` or `mean`, has the quoted figures."""
    if not FIGURE.fullmatch(cell):
        return False
    pairs = zip(cell.split(" ± "), quoted.split(" ± "), strict=False)  # quoted with ± or without
    return all(
        abs(float(exact) - float(text)) <= 0.5001 * 10.0 ** -len(text.partition(".")[2])
        for exact, text in pairs
    )


@pytest.mark.parametrize(("header", "row"), list(experiment_rows()))
def test_a_figure_of_an_experiment_is_in_its_table(header, row):
    (target,) = LINK.findall(header[0])
    source = list(tables(ROOT / "docs" / target))
    measured = next(m for m in ("validation %", "test %", "IoU", "matched") if m in header[0])
    columns = [i for i, c in enumerate(source[0][0]) if measured in c and " to " not in c]
    cells = [line[i] for _, line in source for i in columns]
    for quoted in filter(FIGURE.fullmatch, row[1:]):
        assert any(rounds_to(cell, quoted) for cell in cells), quoted


def test_how_many_rows_are_bracketed_is_counted():
    """Of the rows at the cpu scale that try rates: as many as said, in the tables that are said."""
    count, places = 0, []
    for path in sorted((ROOT / "results" / "cpu").glob("*/table.md")):
        whole = path.parent.name in ("fedavg-iid", "rules", "sparsity", "scaffold-mask")
        for header, row in tables(path):
            cells = dict(zip(header, row, strict=True))
            if place := cells.get("of the rates tried"):
                count += 1
                places.append((place, whole or cells.get("trains") == "head"))
    inside = sum(place == "inside" for place, _ in places)
    assert f"{inside} of {count} rows are" in (ROOT / "results" / "README.md").read_text()
    others = [place for place, whole in places if whole and place != "inside"]
    assert others == ["level with the lowest", "the highest"]  # of a head, and of sparsity


def measured(path):
    """Return the rows of a file below results/, without its comments."""
    lines = (ROOT / "results" / path).read_text().splitlines()
    assert lines[0].startswith("# command: ") and any(x.startswith("# hardware: ") for x in lines)
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def rows_beside(path):
    """Return heading and rows of the one table of results.md whose heading links to the file."""
    target = f"../results/{path}"
    found = [(h, r) for h, r in tables(ROOT / "docs" / "results.md") if target in h[0]]
    (heading,) = {tuple(h) for h, _ in found}
    return heading, [row for _, row in found]


def test_the_masks_at_224_px_are_those_of_their_file():
    """Every row of the file is shown, and none of its masks' best rates lies inside."""
    heading, rows = rows_beside("gpu/pilot_masks.csv")
    lines = measured("gpu/pilot_masks.csv")
    assert heading[-1] == "seeds" and all(row[-1] == "1" for row in rows)
    for (label, *cells, _), line in zip(rows, lines, strict=True):
        name, *figures = line.values()
        assert label.removesuffix(" tenth").replace(" ", "-") == name and cells == figures
    tried: dict[str, list] = {}
    for line in lines:
        tried.setdefault(line["trains"], []).append((float(line["lr"]), line["validation %"]))
    assert all(max(runs)[1] == max(figure for _, figure in runs) for runs in tried.values())
    best = {trains: max(float(figure) for _, figure in runs) for trains, runs in tried.items()}
    gaps = [best["dense"] - accuracy for trains, accuracy in best.items() if trains != "dense"]
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert f"ends {min(gaps):.1f} to {max(gaps):.1f} points of validation below dense" in text


def test_the_factors_of_the_rate_are_those_of_their_file():
    (_, *rules), rows = rows_beside("gpu/mask_rates.csv")
    quoted = {
        (*re.findall(r"[\d.]+", label), rule.replace(" ", "-")): cell
        for label, *cells in rows
        for rule, cell in zip(rules, cells, strict=True)
    }
    factors = {tuple(line.values())[:3]: line["factor"] for line in measured("gpu/mask_rates.csv")}
    assert quoted == factors
    at = {rule: factors["224", "0.9", rule] for rule in ("least-sensitive", "most-sensitive")}
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert f"{at['least-sensitive']} times dense training's for the least sensitive tenth" in text
    assert f"{at['most-sensitive']} times for the most sensitive" in text


def test_the_precision_of_scores_is_that_of_its_file():
    _, rows = rows_beside("cpu/score_precision.csv")
    lines = measured("cpu/score_precision.csv")
    assert {label: cells for label, *cells in rows} == {
        f"{labels} labels, {way}": [line[way] for line in lines if line["labels"] == labels]
        for labels in ("true", "sampled")
        for way in list(lines[0])[2:]
    }


def test_the_rounds_on_an_h200_are_those_of_their_file():
    seconds: dict[tuple, list] = {}
    for line in measured("bench/rounds_h200.csv"):
        seconds.setdefault((line["loop"], line["workers"]), []).append(line["seconds"])
    rows = [r for h, r in tables(ROOT / "docs" / "speed.md") if h[0] == "loop"]
    unit = median(map(float, seconds["project", ""]))
    for (_, span, count, ratio), values in zip(rows, seconds.values(), strict=True):
        ends = sorted({min(values, key=float), max(values, key=float)}, key=float)
        assert (span, int(count)) == (" to ".join(ends), len(values))
        digits = len(ratio.partition(".")[2])
        assert float(ratio) == round(median(map(float, values)) / unit, digits or None)
    text = (ROOT / "README.md").read_text()
    for loop in ("project", "plain"):
        assert f"takes {median(map(float, seconds[loop, ''])):.2f} s" in text


# ---------------------------------------------------------------------------- links and form


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "study" / "latex" / "README.md"], ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", WRAPPED, ids=name)
def test_lines_are_short_outside_tables(page):
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_the_first_screen_is_short_and_its_figures_have_files():
    """The seconds are those of the test of the rounds on an H200."""
    screen, _, _ = (ROOT / "README.md").read_text().partition("\n## ")
    assert len(screen.splitlines()) <= 30 and screen.count("```bash") == 2 and "](docs/" in screen
    figures = reached(ROOT / "results" / "gpu")
    assert re.findall(r"(\d\d\.\d) %", screen) == [f"{figures[n]:.1f}" for n in ("iid", "1")]


def test_the_first_screens_picture_has_what_the_runs_came_to(tmp_path):
    draw_overview(reached(ROOT / "results" / "gpu"), tmp_path / "accuracy.png")
    drawn, shown = (image.imread(f / "accuracy.png") for f in (tmp_path, ROOT / "docs"))
    assert drawn.shape == shown.shape and abs(drawn - shown).mean() < 0.01


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_shows_the_house():
    text = (ROOT / "README.md").read_text()
    house = text.partition("## Files")[2].partition("```")[2].partition("```")[0]
    at_the_top = {f"{file}.py" for file in files() if "." not in file}
    shown = {line.split()[0] for line in house.splitlines() if line.strip()}
    assert at_the_top | {f"{room}/" for room in ROOMS} <= shown
    assert all((ROOT / path).exists() for path in shown)


# ---------------------------------------------------------------------------- what runs


def test_each_block_that_ci_runs_is_there_once():
    wanted = re.findall(r"readme (\w+)\)", (ROOT / ".ci" / "run").read_text())
    marks = [mark for page in WRAPPED for mark in blocks(page)[0]]
    assert wanted and sorted(wanted) == sorted(marks)
    assert {"demo", "tests"} <= blocks(ROOT / "README.md")[0].keys()


def quoted_commands(page):
    """Return the arguments of every train.py command that a page shows whole."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"(?:^|`)(?:[^`\n]*)train\.py ((?!COMMAND)[a-z][^`\n]*?)(?:`|$)", text, re.M)
    return [line.split() for line in lines if "..." not in line]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "method.md"], ids=name)
def test_the_commands_of_a_page_exist(page):
    commands = quoted_commands(page)
    assert len(commands) > 10
    for command in commands:
        assert parse(command, COMMANDS).command == command[0]


def test_the_options_of_a_page_exist(capsys):
    for command, page in itertools.product(COMMANDS, ("--help", "--help-all")):
        with contextlib.suppress(SystemExit):
            main([command, page])
    options = set(re.findall(r"--[a-zA-Z][\w-]*", capsys.readouterr().out))
    others = {"--index-url", "--nproc-per-node", "--max-restarts", "--help"}
    for page in (ROOT / "README.md", ROOT / "docs" / "method.md", ROOT / "docs" / "results.md"):
        named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
        assert named <= options | others, page


def test_the_snippets_of_the_readme_run_one_after_the_other():
    _, snippets = blocks(ROOT / "README.md")
    torch.manual_seed(0)
    names: dict = {}
    exec(snippets[0], names)
    before = [p.detach().clone() for p in names["model"].parameters()]
    for snippet in snippets[1:]:
        exec(snippet, names)
    frozen = [~mask for mask in names["masks"].values()]
    assert len(snippets) == 3 and sum(int(f.sum()) for f in frozen) == 131 - 66
    records = [record for record in names["records"] if record]
    assert len(records) == 10 and records[-1]["train_loss"] < records[0]["train_loss"]
    for parameter, start, stays in zip(names["model"].parameters(), before, frozen, strict=True):
        assert torch.equal(parameter[stays], start[stays])
