"""Federated learning and model editing on pre-trained vision transformers: the command line.

python train.py fedavg --nc 1 --J 4 --rounds 2000     the main job; the same command resumes it
python train.py fedavg --data synthetic               the same job in a minute, nothing to download
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # deterministic cuBLAS; read when it starts

import argparse
import copy
import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import centralized
import data
import fedavg
import head
import model as vit
import plots
import runs
from sparse_sgdm import check_sgd_options
from workspace import ClientTraining, Evaluated, Learner, Workspace, duration, fingerprint

# Defaults that depend on the data set; the help of each option shows both.
BY_DATA = {
    "cifar100": dict(
        model="vit_s16",
        weights="dino",
        image_size=224,
        head="ridge",
        augment=True,
        batch_size=64,
        lr=0.01,
        rounds=200,
        epochs=15,
    ),
    "synthetic": dict(
        model="vit_demo",
        weights="none",
        image_size=32,
        head="linear",
        augment=False,
        batch_size=32,
        lr=0.2,
        rounds=100,
        epochs=5,
    ),
}
FREE = {"name", "runs_dir", "data_dir", "device", "threads", "eval_every", "eval_batch", "command"}
EVALUATIONS = 20  # of a run, where --eval-every does not say otherwise


# ---------------------------------------------------------------------------- commands


def run_fedavg(options: argparse.Namespace) -> None:
    """Train by FedAvg; with --search choose learning rate and weight decay first."""
    workspace = Workspace(options)
    shards = workspace.shards()

    def train(chosen: argparse.Namespace, name: str) -> dict:
        return train_federated(workspace, shards, chosen, name)

    search_then_train(options, "rounds", train)


def train_federated(
    workspace: Workspace, shards: list, options: argparse.Namespace, name: str
) -> dict:
    """Run one federated training in its folder; returns its summary."""
    run = open_run(workspace, options, name, shards)
    if summary := finished_summary(run, "round", options.rounds):
        return summary
    learner = Learner(workspace, options, run.folder)
    training = ClientTraining(learner, shards)
    federation = fedavg.FedAvg(
        learner.flat.theta,
        [len(shard) for shard in shards],
        training.one,
        train_clients=training.heads if learner.on_features else None,
        fraction=options.fraction,
        seed=options.seed,
        server_lr=options.server_lr,
        value_bytes=4 * learner.flat.size,
        on_reset=learner.flat.refresh,
        on_round_end=learner.loss_scale.next_round,
        tensors={"loss_scale": learner.loss_scale.state},
    )
    return drive_to_summary(run, federation, "round", options.rounds, learner)


def run_centralized(options: argparse.Namespace) -> None:
    """Train on all training data; with --search choose learning rate and weight decay first."""
    workspace = Workspace(options)

    def train(chosen: argparse.Namespace, name: str) -> dict:
        return train_centralized(workspace, chosen, name)

    search_then_train(options, "epochs", train)


def train_centralized(workspace: Workspace, options: argparse.Namespace, name: str) -> dict:
    """Run one centralised training in its folder; returns its summary."""
    run = open_run(workspace, options, name)
    if summary := finished_summary(run, "epoch", options.epochs):
        return summary
    learner = Learner(workspace, options, run.folder)
    flat, scale = learner.flat, learner.loss_scale
    tensors = {"theta": flat.theta, "loss_scale": scale.state}
    if learner.momentum is not None:
        tensors["momentum"] = learner.momentum

    def draw(epoch: int) -> torch.Tensor:
        draws = data.draw_epoch(
            workspace.train_index, options.batch_size, seed=options.seed, epoch=epoch
        )
        return draws.to(workspace.device)

    def train_batch(draws: torch.Tensor, at: float) -> torch.Tensor:
        schedule = dict(total=options.epochs, lr=options.lr, warmup=options.warmup)
        lr = centralized.learning_rate(options.schedule, at, **schedule)

        def backward(loss_scale: float) -> torch.Tensor:
            return fedavg.local_sgd([draws], learner.loss, flat.grad, lambda j: None, loss_scale)

        def overflowed() -> bool:
            return not torch.isfinite(flat.grad).all().item()

        loss, used = scale.attempt(backward, overflowed)
        learner.step(lr, first=at == 0, loss_scale=used)
        scale.next_round()
        return loss[0]

    process = centralized.Centralized(draw, train_batch, tensors, flat.refresh)
    return drive_to_summary(run, process, "epoch", options.epochs, learner)


def run_ridge(options: argparse.Namespace) -> None:
    """Solve the ridge head centrally and from the clients' sums, and compare the two."""
    workspace = Workspace(options)
    shards = workspace.shards()
    model = workspace.build_model()
    features = {part: workspace.features(model, part) for part in ("train", "test")}
    labels = workspace.sets["train"].labels
    central = workspace.fit_head(features["train"], "ridge")
    sums = head.RidgeSums(features["train"].shape[1], workspace.classes, workspace.device)
    for shard in shards:
        at = torch.from_numpy(shard).to(workspace.device)
        client = head.RidgeSums(features["train"].shape[1], workspace.classes, workspace.device)
        sums = sums + client.update(features["train"][at], labels[at])
    weight, bias = head.solve_ridge(sums, central.strength)
    weight, bias = weight / central.temperature, bias / central.temperature
    difference = ((weight - central.weight).norm() / central.weight.norm()).item()
    logits = features["test"].double() @ weight.T + bias
    test_labels = workspace.sets["test"].labels
    figures = {
        "ridge": central.strength,
        "temperature": central.temperature,
        "val_acc": central.val_acc,
        "test_acc": (logits.argmax(1) == test_labels).double().mean().item(),
        "test_loss": torch.nn.functional.cross_entropy(logits, test_labels).item(),
        "train_images": len(workspace.train_index),
        "clients": len(shards),
        "difference_to_central": difference,
        "bytes_up": sums.bytes * len(shards),
    }
    print_figures(figures)
    name = options.name or default_name(options)
    run = open_run(workspace, options, name, shards)
    runs.write_json(run.folder / "summary.json", figures)
    print(f"written to {run.folder / 'summary.json'}")


