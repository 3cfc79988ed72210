"""What is refused on a command line: rows of what does not go together, and reasons beside them.

A pair that cannot be is a row of REFUSED. The functions of_* yield other reasons, each below its
condition; commands/rules.py asks them in turn, some once defaults are filled in. `o` is the parsed
namespace; an option that the command does not have is None there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import masks
import model as vit
from centralized import DECAYS
from federated.cohort import cohort_size
from federated.methods import compares_clients
from machine import ranks, safe_files
from machine.device import choose_device
from training.calibration import Masking
from training.clients import LocalSteps, trains_together
from training.mirrors import PACKAGES, check_package

LEAST_NOISE = 1e-6  # below, epsilon is no number
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


class Options(argparse.Namespace):
    """A parsed command line; what it does not have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


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


# ---------------------------------------------------------------------------- data, model, device


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


def check_values(o: Options) -> None:
    if o.name is not None:
        with naming("--name"):
            safe_files.folder_below(o.runs_dir, o.name)
    if o.model is not None:
        with naming("--image-size"):
            vit.check_image_size([o.image_size], vit.MODELS[o.model].patch)
    if o.train is not None:
        vit.check_train(o.train, vit.MODELS[o.model].depth)
    for option in PACKAGES:
        if getattr(o, option):
            check_package(option)


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


# ---------------------------------------------------------------------------- masks, training


def of_masks(o: Options) -> Iterator[str]:
    making = [name for name in Masking._fields if getattr(o, name) not in (None, "auto")]
    if making and not o.mask_rule:
        yield f"{flag(making[0])} makes a mask and needs --mask-rule {'|'.join(masks.RULES)}"
    if o.threshold is not None and o.consensus not in (None, "mean", "max"):
        yield (
            f"--threshold is compared with scores, and --consensus {o.consensus} makes ranks of "
            "them: --consensus mean or max, or a --sparsity"
        )
    masked = o.mask or o.mask_rule
    if o.mask_lr and not masked:
        yield f"--mask-lr {o.mask_lr} is of a rate under a mask: --mask FILE or --mask-rule"
    if masked and o.train not in (None, "all"):
        yield f"a mask says what trains: --mask-scope in place of --train {o.train}"
    if masked and (o.head == "linear" or o.freeze_head is False):
        yield "under a mask the head is fitted first and frozen: --head ridge or probe"


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
