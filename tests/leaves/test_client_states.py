"""Client states: SCAFFOLD's equations and invariants, local entries, files, processes, resume."""

import copy
import io

import numpy as np
import pytest
import torch
from conftest import in_threads

from client_states import ClientStates, LocalEntries, Scaffold
from fedavg import FedAvg, step_weight_sum
from sparse_sgdm import sparse_sgdm_

SIZES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
TARGETS = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CURVATURE = torch.rand(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
LR, STEPS = 0.1, 4


def federation(momentum=0.0, mask=None, group=None, dtype=torch.float64, **store):
    """SCAFFOLD on clients of loss sum h_k (theta - t_k)^2 / 2, by the project's own step."""
    theta = torch.zeros(6, dtype=dtype)
    variates = Scaffold(theta, 12, **store)

    def train(client, round):
        start, correction = theta.clone(), variates.correction(client)
        buffer = torch.zeros_like(theta)
        for j in range(STEPS):
            grad = (CURVATURE[client] * (theta.double() - TARGETS[client])).to(dtype)
            terms = buffer, mask, None, None, correction
            sparse_sgdm_(theta, grad, *terms, lr=LR, momentum=momentum, first=j == 0)
        variates.update(client, start, theta, LR * step_weight_sum(STEPS, momentum))
        return torch.ones(1)

    process = FedAvg(
        theta,
        SIZES,
        train,
        fraction=0.4,
        seed=3,
        companions={"scaffold": variates},
        group=group,
    )
    return process, variates


def run(process, rounds):
    records = []
    while process.round < rounds:
        if (record := process.advance()) is not None:
            records.append(record | {"seconds": 0})
    return records


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffold_is_its_equation_and_its_variates_add_up(momentum):
    process, variates = federation(momentum)
    theta, c = (torch.zeros(6, dtype=torch.float64) for _ in range(2))
    own = torch.zeros(12, 6, dtype=torch.float64)
    for t in range(1, 6):
        (record,) = run(process, t)
        clients, before = record["clients"], own.clone()
        n, change, moved = sum(SIZES[k] for k in clients), 0.0, 0.0
        for k in clients:
            local, buffer, weight = theta.clone(), 0.0, 0.0
            for j in range(STEPS):
                buffer = momentum * buffer + CURVATURE[k] * (local - TARGETS[k]) + c - own[k]
                local = local - LR * buffer
                weight += sum(momentum**i for i in range(STEPS - j))
            new = own[k] - c + (theta - local) / (LR * weight)
            moved, own[k] = moved + new - own[k], new
            change = change + SIZES[k] / n * (local - theta)
        theta, c = theta + change, c + moved / 12
        torch.testing.assert_close(process.theta_global, theta, rtol=0, atol=1e-10)
        torch.testing.assert_close(variates.mean, c, rtol=0, atol=1e-10)
        kept = torch.stack([variates.get(k) for k in range(12)])
        torch.testing.assert_close(kept, own, rtol=0, atol=1e-10)
        torch.testing.assert_close(kept.sum(dim=0), 12 * variates.mean, rtol=0, atol=1e-10)
        absent = [k for k in range(12) if k not in clients]
        torch.testing.assert_close(kept[absent], before[absent], rtol=0, atol=1e-10)
        assert record["state_bytes"]["scaffold"] == variates.bytes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_constant_gradient_the_variate_is_the_gradient(momentum):
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    variates = Scaffold(torch.zeros(3, dtype=torch.float64), clients=10)
    for _ in range(3):
        theta, buffer = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        correction = variates.correction(4)
        for _ in range(STEPS):
            buffer = momentum * buffer + gradient + correction
            theta = theta - LR * buffer
        rate = LR * step_weight_sum(STEPS, momentum)
        variates.update(4, torch.zeros_like(theta), theta, rate)
        variates.next_round()
        torch.testing.assert_close(variates.get(4), gradient, rtol=0, atol=1e-12)
        torch.testing.assert_close(variates.mean, gradient / 10, rtol=0, atol=1e-12)


def test_a_client_that_did_not_take_part_keeps_its_variate():
    process, variates = federation()
    run(process, 2)
    before = {k: variates.get(k).clone() for k in range(12)}
    (record,) = run(process, 3)
    for k in range(12):
        assert torch.equal(variates.get(k), before[k]) == (k not in record["clients"])


def test_under_a_mask_the_variates_of_frozen_entries_stay_zero():
    mask = torch.tensor([True, False, True, True, False, True])
    process, variates = federation(0.9, mask)
    run(process, 4)
    assert not variates.mean[~mask].any() and variates.mean[mask].all()
    assert not process.theta_global[~mask].any() and process.theta_global[mask].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_a_round_in_hand_is_resumed_with_every_state(stop, dtype):
    whole, expected = federation(dtype=dtype)
    records = run(whole, 4)
    first, _ = federation(dtype=dtype)
    found = [r | {"seconds": 0} for r in (first.advance() for _ in range(stop)) if r is not None]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, variates = federation(dtype=dtype)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert found + run(second, 4) == records
    assert torch.equal(second.theta_global, whole.theta_global)
    assert torch.equal(variates.mean, expected.mean)
    assert all(torch.equal(variates.get(k), expected.get(k)) for k in range(12))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_clients_states(size):
    expected, variates = federation()
    run(expected, 4)

    def work(group):
        process, own = federation(group=group)
        run(process, 2)
        process.advance()
        state = copy.deepcopy(process.state_dict())  # of a round in hand
        run(process, 4)
        return process.theta_global, own, state

    results = in_threads(size, work)
    for theta, own, _ in results.values():
        assert torch.equal(theta, expected.theta_global) and torch.equal(own.mean, variates.mean)
        assert all(torch.equal(own.get(k), variates.get(k)) for k in range(12))
    alone, own = federation()
    alone.load_state_dict(results[0][2])
    run(alone, 4)
    assert torch.equal(alone.theta_global, expected.theta_global)
    assert all(torch.equal(own.get(k), variates.get(k)) for k in range(12))


def test_files_hold_what_changed_and_every_kept_checkpoint_can_be_resumed(tmp_path):
    expected, _ = federation()
    run(expected, 12)
    written = []

    def write(path, tensor):
        written.append(path.name)
        torch.save(tensor, path)

    process, variates = federation(folder=tmp_path, write=write)
    states, calls = [], 0
    while process.round < 12:
        process.advance()
        calls += 1
        if calls % 3 == 0:
            states.append(process.state_dict() | {"theta": process.theta_global.clone()})
            mean, total = (states[-1]["companions"]["scaffold"][k] for k in ("mean", "total"))
            kept = {"mean": mean.clone(), "total": total.clone()}
            states[-1]["companions"]["scaffold"] |= kept
    assert len(written) == len(set(written))  # nothing twice
    assert calls - 3 <= len(written) <= calls
    assert len(list(tmp_path.iterdir())) < 12 + 3 * 3  # old files go
    for state in states[-2:]:  # a checkpoint and its predecessor
        again, own = federation(folder=tmp_path, write=None)
        again.load_state_dict(state)
        run(again, 12)
        assert torch.equal(again.theta_global, expected.theta_global)


@pytest.mark.parametrize("size", [1, 2])
def test_a_state_whose_file_is_gone_is_refused_by_name(tmp_path, size):
    def work(group):
        writes = {} if group.rank == 0 else {"write": None}
        process, _ = federation(group=group, folder=tmp_path, **writes)
        run(process, 3)
        return process.state_dict()

    state = in_threads(size, work)[0]
    files = sorted(tmp_path.iterdir())
    assert len(files) > 6
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            federation(folder=tmp_path)[0].load_state_dict(state)
        path.write_bytes(whole)


def test_a_change_beyond_the_fixed_point_is_refused():
    states = ClientStates(torch.zeros(2), clients=3)
    for bad in (2.0**15, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the state of client 1 changes by more than 16384"):
            states.put(1, torch.tensor([0.0, bad]))


# ---------------------------------------------------------------------------- local entries


def test_local_entries_stay_and_the_model_gets_their_average():
    at, shared = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    theta = torch.arange(6.0, dtype=torch.float64)
    start, local = theta.clone(), LocalEntries(theta, at, 12)

    def train(client, round):
        local.enter_(theta, client)
        theta.add_(CURVATURE[client] * (TARGETS[client] - theta), alpha=0.3)
        local.put(client, local.leave_(theta))
        return torch.ones(1)

    def server_step(theta, total, unit):
        theta += total.double() * unit
        local.average_into_(theta)

    steps = dict(server_step=server_step, companions={"local": local})
    process = FedAvg(theta, SIZES, train, fraction=0.4, seed=3, **steps)
    expected, own = start.clone(), start[at].repeat(12, 1)
    for t in range(1, 5):
        (record,) = run(process, t)
        n, change = sum(SIZES[k] for k in record["clients"]), 0.0
        for k in record["clients"]:
            full = expected.clone()
            full[at] = own[k]
            full = full + 0.3 * CURVATURE[k] * (TARGETS[k] - full)
            own[k] = full[at]
            change = change + SIZES[k] / n * (full - expected)[shared]
        expected[shared] += change
        expected[at] = own.mean(dim=0)
        torch.testing.assert_close(process.theta_global, expected, rtol=0, atol=1e-10)
    assert np.isclose(local.get(record["clients"][0]), own[record["clients"][0]]).all()
