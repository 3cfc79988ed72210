"""The federated methods as options: degenerate ones are FedAvg, each does what its paper says."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_learner import build

import federation
import runs
from local_training import local_entries

TINY = ("--clients", "20", "--J", "3", "--batch-size", "8", "--fraction", "0.2", "--lr", "0.05")
COMMAND = ("fedavg", "--data", "synthetic", "--rounds", 3, "--eval-every", 3, *TINY)


@pytest.fixture
def outcome(small_data):
    """Run three rounds with these options; returns theta and the rounds' records."""

    def run(*arguments):
        options = [*TINY, "--dirichlet", "1", *map(str, arguments)]
        learner, training = build(small_data, *options)
        process, records = federation.federate(learner, training.shards), []
        while process.round < 3:
            if (record := process.advance()) is not None:
                records.append(record)
        return process.theta_global, records

    return run


@pytest.mark.parametrize("degenerate", [("--aggregate", "fednova"), ("--prox", 0)])
def test_degenerate_methods_are_fedavg_to_the_bit(outcome, degenerate):
    theta, _ = outcome()
    assert torch.equal(theta, outcome(*degenerate)[0])


@pytest.mark.parametrize(
    "method",
    [
        ("--scaffold", "--momentum", 0),
        ("--fedir",),
        ("--fedvc",),
        ("--local-norm",),
        ("--straggler-fraction", 0.7),
        ("--straggler-fraction", 0.7, "--aggregate", "fednova", "--server", "fedadam"),
        ("--batch-size", "full", "--J", 1),
    ],
)
def test_methods_train_and_differ_from_fedavg(outcome, method):
    plain, _ = outcome()
    theta, records = outcome(*method)
    assert not torch.equal(theta, plain)
    assert records[-1]["train_loss"] < 1.2 * records[0]["train_loss"]


def test_rounds_in_which_all_clients_drop_out_are_empty_and_logged(cli, learners):
    status, out, err = cli(*COMMAND, "--dropout", 1, "--name", "none")
    assert status == 0, err
    run = runs.Run("runs/none")
    for record in run.records()[1:]:
        assert record["unchanged"] and record["bytes_up"] == 0 and not record["clients"]
        assert record["bytes_down"] == 4 * 4 * 71_668 and len(record["dropped_out"]) == 4
    start = learners[0].workspace.build_model().state_dict()
    assert all(torch.equal(x, start[name]) for name, x in learners[0].model.state_dict().items())
    assert json.loads((run.folder / "summary.json").read_text())["bytes_to_dense"] == 1


def test_scaffold_counts_its_bytes_and_its_state(outcome):
    _, plain = outcome()
    _, records = outcome("--scaffold")
    assert [r["bytes_up"] for r in records] == [2 * r["bytes_up"] for r in plain]
    seen = set()
    for record in records:
        seen.update(record["clients"])
        each = record["state_bytes"]["scaffold"] / len(seen)
        assert 4 * 71_668 <= each < 4 * 72_500  # with the padding between parameters
    assert "state_bytes" not in plain[1]


@pytest.mark.parametrize(
    "extra", [(), ("--local-norm",), ("--head", "ridge", "--mask-rule", "random", "--scaffold")]
)
def test_what_dare_drops_is_not_sent(outcome, extra):
    _, plain = outcome(*extra)
    _, records = outcome(*extra, "--aggregate", "dare", "--dare-drop", 0.75)
    variates = plain[0]["bytes_up"] / 2 if "--scaffold" in extra else 0
    for record, dense in zip(records, plain, strict=True):
        entries = dense["bytes_up"] - variates
        share = (record["bytes_up"] - variates) / entries
        # five standard deviations of a binomial share
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / (entries / 4)) ** 0.5
        assert record["bytes_down"] == dense["bytes_down"]
    assert len({r["bytes_up"] for r in records}) == 3  # counted, not expected
    _, hidden = outcome("--aggregate", "dare", "--secure-aggregation")
    assert {r["bytes_up"] for r in hidden} == {4 * 8 * 71_668}


