"""Federated learning of pre-trained vision transformers, from one command line.

    python train.py fedavg --nc 1 --J 4 --rounds 2000   the main job; the same command resumes it
    python train.py fedavg --data synthetic             the same in a minute, nothing to download

Every option has a default; COMMAND --help shows it. Runs go into runs/.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic

import argparse
import contextlib
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import centralized
import commands
import doctor
import experiments
import fedavg
import masks
import merging
import model as vit
import runs
import safe_files
import server
from options import BY_DATA, MASK_DEFAULTS, OWNED, SEARCH_WEIGHT_DECAY, resolve
from ranks import LostProcess, ToldByFirst

LR_HELP = (
    "0.01, with --nc below 10: 0.001; a fitted head alone: 0.003, with --nc below 5: 0.0003; "
    "synthetic: 0.2, with a fitted head 0.01"
)
AGGREGATES = ("mean", "fednova", "ties", "dare", "sign")
OUT_OF_MEMORY = "the device is out of memory: try a lower --eval-batch, --micro-batch or --fraction"
TOLD_ONCE = (ToldByFirst, fedavg.ClientError)  # errors that all processes of a group share


# ---------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, one line each, and names are whole."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what a command does not know by that command's own name."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(
                unknown[0], self._option_string_actions, n=1, cutoff=0.75
            )
            meant = f"; is {close[0]} meant?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

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
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not low <= value <= high or (above and value == low):
            bound = f"{'above' if above else 'at least'} {low:g}"
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {bound}{upper}")
        return value

    return parse


def cadence(text: str) -> int | float:
    """The argparse type of epochs between evaluations: a whole number, or a fraction of one."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    return share if 0 < share < 1 else number(int, 1)(text)


def batch_size(text: str) -> int | str:
    """The argparse type of a client's batch: a number of images, or "full"."""
    return text if text == "full" else number(int, 1)(text)


