"""Real CIFAR-100 and a real ViT-Ti/16; skipped, loudly, where they are absent."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_frozen_stayed

import data
import model as vit
import train
from fisher import fisher_diagonal

pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow


@pytest.fixture
def real(real_data, tmp_path, monkeypatch, capsys):
    """Run a command on the real data at 64 px: real("ridge", ...) -> its summary."""
    monkeypatch.chdir(tmp_path)
    weights = real_data / "vit_tiny_patch16_224.pth"
    model = ["--model", "vit_ti16", "--weights", weights, "--image-size", 64]

    def run(command, *arguments):
        options = [*model, "--data-dir", real_data, "--name", "x", *arguments]
        status = train.main([str(a) for a in (command, *options)])
        assert status == 0, capsys.readouterr().err
        return json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())

    return run


def first(monkeypatch, train: int, test: int) -> None:
    """Let commands see so many images of each set, the first; the files are in random order."""
    load = data.load_cifar100

    def load_few(*arguments):
        whole = load(*arguments)
        few = {"train": whole.train, "test": whole.test}
        few = {
            n: data.ImageSet(*(x[:k] for x in few[n]))
            for n, k in (("train", train), ("test", test))
        }
        return whole._replace(**few)

    monkeypatch.setattr(data, "load_cifar100", load_few)


@pytest.fixture
def few(monkeypatch):
    """A fifth of the images: features take 3 ms each on a core."""
    first(monkeypatch, 10_000, 2000)


@pytest.fixture
def few_tested(monkeypatch):
    """Evaluations on 500 test images: to see all would take longer than to train."""
    first(monkeypatch, 50_000, 500)


@pytest.mark.parametrize("sharding", [(), *[("--nc", n) for n in (1, 5, 10, 50)]])
def test_the_federated_ridge_head_is_the_central_one(real, few, sharding):
    summary = real("ridge", *sharding)
    assert summary["train_images"] == 8998  # the classes of the first images differ in size
    assert summary["difference_to_central"] < 1e-6
    assert summary["final"]["test_acc"] >= 0.25


def test_the_ridge_head_on_all_images_reaches_28_percent(real):
    """Minutes where CIFAR_DIR has no features yet, and then seconds."""
    summary = real("ridge")
    assert summary["train_images"] == 45_000
    assert summary["difference_to_central"] < 1e-6
    assert summary["final"]["test_acc"] >= 0.28


@pytest.mark.parametrize("sharding", [(), ("--nc", 1)])
def test_head_only_rounds_improve_the_ridge_heads_loss(real, few, sharding, tmp_path):
    summary = real("fedavg", "--train", "head", "--rounds", 200, "--lr", 0.001, *sharding)
    log = (tmp_path / "runs" / "x" / "log.jsonl").read_text().splitlines()
    assert summary["final"]["val_loss"] < json.loads(log[0])["val_loss"]


def test_a_round_on_real_images_improves_validation(real, few_tested, tmp_path):
    options = ["--rounds", 2, "--J", 2, "--batch-size", 32, "--eval-every", 2, "--lr", 0.001]
    summary = real("fedavg", *options, "--val-fraction", 0.02)
    start = json.loads((tmp_path / "runs" / "x" / "log.jsonl").read_text().splitlines()[0])
    assert summary["final"]["val_loss"] < start["val_loss"]
    shards = np.load(tmp_path / "runs" / "x" / "shards.npz")
    assert len(np.unique(shards["clients"])) == 49_000 and len(shards["validation"]) == 1000


def test_frozen_coordinates_of_the_real_model_keep_their_bits(real, few_tested, learners):
    masked = ["--mask-rule", "least-sensitive", "--sparsity", 0.9, "--calibration-images", 20]
    options = ["--rounds", 2, "--J", 2, "--batch-size", 8, "--eval-every", 2, "--eval-batch", 500]
    options += ["--val-fraction", 0.01, "--lr", 0.003]
    real("fedavg", *masked, "--calibration-rounds", 2, *options)
    (learner,) = learners
    assert_frozen_stayed(learner)


def test_the_scores_of_the_real_model_are_the_per_sample_ones(real_data):
    """The rounding of the fp32 network is in both; over 32 images it averages out below 1e-5."""
    model = vit.build_vit("vit_ti16", 100)
    vit.load_weights(model, real_data / "vit_tiny_patch16_224.pth")
    with torch.no_grad():
        model.head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    train_set = data.load_cifar100(real_data).train
    preprocess = data.Preprocess(64, *vit.HALF, "cpu", torch.float32)
    images, labels = preprocess(train_set.images[200:232]), train_set.labels[200:232]
    backbone = vit.trained_names(model, "all", freeze_head=True)
    scores = fisher_diagonal(model, [(images, labels)], labels="true", parameters=backbone)
    model = model.double()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def log_likelihood(values, image, label):
        return torch.func.functional_call(model, values, (image[None],)).log_softmax(1)[0, label]

    expected = dict.fromkeys(backbone, 0.0)
    for pair in zip(images.double(), labels, strict=True):
        gradients = torch.func.grad(log_likelihood)(values, *pair)
        expected = {name: e + gradients[name].square() / 32 for name, e in expected.items()}
    for name, reference in expected.items():
        assert (scores[name] - reference).norm() < 1e-5 * reference.norm(), name