def test_client_states_that_do_not_fit_are_refused_with_figures(cli, monkeypatch):
    monkeypatch.setattr(federation, "free_memory", lambda device: 1e6)
    status, _, err = cli(*COMMAND, "--scaffold")
    assert status == 2 and err.count("\n") == 1, err
    assert "--scaffold keeps 0.0 GB, 0.3 MB for each client" in err
    assert "fewer --clients" in err


@pytest.mark.parametrize(("vectors", "fits"), [(7.9, False), (8.1, True)])
def test_eight_client_states_need_room_for_eight(cli, monkeypatch, vectors, fits):
    room = {torch.device("cpu"): vectors * 4 * 71_668}
    monkeypatch.setattr(federation, "memory_room", lambda learner: room)
    status, _, err = cli(*COMMAND, "--rounds", 2, "--scaffold")  # 4 clients a round
    assert (status == 0) == fits and ("fewer --clients" in err) != fits


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


@pytest.mark.parametrize("method", ["--scaffold", "--local-norm"])
def test_a_client_that_diverges_is_named_before_it_is_kept(cli, small_data, method):
    status, _, err = cli(*COMMAND, *method.split(), "--lr", 1e30)
    assert status == 2 and "round 1, client" in err and "try a lower --lr" in err, err
    assert err.count("\n") == 1


def test_a_run_that_did_not_fit_leaves_no_folder(cli, monkeypatch, small_data):
    monkeypatch.setattr(federation, "free_memory", lambda device: 1e6)
    for method in (("--scaffold",), ("--aggregate", "ties"), ("--diagnostics",)):
        status, _, err = cli(*COMMAND, *method, "--name", "x")
        assert status == 2 and "room for 0.0 GB" in err, err
        assert not (small_data / "runs" / "x").exists()


# ---------------------------------------------------------------------------- one client


def test_fedsgd_is_one_step_along_the_gradient_of_the_whole_shard(small_data):
    options = ("--batch-size", "full", "--J", "1", "--lr", "0.1", "--momentum", "0", "--nc", "3")
    learner, training = build(small_data, *options)
    start, shard = learner.entries.theta.clone(), torch.from_numpy(training.shards[7])
    images = learner.workspace.preprocess()(learner.inputs["train"][shard])
    loss = F.cross_entropy(learner.model(images), learner.labels["train"][shard])
    learner.flat.grad.zero_()
    loss.backward()
    expected = start - 0.1 * learner.flat.grad
    losses = training.one(7, round=1)
    torch.testing.assert_close(learner.entries.theta, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses, loss.detach()[None], rtol=1e-5, atol=0)


def test_fedir_weighs_samples_by_class(small_data):
    learner, training = build(small_data, "--fedir", "--dirichlet", "0.3", "--J", "1")
    workspace, shard = learner.workspace, training.shards[5]
    labels = workspace.dataset.train.labels
    p, q = (
        torch.bincount(labels[i], minlength=100).double() for i in (workspace.train_index, shard)
    )
    weights = (p / p.sum()) / (q / q.sum())
    draws = training.draws(5, round=1)[0]
    logits = learner.logits_of(learner.gather("train", draws[:, 0]), None).double()
    each = F.cross_entropy(logits, labels[draws[:, 0]], reduction="none")
    w = weights[labels[draws[:, 0]]]
    expected = (w * each).sum() / w.sum()
    assert training.one(5, round=1).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mask", [(), ("--head", "ridge", "--mask-rule", "random")])
def test_layer_norms_are_a_clients_own(small_data, mask):
    learner, training = build(small_data, "--local-norm", "--nc", "3", *mask)
    theta, at = learner.entries.theta, local_entries(learner)
    start = theta.clone()
    training.one(4, round=1)
    training.keep(4, 1, theta, start)
    assert torch.equal(theta[at], start[at])  # what the server would take in
    shared = torch.ones_like(theta, dtype=torch.bool)
    shared[at] = False
    assert not torch.equal(theta[shared], start[shared])
    own = training.local.get(4)
    assert not torch.equal(own, start[at])
    learner.entries.load(start)
    seen = []
    loss_of = learner.loss
    learner.loss = lambda draws: (seen.append(theta[at].clone()), loss_of(draws))[1]
    training.one(4, round=2)
    assert torch.equal(seen[0], own)  # its next round starts from them
    training.one(9, round=2)
    assert torch.equal(seen[4], start[at])


