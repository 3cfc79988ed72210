"""Every command of docs/brief.md runs at the smallest sizes, in its order, in one folder."""

import glob
import json
import re
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
from conftest import ROOT

from train import COMMANDS

SIZES = {"--rounds": "2", "--epochs": "1", "--search-length": "1", "--calibration-images": "40"}
SMALL = ("--data", "synthetic", "--batch-size", "8", "--clients", "10", "--threads", "1")
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
    if arguments[0] in RUNS:
        allowed = {"shards": SMALL[:2] + SMALL[4:6], "centralized": SMALL[:4] + SMALL[6:]}
        allowed |= {"ridge": SMALL[:2] + SMALL[4:], "calibrate": SMALL[:2] + SMALL[4:]}
        return [*arguments, *allowed.get(arguments[0], SMALL)]
    return [path for word in arguments for path in sorted(glob.glob(word)) or [word]]


def test_the_page_has_a_command_for_every_step():
    steps = (ROOT / "docs" / "brief.md").read_text().split("\n## ")[1:]
    assert len(steps) == 10 and all("```bash" in step for step in steps)
    assert {line[0] for line in commands()} <= COMMANDS.keys()


@pytest.mark.slow
def test_every_command_of_the_page_runs(cli):
    for arguments in commands():
        status, _, errors = cli(*small(arguments))
        assert status == 0, (arguments, errors)


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
def test_the_notebooks_cells_run(cli, tmp_path, monkeypatch):
    for stub in ("google", "google.colab", "IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, stub, MagicMock())

    def command(text):
        status, _, errors = cli(*small(text.split()))
        assert status == 0, (text, errors)

    names = {"command": command}
    for cell in code_cells():
        exec(cell.replace("/content/drive", str(tmp_path)).replace("/content", "."), names)
    pictures = {path.name for path in tmp_path.glob("**/*.png")}
    assert {"shards.png", "central.png", "fedavg.png"} <= pictures
