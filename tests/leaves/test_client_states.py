"""Client states: SCAFFOLD's equations and invariants, local entries, files, processes, resume."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_threads
from loops import reloaded, run

from centralized import Schedule
from fedavg import ClientError, Cohort, FedAvg, Method
from federated.client_states import (
    ClientStates,
    FedIR,
    LocalNorm,
    Prox,
    Scaffold,
    Term,
    importance_weights,
)
from federated.cohort import sample_clients, shares, step_weight_sum
from flat import Sgd
from sparse_sgdm import sparse_sgdm_
from training.clients import Clients, LocalSteps

SIZES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
TARGETS = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CURVATURE = torch.rand(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
LR, STEPS = 0.1, 4


def cohort(round):
    clients = sample_clients(12, 0.4, seed=3, round=round)
    return Cohort(clients, clients, shares(SIZES, clients))


def federation(momentum=0.0, mask=None, group=None, dtype=torch.float64, **store):
    """SCAFFOLD on clients of loss sum h_k (theta - t_k)^2 / 2, by the project's own step."""
    theta, correction = torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=dtype)
    variates = Scaffold(theta, 12, correction.copy_, **store)
    rate = LR * step_weight_sum(STEPS, momentum)

    def train(theta, clients, round):
        for client in map(int, clients):
            theta_k, buffer = variates.enter(theta, client).clone(), torch.zeros_like(theta)
            for j in range(STEPS):
                grad = (CURVATURE[client] * (theta_k.double() - TARGETS[client])).to(dtype)
                vectors = buffer, mask, None, None, correction
                sparse_sgdm_(theta_k, grad, *vectors, lr=LR, momentum=momentum, first=j == 0)
            yield variates.leave(theta_k, theta, client, rate), torch.ones(1)

    loop = FedAvg(theta, train, cohort, states={"scaffold": variates}, group=group)
    return loop, variates


# ---------------------------------------------------------------------------- SCAFFOLD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffold_is_its_equation_and_its_variates_add_up(momentum):
    loop, variates = federation(momentum)
    theta, c = (torch.zeros(6, dtype=torch.float64) for _ in range(2))
    by_hand = torch.zeros(12, 6, dtype=torch.float64)  # c_k
    for t in range(1, 6):
        before = torch.stack([variates.get(k) for k in range(12)])
        (record,) = run(loop, t)
        clients = record["clients"]
        n, change, moved = sum(SIZES[k] for k in clients), 0.0, 0.0
        for k in clients:
            local, buffer, weight = theta.clone(), 0.0, 0.0
            for j in range(STEPS):
                buffer = momentum * buffer + CURVATURE[k] * (local - TARGETS[k]) + c - by_hand[k]
                local = local - LR * buffer
                weight += sum(momentum**i for i in range(STEPS - j))
            new = by_hand[k] - c + (theta - local) / (LR * weight)
            moved, by_hand[k] = moved + new - by_hand[k], new
            change = change + SIZES[k] / n * (local - theta)
        theta, c = theta + change, c + moved / 12
        torch.testing.assert_close(loop.theta, theta, rtol=0, atol=1e-10)
        torch.testing.assert_close(variates.mean, c, rtol=0, atol=1e-10)
        vectors = torch.stack([variates.get(k) for k in range(12)])
        torch.testing.assert_close(vectors, by_hand, rtol=0, atol=1e-10)
        torch.testing.assert_close(vectors.sum(dim=0), 12 * variates.mean, rtol=0, atol=1e-10)
        assert not any(torch.equal(vectors[k], before[k]) for k in clients)
        absent = [k for k in range(12) if k not in clients]
        assert torch.equal(vectors[absent], before[absent])
        assert record["state_bytes"]["scaffold"] == variates.bytes


def test_steps_of_rate_zero_leave_the_variate_as_it_is():
    variates = Scaffold(torch.zeros(2), clients=3)
    variates.leave(torch.ones(2), torch.zeros(2), client=1, rate=0.0)
    assert not variates.get(1).any() and variates.bytes == 0


@pytest.mark.parametrize("closed", [True, False])
def test_a_state_knows_what_no_group_has_merged(closed):
    first, second = (Scaffold(torch.zeros(3), clients=4) for _ in range(2))
    first.enter(torch.zeros(3), 0)
    first.leave(torch.ones(3), torch.zeros(3), 0, rate=0.4)
    if closed:
        first.next_round()
    second.load_state_dict(first.state_dict())
    for variates in (first, second):
        variates.next_round()
    assert second.mean.tolist() == first.mean.tolist() == [-0.625] * 3


