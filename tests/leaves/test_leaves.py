"""Every leaf file works when it is copied alone into an empty folder."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

LEAVES = (
    *(
        "data",
        "model",
        "head",
        "sparse_sgdm",
        "fisher",
        "masks",
        "fedavg",
        "server",
        "loss_scale",
        "cuda_graph",
        "participation",
        "client_states",
        "ranks",
    ),
    *("editing", "centralized", "client_accuracy", "privacy", "plots", "typeset"),
    *("safe_files", "runs", "status"),
)
TAKES_ALONG = {"runs": {"safe_files"}}


def header_example(source: str) -> str:
    """Return the indented lines that end a file's header, from its first import on."""
    header = re.match(r'"""(.*?)"""', source, re.S)[1]
    block = re.search(r"(?:^    (?:import|from) .*\n(?:^    .*\n)*)", header, re.M)
    return "".join(line[4:] for line in block[0].splitlines(keepends=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all examples, each in a folder of its own, in one process: a start costs seconds."""
    folder = tmp_path_factory.mktemp("leaves")
    script = ["import os, sys, traceback", "before = set(sys.modules)"]
    for leaf in LEAVES:
        home = folder / leaf
        home.mkdir()
        for name in (leaf, *TAKES_ALONG.get(leaf, ())):
            shutil.copy(ROOT / f"{name}.py", home)
        (home / "example.txt").write_text(header_example((ROOT / f"{leaf}.py").read_text()))
        script += [
            f"os.chdir({str(home)!r}); sys.path.insert(0, os.getcwd())",
            "try: exec(open('example.txt').read(), {})",
            f"except BaseException: print({leaf!r}, 'failed'); traceback.print_exc()",
            f"else: print({leaf!r}, 'passed')",
            "sys.path.pop(0)",
            f"for name in {LEAVES!r}: sys.modules.pop(name, None)",
        ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(script)], capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_copied_alone_runs_its_example(results, leaf):
    assert f"{leaf} passed" in results, results


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_no_other_file_of_the_project(leaf):
    source = (ROOT / f"{leaf}.py").read_text()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M))
    others = {p.stem for p in ROOT.glob("*.py")} - {leaf} - TAKES_ALONG.get(leaf, set())
    assert imported.isdisjoint(others)
