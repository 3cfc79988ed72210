"""What options mean together: defaults that follow others, combinations that are refused.

    resolve(namespace)    of a parsed command line, in place; as train.py does

What is refused together is a row of REFUSED; what belongs to another option, of OWNED. The
functions of_* yield other reasons to refuse a command line, each below its condition. `o` is the
parsed namespace; an option that the command does not have is None there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import data
import fedavg
import masks
import model as vit
from centralized import DECAYS
from federated import privacy
from federated.cohort import cohort_size
from federated.methods import compares_clients
from federated.server import ADAPTIVE, WITH_MOMENTUM
from machine import ranks, safe_files
from machine.device import choose_device
from sparse_sgdm import check_sgd_options
from training.clients import LocalSteps, trains_together
from training.mirrors import PACKAGES, check_package

SEARCH_WEIGHT_DECAY = 0.0, 5e-4
LEAST_NOISE = 1e-6  # below, epsilon is no number
EVALUATIONS = 20  # of a run at most, where --eval-every does not say otherwise
EVALUATION_SHARE = 0.1  # of a run's time at most, by the same
TRAINING_COST = 3  # forward passes that training on an image takes as long as
FEW_CLASSES = 10  # of a client: with fewer the head is fitted first
SERVER_LR = 0.01  # of the adaptive rules; of the others 1


class Owned(NamedTuple):
    """An option that has an effect only where `owner` has one of these values."""

    default: float | bool | None
    owner: str
    values: tuple = (True,)


OWNED = {
    "server_momentum": Owned(0.9, "server", WITH_MOMENTUM),
    "server_tau": Owned(1e-3, "server", ADAPTIVE),
    "ties_keep": Owned(0.2, "aggregate", ("ties",)),
    "dare_drop": Owned(0.9, "aggregate", ("dare",)),
    "personalised": Owned(False, "per_client"),
    "clients_evaluated": Owned(10, "personalised"),
    "quorum": Owned(None, "consensus", ("vote",)),
    "search_lr": Owned(None, "search"),
    "search_weight_decay": Owned(None, "search"),
    "search_schedule": Owned(None, "search"),
    "search_length": Owned(None, "search"),
    "fisher_images": Owned(256, "rule", ("fisher",)),
    "seed": Owned(0, "rule", ("dare",)),  # of merge
}
OFF = {  # values of options that are off, but for None and False
    **dict(prox=0, dropout=0, straggler_fraction=0, keep_tokens=1, aggregate="mean"),
}
REFUSED = {  # together, once what follows the data set is filled in
    ("--dirichlet", "--nc"): "either says what clients hold",
    ("--threshold", "--sparsity"): "either says what a mask keeps",
    ("--threshold", "--mask-rule random"): "which has no scores; a --sparsity",
    ("--threshold", "--per-tensor"): "a threshold is the same in every tensor anyway",
    ("--mask", "--mask-rule"): "a mask is taken or made; leave one of them away",
    ("--weight-decay", "--search"): "that tries those of --search-weight-decay",
    ("--lr", "--search-lr"): "whose rates are tried in its place",
    ("--freeze-head", "--head linear"): "it would keep a head of zeros; --head ridge or probe",
    ("--freeze-head", "--train head"): "nothing is left to train",
    ("--head-images", "--head linear"): "no head is fitted; --head ridge or probe",
    ("--head-images", "--train head"): "it saves features, and the head needs those of all images",
    ("--keep-tokens", "--train head"): "it thins out images, and the head sees their features",
    ("--augment", "--train head"): "it changes images, and the head sees their features",
    ("--micro-batch", "--train head"): "it divides images, and the head sees their features",
    ("--compile", "--train head"): "it compiles the backbone, which is not run",
    ("--local-norm", "--train head"): "the head has no LayerNorm",
    ("--scaffold", "--prox"): "the proximal pull would enter the control variates as if it were a "
    "gradient",
    ("--scaffold", "--local-norm"): "control variates pull towards a common model, and local "
    "parameters have none",
    ("--scaffold", "--secure-aggregation"): "the server would see each client's control variate",
    ("--aggregate fednova", "--prox"): "the proximal pull shortens steps in a way that the weights "
    "do not know",
    ("--cuda-graph on", "--batch-size full"): "clients' batches differ in size",
    ("--search", "--dp-clip"): "every try spends privacy, and epsilon counts the last run",
    ("--diagnostics", "--secure-aggregation"): "they compare the clients' changes, and only their "
    "sum can be seen",
    ("--straggler-fraction", "--J 1"): "no client can take fewer steps than one",
}
# What client-level privacy does not go with: client state, other samples, other weights, a look at
# single changes.
NOT_PRIVATE = (
    *("scaffold", "local_norm", "fedir", "fedvc", "aggregate", "dropout", "straggler_fraction"),
    "diagnostics",
)
NOT_MPS = "scaffold", "local_norm", "diagnostics", "clip_norm"
# Of a mask that is made; without one these options stay None.
MASK_DEFAULTS = {
    "sparsity": 0.9,
    "mask_scope": ["*"],
    "per_tensor": False,
    "calibration_rounds": 4,
    "calibration_images": 1000,
    "calibration_fraction": 1.0,
    "damp": 0.1,
    "fisher_labels": "sampled",
    "fisher_score": "log-prob",
    "consensus": "mean",
}
SCORING = (  # of them, those of how clients score: a rule without scores takes none
    *("calibration_rounds", "calibration_images", "calibration_fraction", "damp"),
    *("fisher_labels", "fisher_score", "consensus", "quorum", "score_precision"),
)


class Options(argparse.Namespace):
    """A parsed command line; what it does not have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def resolve(o: Options) -> Options:
    """Fill in the defaults that depend on other options, and refuse what cannot work together.

    Raises:
        ValueError: the message names the options.
    """
    fill_by_data(o)
    refuse(of_pairs(o))
    refuse(of_the_model(o))
    check_names(o)
    if "mask_rule" in o:
        fill_mask(o)
    if "train" in o:
        fill_training(o)
    fill_owned(o)
    if o.command == "fedavg":
        refuse(of_methods(o))
        fill_privacy(o)
    refuse(of_the_device(o))
    return o


