"""A sweep starts each run once; killed, it leaves no process behind to hold one."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from commands import study
from study.tables import Row

KILLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from commands.study import end_with_parent
print(subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # a process
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


def test_a_run_that_two_tables_share_starts_once(tmp_path, monkeypatch):
    cell = Row(("iid",), (), (0.1,), (0,)).cell(0.1, 0)
    started = []

    class Process:
        sentinel, exitcode = 0, 0

        def __init__(self, target, args):
            started.append(args[0])

        start = join = terminate = lambda self: None
        is_alive = lambda self: False  # noqa: E731

    context = argparse.Namespace(Process=Process, set_forkserver_preload=lambda names: None)
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(study, "wait", lambda sentinels: None)
    twice = lambda failed: [] if started else [(tmp_path, cell), (tmp_path, cell)]  # noqa: E731
    assert study.run_cells(twice, jobs=2) == set()
    assert len(started) == 1
