"""Each server rule is its paper's equation, step by step, and keeps all of itself in its state."""

import pytest
import torch

from fedavg import FedAvg
from server import RULES, Server

DELTAS = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


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
    monkeypatch.setattr("server.CHUNK", 7)
    theta = torch.zeros(40, dtype=torch.float64)
    server = Server(rule, theta, lr=0.3, momentum=0.8, beta2=0.95, tau=0.01)
    for delta in DELTAS:
        server.step_(theta, delta)
    expected = by_hand(rule, DELTAS, 0.3, 0.8, 0.95, 0.01)
    torch.testing.assert_close(theta, expected, rtol=1e-10, atol=1e-10)


def federation(rule=None, **options):
    """FedAvg on quadratics whose clients pull towards their own targets."""
    theta, targets = torch.zeros(5), torch.randn(12, 5, generator=torch.Generator().manual_seed(1))

    def train(client, round):
        theta.add_(targets[client] - theta, alpha=0.3)
        return theta.mean()[None]

    server = rule and Server(rule, theta, **options)
    extra = dict(server_step=server.step_, companions={"server": server}) if server else {}
    return FedAvg(theta, range(1, 13), train, fraction=0.4, seed=3, **extra)


def run(process, rounds):
    while process.round < rounds:
        process.advance()
    return process.theta_global


@pytest.mark.parametrize("options", [("fedavg", {}), ("fedavgm", {"momentum": 0.0})])
def test_the_degenerate_rules_are_fedavg_to_the_bit(options):
    rule, settings = options
    assert torch.equal(run(federation(), 6), run(federation(rule, **settings), 6))


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_from_its_state_to_the_same_bits(rule):
    whole, first, second = (federation(rule, lr=0.1) for _ in range(3))
    run(first, 3)
    first.advance()  # a round in hand
    second.load_state_dict({k: v for k, v in first.state_dict().items()})
    assert torch.equal(run(second, 6), run(whole, 6))


def test_bad_values_are_refused():
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown server rule 'adam': choose from fedavg"):
        Server("adam", theta)
    for bad in (dict(lr=0), dict(tau=0), dict(momentum=1.0), dict(beta2=-0.1)):
        with pytest.raises(ValueError, match="a server needs lr and tau above 0"):
            Server("fedadam", theta, **bad)
