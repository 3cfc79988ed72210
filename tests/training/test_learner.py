"""What trains: pieces of a batch, compiled steps and evaluations are what the plain ones are."""

from types import SimpleNamespace

import pytest
import torch
from built import build

from machine.device import compiled
from training import learner


def test_evaluation_does_not_depend_on_its_batch(small_data):
    learner, _ = build(small_data, "--head", "ridge")
    whole = learner.evaluate()
    learner.workspace.eval_batch = 37
    parts = learner.evaluate()
    assert whole["test_acc"] == parts["test_acc"]
    assert whole["test_loss"] == pytest.approx(parts["test_loss"], rel=1e-6)


@pytest.mark.parametrize(("free", "reason"), [(1e9, "do not fit"), (0, "memory is not known")])
def test_activations_that_are_not_kept_say_why(monkeypatch, capsys, free, reason):
    """A host may not say how much of its memory is free."""
    monkeypatch.setattr(learner.features, "tokens", lambda workspace, model, first: None)
    monkeypatch.setattr(learner, "free_memory", lambda device: free)
    stub = SimpleNamespace(on_features=False, first=1, model=None, workspace=None)
    stub.training = learner.Training(augment=False)
    learner.Learner.keep_activations(stub)
    assert reason in capsys.readouterr().out and stub.keeps_activations is False


@pytest.mark.parametrize("piece", [1, 7, 16, 32])
@pytest.mark.parametrize("options", [[], ["--fedir", "--dirichlet", "0.3"]], ids=" ".join)
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(small_data, piece, options):
    results = []
    for micro in ([], ["--micro-batch", piece]):
        learner, clients = build(small_data, *options, *micro)
        seen, loss_of = [], learner.loss
        learner.loss = lambda draws, s=seen, f=loss_of: (s.append(len(draws)), f(draws))[1]
        clients.enter(learner.entries.theta.clone(), 4)  # FedIR's class weights
        loss = learner.backward(clients.batches(4, round=1)[0], 1.0)
        results.append((loss, learner.flat.grad.clone()))
    assert seen == [piece] * (32 // piece) + [32 % piece] * (32 % piece > 0)
    (loss, grad), (pieces_loss, pieces_grad) = results
    if piece == 32:
        assert torch.equal(grad, pieces_grad) and torch.equal(loss, pieces_loss)
    torch.testing.assert_close(pieces_loss, loss, rtol=1e-6, atol=0)
    assert (pieces_grad - grad).norm() < 2e-6 * grad.norm()


def test_where_passes_or_attention_are_not_fused_it_says_why(small_data, monkeypatch, capsys):
    trained, _ = build(small_data, "--image-size", 32)
    sizes = trained.workspace.dtype, 48, 3
    reasons, asked = {"passes": "no compiler", "attention": ""}, []

    def serves(device, *of):
        assert of == sizes
        return reasons["passes"]

    def attends(device, *of):
        asked.append(of)
        return reasons["attention"]

    monkeypatch.setattr(trained.workspace, "device", torch.device("cuda"))
    for name, function in (("serves", serves), ("attends", attends)):
        monkeypatch.setattr(learner.fused, name, function)
    monkeypatch.setattr(learner.fused, "hopper", lambda device: True)
    capsys.readouterr()
    assert not trained._may_fuse() and not asked
    assert capsys.readouterr().out == "passes are not fused: no compiler\n"
    reasons["passes"] = ""
    assert trained._may_fuse() and asked == [(*sizes, 17)] and not capsys.readouterr().out
    reasons["attention"] = "257 tokens"
    assert trained._may_fuse()
    assert capsys.readouterr().out == "attention is PyTorch's: 257 tokens\n"


# ---------------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_a_compiled_forward_pass_fills_the_flat_gradient(small_data, monkeypatch):
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, options: compile(f, backend="aot_eager")
    )
    counters.clear()
    changes = []
    for options in ([], ["--compile"]):
        learner, clients = build(small_data, "--augment", "--J", 1, "--batch-size", 8, *options)
        start = learner.entries.theta.clone()
        changes.append(clients.train_client(start, 4, round=1)[0] - start)
    assert (changes[0] - changes[1]).norm() < 1e-5 * changes[0].norm()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_what_cannot_be_compiled_trains_as_it_is(small_data, monkeypatch, capsys):
    plain, clients = build(small_data)
    start = plain.entries.theta.clone()
    clients.train_client(start, 4, round=1)

    def broken(function, dynamic, options):
        def call(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("it raised:\nno compiler\n\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    learner, clients = build(small_data, "--compile")
    clients.train_client(start, 4, round=1)
    assert torch.equal(learner.entries.theta, plain.entries.theta)
    expected = "--compile: PyTorch cannot, steps stay as they are: it raised: no compiler\n"
    assert capsys.readouterr().out == expected


def test_an_error_of_a_compiled_step_itself_is_raised(monkeypatch):
    def out_of_memory(*arguments):
        raise torch.cuda.OutOfMemoryError("all of it")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: function)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="all of it"):
        compiled(out_of_memory)(torch.zeros(1))
