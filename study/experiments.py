"""The experiments as data: which runs make which table, at several sizes.

    at_scale("smoke")["rules"].cells(folder)    the runs; `train.py sweep` runs what is missing

What differs between scales is in study/scales.py.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from centralized import SCHEDULES
from study import common, gpu
from study.common import ACCURACY, METHODS, SEEN
from study.measures import TEST, VALIDATION, Measure
from study.scales import BRIEF_SCALES, RAW, RUNGS, SHARDINGS, SIZES, Scale, mask
from study.tables import Experiment, Row, around, rung

SCALES = dict.fromkeys(SIZES) | BRIEF_SCALES


def rounds(steps: int, local_steps: int, evaluations: int = 1) -> tuple[str, ...]:
    """Return the options of a run of so many local steps in all, evaluated so many times."""
    count = max(1, steps // local_steps)
    every = f"{-(-count // evaluations)}"
    return ("--J", f"{local_steps}", "--rounds", f"{count}", "--eval-every", every)


def of_head(s: Scale, local_steps: int) -> tuple[str, ...]:
    """Return the options of a federated run in which the head alone trains."""
    count = f"{max(1, s.head_steps // local_steps)}"
    return (*s.features, "--train", "head", "--J", f"{local_steps}", "--rounds", count)


def centralized(s: Scale) -> Experiment:
    """Central SGD with momentum: schedules, and weight decay or none, of the head alone and of
    everything."""
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
    return Experiment(("trains", "schedule", "weight decay"), tuple(rows))


def fedavg_iid(s: Scale) -> Experiment:
    """FedAvg on equal shards, J = 4, until it has converged as far as the scale allows."""
    long = (*s.backbone, *rounds(4 * s.long_rounds, 4, evaluations=10))
    tries, seeds = min(2, s.tries), s.wide_seeds
    rows = (
        Row(("head", "ridge"), of_head(s, 4), around(3e-3, s.tries), s.seeds),
        Row(("all", "linear"), (*long, "--head", "linear"), around(3e-2, tries), seeds),
        Row(("all", "ridge, frozen"), long, around(1e-2, tries), seeds),
    )
    return Experiment(("trains", "head"), rows)


def heterogeneity(s: Scale) -> Experiment:
    """How many classes a client holds, against how many steps it takes on its own.

    J times rounds is the same everywhere; --diagnostics logs how far clients drift apart.
    """
    rows = []
    for what, sharding, local_steps in product(("head", "all"), SHARDINGS, (4, 8, 16)):
        few = {"nc5": 1, "nc1": 2}.get(sharding, 0)  # classes: the fewer, the shorter the step
        if what == "head":
            options, seeds = of_head(s, local_steps), s.seeds
            rates = around(rung(3e-3, -few), s.tries)
        else:
            options, seeds = (*s.backbone, *rounds(s.local_steps, local_steps)), s.wide_seeds
            rates = around(rung(1e-2, -2 * few), min(2, s.tries))
        key = (what, sharding, f"{local_steps}")
        name = f"{what}-{sharding}-J{local_steps}"
        options = (*options, "--diagnostics", *SHARDINGS[sharding])
        rows.append(Row(key, options, rates, seeds, name=name))
    drift = (Measure("update cosine", "final/update_cosine"), Measure("moved", "final/distance"))
    measures = (VALIDATION, TEST, *drift, *SEEN)
    return Experiment(("trains", "sharding", "J"), tuple(rows), measures, ("4",))


def heads(s: Scale) -> Experiment:
    """A ridge head, solved from clients' sums, against heads that train; under frozen features or
    with everything."""
    alone = (*s.features, "--train", "head", "--rounds", f"{max(1, s.head_steps // 4)}")
    whole = (*s.backbone, *rounds(s.local_steps, 4))
    rows = []
    for sharding in ("iid", "nc1"):
        few, split = sharding == "nc1", SHARDINGS[sharding]
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
    return Experiment(("trains", "head", "sharding"), tuple(rows))


def scaffold_mask(s: Scale) -> Experiment:
    """Whether SCAFFOLD still helps under a mask: 20 clients of 5 classes, each drawn often."""
    count = max(1, 4 * s.mask_steps // 8)
    often = ("--clients", "20", "--fraction", "0.25", *SHARDINGS["nc5"])
    options = (*s.backbone, *rounds(8 * count, 8, evaluations=2), *often)
    under = mask("least-sensitive", "0.9", s.images) + (() if s.dense_rates else RAW)
    rows = []
    for (weights, low, more), method in product(
        (("dense", 3e-4, ()), ("masked", 3e-4 if s.dense_rates else 3e-3, under)),
        ("plain", "scaffold"),
    ):
        more = (*["--scaffold"] * (method == "scaffold"), *more)
        rates = (low, rung(low, 1), rung(low, -1))[: s.tries]
        rows.append(Row((weights, method), (*options, *more), rates, s.seeds))
    return Experiment(("weights", "method"), tuple(rows), ACCURACY, ("plain",))


def privacy(s: Scale) -> Experiment:
    """What the noise of client-level privacy costs, by which weights carry it; iid, at the rates
    of the rules without noise."""
    rows = []
    for noise, (rule, share) in product(("0.1", "1"), RUNGS):
        if share in ("0", "0.99"):
            private, name = ("--dp-noise", noise, "--dp-clip", "0.3"), f"dp{noise}-{rule}"
            row = s.masked((noise, rule), "iid", rule, share, *private, name=name)
            rows.append(row._replace(rates=row.rates[:1], widened=0))
    measures = (VALIDATION, TEST, Measure("epsilon", "final/epsilon", digits=1))
    return Experiment(("noise", "rule"), tuple(rows), measures, ("dense",))


def methods(s: Scale) -> Experiment:
    """Every federated method at the same budget of local steps, under a frozen ridge head.

    fedsgd takes one step a round, on all of a client's images.
    """
    count = f"{s.method_rounds}"
    training = (*s.backbone, "--J", "16", "--batch-size", "16", "--fraction", "0.05")
    training += ("--rounds", count, "--eval-every", count)
    rows = []
    for sharding, (method, options) in product(("nc1", "nc5"), METHODS.items()):
        high = rung(1e-4 if sharding == "nc1" else 1e-3, 4 * (method == "fedsgd"))
        rates = (high, rung(high, -1), rung(high, -2))[: s.tries]
        options = (*training, *SHARDINGS[sharding], *options)
        rows.append(Row((sharding, method), options, rates, s.wide_seeds))
    return Experiment(("sharding", "method"), tuple(rows), ACCURACY, ("fedavg",))


BRIEF = (  # in its order, the extension last
    *(centralized, fedavg_iid, heads, heterogeneity, common.rules, common.sparsity),
    *(common.agreement, common.consensus, common.linearity, privacy, scaffold_mask, methods),
)
NAMES = tuple(dict.fromkeys(make.__name__.replace("_", "-") for make in (*BRIEF, *gpu.MAKERS)))


def at_scale(name: str, results: Path = Path("nowhere")) -> dict[str, Experiment]:
    """Return the experiments, by name, at one of SCALES, in the order in which they run.

    Args:
        results: the folder of the scale's runs, where a first table says how large others are.
    """
    s = SCALES[name] or gpu.decided(SIZES[name], results / "image-size")
    makers = BRIEF if SCALES[name] else gpu.MAKERS
    tables = {make.__name__.replace("_", "-"): make(s) for make in makers}
    if name.endswith("smoke"):
        return {name: experiment.thinned() for name, experiment in tables.items()}
    return {name: experiment.limited(s.widened) for name, experiment in tables.items()}
