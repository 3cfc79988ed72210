"""What an option that is not given follows: the data set, the command, other options.

    resolve(namespace)    of a parsed command line, in place; as train.py does

What belongs to another option is a row of OWNED, what a mask needs of MASK_DEFAULTS;
commands/refusals.py has what is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import data
import fedavg
import masks
from commands import refusals
from commands.refusals import Options, flag, given, naming, refuse
from federated import privacy
from federated.cohort import cohort_size
from federated.server import ADAPTIVE, WITH_MOMENTUM
from sparse_sgdm import check_sgd_options

SEARCH_WEIGHT_DECAY = 0.0, 5e-4
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


def resolve(o: Options) -> Options:
    """Fill in the defaults that depend on other options, and refuse what cannot work together.

    Raises:
        ValueError: the message names the options.
    """
    fill_by_data(o)
    refuse(refusals.of_pairs(o))
    refuse(refusals.of_the_model(o))
    refusals.check_values(o)
    if "mask_rule" in o:
        fill_mask(o)
    if "train" in o:
        fill_training(o)
    fill_owned(o)
    if o.command == "fedavg":
        refuse(refusals.of_methods(o))
        fill_privacy(o)
    refuse(refusals.of_the_device(o))
    return o


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


def fill_mask(o: Options) -> None:
    """Fill in what decides how a mask is made, of the commands that make or take one."""
    if o.command == "calibrate":
        o.mask_rule = o.mask_rule or "least-sensitive"
    ignore_scoring(o)
    refuse(refusals.of_masks(o))
    if "mask_lr" in o and (o.mask or o.mask_rule):
        o.mask_lr = None if o.mask_lr == "raw" else o.mask_lr or "matched"
    if not o.mask_rule:
        return
    for name, value in MASK_DEFAULTS.items():
        if getattr(o, name) is None and not (name == "sparsity" and o.threshold is not None):
            setattr(o, name, value)


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


def fill_training(o: Options) -> None:
    """Fill in what the commands that train need."""
    total = o.rounds or o.epochs
    fill_search(o)
    if "server_lr" in o and o.server_lr is None:
        o.server_lr = SERVER_LR if o.server in ADAPTIVE else 1.0
    if o.freeze_head is None:  # a fitted head is kept, unless it is all that trains
        o.freeze_head = o.head != "linear" and o.train != "head"
    refuse(refusals.of_training(o, total))
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


def fill_privacy(o: Options) -> None:
    """Fill in what --dp-noise needs."""
    refuse(refusals.of_privacy(o))
    if o.dp_clip is None:
        return
    std = o.dp_noise * o.dp_clip / (o.fraction * o.clients)
    with naming("--dp-noise"):
        privacy.check_std(std, unit=1 / fedavg.FIXED_POINT)
        if o.dp_noise:
            privacy.check_accountant()
    if o.dp_delta is None:
        o.dp_delta = min(1e-5, o.clients**-1.1)
