"""What users mistype, or the machine cannot do, ends in one line that says what to do instead."""

import re
import urllib.request
from urllib.error import URLError

import pytest
import torch
from past import records

import model as vit
from machine import runs
from training import learner, workspace

FEDAVG = ("fedavg", "--data", "synthetic")
TINY = (*FEDAVG, "--rounds", 2, "--clients", 10, "--fraction", 0.3, "--batch-size", 8)


def test_fewer_rounds_than_a_run_has_are_refused(cli, small_data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(runs.Run, "summarise", None)  # ends before the summary is written
        cli(*TINY, "--name", "x")
    status, _, err = cli(*TINY, "--name", "x", "--rounds", 1)
    assert status == 2 and "is at round 2 already, beyond 1" in err


def test_a_folder_that_another_process_runs_is_left_alone(cli, small_data):
    fcntl = pytest.importorskip("fcntl")
    assert cli(*TINY, "--name", "x")[0] == 0
    with open(small_data / "runs" / "x" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = cli(*TINY, "--name", "x", "--rounds", 3)
    assert status == 2 and "x is open in another process" in err
    assert cli(*TINY, "--name", "x", "--rounds", 3)[0] == 0


def test_a_schedule_fixes_the_number_of_rounds(cli):
    cosine = (*TINY, "--schedule", "cosine", "--name", "c")
    assert cli(*cosine)[0] == 0
    status, _, err = cli(*cosine, "--rounds", 4)
    assert status == 2 and "rounds is 2 there and 4 here" in err


@pytest.mark.parametrize("every", [0, -0.1, "half", 1.5, "nan"])
def test_a_cadence_is_whole_or_a_share_of_an_epoch(cli, every):
    status, _, err = cli("centralized", "--data", "synthetic", "--eval-every", every)
    assert status == 2 and "--eval-every" in err and err.count("\n") == 1
    status, _, err = cli(*TINY, "--eval-every", 0.5)
    assert status == 2 and "'0.5' is not a whole number" in err


BAD = {
    "--clients above": (*FEDAVG, "--clients", 3601),
    "--clients 5 --nc 3: 5 clients of 3 classes cannot cover": (*FEDAVG, "--clients", 5, "--nc", 3),
    "N_c must lie in 1..100": (*FEDAVG, "--nc", 101),
    "argument --nc: 0 must be at least 1": (*FEDAVG, "--nc", 0),
    "need 5000 parts": (*FEDAVG, "--clients", 1000, "--nc", 5),
    "--dirichlet with --nc": (*FEDAVG, "--nc", 5, "--dirichlet", 1),
    "argument --dirichlet: 0 must be at least 1e-06 and at most 1e+09": (*FEDAVG, "--dirichlet", 0),
    "argument --J/--local-steps: 0 must be at least 1": (*FEDAVG, "--J", 0),
    "--J/--local-steps: '1.5' is not a whole number": (*FEDAVG, "--J", 1.5),
    "argument --fraction/--C: 0 must be above 0": (*FEDAVG, "--fraction", 0),
    "argument --fraction/--C: 1.1 must be above 0 and at most 1": (*FEDAVG, "--fraction", 1.1),
    "--lr: nan is no finite number": (*FEDAVG, "--lr", "nan"),
    "--lr: -1 must be at least 0": (*FEDAVG, "--lr", -1),
    "--image-size: image size 36 is no multiple of the patch size 8": (*FEDAVG, "--image-size", 36),
    "--train block.3: choose all, head, or one of blocks.0 to": (*FEDAVG, "--train", "block.3"),
    "nothing is left to train": (*FEDAVG, "--train", "head", "--head", "ridge", "--freeze-head"),
    "a head of zeros": (*FEDAVG, "--freeze-head"),
    "--nesterov: nesterov needs a momentum": (*FEDAVG, "--nesterov", "--momentum", 0),
    "--warmup 20 must be shorter than 20 rounds": (*FEDAVG, "--warmup", 20),
    "--warmup 2 must be shorter than 1 rounds": (
        *(*FEDAVG, "--warmup", 2, "--search", "--search-length", 1),
    ),
    "--val-fraction 0.002 holds out no image": (*FEDAVG, "--val-fraction", 0.002),
    "at most 9.22337e+18": (*FEDAVG, "--seed", 2**63),
    "--device meta: choose auto, cpu": (*FEDAVG, "--device", "meta"),
    "at most 1024": (*FEDAVG, "--threads", 100_000),
    "the head sees their features": (*FEDAVG, "--train", "head", "--augment"),
    "--keep-tokens: 0 must be above 0": (*FEDAVG, "--keep-tokens", 0),
    "it thins out images": (*FEDAVG, "--train", "head", "--keep-tokens", 0.5),
    "no head is fitted": (*FEDAVG, "--head-images", 500),
    "the head needs those of all images": (
        *(*FEDAVG, "--head", "ridge", "--train", "head", "--head-images", 500),
    ),
    "--head-images 99 must lie in 100..3600": (*FEDAVG, "--head", "ridge", "--head-images", 99),
    "--head-images 3601 must lie in": ("calibrate", "--data", "synthetic", "--head-images", 3601),
    "needs validation data": (*FEDAVG, "--head", "ridge", "--val-fraction", 0),
    "weights nowhere.pth: no such file": (*FEDAVG, "--weights", "nowhere.pth"),
    "--weights dino is a vit_s16": (*FEDAVG, "--weights", "dino"),
    "--name: '../x' must stay below the folder of runs": (*FEDAVG, "--name", "../x"),
    "cannot write the run folder": (*FEDAVG, "--runs-dir", "occupied"),
    "--ties-keep: 0 must be above 0 and at most 1": (*FEDAVG, "--ties-keep", 0),
    "--ties-keep: 1.5 must be above 0 and at most 1": (*FEDAVG, "--ties-keep", 1.5),
    "--server-tau belongs to --server fedadagrad|fedadam|fedyogi": (
        *(*FEDAVG, "--server", "fedavgm", "--server-tau", 0.1),
    ),
    "--server-momentum belongs to --server fedavgm|fedada": (*FEDAVG, "--server-momentum", 0.5),
    "--search-lr belongs to --search": (*FEDAVG, "--search-lr", 0.1),
    "--search-weight-decay belongs to": ("centralized", "--search-weight-decay", 0),
    "--search-length belongs to --search": (*FEDAVG, "--search-length", 3),
    "--weight-decay with --search": (*FEDAVG, "--search", "--weight-decay", 0.1),
    "--lr with --search-lr": (*FEDAVG, "--search", "--search-lr", 0.1, "--lr", 0.2),
    "--clients-evaluated belongs to --personalised": (
        *("eval", "runs/x", "--per-client", "--clients-evaluated", 3),
    ),
    "--personalised belongs to --per-client": ("eval", "runs/x", "--personalised"),
    "--fisher-images belongs to --rule fisher": ("merge", "runs/x", "--fisher-images", 3),
    "--seed belongs to --rule dare": ("merge", "runs/x", "--seed", 3),
    "--ties-keep belongs to --rule ties": ("merge", "runs/x", "--ties-keep", 0.5),
    "--dp-delta belongs to a --dp-noise above 0": (
        *(*FEDAVG, "--dp-noise", 0, "--dp-clip", 1, "--dp-delta", 1e-6),
    ),
    "--dp-noise: 1e+300 must be at least 0 and at most 1000": (
        *(*FEDAVG, "--dp-clip", 1, "--dp-noise", 1e300),
    ),
    "--server-tau: 1e+300 must be above 0 and at most 1e+06": (
        *(*FEDAVG, "--server", "fedadam", "--server-tau", 1e300),
    ),
    "--lr: 1e400 is no finite number": (*FEDAVG, "--lr", "1e400"),
    "argument --runs-dir: the name is empty": (*FEDAVG, "--runs-dir", ""),
    "argument --out: the name is empty": ("plot", "runs/x", "--out", ""),
    "argument RUN: the name holds a NUL": ("eval", "runs/\0"),
    "occupied is no run folder": ("eval", "occupied"),
    "--dare-drop: 1 must be at least 0 and below 1": (
        *(*FEDAVG, "--aggregate", "dare", "--dare-drop", 1),
    ),
    "--aggregate ties with --secure-aggregation: it compares": (
        *(*FEDAVG, "--aggregate", "ties", "--secure-aggregation"),
    ),
    "--diagnostics with --secure-aggregation: they compare": (
        *(*FEDAVG, "--diagnostics", "--secure-aggregation"),
    ),
    "invalid choice: 'vit_xl'": (*FEDAVG, "--model", "vit_xl"),
    "); is vit_demo meant? (train.py": (*FEDAVG, "--model", "vit_dmeo"),
    "--search-length 9: the run has 2 rounds": (
        *(*FEDAVG, "--rounds", 2, "--search", "--search-length", 9),
    ),
    "--processes 2 are of one thread each": (*FEDAVG, "--processes", 2, "--threads", 2),
    "unrecognized arguments: --round 5; is --rounds meant? (train.py fedavg --help": (
        *(*FEDAVG, "--round", 5),
    ),
    "is no run folder": ("eval", "runs/none"),
    "runs/gone is no run folder": ("merge", "runs/gone"),
    "no run folder": ("plot", "runs/none"),
    "--cuda-graph on: it needs a CUDA device, and this is a cpu": (
        *(*FEDAVG, "--cuda-graph", "on", "--device", "cpu"),
    ),
    "--cuda-graph on: --train head": (*FEDAVG, "--cuda-graph", "on", "--train", "head"),
    "--cuda-graph on: it needs a CUDA device, and": (  # heads that train one by one have steps
        *(*FEDAVG, "--cuda-graph", "on", "--train", "head", "--fedir", "--device", "cpu"),
    ),
    "it compiles the backbone": (*FEDAVG, "--compile", "--train", "head"),
    "--search needs validation data": (*FEDAVG, "--search", "--val-fraction", 0),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(cli, small_data, message):
    (small_data / "occupied").write_text("a file")
    status, out, err = cli(*BAD[message])
    if message == "--clients above":
        message = "the number of clients must lie in 1..3600 (the samples), not 3601"
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert [p.name for p in small_data.iterdir()] == ["occupied"]


def test_a_checkpoint_of_another_architecture_names_the_first_bad_key(cli, small_data):
    torch.save(vit.build_vit("vit_demo", 5).state_dict(), "demo.pth")
    state = torch.load("demo.pth", weights_only=True)
    state["blocks.0.attn.qkv.weight"] = torch.zeros(3, 48)
    torch.save(state, "demo.pth")
    status, _, err = cli(*FEDAVG, "--weights", "demo.pth")
    assert status == 2 and "blocks.0.attn.qkv.weight is (3, 48) in the file" in err


def test_offline_the_message_says_where_to_put_which_file(cli, small_data, monkeypatch):
    pytest.importorskip("torchvision")

    def offline(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    status, _, err = cli("fedavg", "--nc", 1, "--J", 4, "--rounds", 2000)
    assert status == 2 and err.count("\n") == 1
    assert "data/cifar-100-python" in err and "--data synthetic" in err
    assert not list((small_data / "data").iterdir())


def test_a_diverging_client_is_named_and_the_last_checkpoint_kept(cli, small_data):
    status, _, err = cli(*TINY, "--lr", 1e30, "--momentum", 0, "--name", "d")
    assert status == 2 and re.search(r"round 1, client \d+, local step \d: the loss is", err)
    assert not (small_data / "runs" / "d" / "checkpoint.pt").exists()
    assert not (small_data / "runs" / "d" / "summary.json").exists()


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


def test_a_step_that_does_not_fit_says_what_to_try_and_resumes_so(cli, small_data, monkeypatch):
    assert cli(*TINY, "--name", "x", "--rounds", 1)[0] == 0
    folder = small_data / "runs" / "x"
    before = (folder / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "loss", out_of_memory)
        status, _, err = cli(*TINY, "--name", "x")
        assert status == 2 and "cpu is out of memory in a training step of 8 images" in err, err
        assert "try --micro-batch 4;" in err and err.count("\n") == 1
        assert "try --micro-batch 1;" in cli(*TINY, "--name", "x", "--micro-batch", 3)[2]
        assert "smaller --image-size" in cli(*TINY, "--name", "x", "--micro-batch", 1)[2]
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert cli(*TINY, "--name", "x", "--micro-batch", 4)[0] == 0
    (note,) = [r["note"] for r in records(folder) if "note" in r]
    assert note == "not bit-exact from round 2 on: micro_batch was None, is 4"


def test_an_evaluation_that_does_not_fit_says_so(cli, monkeypatch):
    monkeypatch.setattr(vit.VisionTransformer, "forward", out_of_memory)
    status, _, err = cli(*TINY, "--name", "x")
    assert status == 2 and "in an evaluation of 256 images: try --eval-batch 128;" in err, err
    monkeypatch.setattr(vit.VisionTransformer, "features", out_of_memory)
    status, _, err = cli(*TINY, "--head", "ridge", "--name", "y")
    assert status == 2 and "in features of 256 images: try --eval-batch 128" in err, err
    monkeypatch.setattr(workspace.Workspace, "build_model", out_of_memory)
    status, _, err = cli(*TINY, "--name", "z")
    assert status == 2 and "no memory is left" in err and err.count("\n") == 1, err
