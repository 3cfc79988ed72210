"""Each federated method does what its paper says."""

import pytest
import torch
import torch.nn.functional as F
from built import build, build_loop
from loops import run

from training.rounds import local_entries

TINY = ("--clients", 20, "--J", 3, "--batch-size", 8, "--fraction", 0.2, "--lr", 0.05)
MASK = ("--head", "ridge", "--mask-rule", "random", "--mask-lr", "raw")


@pytest.fixture
def two_rounds(small_data):
    """Run two rounds with these options; returns their records."""

    def run_with(*arguments):
        _, loop = build_loop(small_data, *TINY, "--dirichlet", 1, *arguments)
        return run(loop, 2)

    return run_with


def test_scaffold_keeps_a_variate_of_each_client_that_took_part(two_rounds):
    plain, records = two_rounds(), two_rounds("--scaffold")
    seen = set()
    for record in records:
        seen.update(record["clients"])
        each = record["state_bytes"]["scaffold"] / len(seen)
        assert 4 * 71_668 <= each < 4 * 72_500  # with the padding between parameters
    assert "state_bytes" not in plain[1]


@pytest.mark.parametrize(
    "extra", [(), ("--local-norm",), (*MASK, "--scaffold")], ids=lambda o: " ".join(o)
)
def test_what_dare_drops_is_not_sent(two_rounds, extra):
    plain = two_rounds(*extra)
    records = two_rounds(*extra, "--aggregate", "dare", "--dare-drop", 0.75)
    variates = plain[0]["bytes_up"] / 2 if "--scaffold" in extra else 0
    for record, dense in zip(records, plain, strict=True):
        entries = dense["bytes_up"] - variates
        share = (record["bytes_up"] - variates) / entries
        # five standard deviations of a binomial share
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / (entries / 4)) ** 0.5
        assert record["bytes_down"] == dense["bytes_down"]
    assert len({r["bytes_up"] for r in records}) == 2  # counted, not expected


# ---------------------------------------------------------------------------- one client


def test_fedsgd_is_one_step_along_the_gradient_of_the_whole_shard(small_data):
    options = ("--batch-size", "full", "--J", 1, "--lr", 0.1, "--momentum", 0, "--nc", 3)
    learner, clients = build(small_data, *options)
    start, shard = learner.entries.theta.clone(), torch.from_numpy(clients.shards[7])
    images = learner.workspace.preprocess()(learner.inputs["train"][shard])
    loss = F.cross_entropy(learner.model(images), learner.labels["train"][shard])
    learner.flat.grad.zero_()
    loss.backward()
    expected = start - 0.1 * learner.flat.grad
    theta_k, losses = clients.train_client(start, 7, round=1)
    torch.testing.assert_close(theta_k, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses, loss.detach()[None], rtol=1e-5, atol=0)


def test_fedir_weighs_samples_by_class(small_data):
    learner, clients = build(small_data, "--fedir", "--dirichlet", 0.3, "--J", 1)
    workspace, shard = learner.workspace, clients.shards[5]
    labels = workspace.dataset.train.labels
    p, q = (
        torch.bincount(labels[i], minlength=100).double() for i in (workspace.train_index, shard)
    )
    weights = (p / p.sum()) / (q / q.sum())
    at = clients.batches(5, round=1)[0][:, 0]
    logits = learner.logits_of(learner.inputs_of("train", at), None).double()
    each = F.cross_entropy(logits, labels[at], reduction="none")
    w = weights[labels[at]]
    expected = (w * each).sum() / w.sum()
    _, losses = clients.train_client(learner.entries.theta.clone(), 5, round=1)
    assert losses.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("extra", [(), MASK], ids=["dense", "mask"])
def test_the_proximal_steps_of_a_client_are_the_written_ones(small_data, extra):
    """With one step the term is zero; with two the second pulls back by lr mu (theta_1 - start)."""
    ends = {}
    for steps, mu in ((1, 50.0), (2, 0.0), (2, 50.0)):
        command = ("--momentum", 0, "--lr", 0.01, "--J", steps, "--prox", mu)
        learner, clients = build(small_data, *command, *extra)
        start = learner.entries.theta.clone()
        ends[steps, mu] = clients.train_client(start, 4, round=1)[0].clone()
    first_step = ends[1, 50.0] - start
    pull, roundings = 0.01 * 50.0 * first_step, 4 * 2.0**-24  # two an end, of entries near 1
    assert pull.abs().max() > 1e3 * roundings
    torch.testing.assert_close(ends[2, 0.0] - ends[2, 50.0], pull, rtol=1e-3, atol=roundings)


@pytest.mark.parametrize("mask", [(), MASK], ids=["dense", "mask"])
def test_layer_norms_are_a_clients_own(small_data, mask):
    learner, clients = build(small_data, "--local-norm", "--nc", 3, *mask)
    (local,), at = clients.terms, local_entries(learner)
    start, starts, loss_of = learner.entries.theta.clone(), [], learner.loss

    def loss(draws):
        starts.append(learner.entries.theta[at].clone())
        return loss_of(draws)

    learner.loss = loss
    ((theta_k, _),) = clients(start, [4], 1)
    assert torch.equal(theta_k[at], start[at])  # what the server would take in
    shared = torch.ones_like(start, dtype=torch.bool)
    shared[at] = False
    assert not torch.equal(theta_k[shared], start[shared])
    norms = local.get(4).clone()
    assert not torch.equal(norms, start[at])
    starts.clear()
    clients.train_client(start, 4, round=2)
    assert torch.equal(starts[0], norms)  # its next round starts from them
    starts.clear()
    clients.train_client(start, 9, round=2)
    assert torch.equal(starts[0], start[at])


@pytest.mark.parametrize("mask", [(), MASK], ids=["dense", "mask"])
def test_scaffold_corrects_every_step_of_a_client(small_data, mask):
    """With variates set by hand, one step differs from a plain one by -lr (c - c_k)."""
    command = ("--momentum", 0, "--lr", 0.01, "--J", 1, *mask)
    plain, alone = build(small_data, *command)
    _, clients = build(small_data, "--scaffold", *command)
    start, (scaffold,) = plain.entries.theta.clone(), clients.terms
    step = alone.train_client(start, 4, round=1)[0] - start
    c, c_k = torch.randn(2, len(start), generator=torch.Generator().manual_seed(0))
    scaffold.mean.copy_(c)
    scaffold.put(4, c_k)
    ((theta_k, _),) = clients(start, [4], 1)
    torch.testing.assert_close(theta_k - start, step - 0.01 * (c - c_k), rtol=1e-4, atol=1e-7)
    # option II with one step: c_k' = the gradient alone
    torch.testing.assert_close(scaffold.get(4), -step / 0.01, rtol=1e-3, atol=2e-4)
