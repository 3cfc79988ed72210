"""--cover partial: fewer clients than classes need, as people run K = 20, N_c = 1."""

import json

from built import build_learner

import data

FEW = ("--clients", 20, "--nc", 1, "--fraction", 0.2, "--batch-size", 4)


def test_classes_without_a_client_are_named_and_left_out_of_training(cli, small_data):
    command = ("fedavg", "--data", "synthetic", *FEW, "--rounds", 1, "--name", "x")
    status, _, err = cli(*command)
    assert status == 2 and "--cover partial" in err
    status, out, err = cli(*command, "--cover", "partial")
    assert status == 0 and "no client holds 80 of the classes: pattern" in out, err
    folder = small_data / "runs" / "x"
    opening = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert len(opening["classes_without_client"]) == 80
    assert summary["classes_without_client"] == opening["classes_without_client"]


def test_a_head_is_fitted_to_what_is_held(small_data):
    learner, shards, _ = build_learner(small_data, *FEW, "--cover", "partial", "--head", "ridge")
    labels = learner.workspace.dataset.train.labels.numpy()
    held = {int(y) for shard in shards for y in labels[shard]}
    assert len(held) == 20 and held == set(labels[learner.workspace.train_index].tolist())
    assert len(data.synthetic_dataset().classes) == 100