def test_under_a_mask_the_variates_of_frozen_entries_stay_zero():
    mask = torch.tensor([True, False, True, True, False, True])
    loop, variates = federation(0.9, mask)
    run(loop, 4)
    assert not variates.mean[~mask].any() and variates.mean[mask].all()
    assert not loop.theta[~mask].any() and loop.theta[mask].all()


# ---------------------------------------------------------------------------- stops and processes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_a_round_in_hand_is_resumed_with_every_state(stop, dtype):
    whole, expected = federation(dtype=dtype)
    records = run(whole, 4)
    first, _ = federation(dtype=dtype)
    before = [r | {"seconds": 0} for r in (first.advance() for _ in range(stop)) if r is not None]
    second, variates = federation(dtype=dtype)
    second.load_state_dict(reloaded(first.state_dict()))
    assert before + run(second, 4) == records
    assert torch.equal(second.theta, whole.theta)
    assert torch.equal(variates.mean, expected.mean)
    assert all(torch.equal(variates.get(k), expected.get(k)) for k in range(12))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_clients_states(size):
    expected, variates = federation()
    run(expected, 4)
    stopped, _ = federation()
    for _ in range(12):
        stopped.advance()
    in_hand = copy.deepcopy(stopped.state_dict())
    assert in_hand["round"] == 2 and in_hand["done"]

    def work(group):
        for state in (None, in_hand):
            loop, shared = federation(group=group)
            if state is not None:
                loop.load_state_dict(state)
            else:
                run(loop, 2)
                between = copy.deepcopy(loop.state_dict())
            run(loop, 4)
            assert torch.equal(loop.theta, expected.theta)
        return loop.theta, shared, between

    results = in_threads(size, work)
    assert len(results) == size
    for theta, shared, _ in results.values():
        assert torch.equal(theta, expected.theta) and torch.equal(shared.mean, variates.mean)
        assert all(torch.equal(shared.get(k), variates.get(k)) for k in range(12))
    alone, again = federation()
    alone.load_state_dict(results[0][2])
    run(alone, 4)
    assert torch.equal(alone.theta, expected.theta)
    assert all(torch.equal(again.get(k), variates.get(k)) for k in range(12))


class Disk:
    """Counts what is written and read, and dies before a write if told to."""

    def __init__(self):
        self.written, self.read, self.dies_at = [], [], None

    def write(self, path, vectors):
        if self.dies_at == len(self.written):
            raise KeyboardInterrupt
        self.written.append((path.name, len(vectors)))
        torch.save(vectors, path)

    def load(self, path):
        self.read.append(path.name)
        return torch.load(path, weights_only=True)


def test_files_hold_what_changed_and_every_checkpoint_of_the_last_can_be_resumed(tmp_path):
    expected, _ = federation()
    run(expected, 12)
    disk = Disk()
    loop, variates = federation(folder=tmp_path, write=disk.write)
    states, calls = [], 0
    while loop.round < 12:
        loop.advance()
        calls += 1
        if calls % 3 == 0:
            states.append(copy.deepcopy(loop.state_dict()))
            names = [name for name, _ in disk.written]
            assert len(names) == len(set(names)) == len(states)  # one file a save
            live = set(states[-1]["states"]["scaffold"]["files"].values())
            assert sum(n for name, n in disk.written if name in live) <= 2 * len(variates._vectors)
            for state in states[-2:]:  # a checkpoint and its predecessor
                again, _ = federation(folder=tmp_path, write=None)
                again.load_state_dict(state)
    assert sum(n for _, n in disk.written) < 3 * calls  # what changed, and rewritten now and then
    assert len(list(tmp_path.iterdir())) < 3 * 3  # old files go
    for state in states[-2:]:
        again, _ = federation(folder=tmp_path, write=None)
        again.load_state_dict(state)
        run(again, 12)
        assert torch.equal(again.theta, expected.theta)


