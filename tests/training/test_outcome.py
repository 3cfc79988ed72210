"""What a run has come to: its weights to the bit, and its best."""

import json

import pytest
import torch
from conftest import assert_frozen_stayed
from leaves.test_model import dino_checkpoint
from past import records

import model as vit
from training import outcome

TINY = (
    *("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.3),
    *("--batch-size", 8, "--J", 1, "--eval-every", 2, "--name", "x"),
)
CENTRAL = ("centralized", "--data", "synthetic", "--train", "head", "--batch-size", 400)


def shapes(path):
    state = torch.load(path, weights_only=True)
    assert all(value.dtype == torch.float32 for value in state.values())
    return {name: tuple(value.shape) for name, value in state.items()}


# ---------------------------------------------------------------------------- as a file


def test_the_layout_is_that_of_dinos_checkpoint(tmp_path):
    layout = {name: tuple(tensor.shape) for name, tensor in dino_checkpoint().items()}
    model = vit.build_vit("vit_s16", classes=100)
    outcome.export(model, tmp_path / "x.pth")
    assert list(shapes(tmp_path / "x.pth").items()) == list(layout.items())
    outcome.export(model, tmp_path / "head.pth", with_head=True)
    head = {"head.weight": (100, 384), "head.bias": (100,)}
    assert shapes(tmp_path / "head.pth") == layout | head


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--head", "ridge", "--mask-rule", "random"),
        ("--train", "head", "--head", "ridge"),
        ("--train", "blocks.1", "--head", "ridge", "--precision", "bf16"),
    ],
    ids=lambda o: " ".join(str(x) for x in o),
)
def test_exported_weights_are_the_runs_and_load_again_to_the_bit(
    cli, small_data, learners, options
):
    assert cli(*TINY, *options)[0] == 0
    status, out, err = cli("export", "runs/x", "x.pth", "--with-head")
    assert status == 0 and "--model vit_toy --weights x.pth --normalisation half" in out, err
    (learner,), state = learners, torch.load("x.pth", weights_only=True)
    view = learner.flat
    for name in view.shapes:
        assert torch.equal(state[name], view.view(view.theta, name)), name
    start = dict(learner.workspace.build_model().named_parameters())
    for name in set(state) - set(view.shapes) - {"head.weight", "head.bias"}:
        assert torch.equal(state[name], start[name]), name
    assert torch.equal(state["head.weight"], learner.model.head.weight)
    if learner.mask:
        assert_frozen_stayed(learner)
    again = vit.build_vit("vit_demo", classes=100, seed=1)
    vit.load_weights(again, "x.pth")
    assert all(torch.equal(p, state[n]) for n, p in again.named_parameters() if n[:5] != "head.")
    if not options:
        assert "its head is for other programs" in out
        for name, given, said in (("y", (), True), ("z", ("--normalisation", "half"), False)):
            line = (*TINY, "--name", name, "--rounds", 1, "--weights", "x.pth", *given)
            status, out, _ = cli(*line)
            assert status == 0
            assert ("x.pth: pixels are normalised by imagenet statistics" in out) == said


def test_no_export_overwrites_a_file_or_passes_for_one(cli, small_data):
    assert cli(*TINY, "--rounds", 1)[0] == 0
    (small_data / "x.pth").write_text("precious")
    status, _, err = cli("export", "runs/x", "x.pth")
    assert status == 2 and "x.pth exists already" in err
    assert (small_data / "x.pth").read_text() == "precious"
    status, _, err = cli("export", "runs/x", "nowhere/x.pth")
    assert status == 2 and "cannot write nowhere/x.pth" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------- the best weights


@pytest.mark.parametrize(
    ("start", "unit"),
    [((*TINY, "--rounds", 9), "round"), ((*CENTRAL, "--epochs", 9), "epoch")],
    ids=["fedavg", "centralized"],
)
def test_an_early_stop_is_told_resumed_and_its_best_weights_are_there(cli, small_data, start, unit):
    still = (*start, "--lr", 0, "--eval-every", 1, "--name", "s")
    status, out, err = cli(*still, "--early-stop", 2)
    assert status == 0 and "stopped early: 2 evaluations" in out, err
    path = small_data / "runs" / "s" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary[unit] == 2 and summary["stopped_early"] == 2
    status, out, _ = cli(*still, "--early-stop", 2)
    assert status == 0 and f"is finished: {unit} 2, stopped early" in out
    status, out, err = cli("eval", "runs/s", "--best")
    assert status == 0 and out.split()[:2] == [unit, "0"], err
    assert cli("export", "runs/s", "best.pth", "--best")[0] == 0
    names = vit.build_vit("vit_demo", 100).state_dict().keys()
    assert shapes(small_data / "best.pth").keys() <= names
    assert cli(*still, "--early-stop", 3)[0] == 0  # more patience goes on
    assert json.loads(path.read_text())[unit] == 3


def test_the_best_weights_are_always_there_and_tested(cli, small_data):
    assert cli(*TINY, "--rounds", 3, "--lr", 10)[0] == 0  # the start stays the best
    summary = json.loads((small_data / "runs" / "x" / "summary.json").read_text())
    best, final = summary["best_by_validation"], summary["final"]
    status, out, _ = cli("eval", "runs/x", "--best")
    assert status == 0 and out.split()[:2] == ["round", str(best["round"])]
    assert f"{100 * best['test_acc']:.2f} %" in out
    assert f"{100 * final['test_acc']:.2f} %" in cli("eval", "runs/x")[1]
    assert not any("test_acc" in record for record in records(small_data / "runs" / "x"))


def test_a_run_without_validation_data_has_no_best_weights(cli):
    assert cli(*TINY, "--rounds", 1, "--val-fraction", 0)[0] == 0
    status, _, err = cli("eval", "runs/x", "--best")
    assert status == 2 and "runs/x holds no best weights: it has no validation data" in err
