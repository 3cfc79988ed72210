"""DP-FedAvg: samples, clipping and noise are the written ones, and epsilon is the accountant's."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import in_threads

import fedavg
import privacy
from privacy import add_noise_, clip_factor, epsilon, sample_poisson

CLIENTS, FRACTION, BOUND = 20, 0.3, 0.7
TARGETS = torch.randn(CLIENTS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRAINS = torch.tensor([True, True, False, True, True])
SAMPLE = functools.partial(sample_poisson, CLIENTS, FRACTION, seed=3)


def federation(noise=0.0, group=None, sample=SAMPLE):
    theta = torch.zeros(5, dtype=torch.float64)

    def train(client, round):
        theta.add_((TARGETS[client] - theta) * TRAINS, alpha=0.5)
        return torch.ones(1)

    def server_step(theta, total, unit):
        std = noise * BOUND / (FRACTION * CLIENTS)
        add_noise_(total, std, unit=unit, seed=3, round=loop.round, where=TRAINS)
        fedavg.apply_total_(theta, total, unit)

    loop = fedavg.FedAvg(
        theta,
        [1] * CLIENTS,
        train,
        sample=lambda round: sample(round=round),
        weigh=lambda clients, round: [1 / (FRACTION * CLIENTS)] * len(clients),
        clip=functools.partial(clip_factor, bound=BOUND),
        step_empty=True,
        server_step=server_step,
        group=group,
    )
    return loop


def run(loop, rounds):
    while loop.round < rounds:
        loop.advance()
    return loop.theta_global.clone()


def test_without_noise_a_round_is_the_clipped_sum_over_the_expected_count():
    loop, theta, clipped = federation(), torch.zeros(5, dtype=torch.float64), 0
    for t in range(1, 6):
        found, total = run(loop, t), torch.zeros(5, dtype=torch.float64)
        for k in SAMPLE(round=t):
            delta = 0.5 * (TARGETS[k] - theta) * TRAINS
            clipped += bool(delta.norm() > BOUND)
            total += delta * min(1.0, BOUND / delta.norm().item())
        theta = theta + total / (FRACTION * CLIENTS)
        torch.testing.assert_close(found, theta, rtol=0, atol=1e-10)
    assert clipped > 3


def test_a_clipped_change_has_the_norm_of_the_bound_and_a_small_one_its_own():
    start, theta = torch.ones(700_001), torch.ones(700_001) * 1.5
    norm = (theta - start).double().norm().item()
    assert clip_factor(theta, start, 2.0) * norm == pytest.approx(2.0, rel=1e-12)
    assert clip_factor(theta, start, 2 * norm) == 1.0 == clip_factor(start, start, 2.0)
    assert math.isnan(clip_factor(theta * math.nan, start, 2.0))  # which the round then refuses


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


def test_every_client_is_drawn_on_its_own_with_the_same_probability():
    rounds = [sample_poisson(50, 0.2, seed=0, round=t) for t in range(4000)]
    seen = np.bincount(np.concatenate(rounds), minlength=50)
    assert abs(seen - 800).max() < 5 * math.sqrt(4000 * 0.2 * 0.8)
    sizes = np.array([len(r) for r in rounds])  # binomial
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=5 * math.sqrt(2 / 4000))
    assert np.array_equal(rounds[7], sample_poisson(50, 0.2, seed=0, round=7))
    assert any(len(sample_poisson(5, 0.1, seed=0, round=t)) == 0 for t in range(20))


def test_a_round_without_clients_adds_its_noise():
    def nobody(round):
        return np.empty(0, np.int64)

    loop = federation(noise=1.0, sample=nobody)
    record = loop.advance()
    assert "unchanged" not in record and "train_loss" not in record and not record["clients"]
    expected = torch.zeros(5, dtype=torch.int64)
    std = BOUND / (FRACTION * CLIENTS)
    add_noise_(expected, std, unit=2.0**-48, seed=3, round=1, where=TRAINS)
    assert torch.equal(loop.theta_global, expected.double() * 2.0**-48)
    assert (loop.theta_global != 0).tolist() == TRAINS.tolist()


def test_order_processes_and_interruption_change_no_bit():
    whole = run(federation(noise=0.5), 6)
    reordered = federation(noise=0.5, sample=lambda round: SAMPLE(round=round)[::-1].copy())
    assert torch.equal(run(reordered, 6), whole)
    for ends in in_threads(2, lambda group: run(federation(noise=0.5, group=group), 6)).values():
        assert torch.equal(ends, whole)
    first = federation(noise=0.5)
    for _ in range(9):
        first.advance()
    second = federation(noise=0.5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, 6), whole)


# ---------------------------------------------------------------------------- epsilon


def gaussian_delta(eps, mu):
    """delta(eps) of the Gaussian mechanism, exactly: Balle 2018, arXiv:1805.06530, theorem 8."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


def test_epsilon_is_above_the_exact_one_of_all_clients_and_falls_with_sampling_and_noise():
    pytest.importorskip("dp_accounting", reason="epsilon: pip install dp-accounting")
    exact, rounds, noise = 0.0, 10, 4.0
    while gaussian_delta(exact, math.sqrt(rounds) / noise) > 1e-5:
        exact += 1e-3
    found = epsilon(noise, 1.0, rounds, 1e-5)
    assert exact <= found < 1.15 * exact  # Renyi accounting is an upper bound, close to it
    assert epsilon(noise, 0.1, rounds, 1e-5) < found / 4
    assert epsilon(2 * noise, 1.0, rounds, 1e-5) < found
    assert epsilon(noise, 1.0, 2 * rounds, 1e-5) > found
    assert epsilon(noise, 1.0, 0, 1e-5) == 0.0


