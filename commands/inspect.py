"""train.py eval, export: what a run has come to."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

from commands.options import Line, recipe_of
from machine import safe_files
from machine.device import Machine
from machine.status import print_figures
from study import maps
from training.outcome import Best, Outcome, export
from training.per_client import per_client
from training.workspace import NORMALISATIONS


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


EVAL = (RunFolder, Best, PerClient, Machine)
EXPORT = (RunFolder, Export, Best)


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
    figures = per_client(finished, (o.clients_evaluated or 0) * o.personalised)
    print_clients(figures)
    safe_files.write_json(finished.run.folder / "per_client.json", figures)
    print(f"written to {finished.run.folder / 'per_client.json'}")
    try:
        picture = draw_clients(figures, finished.run.folder / "per_client.png")
        print(f"written to {picture}")
    except ValueError as error:
        print(f"no per_client.png: {error}", file=sys.stderr)


def draw_clients(figures: dict, path: Path) -> Path:
    """Draw how many clients the model serves how well, before and after steps of their own."""
    rows = figures["clients"]
    tuned = [100 * row["personalised_acc"] for row in rows if "personalised_acc" in row]
    groups = {"global model": [100 * row["acc"] for row in rows], "personalised": tuned}
    return maps.plot_histogram(groups, path, "accuracy on a client's share of validation (%)")


def run_export(line: Line) -> None:
    """Write a run's weights for --weights, timm or DINO's own code: tensors under DINO's keys."""
    finished, o = outcome_of(line), line.groups.export
    export(finished.model(), Path(o.file), with_head=o.with_head)
    reached = " ".join(f"{unit} {at}" for unit, at in finished.reached.items())
    model, pixels = finished.recipe.backbone.model, finished.workspace.normalisation()
    mean, std = NORMALISATIONS[pixels]
    print(f"{o.file}: {model} at {reached}, pixels normalised by {mean}, {std}")
    weights = shlex.quote(o.file)
    print(f"load it by --model {model} --weights {weights} --normalisation {pixels}")
    if o.with_head:
        print("its head is for other programs: --weights reads the backbone alone")


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
