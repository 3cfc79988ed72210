"""The report quotes what the logs say, says what has not run, and cannot hold a typed number."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from study import experiments, report
from study.tables import Experiment, Row

LATEX = ROOT / "study" / "latex"
ROWS = tuple(
    Row(("iid", rule), (), (0.1,), (0, 1), widened=0) for rule in ("dense", "random", "vote")
)
STUB = Experiment("Rules", ("sharding", "rule"), ROWS, baseline=("dense",))


@pytest.fixture
def scales(monkeypatch):
    """Two scales of one experiment, and one more at the second."""
    known = {"cpu": {"rules": STUB}, "smoke": {"rules": STUB, "heads": STUB}}
    monkeypatch.setattr(experiments, "SCALES", known)
    monkeypatch.setattr(experiments, "at_scale", known.__getitem__)


def finish(folder, rule, seed, val_acc):
    """Leave a run's folder as `train.py fedavg` does."""
    folder = folder / f"iid-{rule}-lr0.1-seed{seed}"
    folder.mkdir(parents=True)
    options = {"J": 4, "nc": None, "mask_rule": rule, "seed": seed, "lr": 0.1}
    config = {"format": 1, "options": options, "environment": {"device": "cpu"}}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"round": r, "val_acc": val_acc} for r in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    sent = {"bytes_up": 10, "bytes_down": 20, "wall_seconds": 1800}
    figures = {"val_acc": val_acc, "test_acc": 0.5}
    (folder / "summary.json").write_text(json.dumps(sent | {"final": figures}))


def written(tmp_path):
    """Write the report of the scale cpu, two rows of three done; returns folder and numbers."""
    for rule, seed, val_acc in (("dense", 0, 0.3), ("dense", 1, 0.32), ("random", 0, 0.31)):
        finish(tmp_path / "cpu" / "rules", rule, seed, val_acc)
    finish(tmp_path / "cpu" / "rules", "random", 1, 0.34)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("stale.pdf", "numbers.json"):
        (out / name).write_text("of another scale")
    made = report.write("cpu", tmp_path, out)
    return out, made, json.loads((out / "numbers.json").read_text())


def test_numbers_have_readable_keys_and_what_did_not_run_has_no_value(tmp_path, scales):
    out, made, numbers = written(tmp_path)
    assert numbers["rules/iid/random/validation"] == "32.50 ± 2.12"
    assert numbers["rules/iid/random/to-dense"] == "+1.00, +2.00"
    assert numbers["rules/best"] == "iid, random" and numbers["rules/sharding=iid/best"] == "random"
    assert numbers["rules/sharding=iid/best/to-dense"] == "+1.00, +2.00"
    assert numbers["rules/iid/vote/validation"] is None
    assert numbers["heads/iid/dense/validation"] is None  # known at another scale
    assert numbers["rules/runs/done"] == "4" and numbers["rules/runs/all"] == "6"
    assert numbers["rules/hours"] == "2.0" and numbers["rules/setup/J"] == "4"
    assert "rules/iid/typo/validation" not in numbers
    assert "table/rules" in made and "table/heads" not in made
    assert not (out / "stale.pdf").exists() and not (out / "heads.tex").exists()
    assert "| iid | vote | not run |  |" in (out / "rules.md").read_text()
    assert "not run" in (out / "rules-short.tex").read_text()


def test_the_command_writes_what_there_is(cli, small_data):
    status, out, _ = cli("report", "--scale", "smoke", "--out", "made")
    assert status == 0 and "written to made: numbers.tex, nothing else has run" in out
    assert json.loads((small_data / "made" / "numbers.json").read_text())["scale"] == "smoke"


