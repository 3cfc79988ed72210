"""The experiments as data: which runs make which table, at several sizes.

    at_scale("smoke")["rules"].cells(folder)    the runs; `train.py sweep` runs what is missing

paper: DINO's ViT-S/16 at 224 px, the brief's sizes, for a GPU. colab: the same in fewer rounds,
rates and seeds: a tenth of paper's operations, 29 hours where a GPU does 15 TFLOP/s (a quarter of a
T4's peak; no T4 was measured: `sweep --list` measures yours). cpu: a ViT-Ti/16 at 64 px, at 224 px
where the head alone trains, for two cores. smoke: the synthetic data set and a few rows, to see
that all works. gpu: other questions, in minutes at a time (study/gpu.py).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

from centralized import SCHEDULES
from masks import CONSENSUS, needs_scores
from study.gpu import ACCURACY, LINEARITY, METHODS, SEEN, SHARDINGS, SIZES, at_size, name_of
from study.gpu import MAKERS as GPU_MAKERS
from study.measures import TEST, VALIDATION, Measure
from study.tables import WIDENED, Experiment, Row, around, rung

CPU = ("--model", "vit_ti16", "--weights", "data/vit_tiny_patch16_224.pth", "--threads", "1")
SMOKE = ("--data", "synthetic", "--threads", "1")
RIDGE = ("--head", "ridge")  # which CIFAR-100 has anyway


class Scale(NamedTuple):
    """The sizes of the experiments: all that differs between scales."""

    backbone: tuple[str, ...]  # model, data and batch where the backbone trains
    features: tuple[str, ...]  # the same where the head alone does
    solved: tuple[str, ...]  # and where it is solved
    local_steps: int  # J x rounds where the backbone trains
    mask_steps: int  # J x rounds of the mask rules
    method_rounds: int
    head_steps: int  # J x rounds where the head alone trains
    long_rounds: int  # of FedAvg to convergence
    epochs: int
    head_epochs: int
    images: int  # scored in a calibration round
    agreement_images: int  # scored where clients' masks are compared
    tries: int  # learning rates that a row tries
    mask_tries: int  # the same of mask rules
    seeds: tuple[int, ...]  # of heads, agreement
    mask_seeds: tuple[int, ...]  # of mask rules
    wide_seeds: tuple[int, ...]  # of the other runs that train a backbone
    widened: int = WIDENED  # rates that a row may try beyond its own
    dense_rates: bool = False  # masked rows take dense training's rates, as --mask-lr matches them


SCALES: dict[str, Scale | None] = dict.fromkeys(SIZES) | {
    "paper": Scale(
        backbone=("--batch-size", "64"),
        features=(),
        solved=(),
        local_steps=800,
        mask_steps=800,
        method_rounds=50,
        head_steps=8000,
        long_rounds=500,
        epochs=15,
        head_epochs=25,
        images=5000,
        agreement_images=2000,
        tries=3,
        mask_tries=3,
        seeds=(0, 1, 2),
        mask_seeds=(0, 1, 2),
        wide_seeds=(0, 1, 2),
    ),
    "colab": Scale(
        backbone=("--batch-size", "64"),
        features=(),
        solved=(),
        local_steps=320,
        mask_steps=120,
        method_rounds=6,
        head_steps=8000,
        long_rounds=150,
        epochs=3,
        head_epochs=25,
        images=1000,
        agreement_images=1000,
        tries=2,
        mask_tries=1,
        seeds=(0, 1, 2),
        mask_seeds=(0,),
        wide_seeds=(0,),
        widened=2,
        dense_rates=True,
    ),
    "cpu": Scale(
        backbone=(*CPU, "--image-size", "64", "--batch-size", "32"),
        features=(*CPU, "--image-size", "224"),
        solved=(*CPU, "--image-size", "224"),
        local_steps=48,
        mask_steps=16,
        method_rounds=4,
        head_steps=8000,
        long_rounds=60,
        epochs=1,
        head_epochs=25,
        images=500,
        agreement_images=2000,
        tries=3,
        mask_tries=2,
        seeds=(0, 1, 2),
        mask_seeds=(0, 1),
        wide_seeds=(0,),
    ),
    "smoke": Scale(
        backbone=(*SMOKE, *RIDGE, "--batch-size", "8"),
        features=(*SMOKE, *RIDGE),
        solved=SMOKE,
        local_steps=16,
        mask_steps=4,
        method_rounds=1,
        head_steps=16,
        long_rounds=3,
        epochs=1,
        head_epochs=1,
        images=100,
        agreement_images=400,
        tries=1,
        mask_tries=1,
        seeds=(0,),
        mask_seeds=(0,),
        wide_seeds=(0,),
    ),
}


def rounds(steps: int, local_steps: int, evaluations: int = 1) -> tuple[str, ...]:
    """Return the options of a run of so many local steps in all, evaluated so many times."""
    count = max(1, steps // local_steps)
    every = f"{-(-count // evaluations)}"
    return ("--J", f"{local_steps}", "--rounds", f"{count}", "--eval-every", every)


# --------------------------------------------------------------- training, central and federated


def centralized(s: Scale) -> Experiment:
    """Schedules, and weight decay or none, of the head alone and of everything."""
    rows = []
    for what, schedule, decay in product(("head", "all"), SCHEDULES, ("0", "0.0005")):
        head = what == "head"
        if not head and decay == "0" and schedule != "cosine":
            continue
        options = (*s.features, "--train", "head") if head else s.backbone
        options += ("--epochs", f"{s.head_epochs if head else s.epochs}")
        options += ("--schedule", schedule, "--weight-decay", decay)
        seeds, rates = (s.seeds, 1e-2) if head else (s.wide_seeds, 3e-3)
        tries = s.tries if head else min(2, s.tries)
        key = (what, schedule, decay)
        rows.append(Row(key, options, around(rates, tries), seeds, "centralized"))
    title = "Central SGD with momentum: schedules and weight decay"
    return Experiment(title, ("trains", "schedule", "weight decay"), tuple(rows))


def fedavg_iid(s: Scale) -> Experiment:
    """FedAvg on equal shards, J = 4, until it has converged as far as the scale allows."""
    every = f"{-(-s.long_rounds // 10)}"
    long = (*s.backbone, "--J", "4", "--rounds", f"{s.long_rounds}", "--eval-every", every)
    head = ("--train", "head", "--J", "4", "--rounds", f"{max(1, s.head_steps // 4)}")
    tries, seeds = min(2, s.tries), s.wide_seeds
    rows = (
        Row(("head", "ridge"), (*s.features, *head), around(3e-3, s.tries), s.seeds),
        Row(("all", "linear"), (*long, "--head", "linear"), around(3e-2, tries), seeds),
        Row(("all", "ridge, frozen"), long, around(1e-2, tries), seeds),
    )
    return Experiment("FedAvg on iid shards, J = 4", ("trains", "head"), rows)


def heterogeneity(s: Scale) -> Experiment:
    """How many classes a client holds, against how many steps it takes on its own.

    J times rounds is the same everywhere; --diagnostics logs how far clients drift apart.
    """
    rows = []
    for what, sharding, local_steps in product(("head", "all"), SHARDINGS, (4, 8, 16)):
        few = {"nc5": 1, "nc1": 2}.get(sharding, 0)  # classes: the fewer, the shorter the step
        if what == "head":
            count = f"{max(1, s.head_steps // local_steps)}"
            options = (*s.features, "--train", "head", "--J", f"{local_steps}", "--rounds", count)
            rates, seeds = around(rung(3e-3, -few), s.tries), s.seeds
        else:
            options = (*s.backbone, *rounds(s.local_steps, local_steps))
            rates, seeds = around(rung(1e-2, -2 * few), min(2, s.tries)), s.wide_seeds
        key = (what, sharding, f"{local_steps}")
        name = f"{what}-{sharding}-J{local_steps}"
        options = (*options, "--diagnostics", *SHARDINGS[sharding])
        rows.append(Row(key, options, rates, seeds, name=name))
    drift = (Measure("update cosine", "final/update_cosine"), Measure("moved", "final/distance"))
    title = "Classes per client against local steps, at equal J x rounds"
    columns = ("trains", "sharding", "J")
    return Experiment(title, columns, tuple(rows), (VALIDATION, TEST, *drift, *SEEN), ("4",))


def heads(s: Scale) -> Experiment:
    """A ridge head, solved from clients' sums, against heads that train; under frozen features or
    with everything."""
    alone = (*s.features, "--train", "head", "--rounds", f"{max(1, s.head_steps // 4)}")
    whole = (*s.backbone, *rounds(s.local_steps, 4))
    rows = []
    for sharding, split in (("iid", ()), ("nc1", ("--nc", "1"))):
        few = sharding == "nc1"
        key = ("nothing", "ridge", sharding)
        rows.append(Row(key, (*s.solved, *split), seeds=s.seeds, command="ridge"))
        for kind in ("linear", "probe", "ridge"):
            rates = around(rung(1e-2 if kind == "linear" else 3e-3, -2 * few), s.tries)
            options = (*alone, "--head", kind, *split)
            rows.append(Row(("head", kind, sharding), options, rates, s.seeds))
        for label, extra in (
            ("linear", ("--head", "linear")),
            ("probe, frozen", ("--head", "probe")),
            ("ridge, frozen", ("--head", "ridge")),
            ("ridge", ("--head", "ridge", "--no-freeze-head")),
        ):
            rates = around(rung(1e-2, -4 * few), min(2, s.tries))
            name = f"all-{label.replace(', ', '-')}-{sharding}"
            options = (*whole, *extra, *split)
            rows.append(Row(("all", label, sharding), options, rates, s.wide_seeds, name=name))
    return Experiment(
        "What the head is, and what trains", ("trains", "head", "sharding"), tuple(rows)
    )


# ------------------------------------------------------------------------------------ mask rules

RUNGS = {  # the lower of the two rates tried, iid: the less the entries matter, the longer the step
    ("dense", "0"): 0.003,
    **{("least-sensitive", s): lr for s, lr in (("0.5", 0.01), ("0.9", 0.03), ("0.99", 3.0))},
    **{("most-sensitive", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.003), ("0.99", 0.01))},
    **{("lowest-magnitude", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
    **{("highest-magnitude", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
    **{("random", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
}


RAW = ("--mask-lr", "raw")  # the rates above are those of each rule, not of dense training


def rate(s: Scale, rule: str, sparsity: str) -> float:
    """Return the lower of the two rates that a rule tries on iid clients."""
    return RUNGS[("dense", "0") if s.dense_rates else (rule, sparsity)]


def masked(s: Scale, rule: str, sparsity: str, sharding: str, *more: str) -> tuple[str, ...]:
    """Return the options of a run under a mask, or of dense training."""
    count = f"{max(1, s.mask_steps // 4)}"
    options = (*s.backbone, "--J", "4", "--rounds", count, "--eval-every", count)
    options += SHARDINGS[sharding]
    if rule == "dense":
        return options
    options += ("--mask-rule", rule, "--sparsity", sparsity, *(() if s.dense_rates else RAW))
    images = ("--calibration-images", f"{s.images}") if needs_scores(rule) else ()
    return (*options, *images, *more)


def mask_rates(s: Scale, rule: str, sparsity: str, sharding: str) -> tuple[float, ...]:
    """Return the rates that a mask rule tries; N_c = 1 takes rates three rungs lower."""
    low = rung(rate(s, rule, sparsity), 0 if sharding == "iid" else -3)
    return (low, rung(low, 1), rung(low, -1))[: s.mask_tries]


def rules(s: Scale) -> Experiment:
    """Five mask rules at three sparsities against dense training, after the same local steps."""
    rows = [
        Row(
            (sharding, rule, sparsity),
            masked(s, rule, sparsity, sharding),
            mask_rates(s, rule, sparsity, sharding),
            s.mask_seeds,
        )
        for sharding in ("iid", "nc1")
        for rule, sparsity in RUNGS
    ]
    columns = ("sharding", "rule", "sparsity")
    return Experiment("Mask rules", columns, tuple(rows), ACCURACY, ("dense", "0"))


def sparsity(s: Scale) -> Experiment:
    """The least-sensitive rule: sparsity against calibration rounds."""
    rows = []
    for sharding, share, count in product(("iid", "nc1"), ("0.5", "0.9", "0.99"), "1248"):
        more = ("--calibration-rounds", count) if count != "4" else ()  # 4 is the default
        options = masked(s, "least-sensitive", share, sharding, *more)
        rates = mask_rates(s, "least-sensitive", share, sharding)
        name = f"{sharding}-least-sensitive-{share}" + (f" R={count}" if more else "")
        rows.append(Row((sharding, share, count), options, rates, s.mask_seeds, name=name))
    title = "Least-sensitive weights: sparsity and calibration rounds"
    columns = ("sharding", "sparsity", "calibration rounds")
    return Experiment(title, columns, tuple(rows), ACCURACY, ("1",), "rules")


# ---------------------------------------------------------------- extension: federated calibration


def agreement(s: Scale) -> Experiment:
    """Whether clients agree on what is insensitive, and how many of them a mask needs.

    IoU of masks that single clients make, of two halves of a client's own images (what the noise
    of sampling leaves), and of two groups of clients that share none.
    """
    images = ("--sparsity", "0.9", "--calibration-rounds", "1")
    images += ("--calibration-images", f"{s.agreement_images}")
    options = (*s.backbone[: s.backbone.index("--batch-size")], *images)
    rows = tuple(
        Row((sharding,), (*options, *split), seeds=s.seeds, command="calibrate")
        for sharding, split in SHARDINGS.items()
    )
    single = [
        Measure(f"IoU, {what}", f"overlap/{key}")
        for what, key in (
            ("two clients", "iou"),
            ("halves of one", "ceiling"),
            ("chance", "chance"),
        )
    ]
    groups = [Measure(f"IoU, 2 x {m}", f"overlap/groups/{m}") for m in (2, 5, 10, 50)]
    title = "Do clients agree on which weights are least sensitive?"
    return Experiment(title, ("sharding",), rows, (*single, *groups))


def consensus(s: Scale) -> Experiment:
    """How clients' scores become one mask, and how many clients share the scored images."""
    rows = []
    for sharding, (rule, share) in product(
        ("iid", "nc1"), [*((rule, "1") for rule in CONSENSUS), ("mean", "0.1"), ("mean", "0.01")]
    ):
        more = ("--consensus", rule) if rule != "mean" else ()
        more += ("--calibration-fraction", share) if share != "1" else ()
        options = masked(s, "least-sensitive", "0.9", sharding, *more)
        rates = mask_rates(s, "least-sensitive", "0.9", sharding)[:2]
        name = "-".join([sharding, "least-sensitive-0.9", *(m for m in more if m[:2] != "--")])
        rows.append(Row((sharding, share, rule), options, rates, s.mask_seeds, name=name))
    columns = ("sharding", "clients that score", "consensus")
    title = "Calibration: consensus rules and calibrating clients"
    return Experiment(title, columns, tuple(rows), ACCURACY, ("1", "mean"), "rules")


