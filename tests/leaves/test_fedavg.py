"""The round is McMahan's, its sum does not know the order of clients, and it stops anywhere."""

import io
import math

import numpy as np
import pytest
import torch

from fedavg import (
    ClientError,
    FedAvg,
    add_delta_,
    apply_total_,
    sample_clients,
    step_weight_sum,
)

TARGETS = torch.linspace(-1, 2, 60, dtype=torch.float64).view(12, 5)
SIZES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def quadratic(theta, steps=3, lr=0.3):
    """Clients whose loss is |theta - target|^2 / 2, trained by `steps` plain steps on `theta`."""

    def train(client, round):
        losses = []
        for _ in range(steps):
            error = theta - TARGETS[client].to(theta.dtype)
            losses.append(error.square().sum() / 2)
            theta.sub_(lr * error)
        return torch.stack(losses)

    return train


def federation(dtype=torch.float64, **options):
    theta = torch.zeros(5, dtype=dtype)
    return FedAvg(theta, SIZES, quadratic(theta), **dict(fraction=0.4, seed=3) | options)


def run(process, rounds):
    records = []
    while process.round < rounds:
        if (record := process.advance()) is not None:
            records.append({k: v for k, v in record.items() if k != "seconds"})
    return records


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


def test_every_client_gets_its_share_of_rounds():
    seen = np.bincount(
        np.concatenate([sample_clients(50, 0.2, seed=0, round=t) for t in range(2000)])
    )
    assert abs(seen - 400).max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_rounds_are_the_update_written_by_hand(server_lr):
    process, theta = federation(server_lr=server_lr), torch.zeros(5, dtype=torch.float64)
    for t in range(1, 5):
        (record,) = run(process, t)
        clients = sample_clients(12, 0.4, seed=3, round=t)
        n = sum(SIZES[k] for k in clients)
        # three steps of 0.3 towards the target leave (1 - 0.3)^3 of the distance
        change = sum(SIZES[k] / n * (1 - 0.7**3) * (TARGETS[k] - theta) for k in clients)
        loss = sum(
            SIZES[k]
            / n
            * np.mean([0.49**j for j in range(3)])
            * (theta - TARGETS[k]).square().sum()
            for k in clients
        )
        assert record["train_loss"] == pytest.approx(loss.item() / 2, rel=1e-12)
        assert record["clients"] == clients.tolist()
        theta = theta + server_lr * change
        # the fixed point's unit is 2^-48, and each of five clients rounds once
        torch.testing.assert_close(process.theta_global, theta, rtol=0, atol=1e-13)


def test_the_sum_knows_neither_order_nor_grouping():
    start = torch.randn(70_001)
    results = start + torch.randn(6, 70_001) * 10.0 ** torch.arange(-6, 0).view(6, 1)
    weights = [0.1, 0.25, 0.05, 0.3, 0.2, 0.1]

    def total(order):
        acc = torch.zeros(70_001, dtype=torch.int64)
        for k in order:
            add_delta_(acc, results[k], start, weights[k])
        return acc

    whole = total(range(6))
    assert torch.equal(whole, total([5, 3, 1, 0, 2, 4]))
    assert torch.equal(whole, total([0, 1]) + total([5]) + total([4, 3, 2]))
    theta = start.clone()
    apply_total_(theta, whole)
    shares = torch.tensor(weights, dtype=torch.float64).view(6, 1)
    exact = start.double() + (shares * (results - start).double()).sum(0)
    torch.testing.assert_close(theta, exact.float(), rtol=1.2e-7, atol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e5])
def test_an_unusable_update_names_round_and_client(bad):
    theta = torch.zeros(3)

    def train(client, round):
        if client == 7:
            theta[1] = bad
        return torch.ones(2)

    process = FedAvg(theta, SIZES, train, fraction=1.0)
    with pytest.raises(ClientError, match="round 1, client 7: its update is"):
        run(process, 1)


def test_a_loss_that_is_not_finite_names_its_step():
    theta = torch.zeros(3)
    process = FedAvg(theta, SIZES, lambda k, t: torch.tensor([1.0, math.inf]), fraction=0.1)
    with pytest.raises(ClientError, match=r"round 1, client \d+, local step 2: the loss is inf"):
        process.advance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", range(1, 12))