def refuse(reasons: Iterator[str]) -> None:
    """Raise ValueError with the first reason, where there is one."""
    for why in reasons:
        raise ValueError(why)


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Say in an error which option it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def flag(name: str) -> str:
    """Return an option as it is typed."""
    return f"--{name.replace('_', '-')}"


def given(o: Options, typed: str) -> bool:
    """Tell whether an option, or its value in "--option value", is on a command line."""
    name, _, wanted = typed.removeprefix("--").partition(" ")
    value = getattr(o, name := name.replace("-", "_"))
    if value is None or value is False or value == OFF.get(name):
        return False
    return wanted in ("", str(value))


def of_pairs(o: Options) -> Iterator[str]:
    for (first, second), why in REFUSED.items():
        if given(o, first) and given(o, second):
            yield f"{first} with {second}: {why}"


# ---------------------------------------------------------------------------- data, model, files


def fill_by_data(o: Options) -> None:
    """Fill in what follows the data set; a mask and what trains go first."""
    if "augment" in o and o.augment is None and o.train not in ("all", "blocks.0"):
        o.augment = False
    if "head" in o and o.head is None:
        few = o.nc is not None and o.nc < FEW_CLASSES
        o.head = "ridge" if o.mask or o.mask_rule or few else None
    for name, value in data.DATASETS[o.data].defaults.items() if o.data else ():
        if name in o and getattr(o, name) is None:
            setattr(o, name, value)


def of_the_model(o: Options) -> Iterator[str]:
    if ranks.launched() > 1 and o.command != "fedavg":
        yield f"torchrun spreads the clients of fedavg; start {o.command} without it"
    named = o.model is not None and o.weights in vit.WEIGHTS
    needs = vit.WEIGHTS[o.weights].model if named else o.model
    if needs != o.model:
        yield f"--weights {o.weights} is a {needs}, not {o.model}: --weights FILE or none"
    fits_head = "model" in o and "val_fraction" in o and o.head != "linear"
    need = {"a ridge or probe head": fits_head, "--early-stop": o.early_stop, "--search": o.search}
    for what in (what for what, wanted in need.items() if wanted and not o.val_fraction):
        yield f"{what} needs validation data: --val-fraction above 0"


def check_names(o: Options) -> None:
    if o.name is not None:
        with naming("--name"):
            safe_files.folder_below(o.runs_dir, o.name)
    if o.model is not None:
        with naming("--image-size"):
            vit.check_image_size([o.image_size], vit.MODELS[o.model].patch)


