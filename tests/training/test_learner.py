"""What trains: clients one by one and all at once agree, and what is frozen stays."""

import numpy as np
import pytest
import torch
from conftest import needs_cuda, small_synthetic
from test_cuda_graph import faithful

import cuda_graph
import fedavg
import head
import model as vit
import train
from device import compiled
from learner import Learner
from local_training import ClientTraining
from workspace import Workspace


def build(tmp_path, *arguments):
    """Return the learner and the training of clients for a command line."""
    command = ["fedavg", "--data", "synthetic", "--data-dir", str(tmp_path), *arguments]
    options = train.resolve(train.build_parser().parse_args(command))
    workspace = Workspace(options)
    learner = Learner(workspace, workspace.build_model(), options, tmp_path, workspace.shards())
    return learner, ClientTraining(learner, workspace.shards())


def test_heads_trained_together_equal_heads_trained_alone(small_data):
    learner, training = build(small_data, "--train", "head", "--weight-decay", "0.01", "--nc", "3")
    start, clients = torch.randn(learner.flat.theta.shape) * 0.1, np.array([3, 0, 77])
    together = list(training.heads(start, clients, round=2))
    for client, (theta, losses) in zip(clients, together, strict=True):
        learner.flat.reset(start)
        alone = training.one(client, round=2)
        # fp32 sums of 48 features and 32 samples in another order
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theta, learner.flat.theta, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_and_frozen_blocks_keep_their_bits(small_data):
    learner, training = build(small_data, "--train", "blocks.1", "--head", "ridge")
    model = learner.model
    trained = set(vit.trained_names(model, "blocks.1", freeze_head=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.one(5, round=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_a_client_depends_on_seed_round_and_client_alone(small_data):
    learner, training = build(small_data)
    start = learner.flat.theta.clone()

    def result(client, round):
        learner.flat.reset(start)
        training.one(client, round)
        return learner.flat.theta.clone()

    first = result(4, 1)
    for other in ((4, 2), (5, 1)):
        assert not torch.equal(first, result(*other))
    assert torch.equal(first, result(4, 1))


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.04), ("fp16", 0.003)])
def test_half_precision_moves_the_parameters_as_fp32_does(small_data, precision, error):
    moved = {}
    for name in ("fp32", precision):
        learner, training = build(small_data, "--precision", name)
        start = learner.flat.theta.clone()
        training.one(4, round=1)
        moved[name] = learner.flat.theta - start
        assert moved[name].dtype == torch.float32
    # a gradient carries 8 (bf16) or 11 (fp16) bits; single errors average out in the norm
    assert (moved[precision] - moved["fp32"]).norm() < error * moved["fp32"].norm()


def test_an_fp16_overflow_is_redone_at_a_lower_scale(small_data):
    learner, training = build(small_data, "--precision", "fp16")
    start = learner.flat.theta.clone()
    training.one(4, round=1)
    usual = learner.flat.theta - start
    learner.flat.reset(start)
    learner.loss_scale.state[:] = torch.tensor([2.0**22, 2.0**22, 0.0])
    training.one(4, round=1)
    assert learner.loss_scale.state[0] == 2.0**22 > learner.loss_scale.state[1]
    assert (learner.flat.theta - start - usual).norm() < 0.003 * usual.norm()
    learner.loss_scale.next_round()
    assert learner.loss_scale.state[0] == learner.loss_scale.state[1] < 2.0**22


def test_evaluation_does_not_depend_on_its_batch(small_data):
    learner, _ = build(small_data, "--head", "ridge")
    whole = learner.evaluate()
    learner.workspace.eval_batch = 37
    parts = learner.evaluate()
    assert whole["test_acc"] == parts["test_acc"]
    assert whole["test_loss"] == pytest.approx(parts["test_loss"], rel=1e-6)


def test_the_validation_split_is_never_trained_on(small_data):
    learner, training = build(small_data)
    seen = np.concatenate([training.draws(k, 1)[..., 0].flatten().numpy() for k in range(100)])
    assert not np.isin(seen, learner.workspace.val_index).any()
    assert len(small_synthetic().train.labels) == 4000 == 10 * len(learner.workspace.val_index)


