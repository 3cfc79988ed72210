"""The tables that the brief's scales and a GPU's questions share; their sizes say what differs."""

from __future__ import annotations

from study.measures import BYTES, TEST, VALIDATION, Measure
from study.scales import SHARDINGS, Scale, Size
from study.tables import Experiment, Row

ACCURACY = (VALIDATION, TEST, BYTES)
SEEN = tuple(Measure(f"{what} seen", f"seen/{what}", digits=0) for what in ("clients", "classes"))
METHODS = {
    "fedavg": (),
    "fedprox": ("--prox", "0.01"),
    **{name: (f"--{name}",) for name in ("scaffold", "fedir", "fedvc", "local-norm")},
    **{name: ("--server", name) for name in ("fedavgm", "fedadagrad", "fedadam", "fedyogi")},
    "ties": ("--aggregate", "ties"),
    "dare": ("--aggregate", "dare", "--dare-drop", "0.5"),
    "sign": ("--aggregate", "sign"),
    "fedavg-stragglers": ("--straggler-fraction", "0.5"),
    "fednova-stragglers": ("--straggler-fraction", "0.5", "--aggregate", "fednova"),
    "fedsgd": ("--J", "1", "--batch-size", "full"),
}


def rules(s: Scale | Size) -> Experiment:
    """Five mask rules at three sparsities against dense training, after the same local steps."""
    rows = tuple(s.masked(key, *key, *s.beside) for key in s.rules)
    return Experiment(("sharding", "rule", "sparsity"), rows, ACCURACY, ("dense", "0"))


def sparsity(s: Scale | Size) -> Experiment:
    """The least-sensitive rule: sparsity against calibration rounds."""
    rows = []
    for sharding, share, count in s.sparsities:
        more = ("--calibration-rounds", count) if count != "4" else ()  # 4 is the default
        name = f"{sharding}-least-sensitive-{share}" + (f" R={count}" if more else "")
        key = (sharding, share, count)
        rows.append(s.masked(key, sharding, "least-sensitive", share, *more, name=name))
    columns = ("sharding", "sparsity", "calibration rounds")
    return Experiment(columns, tuple(rows), ACCURACY, ("1",), s.folder)


def consensus(s: Scale | Size) -> Experiment:
    """How clients' scores become one mask, and how many clients share the scored images.

    The masks differ little: all rows try the same rates, and none goes on beyond them.
    """
    rows = []
    for sharding, share, rule in s.consensuses:
        more = ("--consensus", rule) if rule != "mean" else ()
        more += ("--calibration-fraction", share) if share != "1" else ()
        name = "-".join([sharding, "least-sensitive-0.9", *more[1::2]])
        key = (sharding, share, rule)
        row = s.masked(key, sharding, "least-sensitive", "0.9", *more, name=name)
        rows.append(row._replace(rates=row.rates[: s.consensus_tries], widened=0))
    columns = ("sharding", "clients that score", "consensus")
    return Experiment(columns, tuple(rows), ACCURACY, ("1", "mean"), s.folder)


def linearity(s: Scale | Size) -> Experiment:
    """How linear and disentangled the moves under each rule are: a rate a rule, or the runs of
    `rules`."""
    measures = (
        VALIDATION,
        Measure("moved", "final/distance"),
        Measure("logits moved", "final/displacement"),
        Measure("linearity error", "final/linearity_error"),
        Measure("the same, matched", "final/matched_linearity_error"),
        Measure("disentanglement error, matched", "final/matched_disentanglement_error"),
    )
    rows = tuple(s.watched(*key) for key in s.rules if key[2] in ("0", "0.9"))
    return Experiment(("sharding", "rule"), rows, measures, folder=s.watched_folder)


def agreement(s: Scale | Size) -> Experiment:
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
    single = (("two clients", "iou"), ("halves of one", "ceiling"), ("chance", "chance"))
    measures = [Measure(f"IoU, {what}", f"overlap/{key}") for what, key in single]
    measures += [Measure(f"IoU, 2 x {m}", f"overlap/groups/{m}") for m in (2, 5, 10, 50)]
    return Experiment(("sharding",), rows, tuple(measures))
