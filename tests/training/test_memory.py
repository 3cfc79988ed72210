"""What a run keeps beside its model fits, or is refused with figures before it begins."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from built import build, build_loop, parsed

from commands.options import federation
from fedavg import Alone
from training import memory

TINY = ("--clients", 20, "--J", 2, "--batch-size", 8, "--fraction", 0.2, "--lr", 0.05)
COMMAND = ("fedavg", "--data", "synthetic", "--rounds", 2, "--eval-every", 2, *TINY)


def test_client_states_that_do_not_fit_are_refused_with_figures(cli, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    status, _, err = cli(*COMMAND, "--scaffold")
    assert status == 2 and err.count("\n") == 1, err
    assert "--scaffold keeps 0.0 GB, 0.3 MB for each client" in err
    assert "fewer --clients" in err


@pytest.mark.parametrize(("vectors", "fits"), [(5.9, False), (6.1, True)])
def test_six_client_states_need_room_for_six(small_data, monkeypatch, vectors, fits):
    size = 4 * build(small_data)[0].entries.theta.numel()
    room = {torch.device("cpu"): vectors * size}
    monkeypatch.setattr(memory, "memory_room", lambda learner: room)
    command = ("--clients", 25, "--fraction", 0.1, "--rounds", 2, "--scaffold")  # 3 a round
    if fits:
        build_loop(small_data, *command)
    else:
        with pytest.raises(ValueError, match="fewer --clients"):
            build_loop(small_data, *command)


@pytest.mark.parametrize("method", [("--scaffold",), ("--aggregate", "ties"), ("--diagnostics",)])
def test_a_run_that_did_not_fit_leaves_no_folder(cli, monkeypatch, small_data, method):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    status, _, err = cli(*COMMAND, *method, "--name", "x")
    assert status == 2 and "room for 0.0 GB" in err, err
    assert not (small_data / "runs" / "x").exists()


@pytest.mark.parametrize(("free", "fits"), [(1e9, True), (1e3, False), (0, True)])
def test_an_apple_gpus_changes_are_kept_apart_on_the_host(monkeypatch, free, fits):
    """Where the sums are; a host that does not say what is free is trusted."""
    monkeypatch.setattr(memory, "free_memory", lambda device: {"cpu": free}[device.type])
    workspace = SimpleNamespace(device=torch.device("mps"), shards=20 * [None])
    entries = SimpleNamespace(theta=torch.zeros(1000))
    learner = SimpleNamespace(workspace=workspace, entries=entries, group=Alone())
    o = federation(parsed("fedavg", "--rounds", 1, "--aggregate", "ties").groups)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="--aggregate ties"):
        memory.check_apart(learner, o, None)
