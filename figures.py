"""The report's figures, each from the runs of the experiments that have what it shows."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Callable, Iterator
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


Ran = dict[str, list[list[Done]]]  # by experiment: its rows that ran, each a run a seed


def drawn(draw: Callable, ran: Ran, path: Path) -> bool:
    """Draw a figure; tell whether there was anything to draw."""
    try:
        draw(ran, path)
    except (ValueError, OSError) as error:
        print(f"{path.name} is not drawn: {error}")
    return path.exists()


def draw_curves(name: str, ran: Ran, path: Path) -> None:
    """Draw an experiment's validation accuracy over time, where it was evaluated often enough."""
    panels: dict[str, dict] = {}
    for done in ran.get(name, []):
        if all(sum("val_acc" in record for record in one.records) > 2 for one in done):
            panel, label = (key[0], key[1:]) if len(key := done[0].key) > 1 else ("", key)
            shown = " ".join(map(printed, label))
            panels.setdefault(printed(panel), {})[shown] = [one.records for one in done]
    if len(panels) > 3:
        panels = {
            "": {f"{a}, {b}": logs for a, group in panels.items() for b, logs in group.items()}
        }
    plots.plot_bands(panels, path)


def draw_heterogeneity(ran: Ran, path: Path) -> None:
    """Draw accuracy against classes per client, for each number of local steps."""
    groups: dict[str, dict] = {}
    for done in ran.get("heterogeneity", []):
        options = done[0].options
        values = groups.setdefault(f"$J$ = {options['J']}", {})
        values[str(options["nc"] or "iid")] = [accuracy(one) for one in done]
    plots.plot_grouped(groups, path, "classes per client $N_c$")


def draw_bytes(ran: Ran, path: Path) -> None:
    """Draw accuracy against all that a run sent, calibration and mask included, by mask rule."""
    panels: dict[str, dict] = {}
    reference = {}
    for name in ("rules", "sparsity"):
        for done in ran.get(name, []):
            options, values = done[0].options, [accuracy(one) for one in done]
            panel = printed(f"nc{options['nc']}" if options["nc"] else "iid")
            sent = [one.summary["bytes_up"] + one.summary["bytes_down"] for one in done]
            if not options["mask_rule"]:
                reference.setdefault(panel, ("dense", float(np.mean(values))))
            points = panels.setdefault(panel, {}).setdefault(options["mask_rule"] or "dense", [])
            points.append((np.mean(sent) / 1e6, values))
    for group in panels.values():
        for points in group.values():
            points.sort(key=lambda point: point[0])
    plots.plot_against(panels, path, "sent in the whole run (MB)", reference=reference)


def draw_linearity(ran: Ran, path: Path) -> None:
    """Draw accuracy against how far a model moved, how linear that was, and how clients mix."""
    panels: dict[str, dict] = {}
    for done in ran.get("linearity", []):
        label = done[0].options["mask_rule"] or "dense"
        for key, what in DIAGNOSED.items():
            if all(one.summary["final"].get(key) for one in done):
                x = float(np.mean([one.summary["final"][key] for one in done]))
                points = panels.setdefault(what, {}).setdefault(label, [])
                points.append((x, [accuracy(one) for one in done]))
    for group in panels.values():
        for points in group.values():
            points.sort(key=lambda point: point[0])
    plots.plot_against(panels, path, None)


DIAGNOSED = {
    "distance": "distance from the start",
    "linearity_error": "linearity error",
    "disentanglement_error": "disentanglement error",
}


def draw_agreement(ran: Ran, path: Path) -> None:
    """Draw how far clients' own masks agree, by classes per client, between chance and noise."""
    groups: dict[str, dict] = {}
    for done in overlaps(ran):
        category = str(done[0].options["nc"] or "iid")
        for key, what in (
            ("ceiling", "one client, two halves of its images"),
            ("iou", "two clients"),
            ("chance", "chance"),
        ):
            values = [100 * one.summary["overlap"][key] for one in done]
            groups.setdefault(what, {}).setdefault(category, values)
    plots.plot_grouped(groups, path, "classes per client $N_c$", "IoU of masks (%)")


