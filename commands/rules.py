"""What options mean together: defaults that depend on others, and combinations that are refused.

    options = resolve(build_parser().parse_args(["fedavg", "--nc", "1"]))  # as train.py does

`o` is the namespace of train.py's command line, which declares every option once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import editing
import event_files
import fedavg
import federation
import masks
import model as vit
import privacy
import safe_files
from local_training import train_together
from sparse_sgdm import check_sgd_options

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
LR_OF_BACKBONE = ((9, 1e-3), (math.inf, 1e-2))
LR_OF_FITTED_HEAD = ((4, 3e-4), (math.inf, 3e-3))
LR_OF_SYNTHETIC = 0.2, 0.01  # from a linear head, under a fitted one
SEARCH_WEIGHT_DECAY = 0.0, 5e-4


class Owned(NamedTuple):
    """An option that has an effect only where `owner` has one of these values."""

    default: float
    owner: str
    values: tuple = (True,)


ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")
OWNED = dict(
    server_momentum=Owned(0.9, "server", ("fedavgm", *ADAPTIVE)),
    server_tau=Owned(1e-3, "server", ADAPTIVE),
    ties_keep=Owned(0.2, "aggregate", ("ties",)),
    dare_drop=Owned(0.9, "aggregate", ("dare",)),
    clients_evaluated=Owned(10, "personalised"),
    fisher_images=Owned(256, "rule", ("fisher",)),  # of merge
    seed=Owned(0, "rule", ("dare",)),  # of merge
)
# What client-level privacy does not go with: client state, other samples, other
# weights, a look at single changes.
NOT_PRIVATE = (
    *("scaffold", "local_norm", "fedir", "fedvc", "aggregate", "dropout", "straggler_fraction"),
    "diagnostics",
)
# Of a mask that is made; without one these options stay None.
MASK_DEFAULTS = dict(
    sparsity=0.9,
    mask_scope=["*"],
    per_tensor=False,
    calibration_rounds=4,
    calibration_images=1000,
    calibration_fraction=1.0,
    damp=0.1,
    fisher_labels="sampled",
    fisher_score="log-prob",
    consensus="mean",
)
SCORING = (  # of them, those of how clients score: a rule without scores takes none
    *("calibration_rounds", "calibration_images", "calibration_fraction", "damp"),
    *("fisher_labels", "fisher_score", "consensus", "quorum"),
)
EVALUATIONS = 20  # of a run, where --eval-every does not say otherwise


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and refuse what cannot work together.

    Raises:
        ValueError: the message names the options.
    """
    o = options
    if getattr(o, "augment", False) is None and o.train not in ("all", "blocks.0"):
        o.augment = False
    if getattr(o, "head", "") is None and (o.mask or o.mask_rule):
        o.head = "ridge"  # under a mask the head is fitted
    for name, value in BY_DATA[o.data].items() if hasattr(o, "data") else ():
        if hasattr(o, name) and getattr(o, name) is None:
            setattr(o, name, value)
    if getattr(o, "name", None) is not None:
        with naming("--name"):
            safe_files.folder_below(o.runs_dir, o.name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and o.command != "fedavg":
        raise ValueError(f"torchrun spreads the clients of fedavg; start {o.command} without it")
    if hasattr(o, "model"):
        with naming("--image-size"):
            vit.check_image_size([o.image_size], vit.MODELS[o.model].patch)
        if o.weights == "dino" and o.model != "vit_s16":
            raise ValueError(f"--weights dino is a vit_s16, not {o.model}: --weights FILE or none")
    fits_head = "model" in o and getattr(o, "head", "ridge") != "linear"
    if fits_head and "val_fraction" in o and not o.val_fraction:
        raise ValueError("a ridge or probe head needs validation data: --val-fraction above 0")
    if hasattr(o, "mask_rule"):
        resolve_mask(o)
    if hasattr(o, "train"):
        resolve_training(o)
    resolve_owned(o)
    if hasattr(o, "dare_drop"):
        with naming("--dare-drop"):
            editing.check_drop(o.dare_drop)
    if getattr(o, "personalised", False) and not o.per_client:
        raise ValueError("--personalised belongs to --per-client")
    if o.command == "fedavg":
        refuse_combinations(o)
        resolve_privacy(o)
    return o


def resolve_privacy(o: argparse.Namespace) -> None:
    """The part of `resolve` for --dp-noise and what goes with it."""
    if (o.dp_noise is None) != (o.dp_clip is None):
        given, missing = (
            ("--dp-noise", "--dp-clip S") if o.dp_clip is None else ("--dp-clip", "--dp-noise Z")
        )
        raise ValueError(
            f"{given} needs {missing}: noise is measured by the norm that changes are clipped to"
        )
    if o.dp_clip is None:
        if o.dp_delta is not None:
            raise ValueError("--dp-delta belongs to --dp-noise Z --dp-clip S")
        return
    if o.dp_delta is not None and not o.dp_noise:
        raise ValueError("--dp-delta belongs to a --dp-noise above 0")
    for name in NOT_PRIVATE:
        if getattr(o, name, None) not in (None, False, 0, "mean"):
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} with --dp-noise: privacy needs clients that keep no state, all take "
                "part alike and weigh alike, and show in their sum alone"
            )
    with naming("--dp-noise"):
        privacy.check_std(noise_std(o), unit=1 / fedavg.FIXED_POINT)
    if o.dp_delta is None:
        o.dp_delta = min(1e-5, o.clients**-1.1)
    if o.dp_noise:
        with naming("--dp-noise"):
            privacy.check_accountant()


