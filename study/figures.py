"""The report's figures, each from the runs of the experiments that have what it shows.

python -m study.figures draws README's.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import data
from study import maps, plots
from study.history import rule_of

if TYPE_CHECKING:
    from study.rates import Tried


class Done(NamedTuple):
    """A run that is done: the key of its row, its options, summary and log; what else tells it."""

    key: tuple[str, ...]
    options: dict
    summary: dict
    records: list[dict]
    also: str = ""


PUBLISHED = {"iid": 83.9, "50": 83.8, "10": 82.6, "5": 81.3, "1": 70.4}  # test %, DINO's ViT-S/16:
# the best that other projects of this setting report (K = 100, C = 0.1, J = 4)
CLIENTS = 100  # of the shardings that are drawn
LEAST_SHOWN = 0.005  # of a kind of parameter, the share kept in some layer
TRAINS = {"head": "the head trains", "all": "everything trains"}
OVERLAPS = {
    "ceiling": "one client, two halves of its images",
    "iou": "two clients",
    "chance": "chance",
}
DIAGNOSED = {"distance": "distance", "matched_linearity_error": "linearity error"}
Ran = dict[str, list[list[Done]]]  # by experiment: its rows that ran, each a run a seed


def drawn(draw: Callable, ran: Ran, path: Path) -> bool:
    """Draw a figure; tell whether there was anything to draw."""
    try:
        draw(ran, path)
    except (ValueError, OSError) as error:
        print(f"{path.name} is not drawn: {error}")
    except (
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # a summary or a log of other contents
        print(f"{path.name} is not drawn: what a run says does not fit ({type(error).__name__})")
    return path.exists()


def draw_curves(name: str, keys: Sequence[str], ran: Ran, path: Path) -> None:
    """Draw logged figures of an experiment over time, a panel for each part that trains.

    Of a split that no run has evaluated on its way those of validation are drawn.
    """
    panels: dict[str, dict] = {}
    for done in ran.get(name, []):
        trains, *rest = done[0].key
        panels.setdefault(part_of(trains), {})[", ".join(rest)] = [run.records for run in done]
    records = [r for done in ran.get(name, []) for run in done for r in run.records[1:-1]]
    logged = {key for record in records for key in record}
    keys = [key if key in logged else key.replace("test", "val") for key in keys]
    plots.plot_bands(panels, path, keys)


def draw_heterogeneity(ran: Ran, path: Path) -> None:
    """Draw accuracy against classes per client, for each number of local steps."""
    panels: dict[str, dict] = {}
    rows = sorted(ran.get("heterogeneity", []), key=classes_held, reverse=True)
    for done in rows:
        group = panels.setdefault(part_of(done[0].key[0]), {})
        values = group.setdefault(f"$J$ = {done[0].options['J']:d}{also(done)}", {})
        values[sharding(done[0], "")] = [accuracy(run) for run in done]
    plots.plot_grouped(
        panels,
        path,
        "classes per client $N_c$",
        categories=list(dict.fromkeys(sharding(done[0], "") for done in rows)),
    )


def also(done: list[Done]) -> str:
    """Return what a label adds of a row that other options tell apart, too."""
    return f", {plots.plain(done[0].also)}" if done[0].also else ""


def classes_held(done: list[Done]) -> float:
    """Return how many classes a client of a row holds: any, where they are not fixed."""
    return done[0].options["nc"] or np.inf


def draw_bytes(ran: Ran, path: Path) -> None:
    """Draw accuracy against all that a run sent, calibration and mask included, by mask rule.

    Dense training is a line; of several configurations each is a point.
    """
    panels: dict[str, dict] = {}
    reference = {}
    rows = ran.get("rules", [])
    dense = [sharding(done[0]) for done in rows if rule_of(done[0].options) == "dense"]
    for done in rows:
        values = [accuracy(run) for run in done]
        sent = [run.summary["bytes_up"] + run.summary["bytes_down"] for run in done]
        panel, rule = sharding(done[0]), rule_of(done[0].options)
        if rule == "dense" and dense.count(panel) == 1:
            reference[panel] = f"dense{also(done)}", float(np.mean(values))
        else:
            points = panels.setdefault(panel, {}).setdefault(plots.plain(rule) + also(done), [])
            points.append((float(np.mean(sent)) / 1e6, values))
    plots.plot_against(panels, path, "sent in the whole run (MB)", reference=reference)


def draw_linearity(ran: Ran, path: Path) -> None:
    """Draw accuracy against how far a model moved, and against how linear that is, matched."""
    panels: dict[str, dict] = {}
    for done, (key, what) in itertools.product(ran.get("linearity", []), DIAGNOSED.items()):
        figures = [run.summary["final"].get(key) for run in done]
        if all(figures):
            rule = rule_of(done[0].options)
            point = float(np.mean(figures)), [accuracy(run) for run in done]
            panels.setdefault(f"{sharding(done[0])}: {what}", {})[plots.plain(rule)] = [point]
    plots.plot_against(panels, path, None)


def draw_agreement(ran: Ran, path: Path) -> None:
    """Draw how far clients' own masks agree, by classes per client, between chance and noise."""
    groups: dict[str, dict] = {}
    for done in ran.get("agreement", []):
        overlaps = [run.summary["overlap"] for run in done]
        for key, what in OVERLAPS.items():
            if values := [o[key] for o in overlaps if o.get(key) is not None]:
                groups.setdefault(what, {})[sharding(done[0], "")] = values
    plots.plot_grouped({"": groups}, path, "classes per client $N_c$", "IoU of masks")