def test_two_rounds_average_what_the_clients_did(small_data):
    learner, training = build(small_data, "--clients", "10")
    sizes = [len(shard) for shard in training.shards]
    federation = fedavg.FedAvg(learner.flat.theta, sizes, training.one, fraction=0.3)
    start = learner.flat.theta.clone()
    clients = fedavg.sample_clients(10, 0.3, seed=0, round=1)
    expected = torch.zeros_like(start, dtype=torch.float64)
    for client in clients:
        learner.flat.reset(start)
        training.one(int(client), 1)
        share = sizes[client] / sum(sizes[k] for k in clients)
        expected += share * (learner.flat.theta - start).double()
    learner.flat.reset(start)
    while federation.advance() is None:
        pass
    # the fixed point's half unit per client, then one rounding to fp32
    average = (start.double() + expected).float()
    torch.testing.assert_close(federation.theta_global, average, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("extra", [[], ["--head", "ridge", "--mask-rule", "random"]])
def test_the_proximal_steps_of_a_client_are_the_written_ones(small_data, extra):
    """With one step the term is zero; with two the second pulls back by lr mu (theta_1 - start)."""
    command = ["--momentum", "0", "--lr", "0.01", "--J", "2", *extra]
    free, pulled = (build(small_data, *command, "--prox", str(mu)) for mu in (0.0, 50.0))
    ends = []
    for learner, training in (free, pulled):
        start = learner.entries.theta.clone()
        training.one(4, round=1)
        ends.append(learner.entries.theta.clone())
    one, _ = build(small_data, *command, "--J", "1")
    ClientTraining(one, one.workspace.shards()).one(4, round=1)
    first_step = one.entries.theta - start
    pull, roundings = 0.01 * 50.0 * first_step, 4 * 2.0**-24  # two an end, of entries near 1
    assert pull.abs().max() > 1e3 * roundings
    torch.testing.assert_close(ends[0] - ends[1], pull, rtol=1e-3, atol=roundings)


def graphed(monkeypatch, training, mode="auto"):
    """Let a client's steps on this CPU take the way of those on a GPU."""
    learner = training.learner
    monkeypatch.setattr(cuda_graph, "record", faithful)
    state = learner.entries.state
    training.graphed = cuda_graph.GraphedStep(learner.local_step, state, "cpu", mode=mode)
    return training.graphed


ON_STATIC_INPUTS = {
    "dense": ["--augment"],
    "without momentum": ["--momentum", "0", "--weight-decay", "0.01"],
    "Nesterov, thinned out": ["--nesterov", "--keep-tokens", "0.5"],
    "mask": ["--head", "ridge", "--mask-rule", "random", "--sparsity", "0.2", "--prox", "0.5"],
    "class weights": ["--fedir", "--nc", "30"],
    "control variates": ["--scaffold"],
    "bf16": ["--precision", "bf16"],
    "clipped": ["--clip-norm", "0.05"],
    "clipped under a mask": [
        *("--head", "ridge", "--mask-rule", "random", "--sparsity", "0.2", "--clip-norm", "0.05"),
    ],
    "pieces": ["--micro-batch", "5", "--fedir", "--nc", "30"],
}


@pytest.mark.parametrize("options", ON_STATIC_INPUTS.values(), ids=ON_STATIC_INPUTS)
def test_steps_on_static_inputs_are_the_eager_ones(small_data, monkeypatch, options):
    """At rates that are powers of two, where lr * d is exact, a GPU's way gives the CPU's bits."""
    ends = []
    for on_static_inputs in (False, True):
        learner, training = build(small_data, "--lr", "0.125", *options)
        start, losses = learner.entries.theta.clone(), []
        if on_static_inputs:
            steps = graphed(monkeypatch, training)
        for client, lr in ((4, 0.125), (9, 0.03125)):  # another client and rate, the same graph
            monkeypatch.setattr(training, "lr", lambda round, lr=lr: lr)
            losses.append(training.one(client, round=1))
        ends.append([learner.entries.theta, *losses])
    assert steps.status == "on" and not torch.equal(ends[0][0], start)
    for eager, replayed in zip(*ends, strict=True):
        assert torch.equal(eager, replayed)


def test_replays_are_redone_at_a_lower_scale_after_an_overflow(small_data, monkeypatch):
    learner, training = build(small_data, "--precision", "fp16", "--lr", "0.125")
    start, ends = learner.entries.theta.clone(), []
    for on_static_inputs in (False, True):
        if on_static_inputs:
            graphed(monkeypatch, training)
        learner.entries.load(start)
        learner.loss_scale.state[:] = torch.tensor([2.0**22, 2.0**22, 0.0])
        training.one(4, round=1)
        ends.append((learner.entries.theta.clone(), learner.loss_scale.state.clone()))
    assert ends[0][1][1] < 2.0**22 and torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][0], ends[1][0])