def of_the_device(o: Options) -> Iterator[str]:
    device = choose_device(o.device) if o.cuda_graph == "on" else None
    if device is not None and device.type != "cuda":
        yield f"--cuda-graph on: it needs a CUDA device, and this is a {device}"
    several = isinstance(o.processes, int) and o.processes > 1
    if several and o.threads not in (None, 1):
        yield (
            f"--processes {o.processes} are of one thread each, to the bits of --threads 1: leave "
            f"--threads {o.threads} away"
        )
    if several and ranks.launched() > 1:
        yield f"--processes {o.processes} under torchrun, which starts processes itself"
    if several and (choose_device(o.device).type != "cpu" or not ranks.CAN_FORK):
        yield (
            f"--processes {o.processes} needs a CPU under Linux: torchrun --nproc-per-node="
            f"{o.processes} train.py fedavg"
        )
    for name in NOT_MPS:
        if o.device == "mps" and given(o, flag(name)):
            why = "it sums in 64 bits, which Apple's GPUs do not know; --device cpu"
            yield f"{flag(name)} with --device mps: {why}"


# ---------------------------------------------------------------------------- masks


def fill_mask(o: Options) -> None:
    """Fill in what decides how a mask is made, of the commands that make or take one."""
    if o.command == "calibrate":
        o.mask_rule = o.mask_rule or "least-sensitive"
    ignore_scoring(o)
    refuse(of_masks(o))
    if "mask_lr" in o and (o.mask or o.mask_rule):
        o.mask_lr = None if o.mask_lr == "raw" else o.mask_lr or "matched"
    if not o.mask_rule:
        return
    for name, value in MASK_DEFAULTS.items():
        if getattr(o, name) is None and not (name == "sparsity" and o.threshold is not None):
            setattr(o, name, value)
    refuse(of_making(o))


def ignore_scoring(o: Options) -> None:
    """Take away what only rules that score use, and say so: a loop over rules gives it to all."""
    if not o.mask_rule or masks.needs_scores(o.mask_rule):
        return
    idle = [name for name in SCORING if getattr(o, name) not in (None, "auto")]
    if idle:
        flags = ", ".join(map(flag, idle))
        print(f"{flags}: ignored, as --mask-rule {o.mask_rule} scores nothing")
    for name in idle:
        setattr(o, name, "auto" if name == "score_precision" else None)


def of_masks(o: Options) -> Iterator[str]:
    names = (*MASK_DEFAULTS, "mask_within", "threshold", "quorum")
    making = [name for name in names if getattr(o, name) is not None]
    if making and not o.mask_rule:
        yield f"{flag(making[0])} makes a mask and needs --mask-rule {'|'.join(masks.RULES)}"
    if o.score_precision == "fp32" and not o.mask_rule:
        yield "--score-precision is of scores: --mask-rule least-sensitive|most-sensitive"
    masked = o.mask or o.mask_rule
    if o.mask_lr and not masked:
        yield f"--mask-lr {o.mask_lr} is of a rate under a mask: --mask FILE or --mask-rule"
    if masked and o.train not in (None, "all"):
        yield f"a mask says what trains: --mask-scope in place of --train {o.train}"
    if masked and (o.head == "linear" or o.freeze_head is False):
        yield "under a mask the head is fitted first and frozen: --head ridge or probe"


def of_making(o: Options) -> Iterator[str]:
    if o.threshold is not None and o.consensus not in ("mean", "max"):
        yield (
            f"--threshold is compared with scores, and --consensus {o.consensus} makes ranks of "
            "them: --consensus mean or max, or a --sparsity"
        )


# ---------------------------------------------------------------------------- training


def fill_training(o: Options) -> None:
    """Fill in what the commands that train need."""
    total = o.rounds or o.epochs
    vit.check_train(o.train, vit.MODELS[o.model].depth)
    for option in PACKAGES:
        if getattr(o, option):
            check_package(option)
    fill_search(o)
    if "server_lr" in o and o.server_lr is None:
        o.server_lr = SERVER_LR if o.server in ADAPTIVE else 1.0
    if o.freeze_head is None:  # a fitted head is kept, unless it is all that trains
        o.freeze_head = o.head != "linear" and o.train != "head"
    refuse(of_training(o, total))
    if o.eval_every is None:
        o.eval_every = min(total, max(math.ceil(total / EVALUATIONS), evaluation_interval(o)))
    with naming("--nesterov"):
        check_sgd_options(o.lr, o.momentum, 0.0, o.weight_decay, o.nesterov)


