"""Every command of docs/brief.md runs at the smallest sizes, in its order, in one folder."""

import glob
import json
import re
import subprocess
import sys
from collections import Counter
from unittest.mock import MagicMock

import pytest
from conftest import ROOT

from train import COMMANDS

SIZES = {"--rounds": "2", "--epochs": "1", "--search-length": "1", "--calibration-images": "40"}
DATA, BATCH, COHORT = ("--data", "synthetic"), ("--batch-size", "8"), ("--fraction", "0.03")
RUNS = ("fedavg", "centralized", "ridge", "calibrate", "doctor", "shards")


def commands():
    """Return the arguments of train.py on the page, its loops run through by a shell."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "docs" / "brief.md").read_text(), re.M | re.S
    )
    listing = 'set -f; python() { [ "$1" = -m ] || echo "${@:2}"; }\n' + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", listing], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def small(arguments):
    """Return a command at the smallest sizes, with the names of files that exist by now."""
    for option, size in SIZES.items():
        if option in arguments:
            at = arguments.index(option) + 1
            arguments = [*arguments[:at], size, *arguments[at + 1 :]]
    arguments = [word if word != "50" else "20" for word in arguments]  # classes: few images
    if arguments[0] in RUNS:
        trains = arguments[0] in ("fedavg", "centralized", "doctor")
        threads = ("--threads", "1") * (arguments[0] != "shards")
        cohort = COHORT * (arguments[0] in ("fedavg", "doctor"))
        return [*arguments, *DATA, *BATCH * trains, *cohort, *threads]
    return [path for word in arguments for path in sorted(glob.glob(word)) or [word]]


def test_the_page_has_a_command_for_every_step():
    steps = (ROOT / "docs" / "brief.md").read_text().split("\n## ")[1:]
    assert len(steps) == 10 and all("```bash" in step for step in steps)
    assert {line[0] for line in commands()} <= COMMANDS.keys()


@pytest.fixture
def run(cli):
    """Run a command at the smallest sizes; of a loop's commands two stand for all."""
    seen = Counter()

    def run(arguments):
        shape = arguments[0], *(word for word in arguments if word.startswith("--"))
        seen[shape] += 1
        if seen[shape] <= 2:
            status, _, errors = cli(*small(arguments))
            assert status == 0, (arguments, errors)

    return run


@pytest.mark.slow
def test_every_command_of_the_page_runs(run):
    for arguments in commands():
        run(arguments)


def code_cells():
    """Return the notebook's code cells as Python: `!train.py` lines call `command`."""
    cells = json.loads((ROOT / "docs" / "colab.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = (line.rstrip("\n") for line in cell["source"])
            called = (re.sub(r"!python train\.py (.*)", r'command(f"\1")', line) for line in lines)
            plain = (re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in called)
            yield "\n".join(plain)


@pytest.mark.slow
def test_the_notebooks_cells_run(run, tmp_path, monkeypatch):
    for stub in ("google", "google.colab", "IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, stub, MagicMock())

    names = {"command": lambda text: run(text.split())}
    first, *others = code_cells()
    with pytest.raises(SystemExit, match="put the repository's address above"):
        exec(first.replace("/content", "."), names)
    for cell in (first.replace('REPOSITORY = ""', 'REPOSITORY = "its address"'), *others):
        exec(cell.replace("/content/drive", str(tmp_path)).replace("/content", "."), names)
    pictures = {path.name for path in tmp_path.glob("**/*.png")}
    assert {"shards.png", "central.png", "fedavg.png"} <= pictures
