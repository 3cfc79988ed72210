"""Who takes part, how fast and with what weight: functions of seed, round and client."""

import numpy as np
import pytest
import torch

from fedavg import FedAvg, step_weight_sum
from participation import (
    drop_out,
    importance_weights,
    local_steps,
    normalised_averaging,
    sample_by_size,
    shares,
)


def test_large_clients_are_drawn_in_proportion_to_their_size():
    sizes = [100, 300, 600, 1000]
    draws = [sample_by_size(sizes, 0.25, seed=0, round=t)[0] for t in range(4000)]
    expected = 4000 * np.array(sizes) / 2000
    assert (abs(np.bincount(draws) - expected) < 5 * np.sqrt(expected)).all()
    again = sample_by_size(sizes, 0.5, seed=0, round=7)
    assert np.array_equal(again, sample_by_size(sizes, 0.5, seed=0, round=7))
    assert len(set(again.tolist())) == 2


def test_a_client_drops_out_whoever_else_was_drawn():
    clients = np.arange(1000)
    left = drop_out(clients, 0.3, seed=0, round=5)
    assert abs(len(left) - 700) < 5 * np.sqrt(1000 * 0.3 * 0.7)
    assert np.array_equal(drop_out(clients[::-1], 0.3, seed=0, round=5), left[::-1])
    assert np.array_equal(drop_out(clients[:50], 0.3, seed=0, round=5), left[left < 50])
    assert not np.array_equal(left, drop_out(clients, 0.3, seed=0, round=6))
    assert len(drop_out(clients, 0.0, seed=0, round=5)) == 1000
    assert len(drop_out(clients, 1.0, seed=0, round=5)) == 0
    assert len(drop_out(clients[:0], 0.3, seed=0, round=5)) == 0


def test_stragglers_take_every_smaller_number_of_steps_alike():
    steps = np.array([local_steps(5, 0.4, seed=0, round=1, client=k) for k in range(5000)])
    counts = np.bincount(steps, minlength=6)[1:]
    expected = np.array([500, 500, 500, 500, 3000])
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert local_steps(5, 0.0, seed=0, round=1, client=3) == 5
    assert {local_steps(1, 1.0, seed=0, round=t, client=3) for t in range(20)} == {1}


def test_shares_add_up_whoever_remains():
    assert shares([1, 2, 3, 4], np.array([3, 0])).tolist() == [0.8, 0.2]


def test_importance_weights_are_the_ratio_of_class_frequencies():
    labels = np.array([0] * 10 + [1] * 20 + [2] * 10)
    weights = importance_weights(labels, np.array([0, 1, 1, 1]), classes=4)
    np.testing.assert_allclose(weights, [0.25 / 0.25, 0.5 / 0.75, 0, 0], rtol=1e-15)


# ---------------------------------------------------------------------------- FedNova


SIZES, TARGETS = (
    [3, 1, 4, 1, 5, 9],
    torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
)
CURVATURE, LR = 0.5 + torch.arange(6.0, dtype=torch.float64), 0.02


def federation(tau, momentum=0.0, nova=True):
    """Clients of loss h_k |theta - t_k|^2 / 2, each with its own number of momentum steps."""
    theta = torch.zeros(5, dtype=torch.float64)

    def train(client, round):
        buffer = torch.zeros_like(theta)
        for _ in range(tau[client]):
            buffer.mul_(momentum).add_(CURVATURE[client] * (theta - TARGETS[client]))
            theta.sub_(LR * buffer)
        return torch.ones(1)

    def weigh(clients, round):
        efforts = [step_weight_sum(tau[k], momentum) for k in clients]
        return normalised_averaging(shares(SIZES, clients), efforts)

    return FedAvg(theta, SIZES, train, fraction=0.7, seed=1, weigh=weigh if nova else None)


def run(process, rounds):
    while process.round < rounds:
        process.advance()
    return process.theta_global


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_its_equation(momentum):
    tau, theta = [1, 2, 3, 4, 5, 6], torch.zeros(5, dtype=torch.float64)
    process = federation(tau, momentum)
    for _ in range(3):
        while (record := process.advance()) is None:
            pass
        n = sum(SIZES[k] for k in record["clients"])
        # theta += (sum p |a|) sum p d_k, d_k = delta_k / |a_k|, with delta_k and |a_k| by hand
        effective, direction = 0.0, torch.zeros_like(theta)
        for k in record["clients"]:
            local, buffer, a = theta.clone(), torch.zeros_like(theta), 0.0
            for j in range(tau[k]):
                buffer = momentum * buffer + CURVATURE[k] * (local - TARGETS[k])
                local = local - LR * buffer
                a += sum(momentum**i for i in range(tau[k] - j))
            effective += SIZES[k] / n * a
            direction += SIZES[k] / n * (local - theta) / a
        theta = theta + effective * direction
        torch.testing.assert_close(process.theta_global, theta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_equal_steps_fednova_is_fedavg_to_the_bit(momentum):
    equal = [4] * 6
    nova, plain = federation(equal, momentum), federation(equal, momentum, nova=False)
    assert torch.equal(run(nova, 5), run(plain, 5))


def test_fednova_ends_near_the_optimum_that_unequal_steps_pull_fedavg_from():
    """Two clients of equal size and curvature, of which one takes ten times the steps."""
    ends = {}
    for nova in (True, False):
        theta = torch.zeros(1, dtype=torch.float64)

        def train(client, round, theta=theta):
            for _ in range((1, 10)[client]):
                theta.sub_(0.001 * (theta - (1.0, -1.0)[client]))
            return torch.ones(1)

        def weigh(clients, round):
            return normalised_averaging(shares([5, 5], clients), [(1, 10)[k] for k in clients])

        process = FedAvg(theta, [5, 5], train, fraction=1.0, weigh=weigh if nova else None)
        ends[nova] = run(process, 2000).item()
    assert abs(ends[True]) < 0.01  # the optimum is 0, halfway
    assert ends[False] == pytest.approx(-9 / 11, abs=0.01)
