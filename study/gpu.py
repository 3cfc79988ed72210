"""Questions for a GPU, minutes at a time: tables in the order in which its first hours say most.

    at_scale("gpu", Path("results/gpu"))    name -> Experiment (study/experiments.py)

Everything trains unless a row says otherwise, under one frozen ridge head, on a cosine schedule of
the same length. The tables of masks use the smallest image size that ends within NEAR points of the
largest, as the first table measures. Rates are those of dense training: what they are multiplied by
under a mask is --mask-lr's default.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from centralized import SCHEDULES
from masks import RULES
from study import common
from study.common import ACCURACY, METHODS, SEEN
from study.measures import SECONDS, TEST, VALIDATION, Measure
from study.scales import DENSE, SHARDINGS, Size, mask
from study.tables import Experiment, Row, around, rung

NEAR = 3.0  # points of validation accuracy
QUERY_KEY = ("query.weight", "key.weight")
ELSEWHERE = ("patch.*", "norm*", "value.*", "proj.*", "fc*")
MATTER = ("patch.*", "norm*", "query.*", "key.weight", "value.*", "proj.*", "fc*")  # see `scope`


# ------------------------------------------------------------------------------- what comes first


def image_size(s: Size) -> Experiment:
    """How small images may be: dense training at N_c = 5 and one rate, all at equal rounds."""
    rows = tuple(
        Row((f"{size}",), s.training("nc5", size), (DENSE["nc5"],), s.seeds[:1], widened=0)
        for size in reversed(s.image_sizes)
    )
    measures = (VALIDATION, TEST, SECONDS)
    return Experiment(("pixels",), rows, measures, (f"{s.image_sizes[-1]}",), decides=True)


def decided(s: Size, folder: Path) -> Size:
    """Return the sizes with the smallest image size that ends near the largest.

    That is the largest until all have run.
    """
    experiment = image_size(s)._replace(at=folder)
    best = [experiment.best(row) for row in experiment.rows]
    if None in best:
        return s._replace(pixels=s.image_sizes[-1])
    accuracies = [VALIDATION.of(runs[s.seeds[0]]) for _, runs in best]
    pairs = zip(reversed(s.image_sizes), accuracies, strict=True)
    near = (size for size, accuracy in pairs if accuracy >= accuracies[0] - NEAR)
    return s._replace(pixels=min(near))


def rates(s: Size) -> Experiment:
    """Whether one factor of the matched rate is best for every mask: N_c = 5.

    matched: the norm of an update is dense training's; functional: its change of the loss is.
    """
    tries = around(DENSE["nc5"], 3) + (rung(DENSE["nc5"], 2),)
    rows = []
    for rule, follows in (
        ("dense", "itself"),
        *(("random", "matched"), ("least-sensitive", "matched"), ("least-sensitive", "functional")),
    ):
        share = "0" if rule == "dense" else "0.9"
        more = ("--mask-lr", follows) if follows == "functional" else ()
        row = s.masked((rule, share, follows), "nc5", rule, share, *more)
        rows.append(row._replace(rates=tries[: s.tries + 1], seeds=s.seeds[:1]))
    return Experiment(("rule", "sparsity", "rate"), tuple(rows), ACCURACY)


def heterogeneity(s: Size) -> Experiment:
    """Classes a client against local steps, under one head, schedule and number of steps."""
    rows = []
    for J, sharding in product((4, 8, 16), SHARDINGS):
        options = s.training(sharding, s.image_sizes[-1], J)
        row = s.row(("all", sharding, f"{J}"), options, DENSE[sharding])
        rows.append(row._replace(name=f"all-{sharding}-J{J}"))
    columns = ("trains", "sharding", "J")
    return Experiment(columns, tuple(rows), (VALIDATION, TEST, *SEEN), ("4",))


def query_key(s: Size) -> Experiment:
    """What a tenth of the backbone is worth by every rule, everywhere and within query and key.

    Least sensitive weights lie there: does their insensitivity count, or their place? Masks of a
    tenth within these overlap, as they are most of them; elsewhere they need not. A tenth of every
    tensor keeps the rule and spreads the place. N_c = 5.
    """
    rows = [s.masked(("dense", "everywhere"), "nc5", "dense", "0")]
    rows += [s.masked((rule, "everywhere"), "nc5", rule, "0.9") for rule in RULES]
    for where, kinds in (("query, key", QUERY_KEY), ("elsewhere", ELSEWHERE)):
        for rule in ("least-sensitive", "most-sensitive", "random"):
            rows.append(s.masked((rule, where), "nc5", rule, "0.9", "--mask-within", *kinds))
    key, once = "everywhere, one calibration round", ("--calibration-rounds", "1")
    row = s.masked(("least-sensitive", key), "nc5", "least-sensitive", "0.9", *once)
    rows.append(row._replace(key=("least-sensitive", "everywhere, R = 1")))
    for rule in ("least-sensitive", "most-sensitive"):
        rows.append(s.masked((rule, "every tensor"), "nc5", rule, "0.9", "--per-tensor"))
    return Experiment(("rule", "within"), tuple(rows), ACCURACY, ("dense", "everywhere"))


def query_key_iid(s: Size) -> Experiment:
    """Whether it is the place for iid clients, too."""
    rows = [
        s.masked((rule, where), "iid", rule, "0" if rule == "dense" else "0.9", *within)
        for rule, where, within in (
            ("dense", "everywhere", ()),
            ("least-sensitive", "everywhere", ()),
            ("least-sensitive", "elsewhere", ("--mask-within", *ELSEWHERE)),
            ("random", "elsewhere", ("--mask-within", *ELSEWHERE)),
        )
    ]
    return Experiment(("rule", "within"), tuple(rows), ACCURACY, ("dense", "everywhere"))


# ------------------------------------------------------------------------------------------ masks


def scope(s: Size) -> Experiment:
    """What a budget buys without class token, positions and key biases, N_c = 5.

    A key bias adds the same to all of a query's products, which the softmax takes away: its
    sensitivity is 0, and least-sensitive masks spend entries on it.
    """
    within = {"everything": (), "what matters": ("--mask-within", *MATTER)}
    rows = tuple(
        s.masked((share, where), "nc5", "least-sensitive", share, *within[where])
        for share, where in product(("0.99", "0.9"), within)
    )
    return Experiment(("sparsity", "of"), rows, ACCURACY, ("everything",))


def frontier(s: Size) -> Experiment:
    """Accuracy against bytes, calibration and mask included, N_c = 5."""
    base = s.training("nc5")
    ways = {
        "dense": base,
        "dense, a fifth of the rounds": s.training("nc5", share=0.2),
        "dense, a tenth of the rounds": s.training("nc5", share=0.1),
        **{
            f"{rule} {share}": (*base, *mask(rule, share, s.images))
            for rule in ("least-sensitive", "lowest-magnitude", "random")
            for share in ("0.9", "0.99")
        },
        "biases and norms": (*base, *mask("random", "0", 0), "--mask-scope", "*.bias", "*norm*"),
        "last blocks": (*base, "--train", s.last_blocks),
        "head": (*base, "--train", "head"),
    }
    rows = tuple(s.row((way,), options) for way, options in ways.items())
    sent = (Measure("MB up", "bytes_up", 1e-6, 1), Measure("MB down", "bytes_down", 1e-6, 1))
    return Experiment(("trains",), rows, (VALIDATION, TEST, *sent), ("dense",))


# --------------------------------------------------------------------------------------- the rest


def centralized(s: Size) -> Experiment:
    """Schedules, central, to the plateau."""
    size = ("--image-size", f"{s.image_sizes[-1]}", "--epochs", f"{s.epochs}", "--eval-every", "1")
    options, decay, rates = (*s.backbone, *size), "0.0005", around(3e-3, s.tries)
    rows = []
    for schedule in SCHEDULES:
        words = (*options, "--schedule", schedule, "--weight-decay", decay)
        rows.append(Row(("all", schedule, decay), words, rates, s.seeds[:1], "centralized"))
    loss = Measure("test loss", "final/test_loss")
    measures = (VALIDATION, TEST, loss, Measure("best epoch", "best_by_validation/epoch", digits=0))
    return Experiment(("trains", "schedule", "weight decay"), tuple(rows), measures)


def cheaper_rounds(s: Size) -> Experiment:
    """Fewer patches in more rounds of about as many operations, and their seconds; N_c = 5."""
    largest = s.image_sizes[-1]
    ways = {f"{largest} px": s.training("nc5", largest)}
    half = s.training("nc5", largest, share=2)
    ways["half of the patches"] = (*half, "--keep-tokens", "0.5")
    for size in s.image_sizes[:-1]:
        ways[f"{size} px"] = s.training("nc5", size, share=(largest / size) ** 2)
    tries = around(DENSE["nc5"], s.tries)
    rows = tuple(Row((way,), options, tries, s.seeds[:1]) for way, options in ways.items())
    measures = (VALIDATION, TEST, Measure("rounds", "round", digits=0), SECONDS)
    return Experiment(("images",), rows, measures, (f"{largest} px",))


def scaffold_mask(s: Size) -> Experiment:
    """Whether SCAFFOLD helps under a mask: 20 clients of 5 classes, each drawn often."""
    often, under = ("--clients", "20", "--fraction", "0.25"), {"masked": ("least-sensitive", "0.9")}
    rows = tuple(
        s.masked((weights, method), "nc5", *under.get(weights, ("dense", "0")), *often, *more)
        for weights in ("dense", "masked")
        for method, more in (("plain", ()), ("scaffold", ("--scaffold",)))
    )
    return Experiment(("weights", "method"), rows, ACCURACY, ("plain",))


def methods(s: Size) -> Experiment:
    """Every federated method over the same rounds, N_c = 5; fedsgd takes one step a round."""
    share = 4 * s.method_rounds / s.steps
    rows = []
    for method, options in METHODS.items():
        rate = rung(DENSE["nc5"], 4 * (method == "fedsgd"))
        row = s.row(("nc5", method), (*s.training("nc5", share=share), *options), rate)
        rows.append(row._replace(seeds=s.seeds[:1]))
    return Experiment(("sharding", "method"), tuple(rows), ACCURACY, ("fedavg",))


MAKERS = (
    *(image_size, rates, heterogeneity, query_key, query_key_iid, common.rules, common.sparsity),
    *(scope, frontier, centralized, cheaper_rounds, common.consensus, common.linearity),
    *(scaffold_mask, methods, common.agreement),
)
