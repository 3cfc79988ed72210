"""The report quotes what the logs say, says what has not run, and cannot hold a typed number."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import experiments
import report
from experiments import Row

ROWS = tuple(Row(("iid", rule), (), (0.1,)) for rule in ("dense", "random", "vote"))
HEADING = ["sharding", "rule", "validation", "to dense"]


class Stub(experiments.Experiment):
    """An experiment whose lines are written down here."""

    def lines(self, folder):
        shown = {"dense": ["34.91 ± 0.21", ""], "random": ["36.00 ± 0.10", "+1.09 ± 1.20"]}
        ran = shown if folder.exists() else {}
        return [HEADING, *([*r.key, *ran.get(r.key[1], ["not run", ""])] for r in ROWS)]


@pytest.fixture
def scales(monkeypatch):
    """Two scales of one experiment, and one more at the second."""
    fields = dict(columns=("sharding", "rule"), rows=ROWS, seeds=(0, 1), baseline=("dense",))
    if "title" in experiments.Experiment._fields:
        fields["title"] = "rules"
    stub = Stub(**fields)
    known = {"paper": {}, "cpu": {"rules": stub}, "smoke": {"rules": stub, "heads": stub}}
    monkeypatch.setattr(experiments, "at_scale", known.__getitem__, raising=False)


def finish(folder, rule, seed, val_acc):
    """Leave a run's folder as `train.py fedavg` does."""
    folder = folder / f"iid-{rule}-lr0.1-seed{seed}"
    folder.mkdir(parents=True)
    options = {"J": 4, "nc": None, "mask_rule": None if rule == "dense" else rule, "seed": seed}
    config = {"format": 1, "options": options, "environment": {"device": "cpu"}}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"round": r, "val_acc": val_acc} for r in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    sent = {"bytes_up": 10, "bytes_down": 20, "bytes_to_dense": 0.5, "wall_seconds": 1800}
    figures = {"val_acc": val_acc, "test_acc": 0.5}
    (folder / "summary.json").write_text(json.dumps(sent | {"final": figures}))


def written(tmp_path):
    """Write the report of the scale cpu, two rows of three done; returns folder and numbers."""
    for rule, seed in (("dense", 0), ("dense", 1), ("random", 0), ("random", 1)):
        finish(tmp_path / "cpu" / "rules", rule, seed, 0.3)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.pdf").write_text("of another scale")
    made = report.write("cpu", tmp_path, out)
    return out, made, json.loads((out / "numbers.json").read_text())


def test_numbers_have_readable_keys_and_what_did_not_run_has_no_value(tmp_path, scales):
    out, made, numbers = written(tmp_path)
    assert numbers["rules/iid/random/validation"] == "36.00 ± 0.10"
    assert numbers["rules/iid/best"] == "random"
    assert numbers["rules/iid/best/to-dense"] == "+1.09 ± 1.20"
    assert numbers["rules/iid/vote/validation"] is None
    assert numbers["heads/iid/dense/validation"] is None  # known at another scale
    assert numbers["rules/runs/done"] == "4" and numbers["rules/runs/all"] == "6"
    assert numbers["rules/hours"] == "2.0" and numbers["rules/setup/J"] == "4"
    assert "rules/iid/typo/validation" not in numbers
    assert "table/rules" in made and "table/heads" not in made
    assert not (out / "stale.pdf").exists() and not (out / "heads.tex").exists()
    assert "| iid | vote | not run |  |" in (out / "rules.md").read_text()


def test_the_macros_say_the_same(tmp_path, scales):
    out, _, _ = written(tmp_path)
    lines = (out / "numbers.tex").read_text().splitlines()
    value = r"\ensuremath{36.00 \pm 0.10}"
    assert rf"\defresult{{rules/iid/random/validation}}{{{value}}}{{36.00000}}{{}}" in lines
    assert r"\defmissing{rules/iid/vote/validation}" in lines
    assert r"\defpiece{table/heads}{0}" in lines and r"\defpiece{table/rules}{1}" in lines


def test_a_difference_within_its_spread_is_level():
    assert [report.trend(t) for t in ("+1.09 ± 1.20", "+1.09 ± 0.20", "-1.09 ± 0.20")] == [
        *("level", "up", "down")
    ]
    assert [report.trend(t) for t in ("-0.01", "+0.00", "34.91", "random")] == [
        *("down", "level", "", "")
    ]


# ---------------------------------------------------------------------------- text and LaTeX


def check(what, *paths):
    command = [sys.executable, ROOT / "report" / "check.py", what, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "typed",
    ["The accuracy is 52.3.", r"It gains 4\,\% or 5\%.", "It gains 3 points.", "after 40 rounds"],
)
def test_a_number_typed_into_the_text_is_found(tmp_path, typed):
    copies = [shutil.copy(path, tmp_path) for path in (ROOT / "report").glob("*.tex")]
    assert check("text", *copies) == (0, "")
    results = tmp_path / "results.tex"
    results.write_text(results.read_text() + f"\n{typed}\n")
    status, said = check("text", *copies)
    assert status == 1 and "results.tex:" in said and said.count("typed by hand") == 1


def test_a_number_that_a_macro_looks_up_is_not_typed(tmp_path):
    text = tmp_path / "a.tex"
    text.write_text(
        r"\result{rules/0.5/x} per cent \cite{li2020} % 3.5 \% of a comment"
        "\n"
        r"\ifabove{a/0.5}{b/0.9}{yes}{no} CIFAR-100 $2^{-48}$ \iftrend{a/0.99}{up}{same}{down}"
    )
    assert check("text", text) == (0, "")


LOG = "Output written on report.pdf ({} pages, 1 bytes).\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (LOG.format(8), ""),
        (LOG.format(9), "9 pages"),
        ("", "no pages"),
        (LOG.format(2) + "Overfull \\hbox (2.0pt too wide) in paragraph\n", ""),
        (LOG.format(2) + "Overfull \\hbox (12.0pt too wide) in paragraph\n", "12.0 pt"),
        (LOG.format(2) + "LaTeX Warning: Reference `x' on page 1 undefined\n", "Reference"),
        (LOG.format(2) + "LaTeX Warning: Citation `x' on page 1 undefined\n", "Citation"),
    ],
)
def test_the_log_is_read_for_what_a_reader_would_see(tmp_path, line, problem):
    (tmp_path / "report.log").write_text(line)
    status, said = check("log", tmp_path / "report.log")
    assert status == bool(problem) and problem in said


@pytest.fixture
def copy(tmp_path):
    """A copy of the project's code and report."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    ignore = shutil.ignore_patterns("generated", "build")
    shutil.copytree(ROOT / "report", tmp_path / "report", ignore=ignore)
    return tmp_path


def build(copy, **environment):
    command = ["/bin/sh", copy / "report" / "build.sh", "smoke"]
    known = os.environ | {"PYTHON": sys.executable} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    return done.returncode, done.stdout + done.stderr


def test_without_latex_the_packages_are_named(copy):
    status, said = build(copy, PATH="/nonexistent:" + str(copy))
    assert status == 2 and "apt-get install texlive" in said
