"""Runs that started alike become one model, and diagnostics that change nothing."""

import json
import re
import shutil

import pytest
import torch
from past import records, theta

from commands.merge import RULES
from machine import safe_files

TINY = ("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.3)
TINY = (*TINY, "--batch-size", 8, "--eval-every", 2)


def figures(out):
    return dict(re.findall(r"^(\w+) +(\S+)", out, re.M))


@pytest.fixture
def two_runs(cli, small_data):
    """The folders of two runs that start alike, of other rates and shards."""
    assert cli(*TINY, "--name", "a")[0] == 0
    assert cli(*TINY, "--name", "b", "--lr", 0.05, "--nc", 20, "--train", "blocks.1")[0] == 0
    return small_data / "runs" / "a", small_data / "runs" / "b"


def test_every_rule_makes_a_model_of_two_runs(cli, two_runs):
    seen = {}
    for rule in RULES:
        images = ("--fisher-images", 8) if rule == "fisher" else ()
        status, out, err = cli("merge", *two_runs, "--rule", rule, *images)
        assert status == 0, err
        seen[rule] = figures(out)
        names = {"cosine", "sign_agreement", "disentanglement_error", "linearity_error"}
        assert names | {"val_acc", "test_acc", "distance"} <= set(seen[rule])
    moved = {rule: float(found["distance"]) for rule, found in seen.items()}
    assert moved["add"] == pytest.approx(2 * moved["mean"], rel=1e-5)
    assert moved["sign"] == pytest.approx(moved["mean"], rel=1e-5)
    assert len({found["test_loss"] for found in seen.values()}) == len(RULES)


def test_one_run_is_itself_nothing_or_unlearned(cli, two_runs):
    run, _ = two_runs
    written = {}
    for scale in (1, 0, -1):
        status, out, err = cli("merge", run, "--scale", scale, "--out", f"scale{scale}.pt")
        assert status == 0, err
        written[scale] = safe_files.load_checked(run.parent.parent / f"scale{scale}.pt")
        if scale:
            continue
        assert float(figures(out)["val_loss"]) == pytest.approx(records(run)[0]["val_loss"])
    _, out, _ = cli("eval", run)
    _, merged, _ = cli("merge", run)
    losses = [float(figures(said)["test_loss"]) for said in (merged, out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trained = theta(run)
    ends = written[1]["cls_token"].flatten()  # start + (end - start) rounds twice
    torch.testing.assert_close(trained[:48], ends, rtol=0, atol=1e-7)
    for name, start in written[0].items():
        middle = (written[1][name] + written[-1][name]) / 2
        torch.testing.assert_close(middle, start, rtol=0, atol=1e-7)
    assert cli(*TINY, "--name", "on", "--weights", "scale1.pt", "--rounds", 1)[0] == 0


def test_runs_that_do_not_go_together_are_refused_by_name(cli, two_runs):
    run, _ = two_runs
    other = run.with_name("other")
    shutil.copytree(run, other)
    path = other / "config.json"
    config = json.loads(path.read_text())
    del config[safe_files.SEAL]
    for name, value in {"model": "vit_s16", "seed": 5, "weights_sha256": "0"}.items():
        changed = config | {"options": config["options"] | {name: value}}
        path.write_text(json.dumps(changed))
        status, _, err = cli("merge", run, other)
        assert status == 2 and err.count("\n") == 1
        assert f"{other} cannot be merged with {run}: {name} is {value} there" in err
    fitted = ("--name", "fitted", "--head", "ridge", "--lr", 0.01)
    assert cli(*TINY, *fitted)[0] == 0
    status, _, err = cli("merge", run, run.with_name("fitted"))
    assert status == 2 and f"fitted and {run} did not start alike: head.weight differs" in err


MEASURED = {
    *("update_cosine", "update_sign_agreement", "update_norm", "mean_update_norm"),
    *("distance", "displacement", "linearity_error", "disentanglement_error"),
}
MATCHED = {"matched_linearity_error", "matched_disentanglement_error"}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--head", "ridge", "--mask-rule", "random", "--precision", "bf16"),
        ("--train", "head", "--head", "ridge"),
    ],
    ids=lambda o: " ".join(o),
)
def test_diagnostics_change_no_bit_and_measure_what_they_say(cli, small_data, learners, options):
    assert cli(*TINY, "--name", "plain", *options)[0] == 0
    status, _, err = cli(*TINY, "--name", "measured", "--diagnostics", *options)
    assert status == 0, err
    plain, measured = (small_data / "runs" / name for name in ("plain", "measured"))
    assert torch.equal(theta(plain), theta(measured))
    found = records(measured)
    for record, expected in zip(found, records(plain), strict=True):
        extra = {k for k in record if k not in expected}
        assert extra - MATCHED == (MEASURED if record["round"] == 2 else set())
        assert all(record[k] == v for k, v in expected.items() if k != "seconds")
    last = found[-1]
    assert -1 <= last["update_cosine"] <= 1 and 0 <= last["update_sign_agreement"] <= 1
    assert 0 < last["mean_update_norm"] < last["update_norm"]
    start = learners[-1].workspace.build_model()
    head = torch.load(measured / "head.pt", weights_only=True) if options else {}
    parameters = dict(start.named_parameters())
    for name, values in head.items() if "--train" in options else ():
        if f"head.{name}" in parameters:
            parameters[f"head.{name}"].data = values.float()
    moved = sum(
        (learners[-1].flat.view(learners[-1].flat.theta, name) - parameters[name]).square().sum()
        for name in learners[-1].flat.shapes
    )
    assert last["distance"] == pytest.approx(moved.sqrt().item(), rel=1e-4)
    if options[:1] == ("--train",):  # a head is linear in its parameters
        assert last["linearity_error"] < 1e-3
    else:
        assert 1e-3 < last["linearity_error"]
