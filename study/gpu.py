"""Questions for a GPU, minutes at a time: tables in the order in which its first hours say most.

    at_size(SIZES["gpu"], Path("results/gpu"))    name -> Experiment

Everything trains unless a row says otherwise, under one frozen ridge head, on a cosine schedule of
the same length. The tables of masks use the smallest image size that ends within NEAR points of the
largest, as the first table measures. Rates are those of dense training: what they are multiplied by
under a mask is --mask-lr's default.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

from centralized import SCHEDULES
from masks import RULES, needs_scores
from study.measures import BYTES, SECONDS, TEST, VALIDATION, Measure
from study.tables import WIDENED, Experiment, Row, around, rung

NEAR = 3.0  # points of validation accuracy
SHARDINGS = {
    n: () if n == "iid" else ("--nc", n[2:]) for n in ("iid", "nc50", "nc10", "nc5", "nc1")
}
DENSE = {"iid": 1e-2, "nc50": 1e-2, "nc10": 1e-2, "nc5": 1e-2, "nc1": 1e-3}  # rates to begin with
ACCURACY = (VALIDATION, TEST, BYTES)
SEEN = tuple(Measure(f"{what} seen", f"seen/{what}", digits=0) for what in ("clients", "classes"))
METHODS = {
    "fedavg": (),
    "fedprox": ("--prox", "0.01"),
    "scaffold": ("--scaffold",),
    "fedir": ("--fedir",),
    "fedvc": ("--fedvc",),
    "local-norm": ("--local-norm",),
    "fedavgm": ("--server", "fedavgm"),
    "fedadagrad": ("--server", "fedadagrad"),
    "fedadam": ("--server", "fedadam"),
    "fedyogi": ("--server", "fedyogi"),
    "ties": ("--aggregate", "ties"),
    "dare": ("--aggregate", "dare", "--dare-drop", "0.5"),
    "sign": ("--aggregate", "sign"),
    "fedavg-stragglers": ("--straggler-fraction", "0.5"),
    "fednova-stragglers": ("--straggler-fraction", "0.5", "--aggregate", "fednova"),
    "fedsgd": ("--J", "1", "--batch-size", "full"),
}
QUERY_KEY = ("query.weight", "key.weight")
MATTER = ("patch.*", "norm*", "query.*", "key.weight", "value.*", "proj.*", "fc*")  # see `scope`


class Size(NamedTuple):
    """The sizes of the questions: all that differs between a GPU's and a trial of them."""

    backbone: tuple[str, ...]  # model, data and batch
    image_sizes: tuple[int, ...]  # pixels a side, ascending
    steps: int  # J x rounds
    epochs: int
    last_blocks: str  # those that train alone
    images: int  # scored in a calibration round
    agreement_images: int  # scored where clients' masks are compared
    method_rounds: int
    tries: int
    seeds: tuple[int, ...]
    widened: int = WIDENED  # rates that a row may try beyond its own


TI = ("--model", "vit_ti16", "--weights", "data/vit_tiny_patch16_224.pth", "--batch-size", "64")
GPU = Size(TI, (112, 128, 160, 224), 400, 10, "blocks.8", 1000, 2000, 200, 3, (0, 1, 2))
SIZES = {
    "gpu": GPU,
    "gpu-dino": GPU._replace(backbone=("--batch-size", "64")),  # where a user has its weights
    "gpu-64px": Size(  # the same on two cores, forty short rounds
        (*TI[:-2], "--threads", "1", "--batch-size", "16"),
        *((64,), 160, 1, "blocks.8", 500, 2000, 40, 3, (0, 1, 2)),
    ),
    "gpu-smoke": Size(
        ("--data", "synthetic", "--threads", "1", "--batch-size", "8"),
        *((16, 32), 80, 1, "blocks.1", 100, 400, 1, 1, (0,)),
    ),
}


