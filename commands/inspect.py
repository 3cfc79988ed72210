"""train.py eval, export, plot, shards: what a run has come to, and who holds what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from commands.options import Line, recipe_of
from machine import runs, safe_files
from machine.device import Machine
from machine.status import print_figures
from study import plots
from training import outcome
from training.outcome import Best, Outcome
from training.workspace import NORMALISATIONS, Sharding, Source, Workspace


class RunFolder(NamedTuple):
    """The run."""

    run_folder: Annotated[str, "a run's folder, such as runs/NAME", "path", "RUN", "positional"]
    data_dir: Annotated[str, "folder of data and weights", "path"] = "data"
    weights: Annotated[
        str | None, "the weights that the run began with [where they were]", "path", "FILE"
    ] = None


class PerClient(NamedTuple):
    """How it serves each client."""

    per_client: Annotated[
        bool,
        "accuracy on every client's share of the validation images, which has its mixture of "
        "classes; mean, worst tenth, deviation, worst classes",
    ] = False
    personalised: Annotated[
        bool, "the same after J local steps of the client's own from the model"
    ] = False
    clients_evaluated: Annotated[
        int | None, "clients that --personalised trains, evenly chosen [10]", ">= 1", "N"
    ] = None


class Export(NamedTuple):
    """The file."""

    file: Annotated[str, "where the weights go, such as x.pth", "path", "FILE", "positional"]
    with_head: Annotated[bool, "head.weight and head.bias too"] = False


class Plot(NamedTuple):
    """The picture."""

    run_folders: Annotated[list[str], "run folders, one or several", "path", "RUN", "positional"]
    out: Annotated[str | None, "where the picture goes [curves.png in the first run]", "path"] = (
        None
    )


class Shown(NamedTuple):
    """What is shown."""

    show: Annotated[int, "clients to list", ">= 0"] = 10
    out: Annotated[str | None, "picture of the heat map, such as shards.png [none]", "path"] = None


EVAL = (RunFolder, Best, PerClient, Machine)
EXPORT = (RunFolder, Export, Best)
PLOT = (Plot,)
SHARDS = (Shown, Sharding, Source, Machine)


def outcome_of(line: Line) -> Outcome:
    """Return what the run of a command line has come to."""
    o, machine = line.groups, getattr(line.groups, "machine", Machine("cpu", precision="fp32"))
    folder, data_dir, weights = o.run_folder
    return Outcome(folder, recipe_of(folder, data_dir, machine, weights), o.best.best)


def run_eval(line: Line) -> None:
    """Evaluate a run's last checkpoint on the validation and the test set, or for each client."""
    finished, o = outcome_of(line), line.groups.per_client
    if not o.per_client:
        print_figures(finished.reached | finished.learner().evaluate())
        return
    figures = outcome.per_client(finished, (o.clients_evaluated or 0) * o.personalised)
    print_clients(figures)
    safe_files.write_json(finished.run.folder / "per_client.json", figures)
    print(f"written to {finished.run.folder / 'per_client.json'}")


def run_export(line: Line) -> None:
    """Write a run's weights for --weights, timm or DINO's own code: tensors under DINO's keys."""
    finished, o = outcome_of(line), line.groups.export
    outcome.export(finished.model(), Path(o.file), with_head=o.with_head)
    reached = " ".join(f"{unit} {at}" for unit, at in finished.reached.items())
    model, pixels = finished.recipe.backbone.model, finished.workspace.normalisation()
    mean, std = NORMALISATIONS[pixels]
    print(f"{o.file}: {model} at {reached}, pixels normalised by {mean}, {std}")
    print(f"load it by --model {model} --weights {o.file} --normalisation {pixels}")


def run_plot(line: Line) -> None:
    """Draw the curves of one or several runs."""
    o = line.groups.plot
    folders = [runs.Run(folder) for folder in o.run_folders]
    for run in folders:
        run.config()
    out = o.out or str(folders[0].folder / "curves.png")
    names = [run.folder.name for run in folders]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in folders]
    logs = [run.vouched_records() for run in folders]
    print(f"written to {plots.plot_curves(dict(zip(names, logs, strict=True)), out)}")


def run_shards(line: Line) -> None:
    """Print and plot who holds how many samples of which class."""
    o = line.groups
    workspace = Workspace(o.source, o.machine)
    shards, labels = workspace.shards(o.sharding), workspace.dataset.train.labels.numpy()
    counts = np.stack([np.bincount(labels[s], minlength=workspace.classes) for s in shards])
    sizes, classes = counts.sum(axis=1), (counts > 0).sum(axis=1)
    print(f"{len(shards)} clients, {sizes.sum()} samples, {workspace.classes} classes")
    for what, values in (
        ("samples per client", sizes),
        ("classes per client", classes),
        ("clients per class", (counts > 0).sum(axis=0)),
    ):
        print(f"{what:19} min {values.min()}  median {np.median(values):g}  max {values.max()}")
    print("client  samples  classes: samples")
    for k in range(min(len(shards), o.shown.show)):
        top = np.argsort(-counts[k], kind="stable")[: min(classes[k], 6)]
        parts = ", ".join(f"{workspace.dataset.classes[c]}: {counts[k, c]}" for c in top)
        print(f"{k:6}  {sizes[k]:7}  {parts}{', ...' if classes[k] > len(top) else ''}")
    if len(shards) > o.shown.show:
        print(f"... and {len(shards) - o.shown.show} more clients (--show)")
    if o.shown.out:
        title = f"{o.sharding.name}, seed {o.source.seed}"
        print(f"written to {plots.plot_shards({title: counts}, o.shown.out)}")


def print_clients(figures: dict) -> None:
    """Print how accuracy spreads over clients, and the classes where it is lowest."""
    rows, by_class = figures["clients"], figures["by_class"]
    tuned = [row for row in rows if "personalised_acc" in row]
    named = {"global": ("global model", rows), "same_clients_global": ("on those below", tuned)}
    named["personalised"] = "personalised", tuned
    print("accuracy, %      clients    mean  worst tenth  deviation")
    for key, (what, counted) in named.items():
        if key in figures:
            spread = figures[key]
            shown = [100 * spread[name] for name in ("mean_acc", "worst_decile_acc", "std")]
            print(f"{what:16} {len(counted):7} {shown[0]:7.2f} {shown[1]:12.2f} {shown[2]:10.2f}")
    worst = sorted(by_class, key=by_class.get)[:5]
    mean = 100 * sum(by_class.values()) / len(by_class)
    listed = ", ".join(f"{name} {100 * by_class[name]:.1f}" for name in worst)
    print(f"mean over {len(by_class)} classes {mean:.2f}; lowest: {listed}")
