"""The command line, in-process: what users type, and what they get for what they mistype."""

import json
import re
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import doctor
import learner
import model as vit
import plots
import runs
import safe_files
import train
import workspace
from local_training import ClientTraining
from session import default_name

FEDAVG = ("fedavg", "--data", "synthetic")
TINY = (*FEDAVG, "--rounds", 2, "--clients", 10, "--fraction", 0.3, "--batch-size", 8)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_seconds(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]


def theta(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["process"]
    return state["theta"] if "theta" in state else state["tensors"]["theta"]


def test_the_headline_command_means_what_the_readme_says():
    o = train.resolve(train.build_parser().parse_args("fedavg --nc 1 --J 4 --rounds 2000".split()))
    assert (o.data, o.model, o.weights, o.image_size) == ("cifar100", "vit_s16", "dino", 224)
    assert (o.clients, o.fraction, o.batch_size, o.seed) == (100, 0.1, 64, 0)
    assert (o.nc, o.J, o.rounds, o.head, o.freeze_head) == (1, 4, 2000, "ridge", True)


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
        ("--data synthetic --nc 1", 0.2),
        ("--data synthetic --head ridge", 0.01),
    ],
)
def test_the_default_step_follows_what_clients_hold(options, lr):
    parsed = train.build_parser().parse_args(["fedavg", *options.split()])
    assert train.resolve(parsed).lr == lr


def test_a_run_leaves_its_folder_and_the_same_command_again_says_so(cli, small_data):
    status, out, _ = cli(*TINY, "--nc", 10)
    (folder,) = (small_data / "runs").iterdir()
    names = {"config.json", "log.jsonl", "checkpoint.pt", "summary.json", "shards.npz"}
    assert status == 0 and names <= {p.name for p in folder.iterdir()}
    assert folder.name.startswith("fedavg-synthetic-nc10-J4-seed0-")
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


def test_more_rounds_extend_a_run_to_the_bits_of_a_longer_one(cli, small_data):
    for name, rounds in (("a", 1), ("a", 3), ("b", 3)):
        assert cli(*TINY, "--name", name, "--rounds", rounds, "--eval-every", 1)[0] == 0
    a, b = small_data / "runs" / "a", small_data / "runs" / "b"
    assert without_seconds(a) == without_seconds(b)
    assert torch.equal(theta(a), theta(b))


