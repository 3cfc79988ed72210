"""A sweep that is killed leaves no process behind, so that the same command finds its runs free."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

KILLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from sweep import end_with_parent
print(subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process is not told of its parent's end")
def test_a_process_ends_with_the_one_that_started_it():
    command = [sys.executable, "-c", KILLED, str(ROOT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -9
    stat = Path(f"/proc/{done.stdout.strip()}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")