def draw_groups(ran: Ran, path: Path) -> None:
    """Draw how far two groups of clients agree, against how many clients are in each."""
    lines: dict[str, list] = {}
    chance: list[float] = []
    for done in ran.get("agreement", []):
        overlaps = [run.summary["overlap"] for run in done]
        chance += [overlap["chance"] for overlap in overlaps if overlap]
        for size in overlaps[0].get("groups", {}):
            values = [overlap["groups"][size] for overlap in overlaps]
            lines.setdefault(sharding(done[0]), []).append((int(size), values))
    reference = {"": ("chance", float(np.mean(chance)))} if chance else None
    label = "clients in each of two groups"
    plots.plot_against({"": lines}, path, label, "IoU of masks", reference)


def draw_overlap(ran: Ran, path: Path) -> None:
    """Draw the overlap of every two clients' masks, where clients hold the fewest classes."""
    compared = [
        done[0] for done in ran.get("agreement", []) if done[0].summary["overlap"].get("matrix")
    ]
    if not compared:
        raise ValueError("no run tells the overlap of every two clients")
    fewest = min(compared, key=lambda run: run.options["nc"] or np.inf)
    overlap = fewest.summary["overlap"]
    chance, ceiling = overlap["chance"], overlap["ceiling"]
    matrix = np.array(overlap["matrix"])
    maps.plot_overlap(matrix, path, chance=chance, ceiling=ceiling, title=sharding(fewest))


def draw_density(ran: Ran, path: Path) -> None:
    """Draw where the first mask keeps entries, of the kinds of which it keeps some share."""
    first = [done[0] for done in ran.get("agreement", [])]
    if not first:
        raise ValueError("no run tells the density of a mask by layer")
    density, options = first[0].summary["density"], first[0].options
    layers = list(next(iter(density.values())))
    table = {kind: np.array(list(row.values()), dtype=float) for kind, row in density.items()}
    shown = {kind: row for kind, row in table.items() if np.nanmax(row) >= LEAST_SHOWN}
    some = [i for i in range(len(layers)) if not all(np.isnan(row[i]) for row in shown.values())]
    title = f"{plots.plain(options['mask_rule'])}, {sharding(first[0])}, "
    title += f"frozen share {options['sparsity']:g}; "
    title += f"kinds not shown keep less than {100 * LEAST_SHOWN:g} % in every layer"
    shares = np.array(list(shown.values()))[:, some]
    kinds, layers = map(plots.plain, shown), [plots.plain(layers[i]) for i in some]
    maps.plot_density(list(kinds), layers, shares, path, title)


