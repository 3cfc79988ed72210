"""Private runs: what they log and sum up, what epsilon leaves out, which options they refuse."""

import json
import shutil

import pytest
import torch
from built import parsed
from conftest import assert_frozen_stayed
from past import records

from commands import accounts, fedavg
from federated import methods, privacy
from federated.cohort import sample_poisson

TINY = (
    *("fedavg", "--data", "synthetic", "--clients", 20, "--fraction", 0.2, "--batch-size", 8),
    *("--rounds", 3, "--eval-every", 1, "--name", "x"),
)


@pytest.fixture
def accountant(monkeypatch):
    """Stands in for the accountant where it is not installed; its epsilon counts rounds."""
    monkeypatch.setattr(privacy, "check_accountant", lambda: None)
    monkeypatch.setattr(accounts, "epsilon", lambda noise, fraction, rounds, delta: float(rounds))


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
    private = ("--dp-noise", 0.8, "--dp-clip", 0.5, "--dp-seed", 7)
    status, _, err = cli(*TINY, *private, *extra)
    assert status == 0 and "protects nobody" in err, err
    folder = small_data / "runs" / "x"
    log = records(folder)
    assert [r["epsilon"] for r in log] == [0.0, 1.0, 2.0, 3.0]
    drawn = [sample_poisson(20, 0.2, seed=7, round=t).tolist() for t in (1, 2, 3)]
    assert [r["answered"] for r in log[1:]] == list(map(len, drawn))
    assert not any({"clients", "train_loss"} & r.keys() for r in log)
    summary = json.loads((folder / "summary.json").read_text())["privacy"]
    assert (summary["epsilon"], summary["dp_noise"], summary["dp_delta"]) == (3.0, 0.8, 1e-5)
    said = err.count("fitted") + err.count("calibrated")
    assert len(summary["not_covered"]) == said + len(accounts.NEVER_COVERED)
    assert bool(said) == ("--head" in extra) and not summary["protects"]
    (learner,) = learners
    flat = learner.flat
    assert not flat.theta[~flat.marked()].any()  # padding stays zero
    if learner.mask:
        assert_frozen_stayed(learner)


@pytest.mark.parametrize("rule", ["least-sensitive", "lowest-magnitude", "random"])
def test_a_mask_file_is_named_as_uncovered_where_clients_scored_it(
    cli, small_data, accountant, rule
):
    scored = rule == "least-sensitive"
    images = ("--calibration-images", 20) if scored else ()
    calibration = ("--clients", 20, *images, "--mask-rule", rule, "--name", "m")
    assert cli("calibrate", "--data", "synthetic", *calibration)[0] == 0
    given = ("--head", "ridge", "--mask", "runs/m/mask.pt", "--rounds", 1)
    status, _, err = cli(*TINY, "--dp-noise", 0.8, "--dp-clip", 0.5, *given)
    assert status == 0 and ("mask calibrated" in err) == scored


def test_bad_privacy_options_are_refused(cli, monkeypatch):
    private = (*TINY, "--dp-noise", 1, "--dp-clip", 1)
    monkeypatch.setattr(privacy, "PACKAGE", "no_such_package")
    for command, message in (
        ((*TINY, "--dp-noise", 1), "--dp-noise Z needs --dp-clip S"),
        ((*TINY, "--dp-clip", 1), "--dp-noise Z needs --dp-clip S"),
        ((*TINY, "--dp-delta", 1e-6), "--dp-delta belongs to a --dp-noise"),
        ((*private, "--scaffold"), "--scaffold with --dp-noise"),
        ((*private, "--aggregate", "fednova"), "--aggregate with --dp-noise"),
        ((*private, "--dropout", 0.5), "--dropout with --dp-noise"),
        (private, "--dp-noise: epsilon needs Google's accountant: pip install dp-accounting"),
    ):
        status, _, err = cli(*command)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_run_that_clips_alone_needs_no_accountant(cli, small_data, monkeypatch):
    monkeypatch.setattr(privacy, "PACKAGE", "no_such_package")
    assert cli(*TINY, "--dp-noise", 0, "--dp-clip", 1, "--rounds", 1)[0] == 0
    log = (small_data / "runs" / "x" / "log.jsonl").read_text()
    assert "epsilon" not in log


