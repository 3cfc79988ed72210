"""The recipes of docs/extend.md: each is a small change to one file, and its command then runs."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_house import files

pytestmark = pytest.mark.slow
RECIPE = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
DIFF = re.compile(r"^```diff (\S+)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^```bash\npython (.*?)\n```$", re.M | re.S)
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
RECIPES = {title: body for title, body in RECIPE.findall(TEXT) if DIFF.search(body)}


def applied(text, diff):
    """Return a file's text with the hunks of a diff applied, each at the one place that it fits."""
    for hunk in re.split(r"^---\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def test_there_are_six():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_small_and_its_command_runs(title, tmp_path):
    (path, diff), *others = DIFF.findall(RECIPES[title])
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line != "---"]
    assert len(changed) <= 30 and not others
    for source in files().values():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(source, copy)
    target = tmp_path / path
    target.write_text(applied(target.read_text(encoding="utf-8"), diff), encoding="utf-8")
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    arrays = {"train_images": pixels, "test_images": pixels[:80]}
    labels = np.arange(400) % 4
    np.savez(
        tmp_path / "data" / "images.npz", **arrays, train_labels=labels, test_labels=labels[:80]
    )
    (command,) = COMMAND.findall(RECIPES[title])
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "--threads", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "round 1 reached" in done.stdout
