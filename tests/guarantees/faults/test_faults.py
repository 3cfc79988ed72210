"""The quick set of faults: none ends in other bits or in a traceback, none loses a run.

FAULTS=full python -m pytest -m slow tests/guarantees/faults    all, the whole matrix: minutes
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SPENT = ("damaged client*.pt",)  # the file is there once: without it the run is named as lost


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Try the quick set, or all faults; returns the figures by kind."""
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, Path(__file__).with_name("run.py"), "--out", out]
    command += ["--full"] * (os.environ.get("FAULTS") == "full")
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return json.loads(out.read_text())["faults"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, flock and resource limits")
def test_no_fault_gives_another_result_a_traceback_or_a_lost_run(faults):
    assert len(faults) > 25 and all(found["tried"] for found in faults.values())
    for kind, found in faults.items():
        assert not found["wrong_results"] and not found["tracebacks"], (kind, found)
        assert not found["lost_runs"] or kind in SPENT, (kind, found)
        assert found["survived"] + found["lost_runs"] == found["tried"], (kind, found)
