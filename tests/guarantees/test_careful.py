"""The bench's careful plain loop does what this project's rounds do."""

import sys

import pytest
import torch
from conftest import ROOT

PRECISION = {"fp32": "float32", "bf16": "bfloat16"}
LINE = (
    "fedavg --data synthetic --weights none --head linear --clients 20 --fraction 0.1 --J 3 "
    "--batch-size 8 --lr 0.02 --model vit_demo --device cpu --threads 1"
)


@pytest.fixture
def bench(monkeypatch):
    """The benches' modules; none stays imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_peers

    yield bench_peers
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "bench")):
            del sys.modules[name]


@pytest.mark.parametrize("size, precision", [(32, "fp32"), (48, "fp32"), (32, "bf16")])
def test_the_careful_loop_ends_at_this_projects_weights(bench, small_data, size, precision):
    line = f"{LINE} --rounds 2 --image-size {size} --precision {precision}"
    start = bench.Work(line).workspace.build_model().state_dict()
    ours, theirs = bench.project(bench.Work(line)), bench.careful(bench.Work(line, best=True))
    assert ours.keys() == theirs.keys()
    apart = max((ours[name] - theirs[name].float()).abs().max().item() for name in ours)
    moved = max((ours[name] - start[name]).abs().max().item() for name in ours)
    assert moved > 1e-2
    assert apart <= bench.TOLERANCE[PRECISION[precision]]
    different = torch.cat([(theirs[n] - start[n]).flatten().abs() for n in start])
    assert (different > 0).double().mean() > 0.9