def test_fewer_rounds_than_a_run_has_are_refused(cli, small_data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(runs.Run, "summarise", None)  # ends before the summary is written
        cli(*TINY, "--name", "x")
    status, _, err = cli(*TINY, "--name", "x", "--rounds", 1)
    assert status == 2 and "is at round 2 already, beyond 1" in err


def test_a_kill_between_the_renames_of_a_checkpoint_changes_nothing(cli, small_data):
    options = (*TINY, "--head", "ridge", "--eval-every", 1)
    for name, rounds in (("a", 3), ("b", 2)):
        assert cli(*options, "--name", name, "--rounds", rounds)[0] == 0
    a, b = small_data / "runs" / "a", small_data / "runs" / "b"
    (b / "checkpoint.pt").rename(b / "checkpoint.prev.pt")
    assert cli(*options, "--name", "b", "--rounds", 3)[0] == 0
    assert without_seconds(a) == without_seconds(b)


def test_a_folder_that_another_process_runs_is_left_alone(cli, small_data):
    fcntl = pytest.importorskip("fcntl")
    assert cli(*TINY, "--name", "x")[0] == 0
    with open(small_data / "runs" / "x" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, err = cli(*TINY, "--name", "x", "--rounds", 3)
    assert status == 2 and "x is open in another process" in err
    assert cli(*TINY, "--name", "x", "--rounds", 3)[0] == 0


@pytest.mark.parametrize("damage", ["", "[]", '{"round"'])
def test_a_damaged_summary_is_written_anew(cli, small_data, damage):
    assert cli(*TINY, "--name", "x")[0] == 0
    path = small_data / "runs" / "x" / "summary.json"
    whole = json.loads(path.read_text())
    path.write_text(damage)
    assert cli(*TINY, "--name", "x")[0] == 0
    assert json.loads(path.read_text())["final"] == whole["final"]


def test_without_validation_data_the_summary_has_the_test_set(cli, small_data):
    status, out, _ = cli(*TINY, "--val-fraction", 0, "--name", "x")
    summary = json.loads((small_data / "runs" / "x" / "summary.json").read_text())
    assert status == 0 and "test accuracy" in out.splitlines()[-1]
    assert "test_acc" in summary["final"] and "best_by_validation" not in summary


def test_activations_below_what_trains_are_computed_once(cli, small_data, monkeypatch):
    options = (*TINY, "--train", "blocks.1", "--head", "ridge", "--eval-every", 1)
    status, out, _ = cli(*options, "--name", "once")
    assert status == 0 and "below block 1 are computed once" in out
    monkeypatch.setattr(workspace, "free_memory", lambda device: 0)
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


@pytest.mark.parametrize("extra", [(), ("--train", "head"), ("--mask-rule", "random")])
def test_the_proximal_term_holds_clients_back(cli, small_data, extra):
    if extra[:1] != ():
        extra += ("--head", "ridge", "--lr", 0.01)
    for name, prox in (("free", 0.0), ("held", 3.0)):
        assert cli(*TINY, "--J", 6, "--prox", prox, "--name", name, *extra)[0] == 0
    start = json.loads((small_data / "runs" / "free" / "config.json").read_text())["options"]
    assert start["prox"] == 0.0
    free, held = (records(small_data / "runs" / name) for name in ("free", "held"))
    assert free[0] == held[0]  # the same start
    assert held[1]["train_loss"] != free[1]["train_loss"]
    assert (small_data / "runs" / "held" / "summary.json").exists()


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


def test_a_schedule_fixes_the_number_of_rounds(cli):
    cosine = (*TINY, "--schedule", "cosine", "--name", "c")
    assert cli(*cosine)[0] == 0
    status, _, err = cli(*cosine, "--rounds", 4)
    assert status == 2 and "rounds is 2 there and 4 here" in err


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
        ("--head", "probe", "--no-freeze-head"),
        ("--train", "blocks.1"),
        ("--train", "head"),
        ("--train", "head", "--head", "ridge", "--momentum", 0),
        ("--dirichlet", 0.3, "--server-lr", 0.5, "--nesterov", "--weight-decay", 1e-3),
        ("--augment", "--schedule", "exponential", "--warmup", 1),
        ("--image-size", 48, "--normalisation", "imagenet"),
        ("--keep-tokens", 0.5, "--head", "ridge"),
        ("--head", "ridge", "--head-images", 1000),
        ("--server", "fedyogi", "--prox", 0.1),
        ("--server", "fedavgm", "--train", "head", "--prox", 0.1),
        ("--precision", "bf16", "--head", "ridge"),
        ("--aggregate", "ties", "--diagnostics"),
        ("--aggregate", "dare", "--secure-aggregation", "--dare-drop", 0.5),
        ("--aggregate", "sign", "--train", "head"),
        ("--aggregate", "sign", "--scaffold", "--server", "fedadam"),
        ("--precision", "fp16"),
    ],
    ids=lambda o: " ".join(str(x) for x in o),
)
def test_the_options_of_fedavg_run_and_resume(cli, small_data, options):
    status, _, err = cli(*TINY, "--name", "x", *options)
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


def test_centralized_training_resumes_within_an_epoch(cli, small_data, monkeypatch):
    from centralized import Centralized

    short = ("centralized", "--data", "synthetic", "--epochs", 2, "--schedule", "cosine")
    assert cli(*short, "--name", "whole")[0] == 0
    advance = Centralized.advance

    def stopping(self):
        if self.step == 50:
            runs.signal.raise_signal(runs.signal.SIGTERM)
        return advance(self)

    monkeypatch.setattr(Centralized, "advance", stopping)
    status, out, _ = cli(*short, "--name", "parts")
    assert status == 143 and "the same command goes on" in out
    monkeypatch.setattr(Centralized, "advance", advance)
    assert cli(*short, "--name", "parts")[0] == 0
    whole, parts = (small_data / "runs" / name for name in ("whole", "parts"))
    assert without_seconds(whole) == without_seconds(parts)
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
    assert all("val_acc" in r and "test_loss" in r for r in found)
    x, _ = plots._series(found, "val_acc")
    assert x.tolist() == [r["epoch"] for r in found]
    assert cli("eval", "runs/s", "--best")[0] == 0


