"""The experiments as data: which runs make which table, and the tables from their logs.

An experiment is rows of a table. Each row tries its learning rates on all seeds, the first rate of
every row before the second of any, and shows the one with the best mean validation accuracy.
Rows share their seeds, hence splits, shards, clients and batches: differences are taken seed by
seed. `train.py sweep NAME` runs what is missing.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ViT-Ti/16 at 64 px: what two CPU cores can train
CPU = (
    *("--model", "vit_ti16", "--weights", "data/vit_tiny_patch16_224.pth", "--image-size", "64"),
    *("--batch-size", "32", "--threads", "1"),
)
SHARDINGS = {"iid": (), "nc1": ("--nc", "1"), "nc5": ("--nc", "5")}


class Cell(NamedTuple):
    """One run: the row of the table it belongs to, its learning rate and seed, its options."""

    row: tuple[str, ...]
    lr: float
    seed: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's folder."""
        return "-".join([*self.row, f"lr{self.lr:g}", f"seed{self.seed}"]).replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """What `train.py fedavg` is called with."""
        return [*self.options, "--lr", f"{self.lr:g}", "--seed", f"{self.seed}"]


class Row(NamedTuple):
    """One line of a table: its key (the first columns), its runs' options, the rates to try."""

    key: tuple[str, ...]
    options: tuple[str, ...]
    rates: tuple[float, ...]

    def cell(self, lr: float, seed: int) -> Cell:
        """Return the row's run at one learning rate on one seed."""
        return Cell(self.key, lr, seed, self.options)