def test_noise_beyond_the_fixed_point_is_refused(cli, accountant):
    status, _, err = cli(*TINY, "--dp-noise", 1e3, "--dp-clip", 100)  # over C K = 4
    assert status == 2 and "--dp-noise: noise of standard deviation 25000" in err, err
    assert err.count("\n") == 1


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["process"]


def test_the_noise_is_a_secret_of_the_run_and_resuming_is_exact(cli, small_data, accountant):
    private = ("--dp-noise", 0.8, "--dp-clip", 0.5)
    for name in ("a", "b"):
        status, _, err = cli(*TINY, *private, "--name", name)
        assert status == 0 and "protects nobody" not in err, err
    a, b = (state_of(small_data / "runs" / name) for name in "ab")
    assert not torch.equal(a["theta"], b["theta"])
    secret = a["states"]["secret"]["key"]
    for path in (small_data / "runs" / "a").iterdir():  # nothing but the checkpoints hold it
        assert path.name.startswith("checkpoint") or secret.encode() not in path.read_bytes()
    summary = json.loads((small_data / "runs" / "a" / "summary.json").read_text())["privacy"]
    assert summary["protects"] and summary["dp_seed"] is None
    shutil.copytree(small_data / "runs" / "a", small_data / "runs" / "c")
    ends = []
    for name in ("a", "c"):
        assert cli(*TINY, *private, "--name", name, "--rounds", 4)[0] == 0
        ends.append(state_of(small_data / "runs" / name)["theta"])
    assert torch.equal(*ends)


def test_a_client_alone_in_its_round_is_refused_or_named(cli, small_data):
    secure = ("--secure-aggregation", "--rounds", 6, "--J", 1)
    status, _, err = cli(*TINY, *secure, "--fraction", 0.05)
    assert status == 2 and "one client a round is sent in the clear" in err
    status, _, err = cli(*TINY, *secure, "--fraction", 0.1, "--dropout", 0.5)
    assert status == 0 and "alone in its round is sent in the clear" in err
    rounds = records(small_data / "runs" / "x")[1:]
    alone = [r for r in rounds if len(r["clients"]) == 1]
    assert alone and all(r["in_the_clear"] == r["clients"] for r in alone)
    assert not any("in_the_clear" in r for r in rounds if len(r["clients"]) != 1)


def test_a_private_run_does_not_name_a_client_that_is_alone(cli, small_data):
    private = ("--dp-noise", 1, "--dp-clip", 1, "--dp-seed", 0, "--secure-aggregation")
    status, _, err = cli(*TINY, *private, "--fraction", 0.1, "--rounds", 8, "--J", 1)
    assert status == 0 and "(answered: 1)" in err and "steps are too long" not in err
    rounds = records(small_data / "runs" / "x")[1:]
    assert any(r["answered"] == 1 for r in rounds)
    assert not any({"in_the_clear", "clients"} & set(r) for r in rounds)


def test_runs_of_one_seed_do_not_share_their_masks(small_data, monkeypatch):
    seeds = []
    conceal = methods.conceal_

    def recorded(part, client, clients, round, *, seed):
        seeds.append(seed)
        conceal(part, client, clients, round, seed=seed)

    monkeypatch.setattr(methods, "conceal_", recorded)
    for name, lr in (("a", 0.1), ("b", 0.2)):
        command = ("fedavg", "--rounds", 1, "--J", 1, "--secure-aggregation", "--lr", lr)
        line = parsed(*command, "--data-dir", small_data, "--name", name)
        fedavg.run(line)
    assert len(set(seeds)) == 2
