"""A sweep starts each run once; killed, it leaves no process behind to hold one."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from commands import cells, sweep, timing
from commands.accounts import seen
from commands.costs import Costs
from study import experiments
from study.tables import Experiment, Row

KILLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from machine.ranks import end_with_parent
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
    monkeypatch.setattr(cells.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(cells, "wait", lambda sentinels, seconds: None)
    twice = lambda failed: [] if started else [(tmp_path, cell), (tmp_path, cell)]  # noqa: E731
    assert cells.run_cells(twice, jobs=2) == set()
    assert len(started) == 1


def test_a_run_says_how_many_clients_and_classes_it_has_seen():
    labels, shards = np.array([5, 5, 7, 8]), [np.array([0, 1]), np.array([2]), np.array([3])]
    records = [{"round": 0}, {"clients": [1, 0]}, {"clients": [0]}]
    assert seen(records, shards, labels) == {"seen": {"clients": 2, "classes": 2}}
    assert seen([{"round": 1, "answered": 3}], shards, labels) == {}  # a private run


# ---------------------------------------------------------------------------- time and machines

TINY = ("--data", "synthetic", "--clients", "10", "--threads", "1", "--J", "1", "--batch-size", "4")


@pytest.fixture
def long_and_short(monkeypatch):
    """Two runs, one far too long for a test; a row after a table that decides."""
    short = Row(("short",), (*TINY, "--rounds", "1"), (0.1,), widened=0)
    long = Row(("long",), (*TINY, "--rounds", "100000"), (0.1,), widened=0)
    first = Experiment(("which",), (short,), decides=True)
    planned = {"rules": first, "more": Experiment(("which",), (long, short), folder="rules")}
    monkeypatch.setattr(experiments, "at_scale", lambda *scale: planned)
    monkeypatch.setattr(timing, "costs", lambda line: Costs(step=4.0))


def listed(cli, *options):
    status, out, err = cli("sweep", "--scale", "smoke", *options)
    assert status == 0, err
    return out


@pytest.mark.slow  # processes
def test_a_sweep_stops_in_time_and_another_machine_takes_its_runs_in(
    cli, small_data, long_and_short
):
    out = listed(cli, "--minutes", 0.4)
    assert "short-lr0.1-seed0: done" in out and "long-lr0.1-seed0: the time is up" in out
    long = small_data / "results" / "smoke" / "rules" / "long-lr0.1-seed0"
    assert (long / "checkpoint.pt").exists()  # it goes on from there
    packed = small_data / "results" / "smoke.jsonl.xz"
    out = listed(cli, "--import", packed, "--results", "elsewhere")
    assert "1 runs are new here" in out and "1 of 2 runs done" in out
    assert "0 runs are new here" in listed(cli, "--import", packed, "--results", "elsewhere")
    table = (small_data / "elsewhere" / "smoke" / "more" / "table.md").read_text()
    assert table == (small_data / "results" / "smoke" / "more" / "table.md").read_text()


@pytest.mark.slow  # a process
def test_a_sweep_of_some_hours_starts_what_fits(cli, small_data, long_and_short):
    out = listed(cli, "--hours", 1, "--keep")
    assert "short-lr0.1-seed0: done" in out and "long-lr0.1" not in out
    assert "1 runs are packed" in out and "1 of 2 runs done" in out
    rules = small_data / "results" / "smoke" / "rules"
    assert (rules / "short-lr0.1-seed0" / "checkpoint.pt").exists()
    listed(cli, "rules")  # and without --keep it is tidied away
    assert not (rules / "short-lr0.1-seed0").exists()


LINE = '{{"scale": "{}", "table": "{}", "name": "a", "config": 0, "summary": 0, "records": 0}}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"\xfd7zXZ", "is damaged"),
        (b"{}\n", "is damaged"),
        (LINE.format("cpu", "rules").encode(), "holds runs of 'rules' at the scale 'cpu'"),
        (LINE.format("smoke", "../x").encode(), "holds runs of '../x'"),
    ],
)
def test_a_file_of_other_runs_is_not_taken_in(cli, small_data, long_and_short, content, said):
    path = small_data / "runs.jsonl"
    if content is not None:
        path.write_bytes(content)
    status, _, err = cli("sweep", "--scale", "smoke", "--import", path)
    assert status == 2 and said in err and len(err.splitlines()) == 1


def test_the_later_tables_wait_for_one_that_decides(monkeypatch, cli, small_data, long_and_short):
    asked = []
    monkeypatch.setattr(
        sweep, "run_cells", lambda missing, *more: asked.extend(missing(set())) or set()
    )
    listed(cli)
    assert [cell.row for _, cell in asked] == ["short"]