def run_shards(options: argparse.Namespace) -> None:
    """Print and plot who holds how many samples of which class."""
    workspace = Workspace(options)
    shards = workspace.shards()
    labels = workspace.dataset.train.labels.numpy()
    counts = np.stack([np.bincount(labels[s], minlength=workspace.classes) for s in shards])
    sizes, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    sharing = (counts > 0).sum(axis=0)
    print(f"{len(shards)} clients, {sizes.sum()} samples, {workspace.classes} classes")
    for what, values in (
        ("samples per client", sizes),
        ("classes per client", held),
        ("clients per class", sharing),
    ):
        print(f"{what:19} min {values.min()}  median {np.median(values):g}  max {values.max()}")
    print("client  samples  classes: samples")
    for k in range(min(len(shards), options.show)):
        top = np.argsort(-counts[k], kind="stable")[: min(held[k], 6)]
        parts = ", ".join(f"{workspace.dataset.classes[c]}: {counts[k, c]}" for c in top)
        print(f"{k:6}  {sizes[k]:7}  {parts}{', ...' if held[k] > len(top) else ''}")
    if len(shards) > options.show:
        print(f"... and {len(shards) - options.show} more clients (--show)")
    if options.out:
        plots.plot_shards(counts, options.out, f"{sharding_name(options)}, seed {options.seed}")
        print(f"written to {options.out}")


def run_eval(options: argparse.Namespace) -> None:
    """Evaluate a run's last checkpoint on the validation and the test set."""
    run = runs.Run(options.run_folder)
    stored = argparse.Namespace(**run.config()["options"])
    for name in ("data_dir", "device", "threads", "eval_batch"):
        setattr(stored, name, getattr(options, name))
    checkpoint = run.load()
    if checkpoint is None:
        raise ValueError(f"{run.folder} holds no checkpoint yet")
    workspace = Workspace(stored)
    learner = Learner(workspace, stored, run.folder)
    process = checkpoint["state"]["process"]
    learner.flat.reset(process["theta"] if "theta" in process else process["tensors"]["theta"])
    unit = "round" if "round" in process else "epoch"
    print_figures({unit: process[unit]} | learner.evaluate())


def run_plot(options: argparse.Namespace) -> None:
    """Draw the curves of one or several runs."""
    folders = [runs.Run(folder) for folder in options.run_folders]
    for run in folders:
        run.config()
    out = options.out or str(folders[0].folder / "curves.png")
    plots.plot_curves({run.folder.name: run.records() for run in folders}, out)
    print(f"written to {out}")


# ---------------------------------------------------------------------------- runs


def default_name(options: argparse.Namespace) -> str:
    """Name a run after what it does, with a short hash of everything that defines it."""
    parts = [
        options.command,
        options.data,
        sharding_name(options) if "clients" in options else None,
    ]
    parts += [f"J{options.J}" if "J" in options else None, f"seed{options.seed}"]
    digest = hashlib.sha256(json.dumps(defining(options), sort_keys=True).encode()).hexdigest()
    return "-".join(p for p in [*parts, digest[:6]] if p)