@pytest.mark.parametrize("every", [0, -0.1, "half", 1.5, "nan"])
def test_a_cadence_is_whole_or_a_share_of_an_epoch(cli, every):
    status, _, err = cli("centralized", "--data", "synthetic", "--eval-every", every)
    assert status == 2 and "--eval-every" in err and err.count("\n") == 1
    status, _, err = cli(*TINY, "--eval-every", 0.5)
    assert status == 2 and "'0.5' is not a whole number" in err


def test_search_takes_the_best_by_validation(cli, small_data):
    grid = ("--search", "--search-lr", 0.0, 0.2, "--search-weight-decay", 0.0)
    status, out, _ = cli("centralized", "--data", "synthetic", "--epochs", 2, *grid, "--name", "s")
    best = json.loads((small_data / "runs" / "s" / "search.json").read_text())["best"]
    config = json.loads((small_data / "runs" / "s" / "config.json").read_text())
    assert status == 0 and best["lr"] == 0.2 == config["options"]["lr"]


def test_a_search_goes_on_past_a_rate_that_diverges(cli, small_data):
    grid = ("--search", "--search-lr", 0.05, 1e30, "--search-weight-decay", 0.0)
    status, out, _ = cli(*TINY, *grid, "--momentum", 0, "--name", "s")
    found = json.loads((small_data / "runs" / "s" / "search.json").read_text())
    assert status == 0 and "search: given up, round 1, client" in out
    assert found["best"]["lr"] == 0.05 and len(found["cells"]) == 2


def test_ridge_is_the_same_from_the_clients_sums(cli, small_data):
    for sharding in ((), ("--nc", 1), ("--nc", 50), ("--dirichlet", 0.1)):
        assert cli("ridge", "--data", "synthetic", "--name", "r", *sharding)[0] in (0, 2)
    status, out, _ = cli("ridge", "--data", "synthetic", "--name", "n", "--nc", 1)
    summary = json.loads((small_data / "runs" / "n" / "summary.json").read_text())
    assert status == 0 and summary["difference_to_central"] < 1e-6


@pytest.mark.parametrize("options", [(), ("--train", "head"), ("--nc", 5, "--train", "blocks.1")])
def test_doctor_says_what_a_command_will_cost(cli, small_data, options):
    command = ("doctor", "--json", "d.json", *TINY, "--rounds", 50, *options)
    status, out, err = cli(*command)
    assert status == 0, err
    figures = json.loads((small_data / "d.json").read_text())
    assert figures["seconds_a_round"] == pytest.approx(3 * figures["seconds_a_client"], rel=1e-3)
    least = 50 * figures["seconds_a_round"]
    assert least < figures["seconds_in_all"] < 2 * least + 100 * figures["seconds_an_evaluation"]
    assert "seconds a round" in out and "time in all" in out
    counted = ["features for the head"] if "head" in options else []
    assert figures["not_counted"] == counted
    assert re.search(rf"not counted +{', '.join(counted) or 'nothing'}", out)
    assert figures["cuda_graph"].startswith("off (")
    assert not (small_data / "runs").exists() and not (small_data / "data").exists()
    assert cli("doctor", "ridge")[0] == 2


def timed_as(cli, monkeypatch, *options):
    """Return the learner that doctor times a command with, and its figures."""
    made, build = [], doctor.Learner
    monkeypatch.setattr(doctor, "Learner", lambda *a: made.append(build(*a)) or made[-1])
    status, _, err = cli("doctor", "--json", "d.json", *TINY, *options)
    assert status == 0, err
    return made[0], json.loads(Path("d.json").read_text())


def test_doctor_times_a_mask_of_the_commands_sparsity(cli, small_data, monkeypatch):
    rule = ("--mask-rule", "least-sensitive", "--sparsity", 0.8, "--mask-scope", "blocks.*.weight")
    learner, figures = timed_as(cli, monkeypatch, "--head", "ridge", *rule)
    scoped = sum(p.numel() for n, p in learner.model.named_parameters() if n in learner.mask.shapes)
    assert figures["parameters"] == learner.entries.size == round(0.2 * scoped) < 71_668
    assert all(name.startswith("blocks.") for name in learner.mask.shapes)
    made = ("--mask-rule", "random", "--sparsity", 0.99, "--name", "m")
    assert cli("calibrate", "--data", "synthetic", *made)[0] == 0
    learner, figures = timed_as(cli, monkeypatch, "--head", "ridge", "--mask", "runs/m/mask.pt")
    assert figures["parameters"] == learner.mask.made["kept"] < 700
    threshold = ("--mask-rule", "least-sensitive", "--threshold", 1e-6)
    learner, figures = timed_as(cli, monkeypatch, "--head", "ridge", *threshold)
    assert learner.mask is None
    assert figures["not_counted"] == ["features for the head", "calibration"]


