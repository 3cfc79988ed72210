"""--search: short runs over a grid of rates, weight decays and schedules, then the best of it.

The choice is that of a table's row (study/tables.py): the best mean validation accuracy. No try is
evaluated on the test set; the run that follows is, at its end.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import NamedTuple, Protocol

import centralized
import fedavg
from commands.options import Line
from machine import runs, safe_files
from machine.ranks import OneProcess
from study.measures import best_of

EDGES = ("highest", "higher", 3.0), ("lowest", "lower", 1 / 3)
LAST = ("log.jsonl", "checkpoint.pt")  # of a run's files, in this order
LEFT = ("lock", "summary.json")  # of a try's: the run writes its own, with test figures


class Try(NamedTuple):
    """What a search tries; its fields are options."""

    lr: float
    weight_decay: float
    schedule: str

    @property
    def text(self) -> str:
        """Say it in words."""
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}, {self.schedule} schedule"


class Train(Protocol):
    """Trains a command line's run in a folder; returns its summary."""

    def __call__(self, line: Line, name: str, test: bool) -> dict: ...


def searched(line: Line, group: OneProcess, train: Train) -> Line:
    """Return the command line with the options that do best by validation in short runs.

    The best of these is the beginning of the run, or all of it, where its length does not change
    what it does.

    Args:
        train: test: is the run evaluated on the test set?
    """
    search, folder = line.groups.search, Path(line.stored["runs_dir"]) / line.name
    runs.Run(folder).check()  # before search.json goes there
    if line.stored["eval_test"]:
        print("search: tries look at validation alone, --eval-test is of the run that follows")
    schedules = search.search_schedule or [line.stored["schedule"]]
    grid = itertools.starmap(
        Try, itertools.product(search.search_lr, search.search_weight_decay, schedules)
    )
    accuracies = {tried: accuracy_of(tried, line, train) for tried in grid}
    best = chosen(accuracies)
    if not accuracies[best]:
        raise ValueError("--search: every try diverged; give lower rates by --search-lr")
    if group.rank == 0:
        cells = [tried._asdict() | {"val_acc": acc} for tried, acc in accuracies.items()]
        result = {"cells": cells, "best": best._asdict() | {"val_acc": accuracies[best]}}
        safe_files.write_json(folder / "search.json", result)
    print_table(accuracies, best)
    final, short = line.replaced(**best._asdict()), search.search_length
    whole = short in (None, line.stored["rounds" if "rounds" in line.stored else "epochs"])
    if whole or best.schedule == "constant":
        with group.first_then_others():
            if group.rank == 0:
                take_over(folder / "search" / place(best), folder)
    else:
        print(f"search: a {best.schedule} schedule is of the run's length: it is trained anew")
    return final


def accuracy_of(tried: Try, line: Line, train: Train) -> float:
    """Return the validation accuracy of a try; 0 where it diverges."""
    print(f"search: {tried.text}")
    cell = line.replaced(search=False, **tried._asdict())
    if length := line.groups.search.search_length:
        cell = cell.replaced(**{"rounds" if "rounds" in line.stored else "epochs": length})
    try:
        summary = train(cell, f"{line.name}/search/{place(tried)}", test=False)
    except (fedavg.ClientError, centralized.Diverged) as error:
        print(f"search: given up, {error}")
        return 0.0
    return summary["best_by_validation" if line.stored["early_stop"] else "final"]["val_acc"]


def place(tried: Try) -> str:
    """Return the name of a try's folder."""
    schedule = "" if tried.schedule == "constant" else f"-{tried.schedule}"
    return f"lr{tried.lr:.9g}-wd{tried.weight_decay:.9g}{schedule}"


def chosen(accuracies: dict[Try, float]) -> Try:
    """Return the try of the best validation accuracy, the first of equals."""
    return best_of({tried: [(0, accuracy)] for tried, accuracy in accuracies.items()})


def print_table(accuracies: dict[Try, float], best: Try) -> None:
    """Print what was tried, the best marked, and whether its rate is at the edge of the grid."""
    print(f"search: {'lr':>9}  weight decay  {'schedule':>11}  validation %")
    for tried, accuracy in accuracies.items():
        mark = "  <- chosen" if tried == best else ""
        figure = f"{100 * accuracy:.2f}" if accuracy else "diverged"
        row = f"{tried.lr:9.4g}  {tried.weight_decay:12.4g}  {tried.schedule:>11}  {figure:>12}"
        print(f"search: {row}{mark}")
    rates = sorted({tried.lr for tried in accuracies})
    if len(rates) > 1 and best.lr in (rates[0], rates[-1]):
        edge, other, factor = EDGES[best.lr == rates[0]]
        print(
            f"search: lr {best.lr:g} is the {edge} that was tried, and a {other} one may be "
            f"better: --search-lr {best.lr * factor:.2g} {best.lr:g}"
        )


def take_over(source: Path, folder: Path) -> None:
    """Copy a try's files to where the run goes, in an order that a kill may end anywhere."""
    if (folder / "config.json").exists():
        return
    files = [path for path in source.rglob("*") if path.is_file() and path.name not in LEFT]
    files.sort(key=lambda path: LAST.index(path.name) if path.name in LAST else -1)
    files.sort(key=lambda path: path.name != "config.json")
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        safe_files.write_atomically(target, lambda aside, path=path: shutil.copyfile(path, aside))