def sharding_name(options: argparse.Namespace) -> str:
    """Return iid, nc5 or dir0.3."""
    if options.nc is not None:
        return f"nc{options.nc}"
    return f"dir{options.dirichlet:g}" if options.dirichlet is not None else "iid"


def defining(options: argparse.Namespace) -> dict:
    """Return the options that define an experiment; a constant schedule can be extended."""
    extendable = (
        {"rounds", "epochs"} if getattr(options, "schedule", "constant") == "constant" else set()
    )
    free = FREE | extendable | {"run"}
    return {name: value for name, value in sorted(vars(options).items()) if name not in free}


def open_run(
    workspace: Workspace, options: argparse.Namespace, name: str, shards: list | None = None
) -> runs.Run:
    """Open the run's folder, refusing one made by other options; notes a changed environment."""
    run = runs.Run(Path(options.runs_dir) / name)
    split = [workspace.val_index, *(shards or [])]
    stored = {k: v for k, v in vars(options).items() if k != "run"}
    stored["split_sha256"] = hashlib.sha256(b"".join(part.tobytes() for part in split)).hexdigest()
    extra = {
        "environment": workspace.environment(),
        "python": platform.python_version(),
        "commit": git_commit(),
    }
    if shards:
        sizes = [len(shard) for shard in shards]
        extra["shards"] = {"clients": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
    free = set(stored) - set(defining(options)) - {"split_sha256"}
    run.open(stored, extra, free)
    if shards and not (run.folder / "shards.npz").exists():
        ends = np.cumsum([len(shard) for shard in shards])
        arrays = dict(validation=workspace.val_index, clients=np.concatenate(shards), ends=ends)
        runs.write_atomically(run.folder / "shards.npz", lambda p: save_arrays(p, arrays))
    return run


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """np.savez_compressed to exactly this path."""
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def git_commit() -> str | None:
    """Return the commit of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def finished_summary(run: runs.Run, unit: str, total: int) -> dict | None:
    """Return the summary of a run that has already reached `total`, after saying so."""
    path = run.folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get(unit, -1) < total:
        return None
    print(f"{run.folder} is finished: {unit} {summary[unit]}. {headline(summary)}")
    return summary


def headline(summary: dict) -> str:
    """Return the final figures in one line."""
    final = summary.get("final", {})
    named = (("validation", "val_acc"), ("test", "test_acc"))
    shown = [f"{label} accuracy {100 * final[key]:.2f} %" for label, key in named if key in final]
    return ", ".join(shown)


def drive_to_summary(
    run: runs.Run,
    process: fedavg.FedAvg | centralized.Centralized,
    unit: str,
    total: int,
    learner: Learner,
) -> dict:
    """Drive the process to `total` rounds or epochs, then write summary and curves."""
    print(f"{run.folder}: {learner.flat.size:,} parameters train on {learner.workspace.device}")

    evaluated = Evaluated(learner, unit, total, learner.options.eval_every)

    def finished() -> bool:
        return getattr(process, unit) >= total

    try:
        first = {unit: 0}
        wall = runs.drive(run, process, first=first, finished=finished, complete=evaluated)
    except runs.Interrupted as stop:
        print(
            f"{stop}: saved at {unit} {getattr(process, unit)}; the same command goes on from there"
        )
        raise
    summary = run.summarise(**{unit: getattr(process, unit), "wall_seconds": wall})
    try:
        plots.plot_curves({run.folder.name: run.records()}, run.folder / "curves.png")
    except ValueError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    print(f"{unit} {total} reached in {duration(wall)}. {headline(summary)}. See {run.folder}")
    return summary


def search_then_train(
    options: argparse.Namespace, length: str, train: Callable[[argparse.Namespace, str], dict]
) -> None:
    """Train once; with --search, first short runs over the grid, the best by validation chosen."""
    name = options.name or default_name(options)
    if not options.search:
        train(options, name)
        return
    results = []
    for lr in options.search_lr:
        for weight_decay in options.search_weight_decay:
            cell = copy.copy(options)
            cell.search, cell.lr, cell.weight_decay = False, lr, weight_decay
            setattr(cell, length, options.search_length or getattr(options, length))
            print(f"search: lr {lr:g}, weight decay {weight_decay:g}")
            summary = train(cell, f"{name}/search/lr{lr:g}-wd{weight_decay:g}")
            val_acc = summary["final"]["val_acc"]
            results.append({"lr": lr, "weight_decay": weight_decay, "val_acc": val_acc})
    best = max(results, key=lambda r: r["val_acc"])
    runs.write_json(Path(options.runs_dir) / name / "search.json", {"cells": results, "best": best})
    chosen = copy.copy(options)
    chosen.lr, chosen.weight_decay = best["lr"], best["weight_decay"]
    print(f"search: chose lr {best['lr']:g}, weight decay {best['weight_decay']:g} by validation")
    train(chosen, name)


def print_figures(figures: dict) -> None:
    """Print one figure a line, accuracies in percent."""
    for name, value in figures.items():
        text = f"{100 * value:.2f} %" if name.endswith("_acc") else f"{value:.6g}"
        print(f"{name:22} {text}")


# ---------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, one line each."""

    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable:
    """Return an argparse type: a finite number in [low, high], or in (low, high] with `above`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bound = f"{'above' if above else 'at least'} {low:g}"
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {bound}{upper}")
        return value

    return parse


def default_text(name: str) -> str:
    """Return the default of an option that depends on the data set, for its help."""
    values = [f"{BY_DATA[d][name]}" for d in ("cifar100", "synthetic")]
    return f"[{values[0]}; synthetic: {values[1]}]"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", choices=tuple(BY_DATA), default="cifar100", help="data set [%(default)s]")
    add("--data-dir", default="data", help="folder of data, weights and features [%(default)s]")
    add(
        "--val-fraction",
        type=number(float, 0, 0.9),
        default=0.1,
        help="share of the training set held out for validation, by class [%(default)s]",
    )
    add("--seed", type=number(int, 0), default=0, help="seed of everything random [%(default)s]")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=tuple(vit.MODELS), help=f"architecture {default_text('model')}")
    add("--weights", help=f"dino, none, or a checkpoint file {default_text('weights')}")
    add("--image-size", type=number(int, 1), help=f"pixels a side {default_text('image_size')}")
    add(
        "--normalisation",
        choices=("auto", "imagenet", "half"),
        default="auto",
        help="mean and std of the pixels; auto follows the checkpoint's name [%(default)s]",
    )


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clients")
    add = group.add_argument
    add(
        "--clients",
        "--K",
        type=number(int, 1),
        default=100,
        help="number of clients K [%(default)s]",
    )
    sharding = group.add_mutually_exclusive_group()
    sharding.add_argument("--nc", type=number(int, 1), help="classes per client N_c [iid]")
    sharding.add_argument(
        "--dirichlet",
        type=number(float, 0, above=True),
        help="concentration of the clients' class mixtures [iid]",
    )


def add_training_options(parser: argparse.ArgumentParser, unit: str, lr: float) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add(
        "--train",
        default="all",
        help="what trains: all, head, or from a block on: blocks.8 [%(default)s]",
    )
    add(
        "--head",
        choices=("linear", "probe", "ridge"),
        help=f"zero-initialised, trained first, or closed form {default_text('head')}",
    )
    add(
        "--freeze-head",
        action=argparse.BooleanOptionalAction,
        help="keep the head as it is [a probe or ridge head is frozen, unless --train head]",
    )
    add(
        "--batch-size",
        "--B",
        type=number(int, 1),
        help=f"images a step {default_text('batch_size')}",
    )
    add("--lr", type=number(float, 0), default=lr, help="learning rate of a step [%(default)s]")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum [%(default)s]")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--weight-decay", type=number(float, 0), default=0.0, help="L2 factor [%(default)s]")
    add(
        "--schedule",
        choices=centralized.SCHEDULES,
        default="constant",
        help=f"learning rate over {unit}s [%(default)s]",
    )
    add(
        "--warmup",
        type=number(float, 0),
        default=0,
        help=f"{unit}s of linear warm-up [%(default)s]",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help=f"random crop and flip {default_text('augment')}",
    )
    group = parser.add_argument_group("search, on validation accuracy")
    add = group.add_argument
    add("--search", action="store_true", help="choose learning rate and weight decay first")
    add(
        "--search-lr",
        type=number(float, 0),
        nargs="+",
        default=[lr / 3, lr, 3 * lr],
        metavar="LR",
        help="learning rates to try [%(default)s]",
    )
    add(
        "--search-weight-decay",
        type=number(float, 0),
        nargs="+",
        default=[0.0, 5e-4],
        metavar="WD",
        help="weight decays to try [%(default)s]",
    )
    add(
        "--search-length",
        type=number(int, 1),
        metavar="N",
        help=f"{unit}s of each try [as the run]",
    )


def add_run_options(parser: argparse.ArgumentParser, unit: str | None = None) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--device",
        default="auto",
        help="cpu, cuda or cuda:N [%(default)s: cuda where there is one]",
    )
    add("--threads", type=number(int, 1), help="CPU threads [PyTorch's choice]")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="[%(default)s: bf16 from compute capability 8.0, fp16 below, fp32 on a CPU]",
    )
    add(
        "--eval-batch",
        type=number(int, 1),
        default=256,
        help="images per forward pass [%(default)s]",
    )
    if unit is not None:
        add("--name", help="the run's folder below --runs-dir [made from the options]")
        add("--runs-dir", default="runs", help="where runs go [%(default)s]")
        add(
            "--eval-every",
            type=number(int, 1),
            help=f"{unit}s between evaluations [a 20th of the run]",
        )


def build_parser() -> Parser:
    """Declare every sub-command and option, once."""
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )

    def command(name: str, run: Callable) -> Parser:
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command("fedavg", run_fedavg)
    add = sub.add_argument_group("federation").add_argument
    add("--rounds", type=number(int, 1), default=200, help="communication rounds [%(default)s]")
    add(
        "--J",
        "--local-steps",
        type=number(int, 1),
        default=4,
        help="local steps a round [%(default)s]",
    )
    add(
        "--fraction",
        "--C",
        type=number(float, 0, 1, above=True),
        default=0.1,
        help="share C of the clients in a round [%(default)s]",
    )
    add(
        "--server-lr",
        type=number(float, 0, above=True),
        default=1.0,
        help="factor on the averaged change [%(default)s]",
    )
    add_shard_options(sub)
    add_training_options(sub, "round", lr=0.01)
    add_data_options(sub), add_model_options(sub), add_run_options(sub, "round")

    sub = command("centralized", run_centralized)
    sub.add_argument(
        "--epochs", type=number(int, 1), default=15, help="passes over the data [%(default)s]"
    )
    add_training_options(sub, "epoch", lr=0.005)
    add_data_options(sub), add_model_options(sub), add_run_options(sub, "epoch")

    sub = command("ridge", run_ridge)
    (
        add_shard_options(sub),
        add_data_options(sub),
        add_model_options(sub),
        add_run_options(sub, "run"),
    )

    sub = command("shards", run_shards)
    sub.add_argument(
        "--show", type=number(int, 0), default=10, help="clients to list [%(default)s]"
    )
    sub.add_argument("--out", help="picture of the heat map, such as shards.png [none]")
    add_shard_options(sub), add_data_options(sub), add_run_options(sub)

    sub = command("eval", run_eval)
    sub.add_argument("run_folder", metavar="RUN", help="a run's folder, such as runs/NAME")
    sub.add_argument("--data-dir", default="data", help="folder of data and weights [%(default)s]")
    add_run_options(sub)

    sub = command("plot", run_plot)
    sub.add_argument("run_folders", metavar="RUN", nargs="+", help="run folders, one or several")
    sub.add_argument("--out", help="where the picture goes [curves.png in the first run]")
    return parser


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and refuse what cannot work together.

    Raises:
        ValueError: the message names the options.
    """
    o = options
    for name, value in BY_DATA[o.data].items():
        if hasattr(o, name) and getattr(o, name) is None:
            setattr(o, name, value)
    if hasattr(o, "model"):
        vit.check_image_size([o.image_size], vit.MODELS[o.model].patch)
        if o.weights == "dino" and o.model != "vit_s16":
            raise ValueError(f"--weights dino is a vit_s16, not {o.model}: --weights FILE or none")
    if hasattr(o, "train"):
        resolve_training(o)
    return o


def resolve_training(o: argparse.Namespace) -> None:
    """The part of `resolve` for the commands that train."""
    unit, total = ("rounds", o.rounds) if hasattr(o, "rounds") else ("epochs", o.epochs)
    if o.freeze_head is None:  # a fitted head is kept, unless it is all that trains
        o.freeze_head = o.head != "linear" and o.train != "head"
    if o.freeze_head and o.head == "linear":
        raise ValueError(
            "--freeze-head with --head linear would keep a head of zeros: --head ridge or probe"
        )
    if o.freeze_head and o.train == "head":
        raise ValueError("--train head with --freeze-head leaves nothing to train")
    if o.search and not o.val_fraction:
        raise ValueError("--search chooses on validation data: --val-fraction above 0")
    if o.warmup >= total:
        raise ValueError(f"--warmup {o.warmup:g} must be shorter than --{unit} {total}")
    if o.eval_every is None:
        o.eval_every = math.ceil(total / EVALUATIONS)
    check_sgd_options(o.lr, o.momentum, 0.0, o.weight_decay, o.nesterov)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 128 + signal when interrupted."""
    try:
        options = resolve(build_parser().parse_args(arguments))
        options.run(options)
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except runs.Interrupted as stop:
        return stop.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