def training(s: Size, pixels: int, sharding: str, J: int = 4, share: float = 1) -> tuple[str, ...]:
    """Return the options of a federated run of a share of all steps, evaluated twice."""
    count = max(1, round(share * s.steps) // J)
    length = ("--J", f"{J}", "--rounds", f"{count}", "--eval-every", f"{-(-count // 2)}")
    cosine = ("--schedule", "cosine", "--head", "ridge", "--image-size", f"{pixels}")
    return (*s.backbone, *cosine, *length, *SHARDINGS[sharding])


def mask(s: Size, rule: str, sparsity: str, *more: str) -> tuple[str, ...]:
    """Return the options of a mask; none of dense training."""
    if rule == "dense":
        return more
    images = ("--calibration-images", f"{s.images}") if needs_scores(rule) else ()
    return ("--mask-rule", rule, "--sparsity", sparsity, *images, *more)


def masked(s: Size, pixels: int, key: tuple, sharding: str, rule: str, sparsity: str, *more) -> Row:
    """Return the row of a mask, or of dense training, at the rates of its sharding."""
    options = (*training(s, pixels, sharding), *mask(s, rule, sparsity, *more))
    name = "-".join((*key, f"{pixels}px")).replace(", ", "-")
    return Row(key, options, around(DENSE[sharding], s.tries), s.seeds, name=name)


# ------------------------------------------------------------------------------- what comes first


def image_size(s: Size, pixels: int) -> Experiment:
    """How small images may be: dense training at N_c = 5 and one rate, all at equal rounds."""
    rows = tuple(
        Row((f"{size}",), training(s, size, "nc5"), (DENSE["nc5"],), s.seeds[:1], widened=0)
        for size in reversed(s.image_sizes)
    )
    measures = (VALIDATION, TEST, SECONDS)
    title = "Image sizes at equal rounds, N_c = 5"
    return Experiment(title, ("pixels",), rows, measures, (f"{s.image_sizes[-1]}",), decides=True)


def decided(s: Size, folder: Path) -> int:
    """Return the smallest image size that ends near the largest; the largest until all have run."""
    experiment = image_size(s, 0)
    best = [experiment.best(folder, row) for row in experiment.rows]
    if None in best:
        return s.image_sizes[-1]
    accuracies = [VALIDATION.of(runs[s.seeds[0]]) for _, runs in best]
    pairs = zip(reversed(s.image_sizes), accuracies, strict=True)
    return min(size for size, accuracy in pairs if accuracy >= accuracies[0] - NEAR)


def rates(s: Size, pixels: int) -> Experiment:
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
        row = masked(s, pixels, (rule, share, follows), "nc5", rule, share, *more)
        rows.append(row._replace(rates=tries[: s.tries + 1], seeds=s.seeds[:1]))
    title = "Rates around those that follow a mask, N_c = 5"
    return Experiment(title, ("rule", "sparsity", "rate"), tuple(rows), ACCURACY)


def heterogeneity(s: Size, pixels: int) -> Experiment:
    """Classes a client against local steps, under one head, schedule and number of steps."""
    rows = tuple(
        Row(
            ("all", sharding, f"{J}"),
            training(s, s.image_sizes[-1], sharding, J),
            around(DENSE[sharding], s.tries),
            s.seeds,
            name=f"all-{sharding}-J{J}",
        )
        for J, sharding in product((4, 8, 16), SHARDINGS)
    )
    title = "Classes per client against local steps, at equal J x rounds"
    columns = ("trains", "sharding", "J")
    return Experiment(title, columns, rows, (VALIDATION, TEST, *SEEN), ("4",))


def query_key(s: Size, pixels: int) -> Experiment:
    """Whether it is their insensitivity, or that least sensitive weights are query and key weights.

    All masks keep a tenth of the backbone; N_c = 5.
    """
    rows = [masked(s, pixels, ("dense", "everywhere"), "nc5", "dense", "0")]
    for rule, where in product(("least-sensitive", "random"), ("everywhere", "query, key")):
        more = ("--mask-within", *QUERY_KEY) if where != "everywhere" else ()
        rows.append(masked(s, pixels, (rule, where), "nc5", rule, "0.9", *more))
    title = "Sensitivity, or query and key weights? Frozen share 0.9, N_c = 5"
    return Experiment(title, ("rule", "within"), tuple(rows), ACCURACY, ("dense", "everywhere"))


# ------------------------------------------------------------------------------------------ masks


def rules(s: Size, pixels: int) -> Experiment:
    """Five mask rules at three sparsities against dense training, on three shardings."""
    keys = (("dense", "0"), *product(RULES, ("0.5", "0.9", "0.99")))
    rows = tuple(
        masked(s, pixels, (sharding, *key), sharding, *key, "--diagnostics")
        for key, sharding in product(keys, ("nc5", "iid", "nc1"))
    )
    columns = ("sharding", "rule", "sparsity")
    return Experiment("Mask rules", columns, rows, ACCURACY, ("dense", "0"))


def linearity(s: Size, pixels: int) -> Experiment:
    """How linear and disentangled the moves under each rule are: the runs of `rules`."""
    rows = tuple(
        row._replace(key=row.key[:2]) for row in rules(s, pixels).rows if row.key[2] in ("0", "0.9")
    )
    title = "Linearity and interference under the mask rules, sparsity 0.9"
    return Experiment(title, ("sharding", "rule"), rows, LINEARITY, folder="rules")


LINEARITY = (
    VALIDATION,
    Measure("moved", "final/distance"),
    Measure("logits moved", "final/displacement"),
    Measure("linearity error", "final/linearity_error"),
    Measure("the same, matched", "final/matched_linearity_error"),
    Measure("disentanglement error, matched", "final/matched_disentanglement_error"),
)


def sparsity(s: Size, pixels: int) -> Experiment:
    """The least-sensitive rule: sparsity against calibration rounds, N_c = 5."""
    rows = tuple(
        masked(
            *(s, pixels, ("nc5", share, count), "nc5", "least-sensitive", share),
            *("--calibration-rounds", count),
        )
        for share, count in product(("0.9", "0.99", "0.5"), "1248")
    )
    title = "Least-sensitive weights: sparsity and calibration rounds"
    return Experiment(title, ("sharding", "sparsity", "calibration rounds"), rows, ACCURACY, ("1",))


def scope(s: Size, pixels: int) -> Experiment:
    """What a budget buys without class token, positions and key biases, N_c = 5.

    A key bias adds the same to all of a query's products, which the softmax takes away: its
    sensitivity is 0, and least-sensitive masks spend entries on it.
    """
    rows = []
    for share, where in product(("0.99", "0.9"), ("everything", "what matters")):
        more = ("--mask-within", *MATTER) if where != "everything" else ()
        key = (share, where)
        rows.append(masked(s, pixels, key, "nc5", "least-sensitive", share, *more))
    title = "Least-sensitive weights with and without class token, positions and key biases"
    return Experiment(title, ("sparsity", "of"), tuple(rows), ACCURACY, ("everything",))


def frontier(s: Size, pixels: int) -> Experiment:
    """Accuracy against bytes, calibration and mask included, N_c = 5."""
    base = training(s, pixels, "nc5")
    ways = {
        "dense": base,
        "dense, a fifth of the rounds": training(s, pixels, "nc5", share=0.2),
        "dense, a tenth of the rounds": training(s, pixels, "nc5", share=0.1),
        **{
            f"{rule} {share}": (*base, *mask(s, rule, share))
            for rule, share in product(
                ("least-sensitive", "lowest-magnitude", "random"), ("0.9", "0.99")
            )
        },
        "biases and norms": (*base, *mask(s, "random", "0", "--mask-scope", "*.bias", "*norm*")),
        "last blocks": (*base, "--train", s.last_blocks),
        "head": (*base, "--train", "head"),
    }
    tries = around(DENSE["nc5"], s.tries)
    rows = tuple(
        Row((way,), options, tries, s.seeds, name=f"{way.replace(', ', '-')}-{pixels}px")
        for way, options in ways.items()
    )
    sent = (Measure("MB up", "bytes_up", 1e-6, 1), Measure("MB down", "bytes_down", 1e-6, 1))
    title = "Accuracy against bytes, N_c = 5"
    return Experiment(title, ("trains",), rows, (VALIDATION, TEST, *sent), ("dense",))


# --------------------------------------------------------------------------------------- the rest


def centralized(s: Size, pixels: int) -> Experiment:
    """Schedules, central, to the plateau."""
    size = ("--image-size", f"{s.image_sizes[-1]}", "--epochs", f"{s.epochs}", "--eval-every", "1")
    rows = tuple(
        Row(
            ("all", schedule, "0.0005"),
            (*s.backbone, *size, "--schedule", schedule, "--weight-decay", "0.0005"),
            around(3e-3, s.tries),
            s.seeds[:1],
            "centralized",
        )
        for schedule in SCHEDULES
    )
    plateau = Measure("test loss", "final/test_loss"), Measure("best epoch", BEST_EPOCH, digits=0)
    title = "Central SGD with momentum, to the plateau"
    columns = ("trains", "schedule", "weight decay")
    return Experiment(title, columns, rows, (VALIDATION, TEST, *plateau))


BEST_EPOCH = "best_by_validation/epoch"


def cheaper_rounds(s: Size, pixels: int) -> Experiment:
    """Fewer patches in more rounds of about as many operations, and their seconds; N_c = 5."""
    largest = s.image_sizes[-1]
    ways = {f"{largest} px": training(s, largest, "nc5")}
    half = training(s, largest, "nc5", share=2)
    ways["half of the patches"] = (*half, "--keep-tokens", "0.5")
    for size in s.image_sizes[:-1]:
        ways[f"{size} px"] = training(s, size, "nc5", share=(largest / size) ** 2)
    tries = around(DENSE["nc5"], s.tries)
    rows = tuple(Row((way,), options, tries, s.seeds[:1]) for way, options in ways.items())
    measures = (VALIDATION, TEST, Measure("rounds", "round", digits=0), SECONDS)
    title = "Cheaper rounds, and more of them, N_c = 5"
    return Experiment(title, ("images",), rows, measures, (f"{largest} px",))


def consensus(s: Size, pixels: int) -> Experiment:
    """One client's mask, a tenth of the clients', or all clients', N_c = 5."""
    rows = tuple(
        masked(
            *(s, pixels, ("nc5", share, "mean"), "nc5", "least-sensitive", "0.9"),
            *("--calibration-fraction", share),
        )
        for share in ("1", "0.1", "0.01")
    )
    columns = ("sharding", "clients that score", "consensus")
    return Experiment("Calibrating clients", columns, rows, ACCURACY, ("1", "mean"))


def scaffold_mask(s: Size, pixels: int) -> Experiment:
    """Whether SCAFFOLD helps under a mask: 20 clients of 5 classes, each drawn often."""
    often = ("--clients", "20", "--fraction", "0.25")
    rows = tuple(
        masked(
            *(s, pixels, (weights, method), "nc5"),
            *(("dense", "0") if weights == "dense" else ("least-sensitive", "0.9")),
            *(*often, *["--scaffold"] * (method == "scaffold")),
        )
        for weights, method in product(("dense", "masked"), ("plain", "scaffold"))
    )
    title = "SCAFFOLD with and without a mask, N_c = 5, K = 20"
    return Experiment(title, ("weights", "method"), rows, ACCURACY, ("plain",))


def methods(s: Size, pixels: int) -> Experiment:
    """Every federated method over the same rounds, N_c = 5; fedsgd takes one step a round."""
    share = 4 * s.method_rounds / s.steps
    rows = tuple(
        Row(
            ("nc5", method),
            (*training(s, pixels, "nc5", share=share), *options),
            around(rung(DENSE["nc5"], 4 * (method == "fedsgd")), s.tries),
            s.seeds[:1],
            name=f"nc5-{method}-{pixels}px",
        )
        for method, options in METHODS.items()
    )
    return Experiment("Federated methods", ("sharding", "method"), rows, ACCURACY, ("fedavg",))


MAKERS = (
    *(image_size, rates, heterogeneity, query_key, rules, sparsity, scope, frontier, centralized),
    *(cheaper_rounds, consensus, linearity, scaffold_mask, methods),
)


def at_size(s: Size, results: Path) -> dict[str, Experiment]:
    """Return the experiments by name, in their order.

    Args:
        results: the folder of their runs, which says what image size the tables of masks have.
    """
    pixels = decided(s, results / name_of(image_size))
    return {name_of(make): make(s, pixels) for make in MAKERS}


def name_of(make) -> str:
    """Return an experiment's name."""
    return make.__name__.replace("_", "-")
