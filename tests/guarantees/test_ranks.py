"""Any number of processes gives the same bits, and none of them can leave quietly."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, Threads, in_threads

import editing
import train
from fedavg import ClientError, Cohort, FedAvg, Method
from federated.cohort import sample_clients, shares
from federated.privacy import conceal_
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


def federate(size, calls, state=None, method=Method()):  # noqa: B008  (immutable)
    """Advance a federation of 7 sampled clients in `size` threads; return what rank 0 has."""
    targets, sizes = torch.arange(100.0).view(20, 5), range(1, 21)

    def train(theta, clients, round):
        for client in clients:
            yield theta + (targets[client] - theta) * (0.1 * round), theta[:1].clone()

    def cohort(round):
        clients = sample_clients(20, 0.35, seed=0, round=round)
        return Cohort(clients, clients, shares(sizes, clients))

    def work(group):
        federation = FedAvg(torch.zeros(5), train, cohort, method=method, group=group)
        if state is not None:
            federation.load_state_dict(state)
        records = [federation.advance() for _ in range(calls)]
        return [r | {"seconds": 0} for r in records if r], federation.state_dict()

    return in_threads(size, work)[0]


@pytest.mark.parametrize("size", [2, 3, 7, 9])
def test_rounds_do_not_depend_on_how_many_share_them(size):
    records, state = federate(size, 3)  # a call a round
    expected, expected_state = federate(1, 21)  # a call a client
    assert records == expected and len(records) == 3
    assert torch.equal(state["theta"], expected_state["theta"])


def test_processes_meet_once_a_round(monkeypatch):
    meetings, gather = [], Threads.gather

    def counted(self, value):
        meetings.append(isinstance(value, torch.Tensor))
        return gather(self, value)

    monkeypatch.setattr(Threads, "gather", counted)
    federate(3, 4)
    assert sorted(meetings) == 12 * [False] + 12 * [True]  # results, then the sum, in each of three


@pytest.mark.parametrize(("clients", "after"), [(1, 2), (3, 3), (6, 2), (6, 9)])
def test_a_round_in_hand_is_finished_by_a_group_of_any_size(clients, after):
    records, state = federate(1, 7 + clients)
    assert len(state["done"]) == clients
    later, state = federate(after, 1, state)
    expected, expected_state = federate(1, 14)
    assert [*records, *later] == expected
    assert torch.equal(state["theta"], expected_state["theta"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2), (2, 3)])
def test_a_group_goes_on_from_the_round_of_a_group_of_another_size(before, after):
    records, state = federate(before, 1)
    assert "done" not in state
    later, state = federate(after, 7 if after == 1 else 1, state)
    expected, expected_state = federate(1, 14)
    assert [*records, *later] == expected
    assert torch.equal(state["theta"], expected_state["theta"])


@pytest.mark.parametrize("rule", [editing.ties, editing.sign_elected])
def test_a_merging_rule_gives_the_same_bits_over_processes_and_a_save(rule):
    method = Method(
        apart=lambda round: True,
        combine=lambda parts, cohort, round: rule(parts, cohort.weights),
    )
    expected, expected_state = federate(1, 14, method=method)
    assert federate(2, 2, method=method)[0] == expected
    _, state = federate(1, 7 + 4, method=method)  # four clients into round 2
    assert state["total"].shape == (7, 5) and len(state["done"]) == 4
    _, state = federate(3, 1, state, method=method)
    assert torch.equal(state["theta"], expected_state["theta"])
    assert not torch.equal(state["theta"], federate(1, 14)[1]["theta"])


def test_what_clients_say_they_sent_is_counted_over_processes_and_a_save():
    def send_(part, client, cohort, round):
        return 7 * client if client % 2 else 1000

    method = Method(send_=send_, bytes_up=1000, bytes_down=10)
    expected, _ = federate(1, 14, method=method)
    for record in expected:
        sent = [7 * k if k % 2 else 1000 for k in record["clients"]]
        assert (record["bytes_up"], record["bytes_down"]) == (sum(sent), 70)
    assert federate(2, 2, method=method)[0] == expected
    _, state = federate(1, 7 + 4, method=method)  # four clients into round 2
    assert federate(3, 1, state, method=method)[0] == expected[1:]


def test_a_result_that_no_process_can_use_stops_all_of_them():
    def work(group):
        targets = torch.tensor([[1.0], [float("inf")], [2.0]])
        train = lambda theta, clients, round: ((targets[k], theta) for k in clients)  # noqa: E731
        everyone = Cohort(np.arange(3), np.arange(3), np.full(3, 1 / 3))
        with pytest.raises(ClientError, match="round 1, client 1: its update is inf"):
            FedAvg(torch.zeros(1), train, lambda round: everyone, group=group).advance()
        return True

    assert in_threads(2, work) == {0: True, 1: True}


def test_concealed_contributions_look_uniform_and_their_sum_is_exact():
    clients, generator = [3, 14, 7, 90], torch.Generator().manual_seed(0)
    plain = torch.randint(-(2**50), 2**50, (4, 10_000), generator=generator)
    hidden = plain.clone()
    for row, client in zip(hidden, clients, strict=True):
        conceal_(row, client, clients, round=5, seed=1)
    assert torch.equal(hidden.sum(dim=0), plain.sum(dim=0))
    for row in hidden:  # a uniform int64 has its top bit set half of the time, whatever its sign
        shares = [(row >> bit & 1).double().mean().item() for bit in range(64)]
        assert all(abs(share - 0.5) < 0.025 for share in shares)  # 5 standard deviations
    again = plain[0].clone()
    conceal_(again, 3, clients, round=6, seed=1)
    assert not torch.equal(again, hidden[0])
