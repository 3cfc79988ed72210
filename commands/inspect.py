"""What each sub-command does, printed and written; train.py declares their options.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import experiments
import head
import model as vit
import outcome
import plots
import report
import runs
import safe_files
import sweep
import tables
from calibration import Calibration, cached_mask
from learner import set_fitted_head
from mask_file import density_table
from merging import Merger
from ranks import launched_group
from search import search_then_train
from session import (
    default_name,
    open_run,
    sharding_name,
    train_centralized,
    train_federated,
)
from status import duration
from workspace import Workspace


def run_fedavg(options: argparse.Namespace) -> None:
    """Train by FedAvg; with --search choose learning rate and weight decay first.

    torchrun --nproc-per-node=N train.py fedavg ... spreads the clients over N processes, to the
    same bits at the same --threads; several nodes need a common file system.
    """
    with launched_group() as group:
        workspace = Workspace(options, group)
        with group.first_then_others():
            shards = workspace.shards()

        def train(chosen: argparse.Namespace, name: str) -> dict:
            return train_federated(workspace, shards, chosen, name)

        search_then_train(group, options, "rounds", train)


def run_centralized(options: argparse.Namespace) -> None:
    """Train on all training data; with --search choose learning rate and weight decay first."""
    workspace = Workspace(options)

    def train(chosen: argparse.Namespace, name: str) -> dict:
        return train_centralized(workspace, chosen, name)

    search_then_train(workspace.group, options, "epochs", train)


def run_ridge(options: argparse.Namespace) -> None:
    """Solve the ridge head centrally and from the clients' sums, and compare the two."""
    started, workspace = time.monotonic(), Workspace(options)
    shards, model = workspace.shards(), workspace.build_model()
    name = default_name(options) if options.name is None else options.name
    run = open_run(workspace, model, options, name, shards)
    features, test_features = (workspace.features(model, part) for part in ("train", "test"))
    labels, test_labels = (workspace.sets[part].labels for part in ("train", "test"))
    central = workspace.fit_head(model, "ridge")
    total = head.RidgeSums(features.shape[1], workspace.classes, workspace.device)
    for shard in shards:
        at = torch.from_numpy(shard).to(workspace.device)
        sums = head.RidgeSums(features.shape[1], workspace.classes, workspace.device)
        total = total + sums.update(features[at], labels[at])
    weight, bias = (x / central.temperature for x in head.solve_ridge(total, central.strength))
    logits = test_features.double() @ weight.T + bias
    final = {
        "val_acc": central.val_acc,
        "test_acc": (logits.argmax(1) == test_labels).double().mean().item(),
        "test_loss": F.cross_entropy(logits, test_labels).item(),
    }
    figures = {
        "ridge": central.strength,
        "temperature": central.temperature,
        "train_images": len(workspace.train_index),
        "clients": len(shards),
        "difference_to_central": ((weight - central.weight).norm() / central.weight.norm()).item(),
        "bytes_up": total.bytes * len(shards),
    }
    print_figures(final | figures)
    figures |= {"final": final, "wall_seconds": time.monotonic() - started}
    safe_files.write_json(run.folder / "summary.json", figures, sealed=True)
    print(f"written to {run.folder / 'summary.json'}")


def run_calibrate(options: argparse.Namespace) -> None:
    """Make a mask from the clients' data; write it, its density by layer, and a picture of that."""
    started, workspace = time.monotonic(), Workspace(options)
    shards, model = workspace.shards(), workspace.build_model()
    name = default_name(options) if options.name is None else options.name
    run = open_run(workspace, model, options, name, shards)
    set_fitted_head(workspace, model, options.head)
    with run.opening():
        calibration = Calibration(workspace, model, options, shards)
        mask = cached_mask(calibration)
    mask.save(run.folder / "mask.pt")
    kinds, layers, density = density_table(mask)
    print_density(kinds, layers, density)
    shown = ("entries", "kept", "images", "clients", "bytes_up", "bytes_down", "seconds")
    figures = {name: mask.made[name] for name in shown} | {"mask_bytes": mask.bytes}
    figures["overlap"] = calibration.agreement()
    print_figures({k: v for k, v in figures.items() if k != "overlap"})
    print_overlap(figures["overlap"])
    table = {
        kind: dict(zip(layers, row, strict=True))
        for kind, row in zip(kinds, density.tolist(), strict=True)
    }
    figures |= {"density": table, "wall_seconds": time.monotonic() - started}
    safe_files.write_json(run.folder / "summary.json", figures, sealed=True)
    title = f"{options.mask_rule}, {100 * mask.kept.double().mean():.1f} % trainable"
    try:
        plots.plot_density(kinds, layers, density, run.folder / "density.png", title)
    except ValueError as error:
        print(f"no density.png: {error}", file=sys.stderr)
    print(f"written to {run.folder / 'mask.pt'}; train it with --mask {run.folder / 'mask.pt'}")