def test_a_compiled_forward_pass_fills_the_flat_gradient(small_data, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, options: compile(f, backend="aot_eager")
    )
    ends = []
    for options in ([], ["--compile"]):
        learner, training = build(small_data, "--head", "ridge", "--augment", *options)
        start = learner.entries.theta.clone()
        training.one(4, round=1)
        ends.append(learner.entries.theta - start)
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[0].norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_cannot_be_compiled_trains_as_it_is(small_data, monkeypatch, capsys):
    plain, training = build(small_data)
    training.one(4, round=1)

    def broken(function, dynamic, options):
        def call(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("it raised:\nno compiler\n\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    learner, training = build(small_data, "--compile")
    training.one(4, round=1)
    assert torch.equal(learner.entries.theta, plain.entries.theta)
    said = "--compile: PyTorch cannot, steps stay as they are: it raised: no compiler\n"
    assert capsys.readouterr().out == said


def test_an_error_of_a_compiled_step_itself_is_raised(monkeypatch):
    def out_of_memory(*arguments):
        raise torch.cuda.OutOfMemoryError("all of it")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: function)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="all of it"):
        compiled(out_of_memory)(torch.zeros(1))


ON_A_GPU = ON_STATIC_INPUTS | {"fp16": ["--precision", "fp16"], "fp32": ["--precision", "fp32"]}


