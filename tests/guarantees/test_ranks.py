"""Any number of processes gives the same bits, and none of them can leave quietly."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from machine import runs

slow = pytest.mark.slow  # processes of their own

TINY = [
    *("--data", "synthetic", "--rounds", 3, "--eval-every", 2, "--clients", 20, "--fraction", 0.35),
    *("--J", 2, "--batch-size", 8, "--threads", 1, "--runs-dir", "runs", "--name", "x"),
]


def launch(folder, processes, *arguments):
    """Start train.py fedavg in this many processes, as torchrun does, in `folder`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_PORT=port)
        environment = os.environ | {k: str(v) for k, v in group.items()}
        environment |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / "train.py", "fedavg", *TINY, *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(
            subprocess.Popen([str(a) for a in command], cwd=folder, env=environment, **pipes)
        )
    return started


def finish(processes):
    """Return the processes' exit statuses and what each said."""
    said = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], said


def until(path, process):
    """Wait for a process to write a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def outcome(folder):
    """Return a run's final parameters and its log without seconds."""
    run = runs.Run(folder / "runs" / "x")
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in run.records()]
    return run.load()["state"]["process"]["theta"], records


def alone(folder, *arguments):
    """Return the outcome of one process, this one."""
    threads = torch.get_num_threads()
    command = ["fedavg", *TINY, *arguments, "--runs-dir", folder / "runs"]
    assert train.main([str(a) for a in command]) == 0
    torch.set_num_threads(threads)
    return outcome(folder)


@slow
def test_three_processes_give_the_bits_of_one(tmp_path, tmp_path_factory):
    options = ("--train", "head", "--head", "ridge", "--lr", 0.05, "--scaffold")
    statuses, said = finish(launch(tmp_path, 3, *options))
    assert statuses == [0, 0, 0], said
    assert [bool(out) for out, _ in said] == [True, False, False]
    (theta, records), expected = (
        outcome(tmp_path),
        alone(tmp_path_factory.mktemp("alone"), *options),
    )
    assert torch.equal(theta, expected[0])
    assert records == expected[1]


@slow
def test_what_stops_all_processes_is_told_once(tmp_path):
    statuses, said = finish(launch(tmp_path, 2, "--lr", 1e30))
    assert statuses == [2, 2]
    assert [err.count("train.py: error: ") for _, err in said] == [1, 0], said
