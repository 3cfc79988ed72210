"""The experiments as data: which runs make which table, and the tables from their logs.

An experiment is rows of a table. A row tries its learning rates on the first seed; the one with the
best validation accuracy is run on the other seeds too, so that every row is compared at its best.
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
SHARDINGS = {"iid": (), "nc1": ("--nc", "1")}


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

    @property
    def size(self) -> int:
        """How many runs make the table."""
        return sum(len(row.rates) + len(self.seeds) - 1 for row in self.rows)

    def tried(self, folder: Path, row: Row) -> dict[float, dict | None]:
        """Return what each learning rate came to on the first seed, None where it is missing."""
        return {lr: summary(folder, row.cell(lr, self.seeds[0])) for lr in row.rates}

    def chosen(self, folder: Path, row: Row) -> float | None:
        """Return the row's best learning rate by validation, None while some are not tried."""
        tried = self.tried(folder, row)
        if None in tried.values():
            return None
        return max(tried, key=lambda lr: tried[lr]["final"]["val_acc"])

    def cells(self, folder: Path) -> list[Cell]:
        """Return the runs that are known by what `folder` holds: the search first, then seeds."""
        tries = max(len(row.rates) for row in self.rows)  # one rate of every row, then the next
        pairs = [
            (row, lr) for i in range(tries) for row in self.rows for lr in row.rates[i : i + 1]
        ]
        known = [row.cell(lr, self.seeds[0]) for row, lr in pairs]  # so two do not make one mask
        for seed, row in itertools.product(self.seeds[1:], self.rows):
            if (lr := self.chosen(folder, row)) is not None:
                known.append(row.cell(lr, seed))
        return known

    def missing(self, folder: Path, failed: set[str]) -> list[Cell]:
        """Return the known runs that are neither done nor named in `failed`."""
        cells = self.cells(folder)
        return [c for c in cells if c.name not in failed and summary(folder, c) is None]

    def runs(self, folder: Path, row: Row) -> dict[int, dict]:
        """Return the summaries at the chosen learning rate, by seed."""
        lr = self.chosen(folder, row)
        cells = {} if lr is None else {seed: row.cell(lr, seed) for seed in self.seeds}
        found = {seed: summary(folder, cell) for seed, cell in cells.items()}
        return {seed: figures for seed, figures in found.items() if figures}

    def table(self, folder: Path) -> str:
        """Return a Markdown table from the runs' summaries; accuracies in percent."""
        runs = {row.key: self.runs(folder, row) for row in self.rows}
        lines = [[*self.columns, *COLUMNS], ["---"] * (len(self.columns) + len(COLUMNS))]
        for row in self.rows:
            if found := runs[row.key]:
                base = runs.get((row.key[0], *self.baseline), {})
                lines.append([*row.key, *self.line(folder, row, found, base)])
            else:
                lines.append([*row.key, "not run", *[""] * (len(COLUMNS) - 1)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def line(self, folder: Path, row: Row, found: dict[int, dict], base: dict) -> list[str]:
        """Return a row's COLUMNS; `base` holds the baseline's summaries by seed."""
        gains = [accuracy(found[s], "val") - accuracy(base[s], "val") for s in found if s in base]
        chosen = self.chosen(folder, row)
        others = [
            f"{lr:g}: {100 * accuracy(figures, 'val'):.1f}"
            for lr, figures in self.tried(folder, row).items()
            if lr != chosen
        ]
        return [
            f"{chosen:g}",
            percent([accuracy(figures, "val") for figures in found.values()]),
            percent([accuracy(figures, "test") for figures in found.values()]),
            "" if found is base else percent(gains, sign="+"),
            f"{len(found)}",
            f"{np.mean([figures['bytes_to_dense'] for figures in found.values()]):.3f}",
            ", ".join(others),
        ]


# of a table, after those of the rows' keys
COLUMNS = ("lr", "validation", "test", "to dense", "seeds", "bytes to dense", "other lr")


def summary(folder: Path, cell: Cell) -> dict | None:
    """Return a finished cell's summary, or None."""
    path = folder / cell.name / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def accuracy(figures: dict, part: str) -> float:
    """Return the final accuracy of a run on "val" or "test"."""
    return figures["final"][f"{part}_acc"]


def percent(values: list[float], sign: str = "") -> str:
    """Write a mean of shares as 51.23, with the standard deviation of two or more: 51.23 ± 0.40."""
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.2f}{spread}"


# ---------------------------------------------------------------------------- the experiments


LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # learning rates to choose from
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
    for (sharding, split), ((rule, sparsity), low) in itertools.product(
        SHARDINGS.items(), RUNGS.items()
    ):
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


EXPERIMENTS = {"rules": rules()}