@needs_cuda
@pytest.mark.parametrize("options", ON_A_GPU.values(), ids=ON_A_GPU)
def test_on_a_gpu_replays_give_the_bits_of_eager_steps(small_data, options):
    ends = []
    for mode in ("off", "on"):
        learner, training = build(small_data, "--cuda-graph", mode, *options)
        losses = [training.one(client, round=1) for client in (4, 9)]
        ends.append([learner.entries.theta, *losses])
        assert training.graphed.status == mode
    for eager, replayed in zip(*ends, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("kind", ["ridge", "probe"])
def test_a_head_of_few_images_is_fitted_to_them_alone(small_data, monkeypatch, kind):
    seen = {}

    def record(name, fit):
        monkeypatch.setattr(head, name, lambda *a: seen.setdefault(name, a) and fit(*a))

    record("fit_ridge", head.fit_ridge)
    record("train_probe", head.train_probe)
    learner, _ = build(small_data, "--head", kind, "--head-images", "900")
    workspace = learner.workspace
    train_index, val_index = workspace.head_splits()
    assert len(train_index) == 900 and np.isin(train_index, workspace.train_index).all()
    assert len(val_index) == 100 and np.isin(val_index, workspace.val_index).all()
    labels = workspace.dataset.train.labels
    assert (torch.bincount(labels[train_index]) == 9).all()
    assert (torch.bincount(labels[val_index]) == 1).all()
    assert not (small_data / "features").exists() and learner.start is None
    every = workspace.features(workspace.build_model(), "train")
    if kind == "ridge":
        sums, val, val_labels = seen["fit_ridge"]
        expected = head.RidgeSums(every.shape[1], 100).update(
            every[train_index], labels[train_index]
        )
        # the images are batched otherwise: fp32 rounding of the features
        torch.testing.assert_close(sums.gram, expected.gram, rtol=1e-5, atol=1e-3)
        assert torch.equal(sums.count, expected.count)
    else:
        features, _, _, val, val_labels = seen["train_probe"]
        torch.testing.assert_close(features, every[train_index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(val, every[val_index], rtol=1e-4, atol=1e-4)
    assert torch.equal(val_labels, labels[val_index])


def test_with_all_images_the_head_is_the_usual_one(small_data):
    for folder in ("a", "b"):
        (small_data / folder).mkdir()
    usual, _ = build(small_data / "a", "--head", "ridge")
    named, _ = build(small_data / "b", "--head", "ridge", "--head-images", "3600")
    torch.testing.assert_close(
        named.model.head.weight, usual.model.head.weight, rtol=1e-3, atol=1e-5
    )
    assert named.evaluate()["val_acc"] == usual.evaluate()["val_acc"]


@pytest.mark.parametrize("piece", [1, 7, 16, 32])
@pytest.mark.parametrize("options", [[], ["--fedir", "--dirichlet", "0.3"]], ids=" ".join)
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(small_data, piece, options):
    found = []
    for micro in ([], ["--micro-batch", str(piece)]):
        learner, training = build(small_data, *options, *micro)
        seen, loss_of = [], learner.loss
        learner.loss = lambda draws, s=seen, f=loss_of: (s.append(len(draws)), f(draws))[1]
        if options:
            training._enter(4)
        loss = learner.backward(training.draws(4, round=1)[0], 1.0)
        found.append((loss, learner.flat.grad.clone()))
    assert seen == [piece] * (32 // piece) + [32 % piece] * (32 % piece > 0)
    (loss, grad), (pieces_loss, pieces_grad) = found
    if piece == 32:
        assert torch.equal(grad, pieces_grad) and torch.equal(loss, pieces_loss)
    torch.testing.assert_close(pieces_loss, loss, rtol=1e-6, atol=0)
    assert (pieces_grad - grad).norm() < 2e-6 * grad.norm()


def test_steps_are_clipped_as_torch_clips_them(small_data):
    command = ["--lr", "0.1", "--weight-decay", "0.01", "--J", "5"]
    learner, training = build(small_data, *command, "--clip-norm", "0.02")
    plain, _ = build(small_data, *command)
    draws = training.draws(4, round=1)
    training.one(4, round=1)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    norms = []
    for batch in draws:
        optimiser.zero_grad(set_to_none=False)
        plain.loss(batch).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.02).item())
        optimiser.step()
    assert min(norms) > 0.02
    # clipping divides where torch multiplies; the norm is summed in another order
    torch.testing.assert_close(learner.flat.theta, plain.flat.theta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [[], ["--head", "ridge", "--mask-rule", "random"], ["--precision", "fp16"]],
    ids=" ".join,
)
def test_a_bound_above_every_norm_changes_no_bit(small_data, options):
    ends = []
    for bound in ([], ["--clip-norm", "1e6"], ["--clip-norm", "0.01"]):
        learner, training = build(small_data, *options, *bound)
        training.one(4, round=1)
        ends.append(learner.entries.theta)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_heads_trained_together_are_clipped_each_by_its_own_norm(small_data):
    command = ["--train", "head", "--nc", "3", "--lr", "0.2"]
    start, clients = None, np.array([3, 0, 77])
    ends = {}
    for bound in ("none", "1e6", "0.05"):
        clip = [] if bound == "none" else ["--clip-norm", bound]
        learner, training = build(small_data, *command, *clip)
        if start is None:
            start = torch.randn(learner.flat.theta.shape) * torch.linspace(0.01, 0.3, 1)
        together = [theta.clone() for theta, _ in training.heads(start, clients, round=2)]
        ends[bound] = together
        (one,) = [theta.clone() for theta, _ in training.heads(start, clients[:1], round=2)]
        torch.testing.assert_close(one, together[0], rtol=1e-5, atol=1e-7)
        for client, theta in zip(clients, together, strict=True):
            learner.flat.reset(start)
            training.one(int(client), round=2)
            torch.testing.assert_close(theta, learner.flat.theta, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, ends["none"], ends["1e6"]))
    assert not any(map(torch.equal, ends["none"], ends["0.05"]))