def path(text: str) -> str:
    """The argparse type of a file's or folder's name: not empty, as an unset variable is."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(
            "the name is empty" if not text else "the name holds a NUL"
        )
    return text


def owned(name: str) -> str:
    """Return the default of an option that belongs to another one, for its help."""
    return f"[{OWNED[name].default}]"


def default_text(name: str) -> str:
    """Return the default of an option that depends on the data set, for its help."""
    values = [f"{BY_DATA[d][name]}" for d in ("cifar100", "synthetic")]
    return f"[{values[0]}; synthetic: {values[1]}]"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", choices=tuple(BY_DATA), default="cifar100", help="data set [%(default)s]")
    add(
        "--data-dir",
        type=path,
        default="data",
        help="folder of data, weights and features [%(default)s]",
    )
    add(
        "--val-fraction",
        type=number(float, 0, 0.9),
        default=0.1,
        help="share of the training set held out for validation, by class [%(default)s]",
    )
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="seed of everything random [%(default)s]",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=tuple(vit.MODELS), help=f"architecture {default_text('model')}")
    add("--weights", type=path, help=f"dino, none, or a checkpoint file {default_text('weights')}")
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


def add_head_images(add: Callable) -> None:
    add(
        "--head-images",
        type=number(int, 1),
        metavar="N",
        help="training images that a fitted head sees, drawn by class, with an equal share of the "
        "validation images; only their features are computed [all]",
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
    add_head_images(add)
    add(
        "--batch-size",
        "--B",
        type=batch_size if unit == "round" else number(int, 1),
        help=f"images a step {default_text('batch_size')}"
        + ("; full: all of a client's, which with --J 1 is FedSGD" if unit == "round" else ""),
    )
    add("--lr", type=number(float, 0), help=f"learning rate of a step [{LR_HELP}]")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum [%(default)s]")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--weight-decay", type=number(float, 0), help="L2 factor [0]")
    add(
        "--clip-norm",
        type=number(float, 0, above=True),
        metavar="S",
        help="largest L2 norm of a step's gradient, of all that trains [none]",
    )
    add(
        "--micro-batch",
        type=number(int, 1),
        metavar="N",
        help="images of a step that are on the device at a time: the same gradient up to rounding, "
        "in less memory [all]",
    )
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
        help=f"random crop and flip {default_text('augment')}; --train head or blocks.N: False, so "
        "that what lies below is computed once",
    )
    add(
        "--keep-tokens",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="R",
        help="random share of an image's patches that a training step sees [%(default)g]",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile what trains: other last bits, and half a minute at the start",
    )
    add(
        "--early-stop",
        type=number(int, 1),
        metavar="N",
        help="stop after N evaluations (--eval-every) without a better validation accuracy, and "
        "keep the best weights [never]",
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
        metavar="WD",
        help=f"weight decays to try [{' '.join(f'{w:g}' for w in SEARCH_WEIGHT_DECAY)}]",
    )
    add(
        "--search-length",
        type=number(int, 1),
        metavar="N",
        help=f"{unit}s of each try [as the run]",
    )


def add_mask_options(parser: argparse.ArgumentParser, *, files: bool = True) -> None:
    group = parser.add_argument_group(
        "mask: which weights train; the head is fitted first and frozen"
    )
    add = group.add_argument
    if files:
        add(
            "--mask",
            type=path,
            metavar="FILE",
            help="a mask that `calibrate` wrote [everything trains]",
        )
    add(
        "--mask-rule",
        choices=tuple(masks.RULES),
        help="what a mask keeps trainable " + ("[none]" if files else "[least-sensitive]"),
    )
    limit = group.add_mutually_exclusive_group()
    limit.add_argument(
        "--sparsity",
        type=number(float, 0),
        help=f"FROZEN share, below 1 {mask_default('sparsity')}",
    )
    limit.add_argument(
        "--threshold",
        type=number(float, 0),
        help="instead of --sparsity: train entries whose score is at most this (rules least- and "
        "lowest-), or at least this (most- and highest-)",
    )
    add(
        "--per-tensor",
        action="store_true",
        default=None,
        help="the same sparsity in every tensor [over all tensors together]",
    )
    add(
        "--mask-scope",
        nargs="+",
        metavar="PATTERN",
        help="names of the parameters that take part, others are frozen; 'blocks.*.weight' is one "
        "[* : the whole backbone]",
    )
    add(
        "--calibration-rounds",
        type=number(int, 1),
        help=f"rounds of scoring {mask_default('calibration_rounds')}",
    )
    add(
        "--calibration-images",
        type=number(int, 1),
        help="images scored in a round by all clients together, each at least one "
        f"{mask_default('calibration_images')}",
    )
    add(
        "--calibration-fraction",
        type=number(float, 0, 1, above=True),
        help=f"share of the clients that score {mask_default('calibration_fraction')}",
    )
    add(
        "--damp",
        type=number(float, 0, 1),
        help=f"factor on dropped weights while the next round scores {mask_default('damp')}",
    )
    add(
        "--fisher-labels",
        choices=("sampled", "true"),
        help=f"sampled from the model, or the data's {mask_default('fisher_labels')}",
    )
    add(
        "--fisher-score",
        choices=("log-prob", "logit"),
        help=f"what is differentiated {mask_default('fisher_score')}",
    )
    add(
        "--consensus",
        choices=masks.CONSENSUS,
        help=f"how clients' scores become one {mask_default('consensus')}",
    )
    add(
        "--quorum",
        type=number(int, 1),
        help="clients that make a --consensus vote [more than half of those that score]",
    )


def mask_default(name: str) -> str:
    """Return the default of a mask option, for its help."""
    return f"[{MASK_DEFAULTS[name]}]"


def add_merging_options(add: Callable) -> None:
    """Declare the options of merging rules; add: add_argument of a group or parser."""
    add(
        "--ties-keep",
        type=number(float, 0, 1, above=True),
        metavar="SHARE",
        help="ties: share of its entries that each change keeps, the largest " + owned("ties_keep"),
    )
    add(
        "--dare-drop",
        type=number(float, 0),
        metavar="P",
        help="dare: probability that an entry of a change is dropped, below 1 "
        + owned("dare_drop"),
    )


def add_run_options(parser: argparse.ArgumentParser, unit: str | None = None) -> None:
    """Declare what a command runs on; unit: rounds or epochs, "" of a run that has none, or None
    of a command that makes no run."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--device",
        default="auto",
        help="cpu, cuda or cuda:N [%(default)s: cuda where there is one]",
    )
    add("--threads", type=number(int, 1, 1024), help="CPU threads [PyTorch's choice]")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="[%(default)s: bf16 from compute capability 8.0, fp16 below, fp32 on a CPU]",
    )
    add(
        "--eval-batch",
        type=number(int, 1),
        help="images per forward pass [256; on a CPU fewer where images or model are large]",
    )
    if unit is not None:
        add("--name", help="the run's folder below --runs-dir [made from the options]")
        add("--runs-dir", type=path, default="runs", help="where runs go [%(default)s]")
    if unit:
        add(
            "--cuda-graph",
            choices=("auto", "on", "off"),
            default="auto",
            help="launch a step's kernels all at once, to the same bits [%(default)s: on a GPU, "
            "where a first step shows that it works]",
        )
        add(
            "--eval-every",
            type=cadence if unit == "epoch" else number(int, 1),
            help=f"{unit}s between evaluations"
            + ("; below 1 a share: 0.1 evaluates ten times an epoch" if unit == "epoch" else "")
            + " [a 20th of the run]",
        )
        add(
            "--tensorboard",
            action="store_true",
            help="mirror the log into event files, in the run's folder tensorboard/",
        )