@pytest.mark.parametrize("mask", [(), ("--head", "ridge", "--mask-rule", "random")])
def test_scaffold_corrects_every_step_of_a_client(small_data, mask):
    """With variates set by hand, one step differs from a plain one by -lr (c - c_k)."""
    command = ("--momentum", "0", "--lr", "0.01", "--J", "1", *mask)
    plain, alone = build(small_data, *command)
    learner, training = build(small_data, "--scaffold", *command)
    start = learner.entries.theta.clone()
    alone.one(4, round=1)
    step = plain.entries.theta - start
    c, own = torch.randn(2, len(start), generator=torch.Generator().manual_seed(0))
    training.scaffold.mean.copy_(c)
    training.scaffold.put(4, own)
    training.one(4, round=1)
    training.keep(4, 1, learner.entries.theta, start)
    moved = learner.entries.theta - start
    torch.testing.assert_close(moved, step - 0.01 * (c - own), rtol=1e-4, atol=1e-7)
    # option II with one step: c_k' = the gradient alone
    torch.testing.assert_close(training.scaffold.get(4), -step / 0.01, rtol=1e-3, atol=2e-4)


def test_heads_trained_together_take_scaffolds_steps(small_data):
    command = ("--train", "head", "--nc", "3", "--scaffold")
    learner, training = build(small_data, *command)
    start, clients = torch.randn(learner.flat.theta.shape) * 0.1, np.array([3, 0, 77])
    c = torch.randn(len(start)) * 0.01
    training.scaffold.mean.copy_(c)
    together = [(theta.clone(), losses) for theta, losses in training.heads(start, clients, 2)]
    for client, (theta, _) in zip(clients, together, strict=True):
        training.keep(int(client), 2, theta, start)
    variates = [training.scaffold.get(int(k)).clone() for k in clients]
    again, alone = build(small_data, *command)
    alone.scaffold.mean.copy_(c)
    for client, (theta, losses), variate in zip(clients, together, variates, strict=True):
        again.flat.reset(start)
        expected = alone.one(int(client), round=2)
        alone.keep(int(client), 2, again.flat.theta, start)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theta, again.flat.theta, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.scaffold.get(int(client)), variate, rtol=1e-3, atol=1e-4)


def damage_file(path, how):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.unlink() if how == "gone" else path.write_bytes(raw if how == "flip" else raw[:-99])


@pytest.mark.parametrize("how", ["flip", "truncate", "gone"])
def test_a_damaged_client_state_is_trained_again_from_the_checkpoint_before(cli, small_data, how):
    command = ("fedavg", "--data", "synthetic", *TINY, "--scaffold", "--eval-every", 1)
    for name, rounds in (("whole", 3), ("x", 1), ("x", 2)):
        assert cli(*command, "--rounds", rounds, "--name", name)[0] == 0
    whole, folder = (small_data / "runs" / name for name in ("whole", "x"))
    first, second = (set(r["clients"]) for r in runs.Run(folder).records()[1:])
    damaged = folder / "scaffold" / f"client{min(second - first)}-1.pt"
    damage_file(damaged, how)
    status, out, err = cli(*command, "--rounds", 3, "--name", "x")
    assert status == 0 and out.count("warning: ") == 1, err
    assert damaged.name in out and "going on from checkpoint.prev.pt" in out
    ends = [runs.Run(f).load()["state"]["process"] for f in (whole, folder)]
    assert torch.equal(ends[0]["theta"], ends[1]["theta"])
    logs = [[r | {"seconds": 0} for r in runs.Run(f).records()] for f in (whole, folder)]
    assert logs[0] == logs[1]
    again, out, _ = cli(*command, "--rounds", 4, "--name", "x")
    assert again == 0 and "warning" not in out  # what was lost has been written anew
