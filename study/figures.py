"""The report's figures, each from the runs of the experiments that have what it shows.

python -m study.figures draws README's.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import data
from study import maps, plots, relations
from study.history import label, rule_of, sharded, worded
from study.measures import TEST, VALIDATION, Measure
from study.past import Past, read

if TYPE_CHECKING:
    from study.rates import Tried


class Series(NamedTuple):
    """A row of runs that are done: its key and what that has, the runs of its seeds."""

    key: tuple[str, ...]
    columns: tuple[str, ...]
    runs: list[Past]

    @property
    def options(self) -> dict:
        """Return the options of the first of its runs."""
        return self.runs[0].options

    @property
    def sharding(self) -> str:
        """Return how images are spread over its clients, as a figure has it."""
        return sharded(self.runs[0].sharding)

    @property
    def classes(self) -> str:
        """Return the same on an axis of classes per client: iid, 5."""
        name = self.runs[0].sharding
        return name.removeprefix("nc") if name.startswith("nc") else self.sharding

    @property
    def held(self) -> float:
        """Return how many classes a client holds: any, where they are not fixed; mixtures last."""
        mixed = self.options.get("dirichlet") is not None
        return 0 if mixed else self.options["nc"] or np.inf

    def values(self, measure: Measure) -> tuple[float, ...]:
        """Return a figure of its runs."""
        return measure.over(self.runs).values

    def also(self, shown: int) -> str:
        """Return what its key has beside the first columns, which axes and panels show."""
        return worded(self.columns[shown:], self.key[shown:])


PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.csv"
LEAST_SHOWN = 0.005  # of a kind of parameter, the share kept in some layer
CLASSES = "classes per client $N_c$"
UP, DOWN = Measure("MB up", "bytes_up", 1e-6), Measure("MB down", "bytes_down", 1e-6)
FROZEN = {"sparsity": "frozen share", "threshold": "threshold"}  # of a mask's options, in words
TRAINS = {"head": "the head trains", "all": "everything trains"}
USUAL = TRAINS["all"]  # which is no title, alone
OVERLAPS = {
    "ceiling": "one client, two halves of its images",
    "iou": "two clients",
    "chance": "chance",
}
DIAGNOSED = {"distance": "distance", "matched_linearity_error": "linearity error"}
Ran = Mapping[str, list[Series]]  # by experiment: its rows that ran


def drawn(draw: Callable, ran: Ran, path: Path) -> bool:
    """Draw a figure; tell whether there was anything to draw."""
    try:
        draw(ran, path)
    except (ValueError, OSError) as error:
        print(f"{path.name} is not drawn: {error}")
    except (AttributeError, LookupError, TypeError) as error:  # of other contents
        print(f"{path.name} is not drawn: what a run says does not fit ({type(error).__name__})")
    return path.exists()


def draw_curves(name: str, keys: Sequence[str], ran: Ran, path: Path) -> None:
    """Draw logged figures of an experiment over time, a panel for each part that trains.

    Of a split that no run has evaluated on its way those of validation are drawn.
    """
    panels: dict[str, dict] = {}
    rows = ran.get(name, [])
    for row in rows:
        curve = label(row.columns[1:], row.key[1:])
        panels.setdefault(part_of(row.key[0]), {})[curve] = [run.records for run in row.runs]
    logged = {key for row in rows for run in row.runs for r in run.records[1:-1] for key in r}
    keys = [key if key in logged else key.replace("test", "val") for key in keys]
    plots.plot_bands(titled(panels), path, keys)


def draw_heterogeneity(ran: Ran, path: Path) -> None:
    """Draw accuracy against classes per client, for each number of local steps."""
    panels: dict[str, dict] = {}
    rows = sorted(ran.get("heterogeneity", []), key=lambda row: row.held, reverse=True)
    for row in rows:
        group = panels.setdefault(part_of(row.key[0]), {})
        name = ", ".join(filter(None, [f"$J = {row.options['J']:d}$", row.also(3)]))
        group.setdefault(name, {})[row.classes] = row.values(VALIDATION)
    categories = list(dict.fromkeys(row.classes for row in rows))
    relations.plot_grouped(titled(panels), path, CLASSES, categories=categories)


def draw_bytes(ran: Ran, path: Path) -> None:
    """Draw accuracy against all that a run sent, calibration and mask included, by mask rule.

    Dense training is a line; of several configurations each is a point.
    """
    panels: dict[str, dict] = {}
    reference = {}
    rows = ran.get("rules", [])
    dense = [row.sharding for row in rows if rule_of(row.options) == "dense"]
    for row in rows:
        name = ", ".join(filter(None, [rule_of(row.options), row.also(3)]))
        if rule_of(row.options) == "dense" and dense.count(row.sharding) == 1:
            reference[row.sharding] = name, float(np.mean(row.values(VALIDATION)))
        else:
            points = panels.setdefault(row.sharding, {}).setdefault(name, [])
            points.append(
                (np.mean(row.values(UP)) + np.mean(row.values(DOWN)), row.values(VALIDATION))
            )
    relations.plot_against(panels, path, "sent in the whole run (MB)", reference=reference)


def draw_linearity(ran: Ran, path: Path) -> None:
    """Draw accuracy against how far a model moved, and against how linear that is, matched."""
    panels: dict[str, dict] = {}
    for row, (key, what) in itertools.product(ran.get("linearity", []), DIAGNOSED.items()):
        figures = row.values(Measure(what, f"final/{key}"))
        if figures and all(figures):
            point = float(np.mean(figures)), row.values(VALIDATION)
            panel = panels.setdefault(f"{row.sharding}: {what}", {})
            panel[rule_of(row.options)] = [point]
    relations.plot_against(panels, path, None)


def draw_agreement(ran: Ran, path: Path) -> None:
    """Draw how far clients' own masks agree, by classes per client, between chance and noise.

    Calibrations that differ in more than that have a panel each.
    """
    panels: dict[str, dict] = {}
    for row in sorted(ran.get("agreement", []), key=lambda row: row.held, reverse=True):
        for key, what in OVERLAPS.items():
            if values := row.values(Measure(what, f"overlap/{key}")):
                groups = panels.setdefault(row.also(1), {})
                groups.setdefault(what, {})[row.classes] = values
    relations.plot_grouped(panels, path, CLASSES, "IoU of masks")


def draw_groups(ran: Ran, path: Path) -> None:
    """Draw how far two groups of clients agree, against how many clients are in each."""
    panels: dict[str, dict] = {}
    chance: dict[str, list[float]] = {}
    for row in ran.get("agreement", []):
        sizes = row.runs[0].summary["overlap"].get("groups", {})
        measures = [(int(size), Measure(size, f"overlap/groups/{size}")) for size in sizes]
        points = [(size, row.values(measure)) for size, measure in measures]
        panels.setdefault(row.also(1), {})[row.sharding] = points
        chance.setdefault(row.also(1), []).extend(row.values(Measure("chance", "overlap/chance")))
    reference = {title: ("chance", float(np.mean(some))) for title, some in chance.items() if some}
    what = "clients in each of two groups"
    relations.plot_against(panels, path, what, "IoU of masks", reference)


def draw_overlap(ran: Ran, path: Path) -> None:
    """Draw the overlap of every two clients' masks, where clients hold the fewest classes."""
    rows = [r for r in ran.get("agreement", []) if r.runs[0].summary["overlap"].get("matrix")]
    if not rows:
        raise ValueError("no run tells the overlap of every two clients")
    fewest = min(rows, key=lambda row: row.held or np.inf)
    overlap = fewest.runs[0].summary["overlap"]
    figures = dict(chance=overlap["chance"], ceiling=overlap["ceiling"], title=fewest.sharding)
    maps.plot_overlap(np.array(overlap["matrix"]), path, **figures)