def test_doctor_counts_clipping_a_client_and_noise_a_round(cli, small_data, monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setattr(doctor.privacy, "clip_factor", lambda *a, **k: time.sleep(0.1))
    monkeypatch.setattr(doctor.privacy, "add_noise_", lambda *a, **k: time.sleep(0.2))
    _, figures = timed_as(cli, monkeypatch, "--dp-noise", 1, "--dp-clip", 0.1)
    spent = figures["seconds_a_round"] - 3 * figures["seconds_a_client"]
    assert 0.5 <= spent < 2  # three clients, one round


def test_doctor_times_heads_as_the_command_trains_them(cli, small_data, monkeypatch):
    trained = []
    for name in ("one", "heads"):
        way = getattr(ClientTraining, name)
        record = lambda *a, name=name, way=way: trained.append(name) or way(*a)  # noqa: E731
        monkeypatch.setattr(ClientTraining, name, record)
    _, figures = timed_as(cli, monkeypatch, "--train", "head", "--batch-size", "full")
    assert set(trained) == {"one"}
    one_by_one = figures["images_a_second"] * figures["seconds_a_client"]
    assert one_by_one == pytest.approx(4 * 4500, rel=1e-3)
    trained.clear()
    timed_as(cli, monkeypatch, "--train", "head")
    assert set(trained) == {"heads"}


def test_shards_prints_and_plots(cli, small_data):
    shards = ("shards", "--data", "synthetic", "--nc", 2)
    status, out, _ = cli(*shards, "--show", 3, "--val-fraction", 0)
    assert status == 0
    assert re.search(r"classes per client +min 2  median 2  max 2", out)
    assert len(re.findall(r"^ +\d+ +\d+  pattern", out, re.M)) == 3
    pytest.importorskip("matplotlib")
    assert cli(*shards, "--out", "s.png")[0] == 0
    assert (small_data / "s.png").read_bytes().startswith(b"\x89PNG")


def test_plot_draws_several_runs(cli, small_data, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("a", "b", "c/a"):
        cli(*TINY, "--name", name)
    status, out, _ = cli("plot", "runs/a", "runs/b", "--out", "ab.png")
    assert status == 0 and (small_data / "ab.png").read_bytes().startswith(b"\x89PNG")
    drawn = {}
    monkeypatch.setattr(plots, "plot_curves", lambda logs, path: drawn.update(logs))
    cli("plot", "runs/a", "runs/c/a")
    assert list(drawn) == ["runs/a", "runs/c/a"]


def test_what_cannot_be_kept_for_other_runs_is_made_all_the_same(cli, small_data):
    (small_data / "occupied").write_text("a file")
    masked = ("calibrate", "--data", "synthetic", "--clients", 10, "--calibration-images", 20)
    status, _, err = cli(*masked, "--data-dir", "occupied", "--name", "m")
    assert status == 0 and "warning: the mask is not kept for other runs" in err
    assert (small_data / "runs" / "m" / "mask.pt").exists()


def test_labels_are_no_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"round": 1, "train_loss": 2.0, "val_acc": 0.1}]
    plots.plot_curves({"$^$": records, "$x_$": records}, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


BAD = {
    "--clients above": (*FEDAVG, "--clients", 3601),
    "--clients 5 --nc 3: 5 clients of 3 classes cannot cover": (*FEDAVG, "--clients", 5, "--nc", 3),
    "N_c must lie in 1..100": (*FEDAVG, "--nc", 101),
    "argument --nc: 0 must be at least 1": (*FEDAVG, "--nc", 0),
    "need 5000 parts": (*FEDAVG, "--clients", 1000, "--nc", 5),
    "not allowed with argument --nc": (*FEDAVG, "--nc", 5, "--dirichlet", 1),
    "argument --dirichlet: 0 must be above 0": (*FEDAVG, "--dirichlet", 0),
    "argument --J/--local-steps: 0 must be at least 1": (*FEDAVG, "--J", 0),
    "--J/--local-steps: '1.5' is not a whole number": (*FEDAVG, "--J", 1.5),
    "argument --fraction/--C: 0 must be above 0": (*FEDAVG, "--fraction", 0),
    "argument --fraction/--C: 1.1 must be above 0 and at most 1": (*FEDAVG, "--fraction", 1.1),
    "--lr: nan is no finite number": (*FEDAVG, "--lr", "nan"),
    "--lr: -1 must be at least 0": (*FEDAVG, "--lr", -1),
    "--image-size: image size 36 is no multiple of the patch size 8": (*FEDAVG, "--image-size", 36),
    "--train block.3: choose all, head, or one of blocks.0 to": (*FEDAVG, "--train", "block.3"),
    "nothing to train": (*FEDAVG, "--train", "head", "--head", "ridge", "--freeze-head"),
    "a head of zeros": (*FEDAVG, "--freeze-head"),
    "--nesterov: nesterov needs a momentum": (*FEDAVG, "--nesterov", "--momentum", 0),
    "--warmup 100 must be shorter than 100 rounds": (*FEDAVG, "--warmup", 100),
    "--warmup 2 must be shorter than 1 rounds": (
        *(*FEDAVG, "--warmup", 2, "--search", "--search-length", 1),
    ),
    "--val-fraction 0.002 holds out no image": (*FEDAVG, "--val-fraction", 0.002),
    "at most 9.22337e+18": (*FEDAVG, "--seed", 2**63),
    "--device meta: choose auto, cpu": (*FEDAVG, "--device", "meta"),
    "at most 1024": (*FEDAVG, "--threads", 100_000),
    "--train head sees their features": (*FEDAVG, "--train", "head", "--augment"),
    "--keep-tokens: 0 must be above 0": (*FEDAVG, "--keep-tokens", 0),
    "--keep-tokens thins out images": (*FEDAVG, "--train", "head", "--keep-tokens", 0.5),
    "--head linear fits none": (*FEDAVG, "--head-images", 500),
    "--train head needs those of all images": (
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
    "--dare-drop: the share that is dropped must lie in [0, 1), not 1": (
        *(*FEDAVG, "--aggregate", "dare", "--dare-drop", 1),
    ),
    "--aggregate ties with --secure-aggregation: it compares": (
        *(*FEDAVG, "--aggregate", "ties", "--secure-aggregation"),
    ),
    "--diagnostics with --secure-aggregation: they compare": (
        *(*FEDAVG, "--diagnostics", "--secure-aggregation"),
    ),
    "invalid choice: 'vit_xl'": (*FEDAVG, "--model", "vit_xl"),
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
    "--compile compiles the backbone": (*FEDAVG, "--compile", "--train", "head"),
    "chooses on validation data": (*FEDAVG, "--search", "--val-fraction", 0),
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


def test_centralized_training_in_pieces_and_clipped(cli, small_data):
    short = ("centralized", "--data", "synthetic", "--train", "blocks.1", "--head", "ridge")
    short += ("--epochs", 1, "--batch-size", 360)
    for name, options in (
        ("plain", ()),
        ("pieces", ("--micro-batch", 150)),
        ("wide", ("--clip-norm", 1e6)),
        ("clipped", ("--clip-norm", 0.05)),
    ):
        assert cli(*short, *options, "--name", name)[0] == 0
    ends = {name: theta(small_data / "runs" / name) for name in ("plain", "wide", "clipped")}
    moved = ends["plain"].norm()
    assert torch.equal(ends["plain"], ends["wide"])
    assert (theta(small_data / "runs" / "pieces") - ends["plain"]).norm() < 1e-4 * moved
    assert (ends["clipped"] - ends["plain"]).norm() > 1e-2 * moved


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
    assert status == 2 and "the device is out of memory" in err and err.count("\n") == 1, err


def test_options_at_their_defaults_do_not_enter_a_runs_name():
    def name(*arguments):
        options = train.resolve(train.build_parser().parse_args([*FEDAVG, *arguments]))
        return default_name(options)

    assert name() == name("--clients", "100", "--prox", "0")
    assert len({name(), name("--prox", "0.1"), name("--clip-norm", "1"), name("--lr", "1")}) == 4
    options = train.resolve(train.build_parser().parse_args(FEDAVG))
    options.defaults["fedavg"]["later"] = options.later = None
    assert default_name(options) == name()