def draw_shards(ran: Ran, path: Path) -> None:
    """Draw who holds how many samples of which class, for up to three shardings of the runs."""
    shardings = {}
    for done in itertools.chain(*ran.values()):
        fixed = done[0].options.get("dirichlet") is None
        if done[0].options.get("clients") == CLIENTS and fixed:
            shardings.setdefault(done[0].options["nc"] or np.inf, done[0])
    if not shardings:
        raise ValueError(f"no run has {CLIENTS} clients")
    every = sorted(shardings, reverse=True)
    chosen = dict.fromkeys((every[0], every[len(every) // 2], every[-1]))
    counts = {}
    for nc in chosen:
        options = shardings[nc].options
        labels = data.DATASETS[options["data"]].load(options["data_dir"]).train.labels.numpy()
        seed = options["seed"]
        train, _ = data.split_validation(labels, options["val_fraction"], seed)
        nc, cover = options["nc"], options.get("cover", "all") == "all"
        parts = data.shard(labels[train], options["clients"], nc=nc, seed=seed, cover=cover)
        counts[f"$N_c$ = {nc}" if nc else "iid"] = np.stack(
            [np.bincount(labels[train[part]], minlength=labels.max() + 1) for part in parts]
        )
    maps.plot_shards(counts, path)


def part_of(trains: str) -> str:
    """Return what a panel says of the part that trains: all, head or a block."""
    return TRAINS.get(trains, f"{trains} trains")


def reached(folder: Path) -> dict[str, float]:
    """Return the test accuracy, %, that the runs in a folder end with, by classes per client."""
    figures = {}
    for path in sorted(folder.glob("*/summary.json")):
        options = json.loads(path.with_name("config.json").read_text())["options"]
        sharding = str(options["nc"] or "iid")
        figures[sharding] = 100 * json.loads(path.read_text())["final"]["test_acc"]
    return figures


def draw_overview(figures: Mapping[str, float], path: Path) -> None:
    """Draw test accuracy against classes per client, beside what is published."""
    order = list(PUBLISHED)
    series = {
        "here: ViT-Ti/16, trained with labels": figures,
        "published: ViT-S/16, DINO": PUBLISHED,
    }
    figure, axes = plots.pyplot().subplots(figsize=(5.0, 2.6), layout="constrained")
    for i, (label, values) in enumerate(series.items()):
        x = [order.index(sharding) for sharding in order if sharding in values]
        axes.plot(x, [values[order[at]] for at in x], label=label, **plots.look(i))
        for at in x:
            text = f"{values[order[at]]:.1f}"
            shift = (0, 5) if i == 0 else (-7, -11)
            axes.annotate(
                text, (at, values[order[at]]), shift, textcoords="offset points", ha="center"
            )
    axes.set(xlabel="classes per client $N_c$", ylabel="test accuracy (%)", ylim=(66, 92))
    axes.set_xticks(range(len(order)), order)
    axes.grid(axis="y")
    axes.legend(loc="lower left")
    plots.save(figure, path)


def draw_rates(rows: Sequence[Tried], path: Path) -> None:
    """Draw the rates that every mask tried, over the one that matches dense training's norm."""
    panels: dict[str, dict] = {}
    for row in rows:
        sharding, rule, frozen, rounds = row.key
        title = "iid" if sharding == "iid" else f"$N_c$ = {sharding[2:]}"
        label = f"{rule} {frozen:g}" if frozen else rule
        label += f", {rounds} round{'s' * (rounds > 1)}" if rounds else ""
        unit = row.follows("matched")
        rates = [rate / unit for rate in row.accuracy]
        marks = row.best / unit, row.follows("functional") / unit
        panels.setdefault(title, {})[label] = rates, *marks
    names = "the best rate tried", "the rate of equal functional change"
    plots.plot_spans(panels, path, "rate / rate of equal update norm", names)


def accuracy(done: Done) -> float:
    """Return a run's final validation accuracy in percent."""
    return 100 * done.summary["final"]["val_acc"]


def sharding(done: Done, named: str = "$N_c$ = ") -> str:
    """Return iid, how many classes a client of the run holds, or alpha of their mixtures."""
    if done.options.get("dirichlet") is not None:
        return f"$\\alpha$ = {done.options['dirichlet']:g}"
    return f"{named}{done.options['nc']:d}" if done.options["nc"] else "iid"


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