def draw_density(ran: Ran, path: Path) -> None:
    """Draw where the first mask keeps entries, of the kinds of which it keeps some share."""
    rows = ran.get("density", ran.get("agreement", []))
    if not rows:
        raise ValueError("no run tells the density of a mask by layer")
    row, options = rows[0], rows[0].options
    density = row.runs[0].summary["density"]
    layers = list(next(iter(density.values())))
    table = {kind: np.array(list(shares.values()), dtype=float) for kind, shares in density.items()}
    shown = {kind: row for kind, row in table.items() if np.nanmax(row) >= LEAST_SHOWN}
    some = [i for i in range(len(layers)) if not all(np.isnan(row[i]) for row in shown.values())]
    by = "sparsity" if options.get("threshold") is None else "threshold"
    title = f"{options['mask_rule']}, {row.sharding}, {FROZEN[by]} {options[by]:g}; "
    title += f"kinds not shown keep less than {100 * LEAST_SHOWN:g} % in every layer"
    shares = np.array(list(shown.values()))[:, some]
    kinds, layers = map(plots.plain, shown), [plots.plain(layers[i]) for i in some]
    maps.plot_density(list(kinds), layers, shares, path, plots.plain(title))


def draw_shards(ran: Ran, path: Path) -> None:
    """Draw who holds how many samples of which class, for up to three shardings of the runs.

    Of runs of several numbers of clients those of the most are drawn.
    """
    rows = [row for row in itertools.chain(*ran.values()) if row.options.get("clients")]
    rows = [row for row in rows if row.options.get("dirichlet") is None]
    if not rows:
        raise ValueError("no run has clients of a fixed number of classes")
    most = max(row.options["clients"] for row in rows)
    shardings = {row.held: row for row in reversed(rows) if row.options["clients"] == most}
    every = sorted(shardings, reverse=True)
    chosen = dict.fromkeys((every[0], every[len(every) // 2], every[-1]))
    counts = {shardings[held].sharding: held_by(shardings[held].options) for held in chosen}
    maps.plot_shards(counts, path)


def held_by(options: dict) -> np.ndarray:
    """Return how many images of each class (columns) each client (rows) of a run holds."""
    labels = data.DATASETS[options["data"]].load(options["data_dir"]).train.labels.numpy()
    seed, cover = options["seed"], options.get("cover", "all") == "all"
    train, _ = data.split_validation(labels, options["val_fraction"], seed)
    parts = data.shard(labels[train], options["clients"], nc=options["nc"], seed=seed, cover=cover)
    classes = labels.max() + 1
    return np.stack([np.bincount(labels[train[part]], minlength=classes) for part in parts])


def part_of(trains: str) -> str:
    """Return what a panel says of the part that trains: all, head or a block."""
    return TRAINS.get(trains, f"{trains} trains")


def titled(panels: dict[str, dict]) -> dict[str, dict]:
    """Return panels by their titles; a single one of the usual kind has none."""
    return {"": panels[USUAL]} if list(panels) == [USUAL] else panels


def reached(folder: Path) -> dict[str, float]:
    """Return the test accuracy, %, that the runs in a folder end with, by classes per client."""
    runs = [read(path.parent) for path in sorted(folder.glob("*/summary.json"))]
    return {run.sharding.removeprefix("nc"): TEST.of(run) for run in runs}


def draw_overview(figures: Mapping[str, float], path: Path) -> None:
    """Draw test accuracy against classes per client, beside what is published."""
    lines = [line for line in PUBLISHED.read_text("utf-8").splitlines() if line[0] != "#"]
    published = {row["clients"]: float(row["test_acc"]) for row in csv.DictReader(lines)}
    order, here = list(published), "here: ViT-Ti/16, trained with labels"
    series = {here: figures, "others, published: ViT-S/16, DINO": published}
    figure, axes = plots.pyplot().subplots(figsize=(5.0, 2.6), layout="constrained")
    for i, (name, values) in enumerate(series.items()):
        x = [order.index(sharding) for sharding in order if sharding in values]
        axes.plot(x, [values[order[at]] for at in x], label=name, **plots.look(i))
        for at in x:
            y, shift = values[order[at]], (-7, -11) if i else (0, 5)
            axes.annotate(f"{y:.1f}", (at, y), shift, textcoords="offset points", ha="center")
    axes.set(xlabel=CLASSES, ylabel="test accuracy (%)", ylim=(66, 92))
    axes.set_xticks(range(len(order)), order)
    axes.margins(x=0.08)
    axes.grid(axis="y")
    axes.legend(loc="lower left")
    plots.save(figure, path)


def draw_rates(rows: Sequence[Tried], path: Path) -> None:
    """Draw the rates that every mask tried, over the one that matches dense training's norm."""
    panels: dict[str, dict] = {}
    for row in rows:
        sharding, rule, frozen, rounds = row.key
        name = f"{rule} {frozen:g}" if frozen else rule
        name += f", {rounds} round{'s' * (rounds > 1)}" if rounds else ""
        unit = row.follows("matched")
        rates = [rate / unit for rate in row.accuracy]
        marks = row.best / unit, row.follows("functional") / unit
        panels.setdefault(sharded(sharding), {})[name] = rates, *marks
    names = "the best rate tried", "the rate of equal functional change", "the rates tried"
    relations.plot_spans(panels, path, "rate / rate of equal update norm", names)


FIGURES = {
    "shards": draw_shards,
    "centralized": functools.partial(draw_curves, "centralized", ("test_loss", "test_acc")),
    "fedavg-iid": functools.partial(draw_curves, "fedavg-iid", ("val_acc",)),
    "heterogeneity": draw_heterogeneity,
    "bytes": draw_bytes,
    "agreement": draw_agreement,
    "groups": draw_groups,
    "overlap": draw_overlap,
    "density": draw_density,
    "linearity": draw_linearity,
}


if __name__ == "__main__":  # python -m study.figures, after a new run in results/gpu
    draw_overview(reached(Path("results/gpu")), Path("docs/accuracy.png"))