def run_shards(options: argparse.Namespace) -> None:
    """Print and plot who holds how many samples of which class."""
    workspace = Workspace(options)
    shards = workspace.shards()
    labels = workspace.dataset.train.labels.numpy()
    counts = np.stack([np.bincount(labels[s], minlength=workspace.classes) for s in shards])
    sizes, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    sharing = (counts > 0).sum(axis=0)
    print(f"{len(shards)} clients, {sizes.sum()} samples, {workspace.classes} classes")
    for what, values in (
        ("samples per client", sizes),
        ("classes per client", held),
        ("clients per class", sharing),
    ):
        print(f"{what:19} min {values.min()}  median {np.median(values):g}  max {values.max()}")
    print("client  samples  classes: samples")
    for k in range(min(len(shards), options.show)):
        top = np.argsort(-counts[k], kind="stable")[: min(held[k], 6)]
        parts = ", ".join(f"{workspace.dataset.classes[c]}: {counts[k, c]}" for c in top)
        print(f"{k:6}  {sizes[k]:7}  {parts}{', ...' if held[k] > len(top) else ''}")
    if len(shards) > options.show:
        print(f"... and {len(shards) - options.show} more clients (--show)")
    if options.out:
        plots.plot_shards({f"{sharding_name(options)}, seed {options.seed}": counts}, options.out)
        print(f"written to {options.out}")


def run_sweep(options: argparse.Namespace) -> None:
    """Run what is missing of the experiments, several runs at a time, and write their tables."""
    made = experiments.at_scale(options.scale)
    for name in options.experiment:
        if name not in made:
            raise ValueError(f"no experiment is called {name!r}: choose from {', '.join(made)}")
    chosen = {name: made[name] for name in options.experiment or made}
    results = Path(options.results) / options.scale
    folders = {name: results / (e.folder or name) for name, e in chosen.items()}
    if options.list:
        list_runs(chosen, folders, options.jobs)
        return

    def missing(failed: set[str]) -> Iterator[tuple[Path, tables.Cell]]:
        for name, experiment in chosen.items():
            for cell in experiment.missing(folders[name], failed):
                yield folders[name], cell

    next(missing(set()), None)  # refuses what is not of this version before anything is made
    with contextlib.ExitStack() as held:
        for folder in sorted(set(folders.values())):
            held.enter_context(safe_files.held(folder))
        try:
            failed = sweep.run_cells(missing, options.jobs)
        finally:
            for name, experiment in chosen.items():
                text = experiment.table(folders[name])
                write = lambda path, text=text: path.write_text(text, encoding="utf-8")  # noqa: E731
                (results / name).mkdir(exist_ok=True)
                safe_files.write_atomically(results / name / "table.md", write)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(sorted(failed))}")
    list_runs(chosen, folders, options.jobs)
    print(f"tables: {results}/*/table.md")


def list_runs(chosen: dict[str, tables.Experiment], folders: dict[str, Path], jobs: int) -> None:
    """Say of every table how many of its runs are done, and how long the others will take.

    What tables share counts once in the sum of all.
    """
    estimates, counted = [], set()
    for name, experiment in chosen.items():
        left = experiment.left(folders[name])
        took = [experiment.seconds(folders[name], row) for row, _ in left]
        known = [seconds for seconds in took if seconds is not None]
        usual = float(np.mean(known)) if known else math.nan  # of a row that has not run
        seconds = [usual if one is None else one for one in took]
        counts = [count for _, count in left]
        needed = sum(len(row.rates) + len(row.seeds) - 1 for row in experiment.rows)
        takes = [n * s / jobs if n else 0 for n, s in zip(counts, seconds, strict=True)]
        rows = [(folders[name], row.cell(row.rates[0], row.seeds[0]).name) for row, _ in left]
        own = [t for row, t in zip(rows, takes, strict=True) if row not in counted]
        counted |= set(rows)
        estimate = sum(takes)
        estimates.append(sum(own))
        shown = "unknown: none has run" if math.isnan(estimate) else duration(estimate)
        done = f"{needed - sum(counts)} of {needed} runs done"
        print(f"{name:15} {done:24} time left: {shown}")
    if len(chosen) > 1:
        known = [one for one in estimates if not math.isnan(one)]
        unknown = len(estimates) - len(known)
        more = f", and {unknown} tables of unknown length" if unknown else ""
        total = f"{duration(sum(known))}{more}" if known else "unknown: none has run"
        print(f"{'all':15} {'':24} time left: {total}")


