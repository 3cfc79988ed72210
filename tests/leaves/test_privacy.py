"""DP-FedAvg: samples, clipping and noise are the written ones, and epsilon is the accountant's."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import in_threads
from loops import end

from fedavg import Cohort, FedAvg, Method
from federated.cohort import sample_poisson
from federated.methods import hidden, private
from federated.privacy import Secret, add_noise_, clip_factor, conceal_, epsilon

CLIENTS, FRACTION, BOUND = 20, 0.3, 0.7
TARGETS = torch.randn(CLIENTS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRAINS = torch.tensor([True, True, False, True, True])
SAMPLE = functools.partial(sample_poisson, CLIENTS, FRACTION, seed=3)


def train(theta, clients, round):
    for client in clients:
        yield theta + 0.5 * (TARGETS[client] - theta) * TRAINS, torch.tensor([float(client)])


def federation(noise=0.0, group=None, sample=SAMPLE, around=lambda method: method):
    def cohort(round):
        clients = sample(round=round)
        return Cohort(clients, clients, np.full(len(clients), 1 / (FRACTION * CLIENTS)))

    std = noise * BOUND / (FRACTION * CLIENTS)
    method = private(Method(bytes_up=20), clip=BOUND, std=std, secret=Secret(3), where=TRAINS)
    theta = torch.zeros(5, dtype=torch.float64)
    return FedAvg(theta, train, cohort, method=around(method), group=group)


# ---------------------------------------------------------------------------- clipping


def test_without_noise_a_round_is_the_clipped_sum_over_the_expected_count():
    loop, theta, clipped = federation(), torch.zeros(5, dtype=torch.float64), 0
    for t in range(1, 6):
        there, total = end(loop, t), torch.zeros(5, dtype=torch.float64)
        for k in SAMPLE(round=t):
            delta = 0.5 * (TARGETS[k] - theta) * TRAINS
            clipped += bool(delta.norm() > BOUND)
            total += delta * min(1.0, BOUND / delta.norm().item())
        theta = theta + total / (FRACTION * CLIENTS)
        torch.testing.assert_close(there, theta, rtol=0, atol=1e-10)
    assert clipped > 3


def test_a_clipped_change_has_the_norm_of_the_bound_and_a_small_one_its_own():
    start, theta = torch.ones(700_001), torch.ones(700_001) * 1.5
    norm = (theta - start).double().norm().item()
    assert clip_factor(theta, start, 2.0) * norm == pytest.approx(2.0, rel=1e-12)
    assert clip_factor(theta, start, 2 * norm) == 1.0 == clip_factor(start, start, 2.0)
    assert math.isnan(clip_factor(theta * math.nan, start, 2.0))  # which the round then refuses


def test_a_private_round_says_nothing_of_single_clients_and_is_never_saved_within():
    loop = federation()
    record = loop.advance()  # one call, however many take part
    assert record["answered"] == len(SAMPLE(round=1)) > 1
    assert not {"train_loss", "clients"} & record.keys()
    assert not {"done", "total"} & loop.state_dict().keys()


def test_a_secret_is_128_bits_of_the_systems_and_a_groups_is_one():
    keys = {Secret().key for _ in range(50)}
    assert len(keys) == 50 and max(keys) > 2**120 and max(keys) < 2**128

    def work(group):
        secret = Secret()
        secret.merge(group)
        again = Secret()
        again.load_state_dict(secret.state_dict())
        return secret.key, again.key

    shared = in_threads(3, work)
    assert len({key for pair in shared.values() for key in pair}) == 1
    draws = [sample_poisson(1000, 0.5, seed=key, round=1).tolist() for key in (1, 1 + 2**64)]
    assert draws[0] != draws[1]  # all of the bits count


# ---------------------------------------------------------------------------- noise


def test_noise_has_its_deviation_and_is_absent_where_nothing_trains():
    where = torch.arange(1_000_003) % 4 != 1
    start = torch.arange(1_000_003)
    total = start.clone()
    add_noise_(total, 0.02, unit=2.0**-48, seed=0, round=1, where=where)
    assert torch.equal(total[~where], start[~where])
    noise = (total - start)[where].double() * 2.0**-48
    count = len(noise)  # five standard errors of each figure
    assert noise.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * count))
    assert abs(noise.mean().item()) < 5 * 0.02 / math.sqrt(count)
    assert noise.abs().max() > 4 * 0.02
    inside = (noise.abs() < 0.02).double().mean().item()
    assert inside == pytest.approx(0.682689, abs=5 * math.sqrt(0.22 / count))
    again, other, later = (start.clone() for _ in range(3))
    add_noise_(again, 0.02, unit=2.0**-48, seed=0, round=1, where=where)
    add_noise_(other, 0.02, unit=2.0**-48, seed=1, round=1, where=where)
    add_noise_(later, 0.02, unit=2.0**-48, seed=0, round=2, where=where)
    assert torch.equal(again, total)
    for draw in (other, later):
        pair = torch.stack([noise, (draw - start)[where].double()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(count)


def test_a_round_without_clients_adds_its_noise():
    loop = federation(noise=1.0, sample=lambda round: np.empty(0, np.int64))
    record = loop.advance()
    assert "unchanged" not in record and record["answered"] == 0
    expected = torch.zeros(5, dtype=torch.int64)
    std = BOUND / (FRACTION * CLIENTS)
    add_noise_(expected, std, unit=2.0**-48, seed=3, round=1, where=TRAINS)
    assert torch.equal(loop.theta, expected.double() * 2.0**-48)
    assert (loop.theta != 0).tolist() == TRAINS.tolist()


def test_noise_beyond_the_fixed_point_is_refused():
    total = torch.zeros(100_000, dtype=torch.int64)
    add_noise_(total, 2.0**11, unit=2.0**-48, seed=0, round=1)
    # five standard errors; a wrapped entry alone would be 32 deviations out
    assert total.double().mul(2.0**-48).std().item() == pytest.approx(2**11, rel=0.012)
    with pytest.raises(ValueError, match="noise of standard deviation 2049 in each parameter"):
        add_noise_(total, 2049.0, unit=2.0**-48, seed=0, round=1)


# ---------------------------------------------------------------------------- secure aggregation


def test_hidden_parts_look_uniform_and_add_up_to_what_they_hide():
    clients, generator = [7, 0, 11, 4], torch.Generator().manual_seed(0)
    parts = torch.randint(-(2**40), 2**40, (4, 10_000), generator=generator)
    parts[0] = 0
    sealed = parts.clone()
    for part, client in zip(sealed, clients, strict=True):
        conceal_(part, client, clients, round=3, seed=1)
    assert torch.equal(sealed.sum(dim=0), parts.sum(dim=0))  # mod 2^64
    for part in (*sealed, sealed[:3].sum(dim=0)):
        uniform = part.double() / 2.0**63  # in [-1, 1): variance 1/3, five standard errors
        assert abs(uniform.mean().item()) < 5 * math.sqrt(1 / 3 / 10_000)
        assert uniform.square().mean().item() == pytest.approx(1 / 3, abs=5 * 0.298 / 100)
    bits = torch.stack([(sealed[0] >> i & 1).double().mean() for i in range(64)])
    assert (bits - 0.5).abs().max() < 5 * 0.5 / 100  # of zeros too every bit is hidden
    other = parts[0].clone()
    conceal_(other, 7, clients, round=4, seed=1)
    assert (other != sealed[0]).all()
    alone = parts[0].clone()
    conceal_(alone, 7, [7], round=3, seed=1)
    assert torch.equal(alone, parts[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_secure_aggregation_changes_no_bit_and_sends_eight_bytes_an_entry(size):
    whole = end(federation(noise=0.5), 6)

    def work(group):
        loop = federation(0.5, group, around=lambda method: hidden(method, seed=1))
        while (record := loop.advance()) is None:
            pass
        assert record["bytes_up"] == 40 * record["answered"] > 0
        return end(loop, 6)

    ends = in_threads(size, work)
    assert all(torch.equal(ends[rank], whole) for rank in range(size))


# ---------------------------------------------------------------------------- epsilon


def gaussian_delta(eps, mu):
    """delta(eps) of the Gaussian mechanism, exactly: Balle 2018, arXiv:1805.06530, theorem 8."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


