"""Each server rule is its paper's equation, step by step, and keeps all of itself in its state."""

import numpy as np
import pytest
import torch
from loops import end, run

from fedavg import Cohort, FedAvg
from federated import server as servers
from federated.cohort import sample_clients, shares
from federated.server import RULES, Server

DELTAS = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


def by_hand(rule, deltas, lr, beta, b2, tau):
    """The equations of the header, written out for one entry after the other."""
    result = []
    for i in range(deltas.shape[1]):
        theta, m, v = 0.0, 0.0, 0.0 if rule == "fedavgm" else tau**2
        for delta in deltas[:, i].tolist():
            m = beta * m + (1 - beta) * delta
            if rule == "fedavg":
                theta += lr * delta
                continue
            if rule == "fedavgm":
                v = beta * v + delta
                theta += lr * v
                continue
            if rule == "fedadagrad":
                v += delta**2
            if rule == "fedadam":
                v = b2 * v + (1 - b2) * delta**2
            if rule == "fedyogi":
                v -= (1 - b2) * delta**2 * ((v > delta**2) - (v < delta**2))
            theta += lr * m / (v**0.5 + tau)
        result.append(theta)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_the_equations(rule, monkeypatch):
    monkeypatch.setattr(servers, "CHUNK", 7)
    theta = torch.zeros(40, dtype=torch.float64)
    server = Server(rule, theta, lr=0.3, momentum=0.8, beta2=0.95, tau=0.01)
    for delta in DELTAS:
        server.step_(theta, delta)
    expected = by_hand(rule, DELTAS, 0.3, 0.8, 0.95, 0.01)
    torch.testing.assert_close(theta, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_change_in_units_is_the_change(rule):
    ends = []
    for delta, unit in ((DELTAS, 1.0), ((DELTAS * 2.0**48).round().long(), 2.0**-48)):
        theta = torch.zeros(40, dtype=torch.float64)
        server = Server(rule, theta, lr=0.3, tau=0.01)
        for change in delta:
            server.step_(theta, change, unit)
        ends.append(theta)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def train(theta, clients, round):
    """Clients that pull towards their own targets."""
    for client in clients:
        theta_k = theta + 0.3 * (TARGETS[client] - theta)
        yield theta_k, theta_k.mean()[None]


def cohort(round):
    clients = sample_clients(12, 0.4, seed=3, round=round)
    return Cohort(clients, clients, shares(np.arange(1, 13), clients))


def federation(rule=None, **settings):
    theta = torch.zeros(5)
    return FedAvg(theta, train, cohort, rule and Server(rule, theta, **settings))


@pytest.mark.parametrize(("rule", "settings"), [("fedavg", {}), ("fedavgm", {"momentum": 0.0})])
def test_the_degenerate_rules_are_fedavg_to_the_bit(rule, settings):
    assert torch.equal(end(federation(), 6), end(federation(rule, **settings), 6))


@pytest.mark.parametrize("rule", RULES)
def test_records_count_the_memory_of_the_servers_state(rule):
    moments = {"fedavg": 0, "fedavgm": 1}.get(rule, 2)
    (record,) = run(federation(rule), 1)
    assert record.get("state_bytes", {"server": 0}) == {"server": moments * 5 * 8}


def test_bad_values_are_refused():
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown server rule 'adam': choose from fedavg"):
        Server("adam", theta)
    for bad in (dict(lr=0), dict(tau=0), dict(momentum=1.0), dict(beta2=-0.1)):
        with pytest.raises(ValueError, match="a server needs lr and tau above 0"):
            Server("fedadam", theta, **bad)