def build_parser() -> Parser:
    """Declare every sub-command and option, once."""
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )

    def command(name: str, run: Callable) -> Parser:
        sub = subparsers.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command("fedavg", commands.run_fedavg)
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
        "--server",
        choices=server.RULES,
        default="fedavg",
        help="what the server does with the averaged change [%(default)s]",
    )
    add(
        "--server-lr",
        type=number(float, 0, above=True),
        help="server learning rate [1, of the adaptive rules 0.01]",
    )
    add(
        "--server-momentum",
        type=number(float, 0, 0.9999),
        help="beta of fedavgm, b1 of the adaptive rules " + owned("server_momentum"),
    )
    add(
        "--server-tau",
        type=number(float, 0, 1e6, above=True),
        help="adaptivity of the adaptive rules " + owned("server_tau"),
    )
    add(
        "--prox",
        type=number(float, 0),
        default=0.0,
        metavar="MU",
        help="FedProx: strength of each client's pull to where it started [%(default)g]",
    )
    add("--scaffold", action="store_true", help="SCAFFOLD: control variates correct client drift")
    add("--fedir", action="store_true", help="FedIR: samples weighted by class, p(y) / p_k(y)")
    add(
        "--fedvc",
        action="store_true",
        help="FedVC: clients drawn in proportion to their samples, and weighted alike",
    )
    add(
        "--local-norm",
        action="store_true",
        help="LayerNorm parameters stay with each client; evaluations see their average",
    )
    add(
        "--aggregate",
        choices=AGGREGATES,
        default="mean",
        help="how clients' changes become one; fednova: per unit of local work; ties, dare, sign: "
        "merging rules of model editing [%(default)s]",
    )
    add_merging_options(add)
    add(
        "--straggler-fraction",
        type=number(float, 0, 1),
        default=0.0,
        help="share of the clients that take fewer than J steps in a round [%(default)g]",
    )
    add(
        "--dropout",
        type=number(float, 0, 1),
        default=0.0,
        help="probability that a sampled client does not answer [%(default)g]",
    )
    add(
        "--secure-aggregation",
        action="store_true",
        help="hide each client's update under pairwise masks that cancel in the sum",
    )
    add(
        "--diagnostics",
        action="store_true",
        help="with each evaluation, log how clients' changes relate, how far the model has moved, "
        "and how linear that move is",
    )
    add = sub.add_argument_group(
        "client-level privacy: DP-FedAvg (arXiv:1710.06963); each client takes part with "
        "probability C, all weigh alike"
    ).add_argument
    add(
        "--dp-noise",
        type=number(float, 0, 1000),
        metavar="Z",
        help="noise multiplier: the sum of the clients' changes gets Gaussian noise of standard "
        "deviation Z S [no privacy]; 0 clips alone",
    )
    add(
        "--dp-clip",
        type=number(float, 0, above=True),
        metavar="S",
        help="largest L2 norm of a client's change",
    )
    add(
        "--dp-delta",
        type=number(float, 0, 0.1, above=True),
        help="delta at which epsilon is told [1e-5, or K^-1.1 where that is less]",
    )
    add_shard_options(sub)
    add_training_options(sub, "round")
    add_mask_options(sub)
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "round")

    sub = command("centralized", commands.run_centralized)
    sub.add_argument(
        "--epochs", type=number(int, 1), help=f"passes over the data {default_text('epochs')}"
    )
    add_training_options(sub, "epoch")
    add_mask_options(sub)
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "epoch")

    sub = command("ridge", commands.run_ridge)
    sub.set_defaults(head_images=None)
    add_shard_options(sub)
    add_data_options(sub)
    add_model_options(sub)
    add_run_options(sub, "")

    sub = command("calibrate", commands.run_calibrate)
    add_mask_options(sub, files=False)
    sub.set_defaults(mask=None)
    add_shard_options(sub)
    add_data_options(sub)
    add_model_options(sub)
    sub.add_argument(
        "--head", choices=("probe", "ridge"), default="ridge", help="head to score under [ridge]"
    )
    add_head_images(sub.add_argument)
    add_run_options(sub, "")

    sub = command("doctor", run_doctor)
    sub.add_argument("--json", type=path, metavar="FILE", help="where the figures go too [none]")
    sub.add_argument(
        "fedavg_command",
        nargs=argparse.REMAINDER,
        metavar="fedavg ...",
        help="the command to examine, as it would be typed [fedavg]",
    )

    sub = command("shards", commands.run_shards)
    sub.add_argument(
        "--show", type=number(int, 0), default=10, help="clients to list [%(default)s]"
    )
    sub.add_argument("--out", type=path, help="picture of the heat map, such as shards.png [none]")
    add_shard_options(sub)
    add_data_options(sub)
    add_run_options(sub)

    sub = command("sweep", commands.run_sweep)
    sub.add_argument(
        "experiment",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(experiments.at_scale('smoke'))} [all of them]",
    )
    sub.add_argument(
        "--scale",
        choices=tuple(experiments.SCALES),
        default="paper",
        help="sizes: paper for a GPU, cpu for two cores, smoke for minutes [%(default)s]",
    )
    sub.add_argument("--list", action="store_true", help="say what is done and what is missing")
    sub.add_argument("--jobs", type=number(int, 1), default=1, help="runs at a time [%(default)s]")
    sub.add_argument(
        "--results",
        type=path,
        default="results",
        help="where runs and tables go, by scale [%(default)s]",
    )

    sub = command("report", commands.run_report)
    add = sub.add_argument
    add(
        "--scale",
        choices=tuple(experiments.SCALES),
        default="paper",
        help="whose runs [%(default)s]",
    )
    add("--results", default="results", help="where the scales' runs lie [%(default)s]")
    add("--out", type=path, default="report/generated", help="where it all goes [%(default)s]")

    sub = command("eval", commands.run_eval)
    sub.add_argument(
        "run_folder", type=path, metavar="RUN", help="a run's folder, such as runs/NAME"
    )
    sub.add_argument(
        "--best",
        action="store_true",
        help="the weights that validated best, of a run with --early-stop [the last]",
    )
    sub.add_argument(
        "--per-client",
        action="store_true",
        help="accuracy on every client's share of the validation images, which has its mixture of "
        "classes; mean, worst tenth, deviation, worst classes",
    )
    sub.add_argument(
        "--personalised",
        action="store_true",
        help="the same after J local steps of the client's own from the model",
    )
    sub.add_argument(
        "--clients-evaluated",
        type=number(int, 1),
        metavar="N",
        help="clients that --personalised trains, evenly chosen " + owned("clients_evaluated"),
    )
    sub.add_argument(
        "--data-dir", type=path, default="data", help="folder of data and weights [%(default)s]"
    )
    add_run_options(sub)

    sub = command("merge", commands.run_merge)
    sub.set_defaults(best=False)
    add = sub.add_argument
    add(
        "run_folders",
        type=path,
        metavar="RUN",
        nargs="+",
        help="run folders, of one model and one start",
    )
    add(
        "--rule",
        choices=merging.RULES,
        default="mean",
        help="how the runs' changes become one; add: their sum [%(default)s]",
    )
    add("--scale", type=number(float, -math.inf), default=1.0, help="factor on it [%(default)g]")
    add_merging_options(add)
    add(
        "--fisher-images",
        type=number(int, 1),
        metavar="N",
        help="fisher: training images on which each model's sensitivities are taken "
        + owned("fisher_images"),
    )
    add("--seed", type=number(int, 0, 2**63 - 1), help="dare: of what drops " + owned("seed"))
    add("--out", type=path, metavar="FILE", help="where the merged weights go [nowhere]")
    add("--data-dir", type=path, default="data", help="folder of data and weights [%(default)s]")
    add_run_options(sub)

    sub = command("export", commands.run_export)
    sub.add_argument(
        "run_folder", type=path, metavar="RUN", help="a run's folder, such as runs/NAME"
    )
    sub.add_argument("file", type=path, metavar="FILE", help="where the weights go, such as x.pth")
    sub.add_argument("--with-head", action="store_true", help="head.weight and head.bias too")
    sub.add_argument(
        "--best",
        action="store_true",
        help="the weights that validated best, of a run with --early-stop [the last]",
    )
    sub.add_argument(
        "--data-dir", type=path, default="data", help="folder of data and weights [%(default)s]"
    )
    sub.set_defaults(device="cpu", threads=None, eval_batch=None, precision="fp32")

    sub = command("plot", commands.run_plot)
    sub.add_argument(
        "run_folders", type=path, metavar="RUN", nargs="+", help="run folders, one or several"
    )
    sub.add_argument(
        "--out", type=path, help="where the picture goes [curves.png in the first run]"
    )
    makes_runs = ("fedavg", "centralized", "ridge", "calibrate")
    defaults = {name: vars(subparsers.choices[name].parse_args([])) for name in makes_runs}
    for values in defaults.values():
        del values["run"]
    parser.set_defaults(defaults=defaults)
    return parser


def run_doctor(options: argparse.Namespace) -> None:
    """Say what this machine is, which kernels run on it, and how long a fedavg command will take.

    It needs no download: images and weights are generated.
    """
    name, *rest = options.fedavg_command or ["fedavg"]
    if name != "fedavg":
        raise ValueError(f"doctor examines a fedavg command, not {name!r}")
    figures = doctor.examine(resolve(build_parser().parse_args(["fedavg", *rest])))
    doctor.print_table(figures)
    if options.json:
        safe_files.write_json(Path(options.json), figures)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for bad input, 1 when a process of its group was lost, or
    128 + signal when interrupted. Of several processes the first speaks for those that fail alike.
    """
    first, shared = int(os.environ.get("RANK", 0)) == 0, True
    try:
        options = resolve(build_parser().parse_args(arguments))
        shared = False
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
            if not first:
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            options.run(options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = OUT_OF_MEMORY
        if first or not (shared or isinstance(error, TOLD_ONCE)):
            who = "" if first else f" of process {os.environ['RANK']}"
            print(f"train.py: error{who}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except LostProcess as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except runs.Interrupted as stop:
        return stop.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