@pytest.mark.parametrize("lost", [0, 1])  # the newest checkpoint is whole, or gives way
@pytest.mark.parametrize("dies_at", range(2, 14))
def test_killed_at_any_save_a_checkpoint_and_its_predecessor_find_their_files(
    tmp_path, dies_at, lost
):
    expected, _ = federation()
    run(expected, 9)
    disk, states = Disk(), []
    for death in (dies_at, dies_at + 1, None):
        disk.dies_at = death
        loop, _ = federation(folder=tmp_path, write=disk.write, read=disk.load)
        if states:
            states = states[: len(states) - lost]
            loop.load_state_dict(states[-1])
        try:
            while loop.round < 9:
                loop.advance()
                states.append(copy.deepcopy(loop.state_dict()))
        except KeyboardInterrupt:
            assert death is not None
        for state in states[-2:]:
            federation(folder=tmp_path, write=None)[0].load_state_dict(state)
    assert torch.equal(loop.theta, expected.theta)


def test_a_state_without_changes_writes_nothing_and_counts_as_the_last(tmp_path):
    disk = Disk()
    loop, _ = federation(folder=tmp_path, write=disk.write, read=disk.load)
    assert loop.state_dict() and not list(tmp_path.iterdir())
    run(loop, 2)
    earlier = copy.deepcopy(loop.state_dict())
    run(loop, 4)
    for _ in range(9):
        state = copy.deepcopy(loop.state_dict())
    assert len(disk.written) == 2
    for saved in (earlier, state):
        disk.read.clear()
        again, _ = federation(folder=tmp_path, write=disk.write, read=disk.load)
        again.load_state_dict(saved)
        assert len(disk.read) == len(set(disk.read)) <= 2  # each file once
        assert again.state_dict()["states"]["scaffold"]["saves"] == (saved is state) + 1


@pytest.mark.parametrize("size", [1, 2])
def test_a_state_whose_file_is_gone_is_refused_by_name(tmp_path, size):
    def work(group):
        writes = {} if group.rank == 0 else {"write": None}
        loop, _ = federation(group=group, folder=tmp_path, **writes)
        run(loop, 1)
        loop.state_dict()
        run(loop, 2)
        return loop.state_dict()

    state = in_threads(size, work)[0]
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["clients-1.pt", "clients-2.pt"]
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            federation(folder=tmp_path)[0].load_state_dict(state)
        path.write_bytes(whole)


@pytest.mark.parametrize("wrong", [
    lambda part, k: part.pop(k), lambda part, k: part.update({k: torch.zeros(1).double()}),
    lambda part, k: part.update({k: torch.zeros(6)}), lambda part, k: part.update({k: 3}),
])  # fmt: skip
def test_vectors_that_are_not_the_clients_are_refused(tmp_path, wrong):
    loop, variates = federation(folder=tmp_path)
    run(loop, 2)
    state, client = loop.state_dict(), min(variates._vectors)
    part = torch.load(tmp_path / "clients-1.pt", weights_only=True)
    wrong(part, client)
    torch.save(part, tmp_path / "clients-1.pt")
    with pytest.raises(ValueError, match=rf"no vector \(6,\) torch.float64 of client {client}$"):
        federation(folder=tmp_path)[0].load_state_dict(state)


