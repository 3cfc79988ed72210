"""Federated learning of pre-trained vision transformers, from one command line.

    python train.py fedavg --nc 1 --J 4 --rounds 2000   the main job; the same command resumes it
    python train.py fedavg --data synthetic             the same in a minute, nothing to download

Every option has a default; COMMAND --help shows it. Runs go into runs/.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import centralized
import head
import model as vit
import plots
import runs
from learner import Learner
from session import (
    default_name,
    open_run,
    search_then_train,
    sharding_name,
    train_centralized,
    train_federated,
)
from sparse_sgdm import check_sgd_options
from workspace import Workspace

# Defaults that depend on the data set; the help of each option shows both.
BY_DATA = {
    "cifar100": dict(
        model="vit_s16",
        weights="dino",
        image_size=224,
        head="ridge",
        augment=True,
        batch_size=64,
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
        rounds=100,
        epochs=5,
    ),
}
# --lr on CIFAR-100, chosen on validation (README, Results), by what trains: (N_c at most, lr). The
# fewer classes a client holds, the further it drifts in a step.
LR_OF_BACKBONE = ((4, 1e-4), (9, 1e-3), (math.inf, 1e-2))
LR_OF_FITTED_HEAD = ((4, 3e-4), (math.inf, 3e-3))
LR_HELP = (
    "0.01, with --nc below 10: 0.001, below 5: 0.0001; a fitted head alone: 0.003, with --nc "
    "below 5: 0.0003; synthetic: 0.2"
)
EVALUATIONS = 20  # of a run, where --eval-every does not say otherwise


# ---------------------------------------------------------------------------- commands


def run_fedavg(options: argparse.Namespace) -> None:
    """Train by FedAvg; with --search choose learning rate and weight decay first."""
    workspace = Workspace(options)
    shards = workspace.shards()

    def train(chosen: argparse.Namespace, name: str) -> dict:
        return train_federated(workspace, shards, chosen, name)

    search_then_train(options, "rounds", train)


def run_centralized(options: argparse.Namespace) -> None:
    """Train on all training data; with --search choose learning rate and weight decay first."""
    workspace = Workspace(options)

    def train(chosen: argparse.Namespace, name: str) -> dict:
        return train_centralized(workspace, chosen, name)

    search_then_train(options, "epochs", train)


def run_ridge(options: argparse.Namespace) -> None:
    """Solve the ridge head centrally and from the clients' sums, and compare the two."""
    workspace = Workspace(options)
    shards, model = workspace.shards(), workspace.build_model()
    name = options.name or default_name(options)
    run = open_run(workspace, model, options, name, shards)
    features, test_features = (workspace.features(model, part) for part in ("train", "test"))
    labels, test_labels = (workspace.sets[part].labels for part in ("train", "test"))
    central = workspace.fit_head(features, "ridge")
    total = head.RidgeSums(features.shape[1], workspace.classes, workspace.device)
    for shard in shards:
        at = torch.from_numpy(shard).to(workspace.device)
        sums = head.RidgeSums(features.shape[1], workspace.classes, workspace.device)
        total = total + sums.update(features[at], labels[at])
    weight, bias = (x / central.temperature for x in head.solve_ridge(total, central.strength))
    logits = test_features.double() @ weight.T + bias
    figures = {
        "val_acc": central.val_acc,
        "test_acc": (logits.argmax(1) == test_labels).double().mean().item(),
        "test_loss": F.cross_entropy(logits, test_labels).item(),
        "ridge": central.strength,
        "temperature": central.temperature,
        "train_images": len(workspace.train_index),
        "clients": len(shards),
        "difference_to_central": ((weight - central.weight).norm() / central.weight.norm()).item(),
        "bytes_up": total.bytes * len(shards),
    }
    print_figures(figures)
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
    learner = Learner(workspace, workspace.build_model(), stored, run.folder)
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


def print_figures(figures: dict) -> None:
    """Print one figure a line, accuracies in percent."""
    for name, value in figures.items():
        text = f"{100 * value:.2f} %" if name.endswith("_acc") else f"{value:.6g}"
        print(f"{name:22} {text}")


# ---------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, one line each, and names are whole."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

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


def add_training_options(parser: argparse.ArgumentParser, unit: str) -> None:
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
    add("--lr", type=number(float, 0), help=f"learning rate of a step [{LR_HELP}]")
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
        metavar="LR",
        help="learning rates to try [a third of --lr, --lr, three times --lr]",
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
    add("--rounds", type=number(int, 1), help=f"communication rounds {default_text('rounds')}")
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
    add_training_options(sub, "round")
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "round")

    sub = command("centralized", run_centralized)
    sub.add_argument(
        "--epochs", type=number(int, 1), help=f"passes over the data {default_text('epochs')}"
    )
    add_training_options(sub, "epoch")
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "epoch")

    sub = command("ridge", run_ridge)
    add_shard_options(sub)
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "run")

    sub = command("shards", run_shards)
    sub.add_argument(
        "--show", type=number(int, 0), default=10, help="clients to list [%(default)s]"
    )
    sub.add_argument("--out", help="picture of the heat map, such as shards.png [none]")
    add_shard_options(sub)
    add_data_options(sub)
    add_run_options(sub)

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
    for name, value in BY_DATA[o.data].items() if hasattr(o, "data") else ():
        if hasattr(o, name) and getattr(o, name) is None:
            setattr(o, name, value)
    if hasattr(o, "model"):
        vit.check_image_size([o.image_size], vit.MODELS[o.model].patch)
        if o.weights == "dino" and o.model != "vit_s16":
            raise ValueError(f"--weights dino is a vit_s16, not {o.model}: --weights FILE or none")
    if getattr(o, "head", "ridge") != "linear" and "val_fraction" in o and not o.val_fraction:
        raise ValueError("a ridge or probe head needs validation data: --val-fraction above 0")
    if hasattr(o, "train"):
        resolve_training(o)
    return o


def default_lr(o: argparse.Namespace) -> float:
    """Return --lr's default for the data set, what trains, and what the clients hold."""
    if o.data == "synthetic":
        return 0.2
    head_only = o.train == "head" and o.head != "linear"
    table = LR_OF_FITTED_HEAD if head_only else LR_OF_BACKBONE
    held = getattr(o, "nc", None) or math.inf
    return next(lr for most, lr in table if held <= most)


def resolve_training(o: argparse.Namespace) -> None:
    """The part of `resolve` for the commands that train."""
    unit, total = ("rounds", o.rounds) if hasattr(o, "rounds") else ("epochs", o.epochs)
    vit.check_train(o.train, vit.MODELS[o.model].depth)
    if o.lr is None:
        o.lr = default_lr(o)
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
    if not o.search:
        o.search_lr = o.search_weight_decay = o.search_length = None
    elif o.search_lr is None:
        o.search_lr = [o.lr / 3, o.lr, 3 * o.lr]
    if o.warmup >= total:
        raise ValueError(f"--warmup {o.warmup:g} must be shorter than --{unit} {total}")
    if o.eval_every is None:
        o.eval_every = math.ceil(total / EVALUATIONS)
    check_sgd_options(o.lr, o.momentum, 0.0, o.weight_decay, o.nesterov)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for bad input, or 128 + signal when interrupted."""
    try:
        options = resolve(build_parser().parse_args(arguments))
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except runs.Interrupted as stop:
        return stop.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
