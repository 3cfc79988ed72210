"""The report quotes what the logs say and what it was written for, and holds no typed number."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from study import experiments, report
from study.figures import FIGURES
from study.tables import Experiment, Row

LATEX = ROOT / "study" / "latex"
SPEC = importlib.util.spec_from_file_location("check", LATEX / "check.py")
CHECK = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CHECK)
ROWS = tuple(
    Row(("iid", rule), (), (0.1,), (0, 1), widened=0) for rule in ("dense", "random", "vote")
)
STUB = Experiment(("sharding", "rule"), ROWS, baseline=("dense",))


@pytest.fixture
def scales(monkeypatch):
    """Two scales of one experiment, and one more at the second."""
    known = {"cpu": {"rules": STUB}, "smoke": {"rules": STUB, "heads": STUB}}
    monkeypatch.setattr(experiments, "SCALES", known)
    monkeypatch.setattr(experiments, "at_scale", known.__getitem__)
    monkeypatch.setattr(report, "BESIDE", {})


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


def test_a_file_of_figures_is_quoted_and_is_a_table(tmp_path, scales):
    (tmp_path / "gpu").mkdir()
    text = "# command: none\ntrains,lr,validation %,test %,bytes to dense\n"
    text += "dense,0.01,84.86,84.60,1\nrandom,0.03,83.30,82.79,0.102\n"
    (tmp_path / "gpu" / "pilot_masks.csv").write_text(text)
    out, _, numbers = written(tmp_path)
    assert numbers["pilot-masks/random/0.03/validation"] == "83.30"
    assert numbers["pilot-masks/dense/0.01/bytes-to-dense"] == "1"
    table = (out / "pilot-masks.tex").read_text()
    assert r"\bestresult{\ensuremath{84.86}}" in table and "random" in table
    assert not (out / "mask-rates.tex").exists()


def test_what_a_mask_keeps_is_quoted_by_its_least_and_most_layer(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text('{"density": {"key.weight": {"embed": NaN, "0": 0.361, "1": 0.704}}}')
    numbers = report.density_numbers(path)
    assert numbers == {"density/key.weight/least": "36", "density/key.weight/most": "70"}
    assert report.density_numbers(tmp_path / "none.json") == {}


def test_a_rate_that_is_not_bracketed_has_a_star_in_latex(tmp_path, scales):
    out, _, _ = written(tmp_path)
    text = (out / "rules.tex").read_text()
    assert "0.1* " in text and "in 2 of 2 rows the best rate is at an end" in text


def test_the_macros_say_the_same(tmp_path, scales):
    out, _, _ = written(tmp_path)
    lines = (out / "numbers.tex").read_text().splitlines()
    assert r"\defresult{rules/iid/random/validation}{\ensuremath{32.50 \pm 2.12}}" in lines
    assert r"\defresult{scale}{cpu}" in lines
    assert not [line for line in lines if "rules/iid/vote/validation" in line]


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
    masks = tmp_path / "masks.tex"
    masks.write_text(masks.read_text() + f"\n{typed}\n")
    status, said = check("text", *copies)
    assert status == 1 and "masks.tex:" in said and said.count("typed by hand") == 1


def test_a_number_that_a_macro_looks_up_is_not_typed(tmp_path):
    text = tmp_path / "a.tex"
    text.write_text(
        r"\result{rules/0.5/x} per cent \cite{li2020} % 3.5 \% of a comment"
        "\n"
        r"CIFAR-100 $2^{-48}$ \generated{rules-40} \drawn{../a-40.png} $N_c = 10$"
    )
    assert check("text", text) == (0, "")


def test_the_text_quotes_what_the_runs_say_and_what_it_was_written_for():
    """A value that has changed wants its sentence read again, then `check.py accept`."""
    places = CHECK.quotes(sorted(LATEX.glob("*.tex")))
    quoted = json.loads((LATEX / "quoted.json").read_text())
    numbers = report.values(quoted["scale"], ROOT / "results")
    assert len(places) > 50 and CHECK.unfit(places, numbers, quoted["values"]) == ([], [])


def test_the_text_takes_tables_and_figures_that_are_made():
    text = "".join(path.read_text() for path in LATEX.glob("*.tex") if path.name != "macros.tex")
    tables = {*report.tables_of("cpu", ROOT / "results")} | {file.name for file in report.FILES}
    named = re.findall(r"\\generated\{([^}]*)\}", text)
    assert len(named) > 5 and {name.removesuffix("-short") for name in named} <= tables
    for path in re.findall(r"\\drawn\{([^}]*)\}", text):
        folder, _, name = path.rpartition("/")
        assert (LATEX / path).exists() or (
            folder == "generated" and name.removesuffix(".pdf") in FIGURES
        )


def test_every_source_that_the_text_cites_is_listed():
    text = "".join(path.read_text() for path in LATEX.glob("*.tex"))
    cited = {
        key.strip() for keys in re.findall(r"\\cite\{([^}]*)\}", text) for key in keys.split(",")
    }
    listed = re.findall(r"@\w+\{(\w+),", (LATEX / "references.bib").read_text())
    assert len(cited) > 15 and cited <= set(listed) and len(listed) == len(set(listed))


def test_what_the_text_refers_to_has_a_label():
    text = "".join(path.read_text() for path in LATEX.glob("*.tex"))
    labels = re.findall(r"\\label\{([^}]*)\}", text)
    assert set(re.findall(r"\\(?:eq)?ref\{([^}]*)\}", text)) <= set(labels)
    assert len(labels) == len(set(labels))


@pytest.fixture
def quoting(tmp_path):
    """A text that quotes two numbers, and what `check.py` says of it at a scale."""
    (tmp_path / "generated").mkdir()
    (tmp_path / "a.tex").write_text("It is\n\\result{a/b}, not \\result{c}. % \\result{d}\n")

    def said(numbers, accept=False):
        (tmp_path / "generated" / "numbers.json").write_text(json.dumps(numbers))
        return CHECK.check_numbers([tmp_path / "a.tex"], tmp_path, accept)

    said({"scale": "cpu", "a/b": "1.0 ± 0.1", "c": "2"}, accept=True)
    return said


def test_a_changed_value_wants_its_sentence_read_again(quoting):
    assert quoting({"scale": "cpu", "a/b": "1.0 ± 0.1", "c": "2"}) == []
    (stale,) = quoting({"scale": "cpu", "a/b": "1.0 ± 0.1", "c": "3"})
    assert stale.startswith("a.tex:2: 'c' is '3', and the text was written for '2'")
    assert quoting({"scale": "cpu", "a/b": "1.0 ± 0.1", "c": "3"}, accept=True) == []


def test_a_key_without_a_value_is_named(quoting, capsys):
    (missing,) = quoting({"scale": "cpu", "c": "2", "a/b": None})
    assert missing == "a.tex:2: 'a/b' has no value"
    assert quoting({"scale": "smoke", "c": "7"}) == []
    assert "1 of 2 numbers have no value at this scale, and stand as [?]: a/b" in (
        capsys.readouterr().out
    )


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
    assert "numbers have no value at this scale" in said and "gpu/iid/test" in said


def test_without_latex_the_packages_are_named(copy):
    status, said = build(copy, PATH="/nonexistent")
    assert status == 2 and "apt-get install texlive" in said