def test_a_round_in_hand_can_be_saved_at_every_client(stop, dtype):
    whole = federation(dtype)
    records = run(whole, 3)
    first = federation(dtype)
    found = [r for r in (first.advance() for _ in range(stop)) if r is not None]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = federation(dtype)
    second.load_state_dict(torch.load(file, weights_only=True))
    found = [{k: v for k, v in r.items() if k != "seconds"} for r in found] + run(second, 3)
    assert torch.equal(second.theta_global, whole.theta_global)
    assert found == records


def test_clients_trained_together_give_the_bits_of_clients_trained_alone():
    alone = federation()

    def together(theta_global, clients, round):
        for client in clients:
            theta = theta_global.clone()
            losses = quadratic(theta)(int(client), round)
            yield theta, losses

    theta = torch.zeros(5, dtype=torch.float64)
    batched = FedAvg(theta, SIZES, fraction=0.4, seed=3, train_clients=together)
    assert run(alone, 3) == run(batched, 3)
    assert torch.equal(alone.theta_global, batched.theta_global)


def test_one_client_is_local_training():
    theta, local = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    process = FedAvg(theta, [4], quadratic(theta), fraction=1.0)
    run(process, 3)
    for t in range(3):
        quadratic(local)(0, t)
    torch.testing.assert_close(process.theta_global, local, rtol=0, atol=3 * 2.0**-48)


def test_a_sample_and_weights_of_ones_own_take_the_place_of_the_usual_ones():
    options = dict(sample=lambda t: np.array([t, 11]), weigh=lambda clients, t: [0.25, 1.5])
    process, theta = federation(**options), torch.zeros(5, dtype=torch.float64)
    for t in (1, 2):
        (record,) = run(process, t)
        assert record["clients"] == [t, 11]
        pull = 0.25 * (TARGETS[t] - theta) + 1.5 * (TARGETS[11] - theta)
        theta = theta + (1 - 0.7**3) * pull
        torch.testing.assert_close(process.theta_global, theta, rtol=0, atol=1e-13)


def test_a_round_without_clients_changes_nothing_and_says_so():
    def sample(round):
        return np.empty(0, np.int64) if round == 2 else np.array([3, 8])

    process, never = federation(sample=sample), federation(sample=lambda t: np.array([3, 8]))
    records = run(process, 3)
    assert records[1]["unchanged"] and "train_loss" not in records[1] and not records[1]["clients"]
    assert records[1]["bytes_up"] == 0 and records[2]["train_loss"] > 0
    run(never, 2)
    assert torch.equal(process.theta_global, never.theta_global)


def test_weights_that_add_up_to_more_cannot_leave_the_fixed_point_range():
    theta = torch.zeros(3)

    def train(client, round):
        theta.fill_(9000.0)  # alone below the limit of 2^14
        return torch.ones(1)

    process = FedAvg(theta, SIZES, train, weigh=lambda clients, t: [2.0] * len(clients))
    with pytest.raises(ClientError, match="beyond the fixed-point range"):
        process.advance()


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


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"not {fraction}"):
        federation(fraction=fraction)


def test_bytes_count_every_sampled_client():
    record = run(federation(client_bytes=(20, 20)), 1)[0]
    assert record["bytes_up"] == record["bytes_down"] == 20 * len(record["clients"]) == 100


def test_bytes_down_count_who_was_sent_the_model_and_did_not_answer():
    options = dict(client_bytes=(20, 30), sample=lambda t: np.array([3, 8, 5]))
    (record,) = run(federation(answering=lambda clients, t: clients[:1], **options), 1)
    assert record["clients"] == [3] and record["dropped_out"] == [8, 5]
    assert (record["bytes_up"], record["bytes_down"]) == (20, 90)
    assert "dropped_out" not in run(federation(), 1)[0]


def test_the_training_loss_has_the_weights_of_the_average():
    weights = [0.5, 0.125]
    process = federation(sample=lambda t: np.array([2, 11]), weigh=lambda clients, t: weights)
    (record,) = run(process, 1)
    means = [quadratic(torch.zeros(5, dtype=torch.float64))(k, 1).mean().item() for k in (2, 11)]
    expected = (0.5 * means[0] + 0.125 * means[1]) / 0.625
    assert record["train_loss"] == pytest.approx(expected, rel=1e-14)


def test_what_a_client_cannot_keep_stops_the_round():
    def keep(client, round, theta_k, theta_global):
        assert not torch.equal(theta_k, theta_global)
        if client == 4:
            raise ClientError("round 1: the state of client 4")

    with pytest.raises(ClientError, match="the state of client 4"):
        run(federation(fraction=1.0, keep=keep), 1)