# ---------------------------------------------------------------------------- the command

TINY = (
    *("fedavg", "--data", "synthetic", "--clients", 20, "--fraction", 0.2, "--batch-size", 8),
    *("--rounds", 3, "--eval-every", 1, "--name", "x"),
)


@pytest.fixture
def accountant(monkeypatch):
    """Stands in for the accountant where it is not installed; its epsilon counts rounds."""
    monkeypatch.setattr(privacy, "check_accountant", lambda: None)
    monkeypatch.setattr(privacy, "epsilon", lambda noise, fraction, rounds, delta: float(rounds))


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--head", "ridge", "--mask-rule", "least-sensitive", "--server", "fedadam"),
        ("--train", "head", "--secure-aggregation"),
    ],
    ids=lambda o: " ".join(str(x) for x in o),
)
def test_a_private_run_tells_what_it_spent(cli, small_data, accountant, learners, extra):
    private = ("--dp-noise", 0.8, "--dp-clip", 0.5)
    status, _, err = cli(*TINY, *private, *extra)
    assert status == 0, err
    folder = small_data / "runs" / "x"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["epsilon"] for r in log] == [0.0, 1.0, 2.0, 3.0]
    drawn = [sample_poisson(20, 0.2, seed=0, round=t).tolist() for t in (1, 2, 3)]
    assert [r["clients"] for r in log[1:]] == drawn
    told = json.loads((folder / "summary.json").read_text())["privacy"]
    assert (told["epsilon"], told["dp_noise"], told["dp_delta"]) == (3.0, 0.8, 1e-5)
    assert len(told["not_covered"]) == err.count("fitted") + err.count("calibrated")
    assert bool(told["not_covered"]) == ("--head" in extra)
    (learner,) = learners
    flat = learner.flat
    assert not flat.theta[~flat.marked()].any()  # padding stays zero
    if learner.mask:
        start = dict(learner.workspace.build_model().named_parameters())
        now = dict(learner.model.named_parameters())
        for name, trains in learner.mask.parts().items():
            assert torch.equal(now[name][~trains], start[name][~trains]), name


@pytest.mark.parametrize("rule", ["least-sensitive", "lowest-magnitude", "random"])
def test_a_mask_file_is_told_as_uncovered_where_clients_scored_it(
    cli, small_data, accountant, rule
):
    scored = rule == "least-sensitive"
    images = ("--calibration-images", 20) if scored else ()
    made = ("--clients", 20, *images, "--mask-rule", rule, "--name", "m")
    assert cli("calibrate", "--data", "synthetic", *made)[0] == 0
    given = ("--head", "ridge", "--mask", "runs/m/mask.pt", "--rounds", 1)
    status, _, err = cli(*TINY, "--dp-noise", 0.8, "--dp-clip", 0.5, *given)
    assert status == 0 and ("mask calibrated" in err) == scored


def test_bad_privacy_options_are_refused(cli, monkeypatch):
    private = (*TINY, "--dp-noise", 1, "--dp-clip", 1)
    monkeypatch.setattr(privacy, "PACKAGE", "no_such_package")
    for command, message in (
        ((*TINY, "--dp-noise", 1), "--dp-noise needs --dp-clip S"),
        ((*TINY, "--dp-clip", 1), "--dp-clip needs --dp-noise Z"),
        ((*TINY, "--dp-delta", 1e-6), "--dp-delta belongs to --dp-noise"),
        ((*private, "--scaffold"), "--scaffold with --dp-noise"),
        ((*private, "--aggregate", "fednova"), "--aggregate with --dp-noise"),
        ((*private, "--dropout", 0.5), "--dropout with --dp-noise"),
        (private, "--dp-noise: epsilon needs Google's accountant: pip install dp-accounting"),
    ):
        status, _, err = cli(*command)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert cli(*TINY, "--dp-noise", 0, "--dp-clip", 1, "--rounds", 1)[0] == 0  # clips alone


def test_noise_beyond_the_fixed_point_is_refused(cli, accountant):
    total = torch.zeros(100_000, dtype=torch.int64)
    add_noise_(total, 2.0**11, unit=2.0**-48, seed=0, round=1)
    # five standard errors; a wrapped entry alone would be 32 deviations out
    assert total.double().mul(2.0**-48).std().item() == pytest.approx(2**11, rel=0.012)
    with pytest.raises(ValueError, match="noise of standard deviation 2049 in each parameter"):
        add_noise_(total, 2049.0, unit=2.0**-48, seed=0, round=1)
    status, _, err = cli(*TINY, "--dp-noise", 1e3, "--dp-clip", 100)  # over C K = 4
    assert status == 2 and "--dp-noise: noise of standard deviation 25000" in err, err
    assert err.count("\n") == 1


def test_a_private_runs_training_loss_counts_clients_alike():
    loop = federation()
    loop.train_clients = lambda theta, clients, round: (
        (theta.clone(), torch.tensor([float(k)])) for k in clients
    )
    loop.shard_sizes = list(range(1, CLIENTS + 1))
    record = loop.advance()
    while record is None:
        record = loop.advance()
    assert record["train_loss"] == pytest.approx(np.mean(record["clients"]), rel=1e-12)