def noise_std(o: argparse.Namespace) -> float:
    """Return the standard deviation of the noise in each entry of a private round's average."""
    return o.dp_noise * o.dp_clip / (o.fraction * o.clients)


def resolve_owned(o: argparse.Namespace) -> None:
    """The part of `resolve` for options that belong to another one's values."""
    for name, (default, owner, values) in OWNED.items():
        owner = "rule" if o.command == "merge" and owner == "aggregate" else owner
        if not (hasattr(o, name) and hasattr(o, owner)):
            continue
        chosen = getattr(o, owner) in values
        if getattr(o, name) is None:
            setattr(o, name, default if chosen or name != "fisher_images" else None)
        elif not chosen:
            named = f"--{owner} {'|'.join(values)}" if values != (True,) else f"--{owner}"
            raise ValueError(f"--{name.replace('_', '-')} belongs to {named}")


def refuse_combinations(o: argparse.Namespace) -> None:
    """The part of `resolve` for federated methods that do not go together."""
    for given, why in (
        (
            o.scaffold and o.prox,
            "--scaffold with --prox: the proximal pull would enter the control variates as if it "
            "were a gradient",
        ),
        (
            o.aggregate == "fednova" and o.prox,
            "--aggregate fednova with --prox: the proximal pull shortens steps in a way that the "
            "weights do not know",
        ),
        (
            o.cuda_graph == "on" and o.batch_size == "full",
            "--cuda-graph on with --batch-size full: clients' batches differ in size",
        ),
        (
            o.search and o.dp_clip is not None,
            "--search with --dp-clip: every try spends privacy, and epsilon counts the last run",
        ),
        (
            o.scaffold and o.local_norm,
            "--scaffold with --local-norm: control variates pull towards a common model, and local "
            "parameters have none",
        ),
        (
            o.scaffold and o.secure_aggregation,
            "--scaffold with --secure-aggregation: the server would see each client's control "
            "variate",
        ),
        (
            o.scaffold and not o.lr,
            "--scaffold divides by --lr, which must be above 0",
        ),
        (
            o.local_norm and o.train == "head",
            "--local-norm with --train head: the head has no LayerNorm",
        ),
        (
            o.secure_aggregation and o.aggregate in federation.APART,
            f"--aggregate {o.aggregate} with --secure-aggregation: it compares the clients' "
            "changes entry by entry, and only their sum can be seen",
        ),
        (
            o.secure_aggregation and o.diagnostics,
            "--diagnostics with --secure-aggregation: they compare the clients' changes, and only "
            "their sum can be seen",
        ),
        (
            o.straggler_fraction and o.J == 1,
            "--straggler-fraction with --J 1: no client can take fewer steps than one",
        ),
    ):
        if given:
            raise ValueError(why)


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Say in an error which option it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def resolve_mask(o: argparse.Namespace) -> None:
    """The part of `resolve` for the commands that make or take a mask."""
    if o.command == "calibrate":
        o.mask_rule = o.mask_rule or "least-sensitive"
    making = [
        name for name in (*MASK_DEFAULTS, "threshold", "quorum") if getattr(o, name) is not None
    ]
    if not o.mask_rule and making:
        option = "--" + making[0].replace("_", "-")
        raise ValueError(f"{option} makes a mask and needs --mask-rule {'|'.join(masks.RULES)}")
    idle = [name for name in making if name in SCORING and not masks.needs_scores(o.mask_rule)]
    if idle:
        raise ValueError(
            f"--{idle[0].replace('_', '-')} belongs to --mask-rule least-sensitive|most-sensitive: "
            f"{o.mask_rule} scores nothing"
        )
    if o.mask and o.mask_rule:
        raise ValueError("--mask takes a mask that is made: leave --mask-rule away, or --mask")
    if not (o.mask or o.mask_rule):
        return
    if getattr(o, "train", "all") != "all":
        raise ValueError(f"a mask says what trains: --mask-scope in place of --train {o.train}")
    if o.head == "linear" or getattr(o, "freeze_head", True) is False:
        raise ValueError("under a mask the head is fitted first and frozen: --head ridge or probe")
    if o.mask_rule:
        fill_mask_options(o)


