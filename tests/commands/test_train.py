"""The command line, in-process: what users type, and what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from built import parsed
from conftest import SYNTHETIC_DATASET
from past import records, theta

import data
import fedavg
import train
from commands.options import parse
from machine import safe_files
from study import plots
from train import COMMANDS
from training import features
from training.learner import Learner

FEDAVG = ("fedavg", "--data", "synthetic")
TINY = (*FEDAVG, "--rounds", 2, "--clients", 10, "--fraction", 0.3, "--batch-size", 8)


@pytest.fixture
def few_images(small_data, monkeypatch):
    """Ten images of a class, for whole epochs."""
    monkeypatch.setattr(data, "synthetic_dataset", lambda: SYNTHETIC_DATASET(samples_per_class=10))


def test_the_headline_command_means_what_the_readme_says():
    o = parse("fedavg --nc 1 --J 4 --rounds 2000".split(), COMMANDS).groups
    assert (o.source.data, o.source.seed) == ("cifar100", 0)
    assert o.backbone[:3] == ("vit_s16", "dino", 224)
    assert (o.sharding.clients, o.sharding.nc, o.participation.fraction) == (100, 1, 0.1)
    assert (o.rounds.rounds, o.local_steps) == (2000, (4, 64))
    assert (o.head.head, o.head.freeze_head) == ("ridge", True)


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ("", 0.01),
        ("--nc 50", 0.01),
        ("--nc 5", 0.001),
        ("--nc 1", 0.001),
        ("--nc 1 --train blocks.8", 0.001),
        ("--nc 1 --train head", 0.0003),
        ("--nc 10 --train head", 0.003),
        ("--nc 1 --lr 0.5", 0.5),
        ("--data synthetic", 0.1),
        ("--data synthetic --nc 1", 0.003),
        ("--data synthetic --nc 5", 0.01),
        ("--data synthetic --nc 1 --head linear", 0.1),
        ("--data synthetic --head ridge", 0.01),
    ],
)
def test_the_default_step_follows_what_clients_hold(options, lr):
    assert parse(["fedavg", *options.split()], COMMANDS).groups.sgd.lr == lr


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ("fedavg", 10),  # of 2,560 images a round, which count 7,680 passes; 5,000 are evaluated
        ("fedavg --rounds 40", 6),
        ("fedavg --rounds 40 --eval-test", 18),
        ("fedavg --rounds 3 --J 1", 3),
        ("fedavg --rounds 40 --J 1 --batch-size full --fraction 1", 2),
        ("fedavg --rounds 2000 --eval-every 7", 7),
        ("centralized", 1),
        ("centralized --epochs 100", 5),
    ],
)
def test_evaluations_take_a_tenth_of_the_time_at_most(options, every):
    assert parse(options.split(), COMMANDS).stored["eval_every"] == every


def test_a_run_leaves_its_folder_and_the_same_command_again_says_so(cli, small_data):
    status, out, _ = cli(*TINY, "--nc", 10)
    (folder,) = (small_data / "runs").iterdir()
    names = {"config.json", "log.jsonl", "checkpoint.pt", "summary.json", "shards.npz"}
    assert status == 0 and names <= {p.name for p in folder.iterdir()}
    assert folder.name.startswith("fedavg-synthetic-nc10-J4-K10-C0.3-B8-seed0-")
    first, *rounds = records(folder)
    assert first["round"] == 0 and first["val_acc"] == 0.01
    size = json.loads((folder / "config.json").read_text())
    assert [r["round"] for r in rounds] == [1, 2]
    assert all(len(r["clients"]) == 3 and r["bytes_up"] == 3 * 4 * 71668 for r in rounds)
    assert size["shards"] == {"clients": 10, "smallest": 360, "largest": 360}
    shards = np.load(folder / "shards.npz")
    assert len(shards["clients"]) == 3600 and len(shards["validation"]) == 400
    before = {p: p.read_bytes() for p in folder.iterdir()}
    status, out, _ = cli(*TINY, "--nc", 10)
    assert status == 0 and "is finished: round 2" in out
    assert before == {p: p.read_bytes() for p in folder.iterdir()}
    status, out, _ = cli(*TINY, "--nc", 10, "--rounds", 1)  # no run becomes a shorter one
    assert status == 0 and "is finished: round 2, beyond the 1 asked for" in out
    assert json.loads((folder / "config.json").read_text())["options"]["rounds"] == 2


def test_a_run_of_another_command_is_called_that_alone(cli):
    assert cli(*TINY, "--name", "a")[0] == 0
    status, _, err = cli("centralized", "--data", "synthetic", "--name", "a")
    assert status == 2 and err.endswith("is of fedavg, another command: take another --name\n")


def test_more_rounds_extend_a_run_to_the_bits_of_a_longer_one(cli, small_data):
    for name, rounds in (("a", 1), ("a", 3), ("b", 3)):
        assert cli(*TINY, "--name", name, "--rounds", rounds, "--eval-every", 1)[0] == 0
    a, b = small_data / "runs" / "a", small_data / "runs" / "b"
    assert records(a, "seconds") == records(b, "seconds")
    assert torch.equal(theta(a), theta(b))


def test_without_validation_data_the_summary_has_the_test_set(cli, small_data):
    status, out, _ = cli(*TINY, "--val-fraction", 0, "--name", "x")
    assert "sent " in out and "times the bytes" not in out  # of dense FedAvg, which this is
    summary = json.loads((small_data / "runs" / "x" / "summary.json").read_text())
    assert status == 0 and "test accuracy" in out.splitlines()[-1]
    assert "test_acc" in summary["final"] and "best_by_validation" not in summary


def test_activations_below_what_trains_are_computed_once(cli, small_data, monkeypatch):
    options = (*TINY, "--train", "blocks.1", "--head", "ridge", "--eval-every", 1)
    status, out, _ = cli(*options, "--name", "once")
    assert status == 0 and "below block 1 are computed once" in out
    monkeypatch.setattr(features, "free_memory", lambda device: 0)
    status, out, _ = cli(*options, "--name", "always")
    assert status == 0 and "do not fit in memory" in out
    once, always = (records(small_data / "runs" / name) for name in ("once", "always"))
    for a, b in zip(once, always, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
    status, out, _ = cli(*options, "--name", "augmented", "--augment")
    assert status == 0 and "below block" not in out


def test_training_steps_see_a_share_of_the_tokens_and_evaluations_all(cli, small_data):
    for name, share in (("all", 1.0), ("half", 0.5)):
        options = ("--keep-tokens", share, "--head", "ridge", "--name", name)
        assert cli(*TINY, *options)[0] == 0
    (start, *_, whole), (same, *_, half) = (
        records(small_data / "runs" / name) for name in ("all", "half")
    )
    assert start == same
    assert whole["train_loss"] != half["train_loss"]


def test_the_graph_may_change_on_resume_and_compiling_may_not(cli, small_data):
    assert cli(*TINY, "--cuda-graph", "off", "--name", "x", "--device", "cpu")[0] == 0
    assert cli(*TINY, "--name", "x", "--rounds", 3, "--device", "cpu")[0] == 0
    path = small_data / "runs" / "x" / "config.json"
    config = json.loads(path.read_text())
    del config[safe_files.SEAL]
    config["options"]["cuda_graph"] = "on"  # made on a GPU, evaluated here
    path.write_text(json.dumps(config))
    assert cli("eval", "runs/x", "--device", "cpu")[0] == 0
    status, _, err = cli(*TINY, "--name", "x", "--rounds", 4, "--compile")
    assert status == 2 and "compile is False there and True here" in err


def test_another_seed_is_another_run(cli, small_data):
    for seed in (0, 1):
        cli(*TINY, "--name", f"s{seed}", "--seed", seed)
    logs = [records(small_data / "runs" / f"s{seed}") for seed in (0, 1)]
    assert logs[0][1]["clients"] != logs[1][1]["clients"]
    assert logs[0][1]["train_loss"] != logs[1][1]["train_loss"]


@pytest.mark.parametrize(
    "options",
    [
        ("--head", "ridge"),
        ("--head", "probe", "--no-freeze-head", "--head-images", 200),
        ("--train", "blocks.1"),
        ("--train", "head"),
        ("--train", "head", "--head", "ridge", "--momentum", 0),
        ("--dirichlet", 0.3, "--server-lr", 0.5, "--nesterov", "--weight-decay", 1e-3),
        ("--augment", "--schedule", "exponential", "--warmup", 1),
        ("--image-size", 40, "--normalisation", "imagenet"),
        ("--keep-tokens", 0.5, "--head", "ridge"),
        ("--head", "ridge", "--head-images", 1000),
        ("--server", "fedyogi", "--prox", 0.1),
        ("--server", "fedavgm", "--train", "head", "--prox", 0.1),
        ("--precision", "bf16", "--head", "ridge"),
        ("--aggregate", "ties", "--diagnostics"),
        ("--aggregate", "dare", "--secure-aggregation", "--dare-drop", 0.5),
        ("--aggregate", "sign", "--train", "head"),
        ("--aggregate", "sign", "--scaffold", "--server", "fedadam"),
        pytest.param(("--precision", "fp16"), marks=pytest.mark.slow),  # in software on a CPU
    ],
    ids=lambda o: " ".join(str(x) for x in o),
)
def test_the_options_of_fedavg_run_and_what_is_logged_is_what_eval_finds(cli, small_data, options):
    status, _, err = cli(*TINY, "--eval-test", "--name", "x", *options)
    assert status == 0, err
    folder = small_data / "runs" / "x"
    start, end = (records(folder)[i] for i in (0, -1))
    assert np.isfinite(end["test_loss"]) and end["test_loss"] != start["test_loss"]
    status, out, _ = cli("eval", folder)
    assert status == 0 and f"{end['test_acc'] * 100:.2f} %" in out


def test_from_a_block_on_only_what_follows_trains_and_is_sent(cli, small_data):
    cli(*TINY, "--train", "blocks.1", "--name", "x")
    block = 12 * 48 * 48 + 13 * 48  # two LayerNorms, qkv, projection, a 4x MLP, all with biases
    trained = block + 2 * 48 + 100 * 48 + 100
    assert records(small_data / "runs" / "x")[-1]["bytes_up"] == 3 * 4 * trained


def test_ctrl_c_while_pytorch_is_imported_says_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    run = subprocess.run(
        [sys.executable, train.__file__, "runs"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored, as by nohup
    )
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


def test_centralized_training_resumes_within_an_epoch(cli, small_data, few_images, monkeypatch):
    from centralized import Centralized

    short = ("centralized", "--data", "synthetic", "--epochs", 2, "--schedule", "cosine")
    short += ("--batch-size", 90)
    assert cli(*short, "--name", "whole")[0] == 0
    advance = Centralized.advance

    def stopping(self):
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return advance(self)

    monkeypatch.setattr(Centralized, "advance", stopping)
    status, out, _ = cli(*short, "--name", "parts")
    assert status == 143 and "the same command goes on" in out
    monkeypatch.setattr(Centralized, "advance", advance)
    assert cli(*short, "--name", "parts")[0] == 0
    whole, parts = (small_data / "runs" / name for name in ("whole", "parts"))
    assert records(whole, "seconds") == records(parts, "seconds")
    assert torch.equal(theta(whole), theta(parts))


def test_a_central_run_stops_within_an_epoch_and_keeps_what_was_best_there(cli, small_data):
    still = ("centralized", "--data", "synthetic", "--epochs", 1, "--lr", 0, "--batch-size", 360)
    short = (*still, "--eval-every", 0.1, "--name", "s")
    status, out, err = cli(*short, "--early-stop", 3)
    assert status == 0, err
    assert "stopped early: 3 evaluations" in out and "epoch 0.3 reached" in out
    folder = small_data / "runs" / "s"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epoch"] == summary["final"]["epoch"] == 0.3
    status, out, _ = cli(*short, "--early-stop", 3)
    assert status == 0 and "is finished: epoch 0.3, stopped early" in out
    # more patience, and less often: it goes on from within the epoch
    assert cli(*short, "--early-stop", 9, "--eval-every", 0.5)[0] == 0
    found = records(folder)
    assert [r["epoch"] for r in found] == [0, 0.1, 0.2, 0.3, 0.5, 1]
    assert all("val_acc" in r and "test_loss" not in r for r in found)
    assert [*plots._series(found, "val_acc")] == [r["epoch"] for r in found]
    assert cli("eval", "runs/s", "--best")[0] == 0


def test_search_takes_the_best_by_validation(cli, small_data):
    grid = ("--search", "--search-lr", 5.0, 0.001, "--search-weight-decay", 0.0)
    short = ("centralized", "--data", "synthetic", "--epochs", 1, "--batch-size", 360)
    status, out, _ = cli(*short, "--head", "ridge", "--train", "head", *grid, "--name", "s")
    best = json.loads((small_data / "runs" / "s" / "search.json").read_text())["best"]
    config = json.loads((small_data / "runs" / "s" / "config.json").read_text())
    assert status == 0 and best["lr"] == 0.001 == config["options"]["lr"]


def test_a_search_goes_on_past_a_rate_that_diverges(cli, small_data):
    grid = ("--search", "--search-lr", 0.05, 1e30, "--search-weight-decay", 0.0)
    status, out, _ = cli(*TINY, *grid, "--momentum", 0, "--name", "s")
    found = json.loads((small_data / "runs" / "s" / "search.json").read_text())
    assert status == 0 and "search: given up, round 1, client" in out
    assert found["best"]["lr"] == 0.05 and len(found["cells"]) == 2


def test_a_searchs_winner_is_the_run_or_its_beginning(cli, small_data, monkeypatch):
    grid = ("--search", "--search-lr", 0.01, 0.02, "--search-weight-decay", 0.0)
    trained = []
    advance = fedavg.FedAvg.advance

    def counting(self):
        trained.append(self.round)
        return advance(self)

    monkeypatch.setattr(fedavg.FedAvg, "advance", counting)
    line = (*TINY, "--rounds", 2, *grid)  # three clients a round
    tested, evaluate = [], Learner.evaluate

    def watched(self, sets=("val", "test")):
        tested.append("test" in sets)
        return evaluate(self, sets)

    monkeypatch.setattr(Learner, "evaluate", watched)
    status, out, err = cli(*line, "--eval-test", "--name", "s")
    tries = list((small_data / "runs" / "s" / "search").rglob("*.json*"))
    assert len(tries) == 6 and not any("test_acc" in path.read_text() for path in tries)
    assert tested[-1] and sum(tested) <= 2 and out.count("test accuracy") == 1
    final = json.loads((small_data / "runs" / "s" / "summary.json").read_text())
    assert "test_acc" in final["final"] and "test_acc" in final["best_by_validation"]
    assert status == 0 and len(trained) == 2 * 2 * 3, err
    assert out.count("<- chosen") == 1 and "that was tried, and a" in out
    assert cli("eval", "runs/s")[0] == 0
    status, out, _ = cli(*line, "--eval-test", "--name", "s")
    assert status == 0 and "s is finished: round 2" in out
    trained.clear()
    status, out, err = cli(*line, "--search-length", 1, "--name", "longer")
    assert status == 0 and len(trained) == 2 * 3 + 3, err  # the second round of the winner
    plain = json.loads((small_data / "runs" / "s" / "search.json").read_text())["best"]["lr"]
    assert cli(*TINY, "--rounds", 2, "--lr", plain, "--name", "plain")[0] == 0
    assert torch.equal(theta(small_data / "runs" / "s"), theta(small_data / "runs" / "plain"))


def test_a_search_takes_schedules_and_a_shorter_one_trains_anew(cli, small_data):
    grid = ("--search", "--search-lr", 0.01, "--search-weight-decay", 0.0, "--search-length", 2)
    status, out, err = cli(
        *(*TINY, "--rounds", 3, *grid, "--search-schedule", "cosine", "exponential"),
        *("--decay", 0.1, "--name", "s"),
    )
    found = json.loads((small_data / "runs" / "s" / "search.json").read_text())
    assert status == 0 and "it is trained anew" in out, err
    assert [cell["schedule"] for cell in found["cells"]] == ["cosine", "exponential"]
    assert "error: --decay belongs to --schedule" in cli(*TINY, "--decay", 0.1)[2]


def test_ridge_is_the_same_from_the_clients_sums(cli, small_data):
    for sharding in ((), ("--nc", 1), ("--nc", 50), ("--dirichlet", 0.1)):
        assert cli("ridge", "--data", "synthetic", "--name", "r", *sharding)[0] in (0, 2)
    status, out, _ = cli("ridge", "--data", "synthetic", "--name", "n", "--nc", 1)
    summary = json.loads((small_data / "runs" / "n" / "summary.json").read_text())
    assert status == 0 and summary["difference_to_central"] < 1e-6


def test_shards_prints_and_plots(cli, small_data):
    shards = ("shards", "--data", "synthetic", "--nc", 2)
    status, out, _ = cli(*shards, "--show", 3, "--val-fraction", 0)
    assert status == 0
    assert re.search(r"classes per client +min 2  median 2  max 2", out)
    assert len(re.findall(r"^ +\d+ +\d+  pattern", out, re.M)) == 3
    pytest.importorskip("matplotlib")
    status, out, _ = cli(*shards, 5, "--out", "s.png")  # two shardings side by side
    assert status == 0 and "nc2: " in out and "nc5: " in out
    assert (small_data / "s.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_kept_for_other_runs_is_made_all_the_same(cli, small_data):
    (small_data / "occupied").write_text("a file")
    masked = ("calibrate", "--data", "synthetic", "--clients", 10, "--calibration-images", 20)
    status, _, err = cli(*masked, "--data-dir", "occupied", "--name", "m")
    assert status == 0 and "warning: the mask is not kept for other runs" in err
    assert (small_data / "runs" / "m" / "mask.pt").exists()


def test_centralized_training_in_pieces_and_clipped(cli, small_data, few_images):
    short = ("centralized", "--data", "synthetic", "--train", "blocks.1", "--head", "ridge")
    short += ("--epochs", 1, "--batch-size", 90)
    for name, options in (
        ("plain", ()),
        ("pieces", ("--micro-batch", 40)),
        ("wide", ("--clip-norm", 1e6)),
        ("clipped", ("--clip-norm", 0.05)),
    ):
        assert cli(*short, *options, "--name", name)[0] == 0
    ends = {name: theta(small_data / "runs" / name) for name in ("plain", "wide", "clipped")}
    moved = ends["plain"].norm()
    assert torch.equal(ends["plain"], ends["wide"])
    assert (theta(small_data / "runs" / "pieces") - ends["plain"]).norm() < 1e-4 * moved
    assert (ends["clipped"] - ends["plain"]).norm() > 1e-2 * moved


def test_options_at_their_defaults_do_not_enter_a_runs_name():
    def name(*arguments):
        return parsed("fedavg", *arguments).name

    assert name() == name("--clients", "100", "--prox", "0")
    assert len({name(), name("--prox", "0.1"), name("--clip-norm", "1"), name("--lr", "1")}) == 4
    line = parsed("fedavg")
    later = {"later": None}
    further = line._replace(stored=line.stored | later, defaults=line.defaults | later)
    assert further.name == name()
