"""Private runs: what they log and sum up, what epsilon leaves out, which options they refuse."""

import json

import pytest
from conftest import assert_frozen_stayed

from commands import fedavg
from federated import privacy
from federated.cohort import sample_poisson

TINY = (
    *("fedavg", "--data", "synthetic", "--clients", 20, "--fraction", 0.2, "--batch-size", 8),
    *("--rounds", 3, "--eval-every", 1, "--name", "x"),
)


@pytest.fixture
def accountant(monkeypatch):
    """Stands in for the accountant where it is not installed; its epsilon counts rounds."""
    monkeypatch.setattr(privacy, "check_accountant", lambda: None)
    monkeypatch.setattr(fedavg, "epsilon", lambda noise, fraction, rounds, delta: float(rounds))


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
    summary = json.loads((folder / "summary.json").read_text())["privacy"]
    assert (summary["epsilon"], summary["dp_noise"], summary["dp_delta"]) == (3.0, 0.8, 1e-5)
    assert len(summary["not_covered"]) == err.count("fitted") + err.count("calibrated")
    assert bool(summary["not_covered"]) == ("--head" in extra)
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


def test_a_run_that_clips_alone_needs_no_accountant(cli, small_data, monkeypatch):
    monkeypatch.setattr(privacy, "PACKAGE", "no_such_package")
    assert cli(*TINY, "--dp-noise", 0, "--dp-clip", 1, "--rounds", 1)[0] == 0
    log = (small_data / "runs" / "x" / "log.jsonl").read_text()
    assert "epsilon" not in log


def test_noise_beyond_the_fixed_point_is_refused(cli, accountant):
    status, _, err = cli(*TINY, "--dp-noise", 1e3, "--dp-clip", 100)  # over C K = 4
    assert status == 2 and "--dp-noise: noise of standard deviation 25000" in err, err
    assert err.count("\n") == 1
