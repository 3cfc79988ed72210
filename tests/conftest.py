"""What all tests share: the device, Triton's interpreter where it is no GPU, and the real data.

Tests see no GPU, whose rounding is another; GPU_TESTS=1 runs those that are for one.
"""

import functools
import math
import os
import threading
from pathlib import Path

import pytest
import torch

import data

SYNTHETIC_DATASET = data.synthetic_dataset

GPU_TESTS = os.environ.get("GPU_TESTS") == "1"
if not GPU_TESTS:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one, here and in children
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a file with kernels is imported

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or no GPU_TESTS=1")


def pytest_collection_modifyitems(config, items):
    """Under GPU_TESTS=1 keep the tests named on_a_gpu, and all of the kernels'."""
    if GPU_TESTS:
        kernels = ("test_sparse_sgdm", "test_fisher", "test_fused")
        chosen = [i for i in items if "on_a_gpu" in i.name or i.module.__name__ in kernels]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("CIFAR_DIR", ROOT / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with cifar-100-python and vit_tiny_patch16_224.pth; skips the test without it."""
    for name in ("cifar-100-python", "vit_tiny_patch16_224.pth"):
        if not (REAL_DATA / name).exists():
            pytest.skip(f"real data: no {name} in {REAL_DATA} (CIFAR_DIR names another folder)")
    return REAL_DATA


@functools.cache
def small_synthetic() -> data.Dataset:
    """A fifth of the synthetic data set."""
    return SYNTHETIC_DATASET(samples_per_class=40)


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """Less synthetic data, and an empty working directory, for commands run in-process."""
    monkeypatch.setattr(data, "synthetic_dataset", small_synthetic)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_curves(monkeypatch):
    """Runs without their picture, which takes longer than a tiny run; test_plots.py draws it."""
    from commands import centralized, fedavg

    for command in (centralized, fedavg):
        monkeypatch.setattr(command, "plot_curves", lambda logs, path: None)


@pytest.fixture
def cli(small_data, no_curves, capsys, monkeypatch):
    """Run train.py's command line in-process: cli("fedavg", ...) -> (status, stdout, stderr).

    A slow machine says no more on stderr than a quick one.
    """
    import train

    monkeypatch.setattr("machine.status.PATIENCE", math.inf)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = train.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def learners(monkeypatch):
    """The learners of the runs that a test makes, as the runs leave them."""
    from training import session

    recorded = []

    class Recorded(session.Learner):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            recorded.append(self)

    monkeypatch.setattr(session, "Learner", Recorded)
    return recorded


def assert_frozen_stayed(learner) -> None:
    """Compare a learner's model with its start: what its mask freezes is the same to the bit."""
    start, moved = dict(learner.workspace.build_model().named_parameters()), 0
    now = dict(learner.model.named_parameters())
    for name, trains in learner.mask.parts().items():
        assert torch.equal(now[name][~trains], start[name][~trains]), name
        moved += (now[name][trains] != start[name][trains]).sum().item()
    assert moved > 0.9 * learner.mask.origin["kept"] == 0.9 * learner.entries.size


class Threads:
    """A group of threads, each of which takes the rank it is given."""

    def __init__(self, size):
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size)
        self.local = threading.local()

    @property
    def rank(self):
        return self.local.rank

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def sum_(self, tensor):
        tensor.copy_(sum(self.gather(tensor.clone())))


def in_threads(size, work):
    """Run `work(group)` in `size` threads that are a group; returns the results by rank."""
    group, results, problems = Threads(size), {}, []

    def run(rank):
        group.local.rank = rank
        try:
            results[rank] = work(group)
        except BaseException as error:
            problems.append(error)
            group.barrier.abort()  # or the others would wait for ever

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        broken = threading.BrokenBarrierError
        raise next((e for e in problems if not isinstance(e, broken)), problems[0])
    return results