def test_epsilon_is_above_the_exact_value_of_all_clients_and_falls_with_sampling_and_noise():
    pytest.importorskip("dp_accounting", reason="epsilon: pip install dp-accounting")
    exact, rounds, noise = 0.0, 10, 4.0
    while gaussian_delta(exact, math.sqrt(rounds) / noise) > 1e-5:
        exact += 1e-3
    bound = epsilon(noise, 1.0, rounds, 1e-5)
    assert exact <= bound < 1.15 * exact  # Renyi accounting is an upper bound, close to it
    assert epsilon(noise, 0.1, rounds, 1e-5) < bound / 4
    assert epsilon(2 * noise, 1.0, rounds, 1e-5) < bound
    assert epsilon(noise, 1.0, 2 * rounds, 1e-5) > bound
    assert epsilon(noise, 1.0, 0, 1e-5) == 0.0
    for none in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="of noise above 0"):
            epsilon(none, 1.0, rounds, 1e-5)


@pytest.mark.parametrize("total", [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5)])
def test_noise_and_pads_are_for_one_vector_of_whole_numbers(total):
    """A second one in a round, a row say, would get the same numbers."""
    with pytest.raises(ValueError, match=r"one vector \(P,\) int64"):
        add_noise_(total, 0.5, unit=2.0**-48, seed=7, round=1)
    with pytest.raises(ValueError, match=r"one vector \(P,\) int64"):
        conceal_(total, client=3, clients=[3, 7], round=1)


def test_seeds_are_numpys_or_a_whole_secret():
    hidden_parts = []
    for seed in (np.int64(3), 3, Secret().key):
        pair = torch.zeros(2, 5, dtype=torch.int64)
        for client, part in zip((3, 7), pair, strict=True):
            conceal_(part, client, [3, 7], 1, seed=seed)
        assert pair[0].any() and not pair.sum(0).any()
        hidden_parts.append(pair)
    assert torch.equal(*hidden_parts[:2])
    assert list(sample_poisson(9, 0.5, seed=np.int64(3), round=1)) == list(
        sample_poisson(9, 0.5, seed=3, round=1)
    )


def test_all_bits_of_a_secret_count():
    drawn = {"noise": set(), "pad": set()}
    for seed in (1, 1 + 2**64, 1 + 2**127):
        noise, pad = torch.zeros(2, 5, dtype=torch.int64)
        add_noise_(noise, 1.0, unit=2.0**-48, seed=seed, round=1)
        conceal_(pad, 3, [3, 7], 1, seed=seed)
        drawn["noise"].add(tuple(noise.tolist())), drawn["pad"].add(tuple(pad.tolist()))
    assert {name: len(draws) for name, draws in drawn.items()} == {"noise": 3, "pad": 3}