class Experiment(NamedTuple):
    """A table: its rows, the seeds of each, and the row that others of its kind are compared with.

    columns: headings of the rows' keys; a row is compared with `baseline` of the same first column.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    baseline: tuple[str, ...]

    def cells(self) -> list[Cell]:
        """Return all runs, in the order in which a table that is cut short says most."""
        tries = range(max(len(row.rates) for row in self.rows))
        pairs = [(row, lr) for i in tries for row in self.rows for lr in row.rates[i : i + 1]]
        return [row.cell(lr, seed) for row, lr in pairs for seed in self.seeds]

    def missing(self, folder: Path) -> list[Cell]:
        """Return the runs that are not done."""
        return [cell for cell in self.cells() if summary(folder, cell) is None]

    def tried(self, folder: Path, row: Row) -> dict[float, dict[int, dict]]:
        """Return the summaries of every learning rate that all seeds have run, by seed."""
        runs = {lr: {s: summary(folder, row.cell(lr, s)) for s in self.seeds} for lr in row.rates}
        return {lr: found for lr, found in runs.items() if all(found.values())}

    def best(self, folder: Path, row: Row) -> tuple[float, dict[int, dict]] | None:
        """Return the learning rate with the best mean validation accuracy, and its summaries."""
        tried = self.tried(folder, row)
        return max(tried.items(), key=lambda item: mean(item[1], "val")) if tried else None

    def table(self, folder: Path) -> str:
        """Return a Markdown table from the runs' summaries; accuracies in percent."""
        groups = list(dict.fromkeys(row.key[0] for row in self.rows))
        named = {TO: f"to {self.baseline[0]}"} if self.baseline else {}
        heading = [*self.columns, *(named.get(column, column) for column in COLUMNS)]
        lines = [heading, ["---"] * len(heading)]
        best = {row.key: self.best(folder, row) for row in self.rows}
        for row in sorted(self.rows, key=lambda row: groups.index(row.key[0])):
            if best[row.key]:
                base = (
                    None if row.key[1:] == self.baseline else best.get((row.key[0], *self.baseline))
                )
                lines.append([*row.key, *self.line(folder, row, *best[row.key], base)])
            else:
                lines.append([*row.key, "not run", *[""] * (len(COLUMNS) - 1)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def line(self, folder: Path, row: Row, lr: float, found: dict, base: tuple | None) -> list[str]:
        """Return a row's COLUMNS; `base`: what `best` says of the row to compare with."""
        others = [
            f"{other:g}: {100 * mean(runs, 'val'):.1f}"
            for other, runs in self.tried(folder, row).items()
            if other != lr
        ]
        gains = (
            [accuracy(found[s], "val") - accuracy(base[1][s], "val") for s in found] if base else []
        )
        return [
            f"{lr:g}",
            percent([accuracy(figures, "val") for figures in found.values()]),
            percent([accuracy(figures, "test") for figures in found.values()]),
            percent(gains, sign="+"),
            f"{len(found)}",
            f"{np.mean([figures['bytes_to_dense'] for figures in found.values()]):.3f}",
            ", ".join(others),
        ]


TO = "to baseline"
# of a table, after those of the rows' keys
COLUMNS = ("lr", "validation", "test", TO, "seeds", "bytes to dense", "other lr")


def summary(folder: Path, cell: Cell) -> dict | None:
    """Return a finished cell's summary, or None."""
    path = folder / cell.name / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def accuracy(figures: dict, part: str) -> float:
    """Return the final accuracy of a run on "val" or "test"."""
    return figures["final"][f"{part}_acc"]


def mean(found: dict[int, dict], part: str) -> float:
    """Return the mean final accuracy of several seeds."""
    return float(np.mean([accuracy(figures, part) for figures in found.values()]))


def percent(values: list[float], sign: str = "") -> str:
    """Write a mean of shares as 51.23, with the standard deviation of two or more: 51.23 ± 0.40."""
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.2f}{spread}"


# ---------------------------------------------------------------------------- the experiments


LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # to choose from
RUNGS = {  # the lower of the two rates tried, iid: the less the entries matter, the longer the step
    ("dense", "0"): 0.003,
    **{("least-sensitive", s): lr for s, lr in (("0.5", 0.01), ("0.9", 0.03), ("0.99", 0.3))},
    **{("most-sensitive", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.003), ("0.99", 0.01))},
    **{("lowest-magnitude", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
    **{("highest-magnitude", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
    **{("random", s): lr for s, lr in (("0.5", 0.003), ("0.9", 0.01), ("0.99", 0.03))},
}


def rules() -> Experiment:
    """Five mask rules at three sparsities against dense training, and calibration rounds 1 to 8."""
    training = (*CPU, "--J", "4", "--rounds", "4", "--eval-every", "4")
    rows = []
    for ((rule, sparsity), low), sharding in itertools.product(RUNGS.items(), ("iid", "nc1")):
        split = SHARDINGS[sharding]
        rung = LADDER.index(low) - (0 if sharding == "iid" else 3)
        options, rates = (*training, *split), LADDER[rung : rung + 2]
        if rule != "dense":
            options += ("--mask-rule", rule, "--sparsity", sparsity, "--calibration-images", "500")
        rows.append(Row((sharding, rule, sparsity), options, rates))
        if (rule, sparsity) == ("least-sensitive", "0.9"):
            for rounds in ("1", "2", "8"):  # 4 is the default
                key = (sharding, rule, f"{sparsity} R={rounds}")
                rows.append(Row(key, (*options, "--calibration-rounds", rounds), rates))
    return Experiment(("sharding", "rule", "sparsity"), tuple(rows), (0, 1), ("dense", "0"))


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


def methods() -> Experiment:
    """Every federated method at the same budget of local steps, under a frozen ridge head.

    fedsgd takes one step a round, on all of a client's images.
    """
    training = (*CPU, "--J", "16", "--batch-size", "16", "--fraction", "0.05", "--rounds", "4")
    rows = []
    for (method, options), sharding in itertools.product(METHODS.items(), ("nc1", "nc5")):
        rung = LADDER.index(1e-4 if sharding == "nc1" else 1e-3) + 4 * (method == "fedsgd")
        options = (*training, "--eval-every", "4", *SHARDINGS[sharding], *options)
        rates = tuple(LADDER[i] for i in (rung, rung - 1, rung - 2))
        rows.append(Row((sharding, method), options, rates))
    return Experiment(("sharding", "method"), tuple(rows), (0,), ("fedavg",))


EXPERIMENTS = {"rules": rules(), "methods": methods()}