def test_a_change_beyond_the_fixed_point_is_refused():
    states = ClientStates(torch.zeros(2), clients=3)
    for bad in (2.0**15, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the state of client 1 changes by more than 16384"):
            states.put(1, torch.tensor([0.0, bad]))


# ---------------------------------------------------------------------------- local entries


def test_local_entries_stay_and_the_model_gets_their_average():
    at, shared = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    start = torch.arange(6.0, dtype=torch.float64)
    local = LocalNorm(start, at, 12)

    def train(theta, clients, round):
        for client in map(int, clients):
            theta_k = local.enter(theta, client)
            theta_k = theta_k + 0.3 * CURVATURE[client] * (TARGETS[client] - theta_k)
            sent = local.leave(theta_k, theta, client, rate=0.3)
            assert torch.equal(sent[at], theta[at]) and torch.equal(sent[shared], theta_k[shared])
            yield sent, torch.ones(1)

    method = Method(after_=local.average_into_)
    loop = FedAvg(start.clone(), train, cohort, None, method, {"local": local})
    expected, by_hand = start.clone(), start[at].repeat(12, 1)
    for t in range(1, 5):
        (record,) = run(loop, t)
        n, change = sum(SIZES[k] for k in record["clients"]), 0.0
        for k in record["clients"]:
            full = expected.clone()
            full[at] = by_hand[k]
            full = full + 0.3 * CURVATURE[k] * (TARGETS[k] - full)
            by_hand[k] = full[at]
            change = change + SIZES[k] / n * (full - expected)[shared]
        expected[shared] += change
        expected[at] = by_hand.mean(dim=0)
        torch.testing.assert_close(loop.theta, expected, rtol=0, atol=1e-10)
    assert np.isclose(local.get(record["clients"][0]), by_hand[record["clients"][0]]).all()


# ---------------------------------------------------------------------------- other terms


def test_importance_weights_are_the_ratio_of_class_frequencies():
    labels = np.array([0] * 10 + [1] * 20 + [2] * 10)
    weights = importance_weights(labels, np.array([0, 1, 1, 1]), classes=4)
    np.testing.assert_allclose(weights, [0.25 / 0.25, 0.5 / 0.75, 0, 0], rtol=1e-15)


def test_prox_pulls_to_the_start_and_fedir_weighs_as_the_client_does():
    anchor, out, start = torch.zeros(3), torch.ones(2), torch.tensor([1.0, 2.0, 3.0])
    prox, fedir = Prox(anchor.copy_), FedIR(lambda client: np.array([client, 0.5]), out)
    for term in (prox, fedir):
        assert torch.equal(term.enter(start, 4), start)
        assert torch.equal(term.leave(2 * start, start, 4, rate=0.1), 2 * start)
    assert torch.equal(anchor, start) and out.tolist() == [4, 0.5]


class Noted(Term):
    """Adds its number on the way in, doubles on the way out, and notes who called when."""

    def __init__(self, number, notes):
        self.number, self.notes = number, notes

    def enter(self, start, client):
        self.notes.append(("enter", self.number, client, start.item()))
        return start + self.number

    def leave(self, theta_k, theta, client, rate):
        self.notes.append(("leave", self.number, client, theta_k.item(), theta.item(), rate))
        return 2 * theta_k


def clients_with(terms, lr=0.5):
    learner = SimpleNamespace(
        entries=SimpleNamespace(sgd=Sgd(lr=lr, momentum=0.5)),
        workspace=SimpleNamespace(source=SimpleNamespace(seed=0)),
        local_step=None,
        graphed=lambda step, choice, obstacle: None,
    )
    return Clients(learner, [], LocalSteps(J=2, batch_size=1), Schedule(), 10, terms=terms)


def test_terms_are_entered_in_order_and_left_in_reverse():
    notes, theta = [], torch.tensor([10.0])
    clients = clients_with([Noted(1, notes), Noted(2, notes), Noted(3, notes)])
    start = clients.enter(theta, client=7)
    sent = clients.leave(torch.tensor([5.0]), theta, 7, 1, torch.ones(2))
    assert (start.item(), sent.item(), theta.item()) == (16, 40, 10)
    rate = 0.5 * (1.5 + 1)  # lr times what two steps of momentum 0.5 weigh
    assert notes == [
        *(("enter", 1, 7, 10), ("enter", 2, 7, 11), ("enter", 3, 7, 13)),
        *(
            ("leave", 3, 7, 5, 10, rate),
            ("leave", 2, 7, 10, 10, rate),
            ("leave", 1, 7, 20, 10, rate),
        ),
    ]


def test_scaffold_learns_nothing_of_entries_that_stay_local():
    theta, at = torch.zeros(3, dtype=torch.float64), torch.tensor([1])
    scaffold, local = Scaffold(theta, 4), LocalNorm(theta, at, 4)
    clients = clients_with([scaffold, local])
    sent = clients.leave(torch.tensor([1.0, 5.0, 2.0]).double(), theta, 2, 1, torch.ones(2))
    assert sent.tolist() == [1, 0, 2] and local.get(2).tolist() == [5]
    assert scaffold.get(2).tolist() == [-1 / 1.25, 0, -2 / 1.25]


def test_a_client_that_diverged_keeps_nothing():
    states = ClientStates(torch.zeros(1), clients=9)
    states.leave = lambda theta_k, theta, client, rate: states.put(client, theta_k)
    clients = clients_with([states])
    with pytest.raises(ClientError, match="round 3, client 7, local step 2: the loss is nan"):
        clients.leave(torch.ones(1), torch.zeros(1), 7, 3, torch.tensor([1.0, float("nan")]))
    assert states.bytes == 0
    with pytest.raises(ClientError, match="round 3: the state of client 7 changes by more than"):
        clients.leave(torch.full((1,), 1e5), torch.zeros(1), 7, 3, torch.ones(2))
    assert states.bytes == 0