def draw_overlap(ran: Ran, path: Path) -> None:
    """Draw the overlap of every two clients' masks, in the first run that tells it."""
    for done in overlaps(ran):
        overlap, options = done[0].summary["overlap"], done[0].options
        if overlap.get("matrix"):
            matrix = np.array(overlap["matrix"])
            title = printed(f"nc{options['nc']}" if options["nc"] else "iid")
            scale = dict(chance=overlap["chance"], ceiling=overlap["ceiling"], title=title)
            plots.plot_overlap(matrix, path, range(len(matrix)), **scale)
            return
    raise ValueError("no run tells the overlap of every two clients")


def overlaps(ran: Ran) -> Iterator[list[Done]]:
    """Yield the runs that measured how far clients' masks agree, a row's seeds together."""
    for done in itertools.chain(*ran.values()):
        if all((run.summary.get("overlap") or {}).get("iou") is not None for run in done):
            yield done


def draw_density(ran: Ran, path: Path) -> None:
    """Draw where a mask keeps entries, in the first run that tells it."""
    for done in itertools.chain(*ran.values()):
        if density := done[0].summary.get("density"):
            options = done[0].options
            kinds = {k: v for k, v in density.items() if np.nanmax(floats(v)) >= LEAST_SHOWN}
            table = np.array([floats(row) for row in kinds.values()])
            layers = [i for i in range(table.shape[1]) if not np.isnan(table[:, i]).all()]
            names = [list(next(iter(kinds.values())))[i] for i in layers]
            title = f"{options['mask_rule']}, frozen share {options['sparsity']:g}; "
            title += f"kinds not shown keep less than {100 * LEAST_SHOWN:g} % in every layer"
            plots.plot_density(list(kinds), names, table[:, layers], path, title)
            return
    raise ValueError("no run tells the density of a mask by layer")


LEAST_SHOWN = 0.005


def floats(row: dict[str, float]) -> np.ndarray:
    """Return a layer's shares as an array."""
    return np.array(list(row.values()), dtype=float)


def draw_shards(ran: Ran, path: Path) -> None:
    """Draw who holds how many samples of which class, for up to three shardings of the runs."""
    shardings = {}
    for done in itertools.chain(*ran.values()):
        if done[0].options.get("clients"):
            shardings.setdefault(done[0].options["nc"] or np.inf, done[0].options)
    if not shardings:
        raise ValueError("no run has clients")
    chosen = sorted(shardings, reverse=True)
    chosen = dict.fromkeys([chosen[0], chosen[len(chosen) // 2], chosen[-1]])
    counts = {}
    for nc in chosen:
        options = argparse.Namespace(**{**shardings[nc], "device": "cpu", "threads": None})
        workspace = Workspace(options)
        labels = workspace.dataset.train.labels.numpy()
        shards = workspace.shards()
        name = "iid" if nc == np.inf else f"$N_c$ = {nc}"
        counts[name] = np.stack(
            [np.bincount(labels[s], minlength=workspace.classes) for s in shards]
        )
    plots.plot_shards(counts, path)


def accuracy(done: Done) -> float:
    """Return a run's final validation accuracy in percent."""
    return 100 * done.summary["final"]["val_acc"]


def printed(text: str) -> str:
    """Write a part of a key for a figure."""
    return re.sub(r"^nc(\d+)$", r"$N_c$ = \1", text)


FIGURES = {
    "shards": draw_shards,
    "curves-centralized": functools.partial(draw_curves, "centralized"),
    "curves-fedavg-iid": functools.partial(draw_curves, "fedavg-iid"),
    "curves-heterogeneity": functools.partial(draw_curves, "heterogeneity"),
    "heterogeneity": draw_heterogeneity,
    "bytes": draw_bytes,
    "agreement": draw_agreement,
    "overlap": draw_overlap,
    "density": draw_density,
    "linearity": draw_linearity,
}
