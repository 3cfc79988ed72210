"""Features are computed once, no other file passes for them, and heads are fitted to them."""

import shutil

import numpy as np
import pytest
import torch
from built import build, parsed

import head
from training import features
from training.workspace import Workspace


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_features_of_something_else_are_computed_again_and_named(small_data, damage, capsys):
    o = parsed("fedavg", "--data-dir", "data", "--eval-batch", 500).groups
    workspace = Workspace(o.source, o.machine, o.backbone)
    model = workspace.build_model()
    whole = features.features(workspace, model, "test")
    (path,) = (small_data / "data" / "features").iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        features.save_features(other := path.with_name("other.pt"), "other key", whole + 1)
        shutil.move(other, path)
    assert torch.equal(features.features(workspace, model, "test"), whole)
    assert path.name in capsys.readouterr().err
    assert torch.equal(features.features(workspace, model, "test"), whole)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ridge", "probe"])
def test_a_head_of_few_images_is_fitted_to_them_alone(small_data, monkeypatch, kind):
    seen = {}

    def record(name, fit):
        monkeypatch.setattr(head, name, lambda *a: seen.setdefault(name, a) and fit(*a))

    record("fit_ridge", head.fit_ridge)
    record("train_probe", head.train_probe)
    learner, _ = build(small_data, "--head", kind, "--head-images", "900")
    workspace = learner.workspace
    train_index, val_index = features.head_splits(workspace, 900)
    assert len(train_index) == 900 and np.isin(train_index, workspace.train_index).all()
    assert len(val_index) == 100 and np.isin(val_index, workspace.val_index).all()
    labels = workspace.dataset.train.labels
    assert (torch.bincount(labels[train_index]) == 9).all()
    assert (torch.bincount(labels[val_index]) == 1).all()
    assert not (small_data / "features").exists() and learner.start is None
    every = features.features(workspace, workspace.build_model(), "train")
    if kind == "ridge":
        sums, val, val_labels = seen["fit_ridge"]
        expected = head.RidgeSums(every.shape[1], 100)
        expected.update(every[train_index], labels[train_index])
        # the images are batched otherwise: fp32 rounding of the features
        torch.testing.assert_close(sums.gram, expected.gram, rtol=1e-5, atol=1e-3)
        assert torch.equal(sums.count, expected.count)
    else:
        rows, _, _, val, val_labels = seen["train_probe"]
        torch.testing.assert_close(rows, every[train_index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(val, every[val_index], rtol=1e-4, atol=1e-4)
    assert torch.equal(val_labels, labels[val_index])


def test_with_all_images_the_head_is_the_usual_one(small_data):
    for folder in ("a", "b"):
        (small_data / folder).mkdir()
    usual, _ = build(small_data / "a", "--head", "ridge")
    named, _ = build(small_data / "b", "--head", "ridge", "--head-images", "3600")
    splits = (features.head_splits(usual.workspace, count) for count in (None, 3600))
    for some, others in zip(*splits, strict=True):
        assert np.array_equal(np.sort(some), np.sort(others))
    # batched otherwise, features are rounded otherwise, and another penalty may be the best
    accuracies = [learner.evaluate()["val_acc"] for learner in (usual, named)]
    assert abs(accuracies[0] - accuracies[1]) <= 0.01
