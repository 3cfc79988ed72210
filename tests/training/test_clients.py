"""What a client does: alone or at once with others, eager or replayed, in any precision."""

import copy

import numpy as np
import pytest
import taped
import torch
from built import build
from conftest import needs_cuda

import model as vit
from machine import cuda_graph
from training.clients import Clients, HeadsTogether
from training.learner import Learner

MASK = ("--head", "ridge", "--mask-rule", "random")
SMALL = ("--J", 2, "--batch-size", 8)
HEADS = ("--train", "head", "--nc", 3)


def test_a_client_depends_on_seed_round_and_client_alone(small_data):
    learner, clients = build(small_data)
    start = learner.entries.theta.clone()

    def result(client, round):
        return clients.train_client(start, client, round)[0].clone()

    first = result(4, 1)
    for other in ((4, 2), (5, 1)):
        assert not torch.equal(first, result(*other))
    assert torch.equal(first, result(4, 1))


def test_the_validation_split_is_never_trained_on(small_data):
    learner, clients = build(small_data)
    batches = [clients.batches(k, round=1) for k in range(100)]
    seen = np.concatenate([batch[..., 0].flatten().numpy() for batch in batches])
    workspace = learner.workspace
    assert not np.isin(seen, workspace.val_index).any()
    assert len(workspace.dataset.train.labels) == 4000 == 10 * len(workspace.val_index)


