"""Every leaf file works when it is copied alone into an empty folder."""

import re
import shutil
import subprocess
import sys

import pytest
from test_house import TAKES_ALONG, files, leaves

LEAVES = (*leaves(), "study.plots", "study.typeset")

pytestmark = pytest.mark.slow  # a process


def header_example(source: str) -> str:
    """Return the indented lines of a file's header from its first import on; "" without one."""
    header = re.match(r'"""(.*?)"""', source, re.S)[1]
    block = re.search(r"(?:^    (?:import|from) .*\n(?:^    .*\n)*)", header, re.M)
    return "".join(line[4:] for line in block[0].splitlines(keepends=True)) if block else ""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all examples, each in a folder of its own, in one process: a start costs seconds."""
    folder = tmp_path_factory.mktemp("leaves")
    plain = [path.stem for path in files().values()]
    script = ["import os, sys, traceback"]
    for leaf in LEAVES:
        home = folder / leaf
        home.mkdir()
        for name in (leaf, *TAKES_ALONG.get(leaf, ())):
            shutil.copy(files()[name], home)
        (home / "example.txt").write_text(header_example(files()[leaf].read_text()))
        script += [
            f"os.chdir({str(home)!r}); sys.path.insert(0, os.getcwd())",
            "try: exec(open('example.txt').read(), {})",
            f"except BaseException: print({leaf!r}, 'failed'); traceback.print_exc()",
            f"else: print({leaf!r}, 'passed')",
            "sys.path.pop(0)",
            f"for name in {plain!r}: sys.modules.pop(name, None)",
        ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(script)], capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_copied_alone_runs_its_example(results, leaf):
    assert header_example(files()[leaf].read_text()), f"{leaf}: no example in its header"
    assert f"{leaf} passed" in results, results