def evaluation_interval(o: Options) -> int:
    """Return the fewest rounds or epochs between evaluations that take EVALUATION_SHARE at most.

    Time is counted in images that pass forward.
    """
    train, test = data.DATASETS[o.data].images
    evaluated = o.val_fraction * train + o.eval_test * test
    trained = (1 - o.val_fraction) * train  # in an epoch
    if o.command == "fedavg":
        batch = trained / o.clients if o.batch_size == "full" else o.batch_size
        trained = cohort_size(o.clients, o.fraction) * o.J * batch
    share = EVALUATION_SHARE / (1 - EVALUATION_SHARE)
    return max(1, math.ceil(evaluated / (share * TRAINING_COST * trained)))


def fill_search(o: Options) -> None:
    """Fill in --lr and --weight-decay, and what a search over them tries."""
    if o.lr is None:
        o.lr = data.DATASETS[o.data].lr(o.train, o.head, o.nc or math.inf)
    if o.weight_decay is None:
        o.weight_decay = 0.0
    if o.search:
        o.search_lr = o.search_lr or [o.lr / 3, o.lr, 3 * o.lr]
        o.search_weight_decay = o.search_weight_decay or list(SEARCH_WEIGHT_DECAY)


def of_training(o: Options, total: int) -> Iterator[str]:
    unit = "rounds" if o.rounds else "epochs"
    steps = LocalSteps(o.J or 1, o.batch_size)
    together = trains_together(o.train, steps, o.straggler_fraction, o.fedir)
    if o.cuda_graph == "on" and o.command == "fedavg" and together:
        yield "--cuda-graph on: --train head takes all clients' steps together"
    if o.decay is not None and not {*(o.search_schedule or [o.schedule])} & DECAYS.keys():
        yield f"--decay belongs to --schedule {'|'.join(DECAYS)}"
    if (o.search_length or 0) > total:
        yield f"--search-length {o.search_length}: the run has {total} {unit}"
    shortest = min(total, o.search_length or total)
    if o.warmup >= shortest:
        yield f"--warmup {o.warmup:g} must be shorter than {shortest} {unit}"


# ---------------------------------------------------------------------------- federated methods


def fill_owned(o: Options) -> None:
    """Fill in options that belong to another one's values."""
    for name, (default, owner, values) in OWNED.items():
        owner = "rule" if o.command == "merge" and owner == "aggregate" else owner
        if not (name in o and owner in o):
            continue
        if getattr(o, name) is None:
            setattr(o, name, default)
        elif given(o, flag(name)) and getattr(o, owner) not in values:
            named = "" if values == (True,) else f" {'|'.join(values)}"
            raise ValueError(f"{flag(name)} belongs to {flag(owner)}{named}")


def of_methods(o: Options) -> Iterator[str]:
    if o.scaffold and not o.lr:
        yield "--scaffold divides by --lr, which must be above 0"
    if o.secure_aggregation and compares_clients(o.aggregate):
        why = "it compares the clients' changes entry by entry, and only their sum can be seen"
        yield f"--aggregate {o.aggregate} with --secure-aggregation: {why}"
    alone = o.dp_clip is None and cohort_size(o.clients, o.fraction) == 1
    if o.secure_aggregation and alone:
        why = "one client a round is sent in the clear; a higher --fraction"
        few = f"--fraction {o.fraction:g} of {o.clients} clients"
        yield f"--secure-aggregation with {few}: {why}"


def fill_privacy(o: Options) -> None:
    """Fill in what --dp-noise needs."""
    refuse(of_privacy(o))
    if o.dp_clip is None:
        return
    std = o.dp_noise * o.dp_clip / (o.fraction * o.clients)
    with naming("--dp-noise"):
        privacy.check_std(std, unit=1 / fedavg.FIXED_POINT)
        if o.dp_noise:
            privacy.check_accountant()
    if o.dp_delta is None:
        o.dp_delta = min(1e-5, o.clients**-1.1)


def of_privacy(o: Options) -> Iterator[str]:
    if (o.dp_noise is None) != (o.dp_clip is None):
        yield (
            "--dp-noise Z needs --dp-clip S, and it needs that: noise is measured by the norm that "
            "changes are clipped to"
        )
    for name in ("dp_delta", "dp_seed"):
        if getattr(o, name) is not None and not o.dp_noise:
            yield f"{flag(name)} belongs to a --dp-noise above 0"
    if o.dp_noise is not None and 0 < o.dp_noise < LEAST_NOISE:
        yield f"--dp-noise {o.dp_noise:g}: 0, or at least {LEAST_NOISE:g}"
    for name in NOT_PRIVATE:
        if o.dp_clip is not None and given(o, flag(name)):
            yield (
                f"{flag(name)} with --dp-noise: privacy needs clients that keep no state, all take "
                "part alike and weigh alike, and show in their sum alone"
            )
