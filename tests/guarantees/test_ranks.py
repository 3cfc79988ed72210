"""Any number of processes gives the same bits, and none of them can leave quietly."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, in_threads

import editing
import fedavg
import runs
import train

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


def test_a_concealed_pair_stops_and_goes_on_alone_to_the_same_bits(tmp_path, tmp_path_factory):
    masked = ("--head", "ridge", "--mask-rule", "random", "--local-norm")
    options = ("--J", 20, "--lr", 0.02, "--straggler-fraction", 0.5, *masked)
    processes = launch(tmp_path, 2, "--secure-aggregation", *options)
    until(tmp_path / "runs" / "x" / "log.jsonl", processes[0])
    for process in processes:
        process.send_signal(signal.SIGTERM)
    statuses, said = finish(processes)
    assert statuses == [143, 143], said
    state = runs.Run(tmp_path / "runs" / "x").load()["state"]["process"]
    assert state["round"] < 3 and len(state.get("losses", ())) < 7
    theta, records = alone(tmp_path, "--secure-aggregation", *options)
    expected, plain = alone(tmp_path_factory.mktemp("alone"), *options)
    assert torch.equal(theta, expected)
    assert [r["train_loss"] for r in records[1:]] == [r["train_loss"] for r in plain[1:]]
    assert [r["bytes_up"] for r in records[1:]] == [2 * r["bytes_up"] for r in plain[1:]]


def test_a_lost_process_ends_the_others_with_a_message(tmp_path):
    processes = launch(tmp_path, 2, "--rounds", 500)
    until(tmp_path / "runs" / "x" / "log.jsonl", processes[0])
    processes[1].kill()
    out, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "another process of the job has gone" in err and "Traceback" not in err


def test_what_stops_all_processes_is_told_once(tmp_path):
    statuses, said = finish(launch(tmp_path, 2, "--lr", 1e30))
    assert statuses == [2, 2]
    assert [err.count("train.py: error: ") for _, err in said] == [1, 0], said


def federate(size, calls, state=None, **options):
    """Advance a federation of 7 sampled clients in `size` threads; return what rank 0 has."""

    def work(group):
        theta, targets = torch.zeros(5), torch.arange(100.0).view(20, 5)

        def one(client, round):
            theta.add_(targets[client] - theta, alpha=0.1 * round)
            return theta[:1].clone()

        how = dict(fraction=0.35, group=group, quick=0) | options
        federation = fedavg.FedAvg(theta, range(1, 21), one, **how)
        if state is not None:
            federation.load_state_dict(state)
        records = [federation.advance() for _ in range(calls)]
        return [r | {"seconds": 0} for r in records if r], federation.state_dict()

    return in_threads(size, work)[0]


@pytest.mark.parametrize("size", [2, 3, 7, 9])
def test_rounds_do_not_depend_on_how_many_share_them(size):
    calls = -(-7 // size)
    records, state = federate(size, 3 * calls)
    expected, expected_state = federate(1, 21)
    assert records == expected and len(records) == 3
    assert torch.equal(state["theta"], expected_state["theta"])


@pytest.mark.parametrize("size", [2, 3, 9])
def test_processes_meet_once_in_a_quick_round(size):
    records, state = federate(size, -(-7 // size) + 2, quick=60)  # a round, then one call each
    expected, expected_state = federate(1, 21)
    assert records == expected and len(records) == 3
    assert torch.equal(state["theta"], expected_state["theta"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_a_round_in_hand_is_finished_by_a_group_of_another_size(before, after):
    records, state = federate(before, -(-7 // before) + 1)  # one call into round 2
    assert len(state["losses"]) == before
    later, state = federate(after, -(-(7 - before) // after), state)
    expected, expected_state = federate(1, 14)
    assert [*records, *later] == expected
    assert torch.equal(state["theta"], expected_state["theta"])


@pytest.mark.parametrize("rule", [editing.ties, editing.sign_elected])
def test_a_merging_rule_gives_the_same_bits_over_processes_and_a_save(rule):
    rules = dict(apart=lambda round: True, combine=lambda rows, weights, *_: rule(rows, weights))
    expected, expected_state = federate(1, 14, **rules)
    records, state = federate(2, 8, **rules)
    assert records == expected
    assert torch.equal(state["theta"], expected_state["theta"])
    _, state = federate(2, 6, **rules)  # two calls into round 2
    assert state["total"].shape == (7, 5) and len(state["losses"]) == 4
    _, state = federate(3, 1, state, **rules)
    assert torch.equal(state["theta"], expected_state["theta"])
    assert not torch.equal(state["theta"], federate(1, 14)[1]["theta"])


def test_what_clients_say_they_sent_is_counted_over_processes_and_a_save():
    options = dict(client_bytes=(1000, 10), edit=lambda *a: 7 * a[1] if a[1] % 2 else None)
    expected, _ = federate(1, 14, **options)
    for record in expected:
        sent = [7 * k if k % 2 else 1000 for k in record["clients"]]
        assert (record["bytes_up"], record["bytes_down"]) == (sum(sent), 70)
    records, _ = federate(2, 8, **options)
    assert records == expected
    _, state = federate(2, 6, **options)  # two calls into round 2
    assert federate(3, 1, state, **options)[0] == expected[1:]


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
