"""Features are computed once, and no other file passes for them."""

import shutil

import pytest
import torch

import kept_features
import train
from workspace import Workspace


def build():
    command = ["fedavg", "--data", "synthetic", "--data-dir", "data", "--eval-batch", "500"]
    return Workspace(train.resolve(train.build_parser().parse_args(command)))


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_features_of_something_else_are_computed_again_and_named(small_data, damage, capsys):
    work = build()
    model = work.build_model()
    whole = work.features(model, "test")
    (path,) = (small_data / "data" / "features").iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        kept_features.save(other := path.with_name("other.pt"), "other key", whole + 1)
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
