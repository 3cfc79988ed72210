"""Any number of processes gives the same bits, and none of them can leave quietly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import fedavg
import runs

TINY = [
    *("--data", "synthetic", "--rounds", 3, "--eval-every", 2, "--clients", 20, "--fraction", 0.35),
    *("--J", 2, "--batch-size", 8, "--threads", 1),
]


def launch(folder, processes, *arguments, wait=True):
    """Run train.py fedavg in this many processes, as torchrun does, in `folder`."""
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
    if not wait:
        return started
    said = [process.communicate(timeout=120) for process in started]
    return [process.returncode for process in started], said


def outcome(folder):
    """Return a run's final parameters and its log without seconds."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return runs.Run(folder).load()["state"]["process"]["theta"], records


def assert_same(folder, other):
    (theta, records), (expected, expected_records) = outcome(folder), outcome(other)
    assert torch.equal(theta, expected)
    assert records == expected_records


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the runs of one process: images, and heads on features."""
    folder = tmp_path_factory.mktemp("alone")
    for name, options in KINDS.items():
        statuses, said = launch(folder, 1, "--name", name, *options)
        assert statuses == [0], said
    return folder / "runs"


KINDS = {
    "images": ("--momentum", 0.5),
    "heads": ("--train", "head", "--head", "ridge", "--lr", 0.05),
    "masked": ("--head", "ridge", "--mask-rule", "random", "--sparsity", 0.8, "--lr", 0.02),
}


@pytest.mark.parametrize(("processes", "name"), [(2, "images"), (3, "heads"), (2, "masked")])
def test_several_processes_give_the_bits_of_one(processes, name, alone, tmp_path):
    statuses, said = launch(tmp_path, processes, "--name", name, *KINDS[name])
    assert statuses == [0] * processes, said
    assert [bool(out) for out, _ in said] == [True] + [False] * (processes - 1)
    assert_same(tmp_path / "runs" / name, alone / name)


def test_secure_aggregation_changes_the_bytes_alone(alone, tmp_path):
    options = ("--name", "images", *KINDS["images"], "--secure-aggregation")
    statuses, said = launch(tmp_path, 2, *options)
    assert statuses == [0, 0], said
    (theta, records), (expected, plain) = (
        outcome(f / "images") for f in (tmp_path / "runs", alone)
    )
    assert torch.equal(theta, expected)
    assert [r["bytes_up"] for r in records[1:]] == [2 * r["bytes_up"] for r in plain[1:]]


def test_a_stopped_pair_goes_on_alone_to_the_same_bits(alone, tmp_path):
    options = ("--name", "images", *KINDS["images"])
    processes = launch(tmp_path, 2, *options, wait=False)
    log = tmp_path / "runs" / "images" / "log.jsonl"
    while not log.exists():  # stops within round 1 or after
        assert processes[0].poll() is None
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in processes] == [143, 143]
    if runs.Run(log.parent).load()["state"]["process"]["round"] == 3:
        pytest.skip("the run was over before the signal came")
    statuses, said = launch(tmp_path, 1, *options)
    assert statuses == [0], said
    assert_same(log.parent, alone / "images")


def test_a_lost_process_ends_the_others_with_a_message(tmp_path):
    processes = launch(tmp_path, 2, "--rounds", 500, wait=False)
    while not list((tmp_path / "runs").glob("*/log.jsonl")):
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].kill()
    out, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "another process of the job has gone" in err and "Traceback" not in err


def test_bad_input_is_told_once(tmp_path):
    statuses, said = launch(tmp_path, 2, "--clients", 10**9)
    assert statuses == [2, 2]
    assert [err.count("error:") for _, err in said] == [1, 0]
    statuses, said = launch(tmp_path, 2, "--lr", 1e30)
    assert statuses == [2, 2]
    assert [err.count("error: round 1, client") for _, err in said] == [1, 0]


def test_concealed_contributions_look_uniform_and_their_sum_is_exact():
    clients, generator = [3, 14, 7, 90], torch.Generator().manual_seed(0)
    plain = torch.randint(-(2**50), 2**50, (4, 10_000), generator=generator)
    hidden = plain.clone()
    for row, client in zip(hidden, clients, strict=True):
        fedavg.conceal_(row, client, clients, round=5, seed=1)
    assert torch.equal(hidden.sum(dim=0), plain.sum(dim=0))
    for row in hidden:  # a uniform int64 has its top bit set half of the time, whatever its sign
        shares = [(row >> bit & 1).double().mean().item() for bit in range(64)]
        assert all(abs(share - 0.5) < 0.025 for share in shares)  # 5 standard deviations
    again = plain[0].clone()
    fedavg.conceal_(again, 3, clients, round=6, seed=1)
    assert not torch.equal(again, hidden[0])
