"""Features are computed once: a kill costs a part of them, and no other file passes for them."""

import shutil

import pytest
import torch

import kept_features
import train
from kept_features import KeptFeatures
from workspace import Workspace


def build():
    command = ["fedavg", "--data", "synthetic", "--data-dir", "data", "--eval-batch", "500"]
    return Workspace(train.resolve(train.build_parser().parse_args(command)))


class Killed(Exception):
    pass


def test_features_that_a_kill_cut_short_are_gone_on_with(small_data, monkeypatch):
    work, batches = build(), []
    model = work.build_model()
    whole = work.compute_features(model, "train")
    monkeypatch.setattr(kept_features, "SAVE_SECONDS", 0.0)
    computed = type(model).features

    def features(self, images):
        if len(batches) == 5:
            raise Killed
        batches.append(len(images))
        return computed(self, images)

    monkeypatch.setattr(type(model), "features", features)
    with pytest.raises(Killed):
        work.features(model, "train")
    (begun,) = (small_data / "data" / "features").iterdir()
    assert begun.suffix == ".begun"
    batches[:] = batches[5:]
    monkeypatch.setattr(type(model), "features", computed)
    monkeypatch.setattr(
        type(model), "features", lambda self, x: batches.append(len(x)) or computed(self, x)
    )
    assert torch.equal(work.features(model, "train"), whole)
    assert batches == [500] * 3  # of 8, of 4,000 images
    assert [p.suffix for p in (small_data / "data" / "features").iterdir()] == [".pt"]


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_features_of_something_else_are_computed_again_and_named(small_data, damage, capsys):
    work = build()
    model = work.build_model()
    whole = work.features(model, "test")
    (path,) = (small_data / "data" / "features").iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        KeptFeatures(other := path.with_name("other.pt"), "other key").save(whole + 1)
        shutil.move(other, path)
    assert torch.equal(work.features(model, "test"), whole)
    assert path.name in capsys.readouterr().err
    assert torch.equal(work.features(model, "test"), whole) and not capsys.readouterr().err


def test_a_forward_pass_takes_fewer_images_where_they_are_large(small_data):
    def batch(size):
        command = f"fedavg --data synthetic --data-dir data --model vit_ti16 --image-size {size}"
        return Workspace(train.resolve(train.build_parser().parse_args(command.split()))).eval_batch

    assert batch(64) == 256 > batch(224) > 8
    assert batch(1600) == 8
