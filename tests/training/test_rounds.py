"""A federated run is put together as its options say, and fits or is refused before it begins."""

import json

import pytest
import torch
from built import build, build_learner, build_loop

from commands.options import federation
from fedavg import Method
from federated.cohort import sample_clients
from federated.methods import METHODS
from machine.runs import Run
from training import rounds

TINY = ("--clients", 20, "--J", 2, "--batch-size", 8, "--fraction", 0.2, "--lr", 0.05)
COMMAND = ("fedavg", "--data", "synthetic", "--rounds", 2, "--eval-every", 2, *TINY)


def test_a_round_averages_what_the_clients_did(small_data):
    learner, clients = build(small_data, "--clients", 10)
    start, sizes = learner.entries.theta.clone(), [len(shard) for shard in clients.shards]
    sent = sample_clients(10, 0.3, seed=0, round=1)
    expected = torch.zeros_like(start, dtype=torch.float64)
    for client in map(int, sent):
        share = sizes[client] / sum(sizes[k] for k in sent)
        expected += share * (clients.train_client(start, client, 1)[0] - start).double()
    _, loop = build_loop(small_data, "--clients", 10, "--fraction", 0.3)
    while loop.advance() is None:
        pass
    # the fixed point's half unit per client, then one rounding to fp32
    average = (start.double() + expected).float()
    torch.testing.assert_close(loop.theta, average, rtol=2e-7, atol=1e-9)


def test_a_method_knows_its_entries_where_the_exact_sums_are(small_data, monkeypatch):
    seen = []
    monkeypatch.setitem(METHODS, "mean", lambda o, shared: seen.append(shared) or Method())
    monkeypatch.setattr(rounds, "exact_place", lambda device: torch.device("meta"))
    learner, _, line = build_learner(small_data)
    rounds.method_of(learner, federation(line.groups), {})
    assert seen[-1].entries.is_meta


def test_rounds_in_which_all_clients_drop_out_are_empty_and_logged(cli, learners):
    status, out, err = cli(*COMMAND, "--dropout", 1, "--name", "none")
    assert status == 0, err
    run = Run("runs/none")
    for record in run.records()[1:]:
        assert record["unchanged"] and record["bytes_up"] == 0 and not record["clients"]
        assert record["bytes_down"] == 4 * 4 * 71_668 and len(record["dropped_out"]) == 4
    start = learners[0].workspace.build_model().state_dict()
    assert all(torch.equal(x, start[name]) for name, x in learners[0].model.state_dict().items())
    assert json.loads((run.folder / "summary.json").read_text())["bytes_to_dense"] == 1


@pytest.mark.parametrize("method", ["--scaffold", "--local-norm"])
def test_a_client_that_diverges_is_named_before_its_state_is_written(cli, small_data, method):
    status, _, err = cli(*COMMAND, method, "--J", 3, "--lr", 1e30, "--name", "x")
    assert status == 2 and "round 1, client" in err and "try a lower --lr" in err, err
    assert err.count("\n") == 1 and not list(small_data.glob("runs/x/*/client*"))


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scaffold", "--prox", 0.1), "--scaffold with --prox: the proximal pull would enter"),
        (("--scaffold", "--local-norm"), "--scaffold with --local-norm: control variates pull"),
        (("--scaffold", "--secure-aggregation"), "the server would see"),
        (("--scaffold", "--lr", 0), "--scaffold divides by --lr"),
        (("--aggregate", "fednova", "--prox", 0.1), "--aggregate fednova with --prox"),
        (("--cuda-graph", "on", "--batch-size", "full"), "clients' batches differ in size"),
        (("--dare-drop", 0.5), "--dare-drop belongs to --aggregate dare"),
        (("--aggregate", "sign", "--secure-aggregation"), "--aggregate sign with --secure-agg"),
        (
            ("--aggregate", "sign", "--dp-noise", 1, "--dp-clip", 1),
            "--aggregate with --dp-noise: privacy needs",
        ),
        (("--local-norm", "--train", "head"), "--local-norm with --train head"),
        (("--straggler-fraction", 0.5, "--J", 1), "no client can take fewer steps than one"),
        (("--dropout", 1.5), "--dropout: 1.5 must be at least 0 and at most 1"),
        (("--straggler-fraction", -1), "--straggler-fraction: -1 must be at least 0"),
        (("--prox", -1), "--prox: -1 must be at least 0"),
        (("--batch-size", "all"), "--batch-size/--B: 'all' is not a whole number"),
        (("--batch-size", 0), "--batch-size/--B: 0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(cli, options, message):
    status, _, err = cli(*COMMAND, *options)
    assert status == 2 and message in err and err.count("\n") == 1, err


# ---------------------------------------------------------------------------- damage


def damage_file(path, how):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.unlink() if how == "gone" else path.write_bytes(raw if how == "flip" else raw[:-99])


@pytest.mark.parametrize(
    "how", ["flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncate", "gone"))]
)
def test_a_damaged_client_state_is_trained_again_from_the_checkpoint_before(cli, small_data, how):
    command = (*COMMAND, "--train", "head", "--scaffold", "--eval-every", 10)
    for name, total in (("whole", 3), ("x", 1), ("x", 2)):
        assert cli(*command, "--rounds", total, "--name", name)[0] == 0
    whole, run = (Run(small_data / "runs" / name) for name in ("whole", "x"))
    damaged = run.folder / "scaffold" / "clients-2.pt"  # which the first checkpoint does not need
    damage_file(damaged, how)
    status, out, err = cli(*command, "--rounds", 3, "--name", "x")
    assert status == 0 and out.count("warning: ") == 1, err
    assert damaged.name in out and "going on from checkpoint.prev.pt" in out
    ends = [r.load()["state"]["process"]["theta"] for r in (whole, run)]
    assert torch.equal(*ends)
    losses = [[r.get("train_loss") for r in each.records()] for each in (whole, run)]
    assert losses[0] == losses[1]
    status, out, _ = cli(*command, "--rounds", 4, "--name", "x")
    assert status == 0 and "warning" not in out  # what was lost has been written anew