def test_a_frozen_head_and_frozen_blocks_keep_their_bits(small_data):
    learner, clients = build(small_data, "--train", "blocks.1", "--head", "ridge")
    model = learner.model
    trained = set(vit.trained_names(model, "blocks.1", freeze_head=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clients.train_client(learner.entries.theta.clone(), 5, round=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


# ---------------------------------------------------------------------------- heads together


def results(kind, clients, start, chosen):
    """Return what clients make of theta in round 2, with their losses, as this kind trains them."""
    pairs = kind.__call__(clients, start, chosen, 2)
    return [(theta_k.clone(), losses) for theta_k, losses in pairs]


@pytest.mark.parametrize("bound", [None, 1e6, 0.05])
def test_heads_trained_together_equal_heads_trained_alone(small_data, bound):
    clip = [] if bound is None else ["--clip-norm", bound]
    learner, clients = build(small_data, *HEADS, "--weight-decay", 0.01, *clip)
    start, chosen = torch.randn(learner.flat.theta.shape) * 0.1, np.array([3, 0, 77])
    together, alone = (results(k, clients, start, chosen) for k in (HeadsTogether, Clients))
    # fp32 sums of 48 features and 32 samples in another order
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_heads_trained_together_take_scaffolds_steps(small_data):
    learner, clients = build(small_data, *HEADS, "--scaffold")
    (scaffold,) = clients.terms
    start, chosen = torch.randn(learner.flat.theta.shape) * 0.1, np.array([3, 0, 77])
    scaffold.mean.copy_(torch.randn(len(start)) * 0.01)
    before, ends = copy.deepcopy(scaffold.state_dict()), []
    for kind in (HeadsTogether, Clients):
        scaffold.load_state_dict(before)
        trained = results(kind, clients, start, chosen)
        ends.append((trained, [scaffold.get(int(k)).clone() for k in chosen]))
    (together, variates), (alone, variates_alone) = ends
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variates, variates_alone, rtol=1e-3, atol=1e-4)
    assert all(variate.norm() > 0 for variate in variates)


# ---------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.04), ("fp16", 0.003)])
def test_half_precision_moves_the_parameters_as_fp32_does(small_data, precision, error):
    changes = {}
    for name in ("fp32", precision):
        learner, clients = build(small_data, "--precision", name)
        start = learner.entries.theta.clone()
        changes[name] = clients.train_client(start, 4, round=1)[0] - start
        assert changes[name].dtype == torch.float32
    # a gradient carries 8 (bf16) or 11 (fp16) bits; single errors average out in the norm
    assert (changes[precision] - changes["fp32"]).norm() < error * changes["fp32"].norm()


def test_an_fp16_overflow_is_redone_at_a_lower_scale(small_data):
    learner, clients = build(small_data, *SMALL, "--precision", "fp16")
    start, scale = learner.entries.theta.clone(), learner.loss_scale
    usual = clients.train_client(start, 4, round=1)[0] - start
    scale.state[:] = torch.tensor([2.0**22, 2.0**22, 0.0])
    again = clients.train_client(start, 4, round=1)[0] - start
    assert scale.state[0] == 2.0**22 > scale.state[1]
    assert (again - usual).norm() < 0.003 * usual.norm()
    scale.next_round()
    assert scale.state[0] == scale.state[1] < 2.0**22


# ---------------------------------------------------------------------------- replayed steps


def replay(monkeypatch, clients):
    """Let a client's steps on this CPU take the way of those on a GPU."""
    learner = clients.learner
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    clients.graphed = cuda_graph.GraphedStep(learner.local_step, learner.entries.state, "cpu")
    return clients.graphed


ON_STATIC_INPUTS = {
    "dense": ["--augment"],
    "without momentum": ["--momentum", "0", "--weight-decay", "0.01"],
    "Nesterov, thinned out": ["--nesterov", "--keep-tokens", "0.5"],
    "mask": [*MASK, "--sparsity", "0.2", "--prox", "0.5"],
    "class weights": ["--fedir", "--nc", "30"],
    "control variates": ["--scaffold"],
    "bf16": ["--precision", "bf16"],
    "clipped": ["--clip-norm", "0.05"],
    "clipped under a mask": [*MASK, "--sparsity", "0.2", "--clip-norm", "0.05"],
    "pieces": ["--micro-batch", "5", "--fedir", "--nc", "30"],
}


@pytest.mark.parametrize("fuses", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("options", ON_STATIC_INPUTS.values(), ids=ON_STATIC_INPUTS)
def test_steps_on_static_inputs_are_the_eager_ones(small_data, monkeypatch, options, fuses):
    """At rates that are powers of two, where lr * d is exact, a GPU's way gives the CPU's bits."""
    monkeypatch.setattr(Learner, "_may_fuse", lambda self: fuses)
    ends = []
    for on_static_inputs in (False, True):
        learner, clients = build(small_data, "--lr", "0.125", *options)
        start, end = learner.entries.theta.clone(), []
        if on_static_inputs:
            steps = replay(monkeypatch, clients)
        theta = start
        for client, lr in ((4, 0.125), (9, 0.03125)):  # another client and rate, the same graph
            monkeypatch.setattr(clients, "lr", lambda round, lr=lr: lr)
            theta_k, losses = clients.train_client(theta, client, round=1)
            theta = theta_k.clone()
            end += [theta, losses]
        ends.append(end)
    assert steps.status == "on" and not torch.equal(ends[0][0], start)
    for eager, replayed in zip(*ends, strict=True):
        assert torch.equal(eager, replayed)


def test_replays_are_redone_at_a_lower_scale_after_an_overflow(small_data, monkeypatch):
    learner, clients = build(small_data, *SMALL, "--precision", "fp16", "--lr", "0.125")
    start, ends = learner.entries.theta.clone(), []
    for on_static_inputs in (False, True):
        if on_static_inputs:
            replay(monkeypatch, clients)
        learner.loss_scale.state[:] = torch.tensor([2.0**22, 2.0**22, 0.0])
        theta = clients.train_client(start, 4, round=1)[0].clone()
        ends.append((theta, learner.loss_scale.state.clone()))
    (theta, scale), (theta_again, scale_again) = ends
    assert scale[1] < 2.0**22 and torch.equal(scale, scale_again)
    assert torch.equal(theta, theta_again)


ON_A_GPU = ON_STATIC_INPUTS | {"fp16": ["--precision", "fp16"], "fp32": ["--precision", "fp32"]}


@needs_cuda
@pytest.mark.parametrize("options", ON_A_GPU.values(), ids=ON_A_GPU)
def test_on_a_gpu_replays_give_the_bits_of_eager_steps(small_data, options):
    ends = []
    for mode in ("off", "on"):
        learner, clients = build(small_data, "--cuda-graph", mode, *options)
        start = learner.entries.theta.clone()
        losses = [clients.train_client(start, client, round=1)[1] for client in (4, 9)]
        ends.append([learner.entries.theta, *losses])
        assert clients.graphed.status == mode
    for eager, replayed in zip(*ends, strict=True):
        assert torch.equal(eager, replayed)


# ---------------------------------------------------------------------------- clipped steps


def test_steps_are_clipped_as_torch_clips_them(small_data):
    command = ["--lr", "0.1", "--weight-decay", "0.01", "--J", "5"]
    learner, clients = build(small_data, *command, "--clip-norm", "0.02")
    plain, _ = build(small_data, *command)
    theta_k, _ = clients.train_client(learner.entries.theta.clone(), 4, round=1)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    norms = []
    for batch in clients.batches(4, round=1):
        optimiser.zero_grad(set_to_none=False)
        plain.loss(batch).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.02).item())
        optimiser.step()
    assert min(norms) > 0.02
    # clipping divides where torch multiplies; the norm is summed in another order
    torch.testing.assert_close(theta_k, plain.flat.theta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [(), MASK, ("--precision", "fp16"), HEADS], ids=str)
def test_a_bound_above_every_norm_changes_no_bit(small_data, options):
    ends = []
    for bound in ([], ["--clip-norm", "1e6"], ["--clip-norm", "0.01"]):
        learner, clients = build(small_data, *options, *bound)
        ((theta_k, _),) = clients(learner.entries.theta.clone(), [4], 1)
        ends.append(theta_k)
    free, loose, tight = ends
    assert torch.equal(free, loose) and not torch.equal(free, tight)