def test_a_folder_of_other_files_is_left_alone(tmp_path, scales):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        report.write("cpu", tmp_path, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_runs_on_a_gpu_are_quoted_by_their_last_evaluation(tmp_path):
    run = tmp_path / report.ON_A_GPU["iid"]
    run.mkdir()
    (run / "log.jsonl").write_text('{"round": 50, "test_acc": 0.8412}\n{"round": 51}\n')
    numbers = report.gpu_numbers(tmp_path)
    assert numbers["gpu/iid/test"] == "84.1" and numbers["gpu/iid/round"] == "50"
    assert numbers["gpu/nc1/test"] is None and numbers["gpu/nc1/round"] is None


def test_a_rate_that_is_not_bracketed_has_a_star_in_latex(tmp_path, scales):
    out, _, _ = written(tmp_path)
    text = (out / "rules.tex").read_text()
    assert "0.1* " in text and "in 2 of 2 rows the best rate is at an end" in text


def test_the_macros_say_the_same(tmp_path, scales):
    out, _, _ = written(tmp_path)
    lines = (out / "numbers.tex").read_text().splitlines()
    value = r"\ensuremath{32.50 \pm 2.12}"
    assert rf"\defresult{{rules/iid/random/validation}}{{{value}}}{{32.50000}}{{}}" in lines
    assert r"\defmissing{rules/iid/vote/validation}" in lines
    assert r"\defpiece{table/heads}{0}" in lines and r"\defpiece{table/rules}{1}" in lines


def test_a_difference_is_open_where_the_seeds_do_not_decide_its_sign():
    decided = ("+1.09 [+0.20, +2.00]", "-1.09 [-2.00, -0.10]")
    assert [report.trend(text) for text in decided] == ["up", "down"]
    undecided = ("+1.09 [-0.20, +2.00]", "+1.09", "-0.01", "+0.00")
    undecided += ("+1.00, +2.00", "none (+0.20 [+0.10, +0.30])")
    assert [report.trend(text) for text in undecided] == ["open"] * 6
    assert [report.trend(text) for text in ("34.91", "34.91 ± 0.20", "random")] == [""] * 3


# ---------------------------------------------------------------------------- text and LaTeX


def check(what, *paths):
    command = [sys.executable, LATEX / "check.py", what, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "typed",
    ["The accuracy is 52.3.", r"It gains 4\,\% or 5\%.", "It gains 3 points.", "after 40 rounds"],
)
def test_a_number_typed_into_the_text_is_found(tmp_path, typed):
    copies = [shutil.copy(path, tmp_path) for path in LATEX.glob("*.tex")]
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


def latex(test):
    """Mark a test that runs LaTeX."""
    missing = pytest.mark.skipif(not shutil.which("latexmk"), reason="LaTeX is not installed")
    return pytest.mark.slow(missing(test))


@pytest.fixture
def copy(tmp_path):
    """A copy of the project's code and report."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    ignore = shutil.ignore_patterns("generated", "build", "__pycache__")
    for name in ("commands", "federated", "machine", "study", "training"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def build(copy, **environment):
    known = os.environ | {"PYTHON": sys.executable, "RESULTS": "none"} | environment
    command = ["/bin/sh", copy / "study" / "latex" / "build.sh", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    return done.returncode, done.stdout + done.stderr


@latex
def test_the_report_is_made_where_nothing_has_run(copy):
    status, said = build(copy)
    assert status == 0 and (copy / "study" / "latex" / "build" / "report.pdf").exists(), said


def test_without_latex_the_packages_are_named(copy):
    status, said = build(copy, PATH="/nonexistent")
    assert status == 2 and "apt-get install texlive" in said


QUESTIONS = r"""\documentclass{article}
\input{macros}
\defresult{a}{2.5}{2.50000}{up}\defresult{b}{0.3}{0.30000}{open}\defmissing{c}
\defpiece{table/t}{1}\defpiece{figure/f}{0}\defresult{scale}{cpu}{}{}
\newcommand\say[1]{\typeout{said: #1}}
\begin{document}
\ifabove{a}{b}{\say{1 yes}}{\say{1 no}}\ifabove{b}{a}{\say{2 yes}}{\say{2 no}}
\ifresult{a}{\say{3 yes}}{\say{3 no}}\ifresult{c}{\say{4 yes}}{\say{4 no}}
\iftrend{a}{\say{5 up}}{\say{5 open}}{\say{5 down}}
\iftrend{b}{\say{6 up}}{\say{6 open}}{\say{6 down}}
\iftable{t}{\say{7 yes}}{\say{7 no}}\iffigure{f}{\say{8 yes}}{\say{8 no}}
\ifscale{cpu}{\say{9 yes}}{\say{9 no}}\ifscale{smoke}{\say{10 yes}}{\say{10 no}}
\end{document}
"""


def pdflatex(folder, text):
    shutil.copy(LATEX / "macros.tex", folder)
    (folder / "questions.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "questions.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


@latex
def test_the_macros_answer_as_the_numbers_say(tmp_path):
    status, said = pdflatex(tmp_path, QUESTIONS)
    answers = [line[6:] for line in said.splitlines() if line.startswith("said: ")]
    assert status == 0 and answers == [
        *("1 yes", "2 no", "3 yes", "4 no", "5 up", "6 open", "7 yes", "8 no", "9 yes", "10 no")
    ]


@latex
@pytest.mark.parametrize(
    "unknown",
    [
        r"\result{x}",
        r"\ifresult{x}{}{}",
        r"\iftrend{x}{}{}{}",
        r"\ifabove{a}{x}{}{}",
        r"\iftable{x}{}{}",
    ],
)
def test_an_unknown_key_stops_latex(tmp_path, unknown):
    status, said = pdflatex(
        tmp_path, QUESTIONS.replace(r"\end{document}", unknown + r"\end{document}")
    )
    assert status == 1 and re.search("No [a-z]+ is called '(figure/|table/)?x'", said)


@latex
@pytest.mark.parametrize("open_question", [r"\iftrend{c}{}{}{}", r"\ifabove{a}{c}{}{}"])
def test_a_question_about_what_has_not_run_stops_latex(tmp_path, open_question):
    text = QUESTIONS.replace(r"\end{document}", open_question + r"\end{document}")
    status, said = pdflatex(tmp_path, text)
    assert status == 1 and "that ran" in said