def linearity(s: Scale) -> Experiment:
    """How linear and disentangled the moves under each rule are, at equal change of the logits."""
    rows = []
    for sharding, (rule, share) in product(("iid", "nc1"), RUNGS):
        if share in ("0", "0.9"):
            options = (*masked(s, rule, share, sharding), "--diagnostics")
            low = rung(rate(s, rule, share), 0 if sharding == "iid" else -3)
            rates = (rung(low, rule == "least-sensitive" and not s.dense_rates),)
            rows.append(Row((sharding, rule), options, rates, s.mask_seeds, widened=0))
    title = "Linearity and interference under the mask rules, sparsity 0.9"
    return Experiment(title, ("sharding", "rule"), tuple(rows), LINEARITY)


def scaffold_mask(s: Scale) -> Experiment:
    """Whether SCAFFOLD still helps under a mask: 20 clients of 5 classes, each drawn often."""
    count = max(1, 4 * s.mask_steps // 8)
    often = ("--clients", "20", "--fraction", "0.25")
    options = (*s.backbone, *rounds(8 * count, 8, evaluations=2), *often)
    rows = []
    for (weights, low), method in product(
        (("dense", 3e-4), ("masked", 3e-4 if s.dense_rates else 3e-3)), ("plain", "scaffold")
    ):
        more = ("--nc", "5", *["--scaffold"] * (method == "scaffold"))
        if weights == "masked":
            more += ("--mask-rule", "least-sensitive", "--sparsity", "0.9")
            more += () if s.dense_rates else RAW
            more += ("--calibration-images", f"{s.images}")
        rates = (low, rung(low, 1), rung(low, -1))[: s.tries]
        rows.append(Row((weights, method), (*options, *more), rates, s.wide_seeds))
    title = "SCAFFOLD with and without a mask, N_c = 5, K = 20"
    return Experiment(title, ("weights", "method"), tuple(rows), ACCURACY, ("plain",))


def privacy(s: Scale) -> Experiment:
    """What the noise of client-level privacy costs, by which weights carry it; iid, at the rates
    of the rules without noise."""
    rows = []
    for noise, (rule, share) in product(("0.1", "1"), RUNGS):
        if share in ("0", "0.99"):
            private = ("--dp-noise", noise, "--dp-clip", "0.3")
            options = (*masked(s, rule, share, "iid"), *private)
            rates = (rate(s, rule, share),)
            name = f"dp{noise}-{rule}"
            rows.append(Row((noise, rule), options, rates, s.mask_seeds, name=name, widened=0))
    title = "Client-level privacy: noise in all weights, or in a hundredth of them"
    measures = (VALIDATION, TEST, Measure("epsilon", "final/epsilon", digits=1))
    return Experiment(title, ("noise", "rule"), tuple(rows), measures, ("dense",))


# -------------------------------------------------------------------------------------- methods


def methods(s: Scale) -> Experiment:
    """Every federated method at the same budget of local steps, under a frozen ridge head.

    fedsgd takes one step a round, on all of a client's images.
    """
    count = f"{s.method_rounds}"
    training = (*s.backbone, "--J", "16", "--batch-size", "16", "--fraction", "0.05")
    training += ("--rounds", count, "--eval-every", count)
    rows = []
    for (method, options), sharding in product(METHODS.items(), ("nc1", "nc5")):
        high = rung(1e-4 if sharding == "nc1" else 1e-3, 4 * (method == "fedsgd"))
        rates = (high, rung(high, -1), rung(high, -2))[: s.tries]
        options = (*training, *SHARDINGS[sharding], *options)
        rows.append(Row((sharding, method), options, rates, s.wide_seeds))
    rows.sort(key=lambda row: row.key[0])
    columns = ("sharding", "method")
    return Experiment("Federated methods", columns, tuple(rows), ACCURACY, ("fedavg",))


BRIEF = (  # in its order, the extension last
    *(centralized, fedavg_iid, heads, heterogeneity, rules, sparsity),
    *(agreement, consensus, linearity, privacy, scaffold_mask, methods),
)
NAMES = tuple(dict.fromkeys([*map(name_of, BRIEF), *map(name_of, GPU_MAKERS)]))


def at_scale(name: str, results: Path = Path("nowhere")) -> dict[str, Experiment]:
    """Return the experiments, by name, at one of SCALES, in the order in which they run.

    Args:
        results: the folder of the scale's runs, where a first table says how large others are.
    """
    if name in SIZES:
        s = SIZES[name]
        tables = at_size(s, results) | {"agreement": agreement(s)}
    else:
        s = SCALES[name]
        tables = {name_of(make): make(s) for make in BRIEF}
    if name.endswith("smoke"):
        return {name: experiment.thinned() for name, experiment in tables.items()}
    return {name: experiment.limited(s.widened) for name, experiment in tables.items()}