def fill_mask_options(o: argparse.Namespace) -> None:
    """Fill in what decides how a mask is made, and refuse what contradicts itself."""
    for name, value in MASK_DEFAULTS.items():
        if getattr(o, name) is None and not (name == "sparsity" and o.threshold is not None):
            setattr(o, name, value)
    if o.sparsity is not None and not o.sparsity < 1:
        raise ValueError(f"--sparsity {o.sparsity:g}: the frozen share must be below 1")
    if o.threshold is not None and o.consensus not in ("mean", "max"):
        raise ValueError(
            f"--threshold is compared with scores, and --consensus {o.consensus} makes ranks of "
            "them: --consensus mean or max, or a --sparsity"
        )
    if o.threshold is not None and o.mask_rule == "random":
        raise ValueError("--threshold has no meaning for --mask-rule random: --sparsity")
    if o.threshold is not None and o.per_tensor:
        raise ValueError("--per-tensor shares a --sparsity out; a --threshold is the same anyway")
    if o.quorum is not None and o.consensus != "vote":
        raise ValueError("--quorum belongs to --consensus vote")


def default_lr(o: argparse.Namespace) -> float:
    """Return --lr's default for the data set, what trains, and what the clients hold."""
    if o.data == "synthetic":
        return LR_OF_SYNTHETIC[o.head != "linear"]
    head_only = o.train == "head" and o.head != "linear"
    table = LR_OF_FITTED_HEAD if head_only else LR_OF_BACKBONE
    held = getattr(o, "nc", None) or math.inf
    return next(lr for most, lr in table if held <= most)


def resolve_search(o: argparse.Namespace) -> None:
    """The part of `resolve` for --lr and --weight-decay, and for a search over them."""
    for name in ("search_lr", "search_weight_decay", "search_length"):
        if not o.search and getattr(o, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --search")
    if o.search and o.weight_decay is not None:
        raise ValueError("--weight-decay with --search, which tries those of --search-weight-decay")
    if o.lr is not None and o.search_lr is not None:
        raise ValueError("--lr with --search-lr, whose rates are tried in its place")
    if o.lr is None:
        o.lr = default_lr(o)
    if o.weight_decay is None:
        o.weight_decay = 0.0
    if o.search:
        o.search_lr = o.search_lr or [o.lr / 3, o.lr, 3 * o.lr]
        o.search_weight_decay = o.search_weight_decay or list(SEARCH_WEIGHT_DECAY)


def resolve_training(o: argparse.Namespace) -> None:
    """The part of `resolve` for the commands that train."""
    unit, total = ("rounds", o.rounds) if hasattr(o, "rounds") else ("epochs", o.epochs)
    vit.check_train(o.train, vit.MODELS[o.model].depth)
    if o.tensorboard:
        event_files.check_tensorboard()
    resolve_search(o)
    if "server_lr" in o and o.server_lr is None:
        o.server_lr = 1.0 if o.server in ("fedavg", "fedavgm") else 0.01
    if o.freeze_head is None:  # a fitted head is kept, unless it is all that trains
        o.freeze_head = o.head != "linear" and o.train != "head"
    if o.freeze_head and o.head == "linear":
        raise ValueError(
            "--freeze-head with --head linear would keep a head of zeros: --head ridge or probe"
        )
    if o.head_images is not None and o.head == "linear":
        raise ValueError("--head-images fits a head, and --head linear fits none: ridge or probe")
    if o.head_images is not None and o.train == "head":
        raise ValueError("--head-images saves features, and --train head needs those of all images")
    if o.keep_tokens < 1 and o.train == "head":
        raise ValueError("--keep-tokens thins out images, and --train head sees their features")
    if o.augment and o.train == "head":
        raise ValueError("--augment changes images, and --train head sees their features")
    if o.freeze_head and o.train == "head":
        raise ValueError("--train head with --freeze-head leaves nothing to train")
    if o.cuda_graph == "on" and o.command == "fedavg" and train_together(o):
        raise ValueError(
            "--cuda-graph on: --train head takes all clients' steps together, and none of their own"
        )
    if o.micro_batch and o.train == "head":
        raise ValueError("--micro-batch divides images, and --train head sees their features")
    if o.compile and o.train == "head":
        raise ValueError("--compile compiles the backbone, and --train head does not run it")
    if o.early_stop and not o.val_fraction:
        raise ValueError("--early-stop watches validation data: --val-fraction above 0")
    if o.search and not o.val_fraction:
        raise ValueError("--search chooses on validation data: --val-fraction above 0")
    if o.warmup >= (shortest := min(total, o.search_length or total)):
        raise ValueError(f"--warmup {o.warmup:g} must be shorter than {shortest} {unit}")
    if o.eval_every is None:
        o.eval_every = math.ceil(total / EVALUATIONS)
    with naming("--nesterov"):
        check_sgd_options(o.lr, o.momentum, 0.0, o.weight_decay, o.nesterov)
