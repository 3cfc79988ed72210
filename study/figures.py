"""The report's figures, each from the runs of the experiments that have what it shows."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import plots
from workspace import Workspace


class Done(NamedTuple):
    """A run that is done: the key of its row, its options, summary and log."""

    key: tuple[str, ...]
    options: dict
    summary: dict
    records: list[dict]


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
    return path.exists()


def draw_curves(name: str, ran: Ran, path: Path) -> None:
    """Draw an experiment's validation accuracy over time, a panel for each part that trains."""
    panels: dict[str, dict] = {}
    for done in ran.get(name, []):
        trains, *rest = done[0].key
        panels.setdefault(TRAINS[trains], {})[" ".join(rest)] = [one.records for one in done]
    plots.plot_bands(panels, path)


def draw_heterogeneity(ran: Ran, path: Path) -> None:
    """Draw accuracy against classes per client, for each number of local steps."""
    panels: dict[str, dict] = {}
    for done in ran.get("heterogeneity", []):
        group = panels.setdefault(TRAINS[done[0].key[0]], {})
        values = group.setdefault(f"$J$ = {done[0].options['J']}", {})
        values[sharding(done[0], "")] = [accuracy(one) for one in done]
    plots.plot_grouped(panels, path, "classes per client $N_c$")


def draw_bytes(ran: Ran, path: Path) -> None:
    """Draw accuracy against all that a run sent, calibration and mask included, by mask rule."""
    panels: dict[str, dict] = {}
    reference = {}
    for done in ran.get("rules", []):
        values = [accuracy(one) for one in done]
        sent = [one.summary["bytes_up"] + one.summary["bytes_down"] for one in done]
        panel, rule = sharding(done[0]), done[0].options["mask_rule"] or "dense"
        if rule == "dense":
            reference[panel] = "dense", float(np.mean(values))
        else:
            points = panels.setdefault(panel, {}).setdefault(rule, [])
            points.append((float(np.mean(sent)) / 1e6, values))
    plots.plot_against(panels, path, "sent in the whole run (MB)", reference=reference)


def draw_linearity(ran: Ran, path: Path) -> None:
    """Draw accuracy against how far a model moved, and against how linear that is, matched."""
    panels: dict[str, dict] = {}
    for done, (key, what) in itertools.product(ran.get("linearity", []), DIAGNOSED.items()):
        figures = [one.summary["final"].get(key) for one in done]
        if all(figures):
            rule = done[0].options["mask_rule"] or "dense"
            point = float(np.mean(figures)), [accuracy(one) for one in done]
            panels.setdefault(f"{sharding(done[0])}: {what}", {})[rule] = [point]
    plots.plot_against(panels, path, None)


def draw_agreement(ran: Ran, path: Path) -> None:
    """Draw how far clients' own masks agree, by classes per client, between chance and noise."""
    groups: dict[str, dict] = {}
    for done in ran.get("agreement", []):
        overlaps = [one.summary["overlap"] for one in done]
        for key, what in OVERLAPS.items():
            if values := [o[key] for o in overlaps if o.get(key) is not None]:
                groups.setdefault(what, {})[sharding(done[0], "")] = values
    plots.plot_grouped({"": groups}, path, "classes per client $N_c$", "IoU of masks")


def draw_groups(ran: Ran, path: Path) -> None:
    """Draw how far two groups of clients agree, against how many clients are in each."""
    lines: dict[str, list] = {}
    chance: list[float] = []
    for done in ran.get("agreement", []):
        overlaps = [one.summary["overlap"] for one in done]
        chance += [overlap["chance"] for overlap in overlaps if overlap]
        for size in overlaps[0].get("groups", {}):
            values = [overlap["groups"][size] for overlap in overlaps]
            lines.setdefault(sharding(done[0]), []).append((int(size), values))
    reference = {"": ("chance", float(np.mean(chance)))} if chance else None
    label = "clients in each of two groups"
    plots.plot_against({"": lines}, path, label, "IoU of masks", reference)


def draw_overlap(ran: Ran, path: Path) -> None:
    """Draw the overlap of every two clients' masks, where clients hold the fewest classes."""
    told = [
        done[0] for done in ran.get("agreement", []) if done[0].summary["overlap"].get("matrix")
    ]
    if not told:
        raise ValueError("no run tells the overlap of every two clients")
    one = min(told, key=lambda one: one.options["nc"] or np.inf)
    overlap = one.summary["overlap"]
    scale = dict(chance=overlap["chance"], ceiling=overlap["ceiling"], title=sharding(one))
    plots.plot_overlap(np.array(overlap["matrix"]), path, **scale)


def draw_density(ran: Ran, path: Path) -> None:
    """Draw where the first mask keeps entries, of the kinds of which it keeps some share."""
    told = [done[0] for done in ran.get("agreement", [])]
    if not told:
        raise ValueError("no run tells the density of a mask by layer")
    density, options = told[0].summary["density"], told[0].options
    layers = list(next(iter(density.values())))
    table = {kind: np.array(list(row.values()), dtype=float) for kind, row in density.items()}
    kept = {kind: row for kind, row in table.items() if np.nanmax(row) >= LEAST_SHOWN}
    some = [i for i in range(len(layers)) if not all(np.isnan(row[i]) for row in kept.values())]
    title = f"{options['mask_rule']}, {sharding(told[0])}, frozen share {options['sparsity']:g}; "
    title += f"kinds not shown keep less than {100 * LEAST_SHOWN:g} % in every layer"
    shown = np.array(list(kept.values()))[:, some]
    plots.plot_density(list(kept), [layers[i] for i in some], shown, path, title)


def draw_shards(ran: Ran, path: Path) -> None:
    """Draw who holds how many samples of which class, for up to three shardings of the runs."""
    shardings = {}
    for done in itertools.chain(*ran.values()):
        if done[0].options.get("clients") == CLIENTS:
            shardings.setdefault(done[0].options["nc"] or np.inf, done[0])
    if not shardings:
        raise ValueError(f"no run has {CLIENTS} clients")
    every = sorted(shardings, reverse=True)
    chosen = dict.fromkeys((every[0], every[len(every) // 2], every[-1]))
    counts = {}
    for nc in chosen:
        options = shardings[nc].options | {"device": "cpu", "threads": None}
        workspace = Workspace(argparse.Namespace(**options))
        labels = workspace.dataset.train.labels.numpy()
        shards = workspace.shards()
        counts[sharding(shardings[nc])] = np.stack(
            [np.bincount(labels[s], minlength=workspace.classes) for s in shards]
        )
    plots.plot_shards(counts, path)


def accuracy(done: Done) -> float:
    """Return a run's final validation accuracy in percent."""
    return 100 * done.summary["final"]["val_acc"]


def sharding(done: Done, named: str = "$N_c$ = ") -> str:
    """Return iid, or how many classes a client of the run holds."""
    return f"{named}{done.options['nc']}" if done.options["nc"] else "iid"


FIGURES = {
    "shards": draw_shards,
    "centralized": functools.partial(draw_curves, "centralized"),
    "fedavg-iid": functools.partial(draw_curves, "fedavg-iid"),
    "heterogeneity": draw_heterogeneity,
    "bytes": draw_bytes,
    "agreement": draw_agreement,
    "groups": draw_groups,
    "overlap": draw_overlap,
    "density": draw_density,
    "linearity": draw_linearity,
}
