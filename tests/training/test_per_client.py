"""How a run's model serves each client: shares of the validation images, and their figures."""

import json

import numpy as np
import pytest
import torch

from training.per_client import by_class, spread, validation_share

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 40))


@pytest.mark.parametrize(
    ("shard", "counts"),
    [
        ([450, *[0] * 9], [40, *[0] * 9]),
        ([100, 100, *[0] * 8], [40, 40, *[0] * 8]),
        ([90, 45, 9, *[0] * 7], [40, 20, 4, *[0] * 7]),
        ([7] * 10, [40] * 10),
        ([1000, 1, *[0] * 8], [40, *[0] * 9]),  # 0.04 of an image rounds to none
    ],
)
def test_a_share_is_the_largest_in_the_clients_mixture(shard, counts):
    share = validation_share(LABELS, shard, seed=0, client=3)
    assert np.bincount(LABELS[share], minlength=10).tolist() == counts
    assert len(set(share.tolist())) == len(share)


def test_a_share_is_a_function_of_seed_and_client():
    shard = [30, 20, 10, *[0] * 7]
    draw = [validation_share(LABELS, shard, seed=s, client=k) for s, k in ((0, 1), (0, 2), (1, 1))]
    assert np.array_equal(draw[0], validation_share(LABELS, shard, seed=0, client=1))
    assert not np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])
    with pytest.raises(ValueError, match="client 4 holds no image"):
        validation_share(LABELS, [0] * 10, seed=0, client=4)


def test_the_spread_is_written_out():
    figures = spread([k / 100 for k in range(25)])  # the worst tenth of 25 clients is three
    assert figures["mean_acc"] == pytest.approx(0.12)
    assert figures["worst_decile_acc"] == pytest.approx(0.01)
    assert figures["std"] == pytest.approx(np.sqrt((25**2 - 1) / 12) / 100)


def test_accuracy_by_class_knows_classes_without_images():
    accuracy = by_class(np.array([0, 0, 2]), np.array([True, False, True]), 4)
    assert accuracy[[0, 2]].tolist() == [0.5, 1.0] and np.isnan(accuracy[[1, 3]]).all()


@pytest.mark.parametrize("extra", [("--nc", 5), ("--train", "head", "--head", "ridge")])
def test_the_evaluation_of_clients_is_that_of_their_images(cli, small_data, learners, extra):
    run = ("fedavg", "--data", "synthetic", "--clients", 20, "--rounds", 3, "--B", 16)
    assert cli(*run, "--name", "x", *extra)[0] == 0
    (learner,) = learners
    status, out, err = cli("eval", "runs/x", "--per-client", "--personalised")
    assert status == 0 and "lowest: pattern" in out, err
    path = small_data / "runs" / "x" / "per_client.json"
    figures = json.loads(path.read_text())
    whole = json.loads((small_data / "runs" / "x" / "summary.json").read_text())["final"]
    assert figures["round"] == 3 and len(figures["clients"]) == 20
    # four validation images a class
    assert np.mean(list(figures["by_class"].values())) == pytest.approx(whole["val_acc"])
    workspace = learner.workspace
    shard = workspace.shards[19]
    labels = workspace.dataset.train.labels.numpy()
    counts = np.bincount(labels[shard], minlength=100)
    share = validation_share(labels[workspace.val_index], counts, seed=0, client=19)
    at = torch.from_numpy(workspace.val_index[share])
    with torch.no_grad():
        logits = learner.logits_of(learner.inputs_of("train", at), None)
    accuracy = (logits.argmax(1) == torch.from_numpy(labels)[at]).double().mean().item()
    assert figures["clients"][19]["acc"] == pytest.approx(accuracy)
    tuned = [row["client"] for row in figures["clients"] if "personalised_acc" in row]
    assert len(tuned) == 10 and {0, 19} <= set(tuned)
    means = [figures[key]["mean_acc"] for key in ("same_clients_global", "personalised")]
    if extra[0] == "--nc":  # a client's own steps suit its five classes
        assert means[1] > means[0]
    else:
        before = path.read_bytes()
        assert cli("eval", "runs/x", "--per-client", "--personalised")[0] == 0
        assert path.read_bytes() == before


def test_a_run_without_clients_has_no_accuracy_per_client(cli):
    central = ("centralized", "--data", "synthetic", "--train", "head", "--batch-size", 400)
    assert cli(*central, "--epochs", 1, "--name", "c")[0] == 0
    status, _, err = cli("eval", "runs/c", "--per-client")
    assert status == 2 and "runs/c has no clients" in err
    assert cli("eval", "runs/c", "--personalised")[0] == 2
