"""Who takes part, how fast and with what weight: functions of seed, round and client."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from loops import run

from fedavg import Cohort, FedAvg, Method
from federated.cohort import (
    cohort_size,
    drop_out,
    local_steps,
    normalised_averaging,
    sample_by_size,
    sample_clients,
    sample_poisson,
    shares,
    step_weight_sum,
)

# ---------------------------------------------------------------------------- who


@pytest.mark.parametrize(
    ("clients", "fraction", "m"), [(100, 0.1, 10), (100, 1.0, 100), (5, 0.1, 1), (7, 0.5, 4)]
)
def test_the_sample_is_a_function_of_seed_and_round(clients, fraction, m):
    draws = [sample_clients(clients, fraction, seed=0, round=t) for t in range(30)]
    assert all(len(set(d.tolist())) == m and d.max() < clients for d in draws)
    assert np.array_equal(draws[4], sample_clients(clients, fraction, seed=0, round=4))
    if m < clients:
        assert len({tuple(d) for d in draws}) > 1
        other = [sample_clients(clients, fraction, seed=1, round=t) for t in range(30)]
        assert not all(map(np.array_equal, draws, other))


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_the_size_of_a_cohort_is_what_is_drawn(fraction):
    for clients in [*range(1, 60), 100, 1001]:
        count = cohort_size(clients, fraction)
        assert count == len(sample_clients(clients, fraction, seed=0, round=1))
        assert count == len(sample_by_size([3] * clients, fraction, seed=0, round=1))
        assert count == max(1, math.floor(Decimal(f"{fraction}") * clients + Decimal("0.5")))
    assert cohort_size(25, 0.1) == 3 and cohort_size(50, 0.29) == 15  # a half is rounded up
    assert cohort_size(9, 1 / 6) == 2 and cohort_size(9, np.float32(1 / 6)) == 2


def test_every_client_gets_its_share_of_rounds():
    seen = np.bincount(
        np.concatenate([sample_clients(50, 0.2, seed=0, round=t) for t in range(2000)])
    )
    assert abs(seen - 400).max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"not {fraction}"):
        sample_clients(12, fraction, seed=0, round=1)
    with pytest.raises(ValueError, match=f"not {fraction}"):
        sample_by_size([1] * 12, fraction, seed=0, round=1)


def test_large_clients_are_drawn_in_proportion_to_their_size():
    sizes = [100, 300, 600, 1000]
    draws = [sample_by_size(sizes, 0.25, seed=0, round=t)[0] for t in range(4000)]
    expected = 4000 * np.array(sizes) / 2000
    assert (abs(np.bincount(draws) - expected) < 5 * np.sqrt(expected)).all()
    again = sample_by_size(sizes, 0.5, seed=0, round=7)
    assert np.array_equal(again, sample_by_size(sizes, 0.5, seed=0, round=7))
    assert len(set(again.tolist())) == 2


def test_every_client_is_drawn_on_its_own_with_the_same_probability():
    rounds = [sample_poisson(50, 0.2, seed=0, round=t) for t in range(4000)]
    seen = np.bincount(np.concatenate(rounds), minlength=50)
    assert abs(seen - 800).max() < 5 * math.sqrt(4000 * 0.2 * 0.8)
    sizes = np.array([len(r) for r in rounds])  # binomial
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=5 * math.sqrt(2 / 4000))
    assert np.array_equal(rounds[7], sample_poisson(50, 0.2, seed=0, round=7))
    assert any(len(sample_poisson(5, 0.1, seed=0, round=t)) == 0 for t in range(20))


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


# ---------------------------------------------------------------------------- how many steps


def test_stragglers_take_every_smaller_number_of_steps_alike():
    steps = np.array([local_steps(5, 0.4, seed=0, round=1, client=k) for k in range(5000)])
    counts = np.bincount(steps, minlength=6)[1:]
    expected = np.array([500, 500, 500, 500, 3000])
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert local_steps(5, 0.0, seed=0, round=1, client=3) == 5
    assert {local_steps(1, 1.0, seed=0, round=t, client=3) for t in range(20)} == {1}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_step_weights_are_those_of_torch_sgd_under_a_constant_gradient(momentum, nesterov):
    nesterov = nesterov and momentum > 0
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimiser = torch.optim.SGD([w], lr=0.5, momentum=momentum, nesterov=nesterov)
    for tau in range(1, 7):
        w.grad = torch.ones(1, dtype=torch.float64)
        optimiser.step()
        assert -w.item() == pytest.approx(0.5 * step_weight_sum(tau, momentum, nesterov), rel=1e-12)


# ---------------------------------------------------------------------------- with what weight


def test_shares_add_up_whoever_remains():
    assert shares([1, 2, 3, 4], np.array([3, 0])).tolist() == [0.8, 0.2]


def test_shares_of_nobody_and_of_nothing_are_no_division_by_zero():
    assert shares([1, 2], np.empty(0, np.int64)).tolist() == []
    assert shares([1, 0, 0], np.array([2, 1])).tolist() == [0, 0]


SIZES, TARGETS = (
    [3, 1, 4, 1, 5, 9],
    torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
)
CURVATURE, LR = 0.5 + torch.arange(6.0, dtype=torch.float64), 0.02


def federation(tau, momentum):
    """Clients of loss h_k |theta - t_k|^2 / 2, each with its own number of momentum steps."""

    def train(theta, clients, round):
        for client in clients:
            theta_k, buffer = theta.clone(), torch.zeros_like(theta)
            for _ in range(tau[client]):
                buffer.mul_(momentum).add_(CURVATURE[client] * (theta_k - TARGETS[client]))
                theta_k.sub_(LR * buffer)
            yield theta_k, torch.ones(1)

    def cohort(round):
        clients = sample_clients(6, 0.7, seed=1, round=round)
        efforts = [step_weight_sum(tau[k], momentum) for k in clients]
        weights = normalised_averaging(shares(SIZES, clients), efforts)
        return Cohort(clients, clients, weights)

    method = Method(any_sum=True)
    return FedAvg(torch.zeros(5, dtype=torch.float64), train, cohort, method=method)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_its_equation(momentum):
    tau, theta = [1, 2, 3, 4, 5, 6], torch.zeros(5, dtype=torch.float64)
    loop = federation(tau, momentum)
    for t in range(1, 4):
        (record,) = run(loop, t)
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
        torch.testing.assert_close(loop.theta, theta, rtol=0, atol=1e-10)