def run_report(options: argparse.Namespace) -> None:
    """Write the report's tables, figures and quoted numbers from a scale's logs."""
    made = report.write(options.scale, Path(options.results), Path(options.out))
    print(f"written to {options.out}: numbers.tex, {', '.join(made) or 'nothing else has run'}")


def run_eval(options: argparse.Namespace) -> None:
    """Evaluate a run's last checkpoint on the validation and the test set, or for each client."""
    finished = outcome.Outcome(options.run_folder, options)
    if not options.per_client:
        print_figures(finished.reached | finished.learner().evaluate())
        return
    figures = outcome.per_client(finished, options.clients_evaluated * options.personalised)
    print_clients(figures)
    safe_files.write_json(finished.run.folder / "per_client.json", figures)
    print(f"written to {finished.run.folder / 'per_client.json'}")


def run_export(options: argparse.Namespace) -> None:
    """Write a run's weights for --weights, timm or DINO's own code: tensors under DINO's keys."""
    finished = outcome.Outcome(options.run_folder, options)
    outcome.export(finished.model(), Path(options.file), with_head=options.with_head)
    reached = " ".join(f"{unit} {at}" for unit, at in finished.reached.items())
    stored = finished.options
    mean, std = finished.workspace.normalisation()
    print(f"{options.file}: {stored.model} at {reached}, pixels normalised by {mean}, {std}")
    again = "half" if mean == vit.HALF[0] else "imagenet"
    print(f"load it by --model {stored.model} --weights {options.file} --normalisation {again}")


def run_merge(options: argparse.Namespace) -> None:
    """Merge the models of runs that started alike, evaluate the result, and say how they interfere.

    The model is start + scale * merge(what each run changed): --scale -1 with one run unlearns what
    that run learned.
    """
    merger = Merger(options.run_folders, options)
    change = options.scale * merger.merge()
    print_figures(merger.interference() | merger.evaluate(change))
    if options.out:
        merger.save(options.out, change)
        print(f"written to {options.out}, which --weights takes")


def run_plot(options: argparse.Namespace) -> None:
    """Draw the curves of one or several runs."""
    folders = [runs.Run(folder) for folder in options.run_folders]
    for run in folders:
        run.config()
    out = options.out or str(folders[0].folder / "curves.png")
    names = [run.folder.name for run in folders]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in folders]
    logs = [run.vouched_records() for run in folders]
    plots.plot_curves(dict(zip(names, logs, strict=True)), out)
    print(f"written to {out}")


def print_density(kinds: list[str], layers: list[str], density: np.ndarray) -> None:
    """Print the kept share of every kind (rows) in every layer (columns), in percent."""
    print("trainable, %".ljust(16) + "".join(f"{layer:>6}" for layer in layers))
    for kind, row in zip(kinds, density, strict=True):
        print(f"{kind:16}" + "".join("     -" if x != x else f"{100 * x:6.1f}" for x in row))


def print_overlap(overlap: dict) -> None:
    """Print how far the clients' own masks agree, where that was measured."""
    if overlap.get("iou") is not None:
        print(
            f"masks of half of a client's images ({overlap['clients']} clients, "
            f"{overlap['images']} images each): IoU {overlap['iou']:.3f} between clients, "
            f"{overlap['ceiling']:.3f} between the halves of one, {overlap['chance']:.3f} by chance"
        )
        groups = (f"{iou:.3f} of {m}" for m, iou in overlap["groups"].items())
        print(f"masks of two groups of clients, all their images: IoU {', '.join(groups)} each")


def print_clients(figures: dict) -> None:
    """Print how accuracy spreads over clients, and the classes where it is lowest."""
    rows, by_class = figures["clients"], figures["by_class"]
    tuned = [row for row in rows if "personalised_acc" in row]
    named = {"global": ("global model", rows), "same_clients_global": ("on those below", tuned)}
    named["personalised"] = "personalised", tuned
    print("accuracy, %      clients    mean  worst tenth  deviation")
    for key, (what, counted) in named.items():
        if key in figures:
            found = figures[key]
            shown = [100 * found[name] for name in ("mean_acc", "worst_decile_acc", "std")]
            print(f"{what:16} {len(counted):7} {shown[0]:7.2f} {shown[1]:12.2f} {shown[2]:10.2f}")
    worst = sorted(by_class, key=by_class.get)[:5]
    mean = 100 * sum(by_class.values()) / len(by_class)
    listed = ", ".join(f"{name} {100 * by_class[name]:.1f}" for name in worst)
    print(f"mean over {len(by_class)} classes {mean:.2f}; lowest: {listed}")


def print_figures(figures: dict) -> None:
    """Print one figure a line, accuracies in percent."""
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if name.endswith("_acc"):
            text = f"{100 * value:.2f} %"
        print(f"{name:22} {text}")
