"""The experiments as data: which runs make which table, and the tables from their logs.

A cell is one run: its name and the options of `train.py fedavg` that make it. A table row gathers
the seeds of one configuration; where several learning rates were tried, the one with the best mean
validation accuracy counts, and the others are listed. `train.py sweep NAME` runs what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from masks import RULES

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


def rules_cells() -> Iterator[Cell]:
    """Five mask rules at three sparsities against dense training, and calibration rounds 1 to 8."""
    images = ("--calibration-images", "500")
    rows: dict[tuple[str, ...], tuple[str, ...]] = {("dense", "0"): ()}
    for rule, sparsity in itertools.product(RULES, ("0.5", "0.9", "0.99")):
        rows[rule, sparsity] = ("--mask-rule", rule, "--sparsity", sparsity, *images)
    least = ("--mask-rule", "least-sensitive", "--sparsity", "0.9", *images)
    for rounds in ("1", "2", "8"):  # 4 is the default
        rows["least-sensitive", f"0.9 R={rounds}"] = (*least, "--calibration-rounds", rounds)
    rates = {"iid": (0.01, 0.1), "nc1": (0.001, 0.01)}
    training = (*CPU, "--J", "4", "--rounds", "8", "--eval-every", "8")
    for seed, (sharding, split) in itertools.product((0, 1), SHARDINGS.items()):
        for (row, mask), lr in itertools.product(rows.items(), rates[sharding]):
            yield Cell((sharding, *row), lr, seed, (*training, *split, *mask))


EXPERIMENTS: dict[str, Callable[[], Iterator[Cell]]] = {"rules": rules_cells}


def summary(folder: Path, cell: Cell) -> dict | None:
    """Return a finished cell's summary, or None."""
    path = folder / cell.name / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(folder: Path, cells: Sequence[Cell]) -> str:
    """Return a Markdown table of accuracies in percent, one line a row, from the cells' logs."""
    rows: dict[tuple[str, ...], dict[float, list[dict]]] = {}
    for cell in cells:
        tried = rows.setdefault(cell.row, {}).setdefault(cell.lr, [])
        if found := summary(folder, cell):
            tried.append(found)
    lines = [
        "| sharding | rule | sparsity | lr | validation | test | seeds | sent | other lr |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, tried in rows.items():
        means = {lr: accuracy(found, "val_acc") for lr, found in tried.items() if found}
        if not means:
            lines.append(f"| {' | '.join(row)} | not run | | | | | |")
            continue
        best = max(means, key=lambda lr: means[lr][0])
        found = tried[best]
        others = ", ".join(f"{lr:g}: {100 * means[lr][0]:.1f}" for lr in means if lr != best)
        share = np.mean([f["bytes_to_dense"] for f in found])
        test = accuracy(found, "test_acc")
        lines.append(
            f"| {' | '.join(row)} | {best:g} | {percent(*means[best])} | {percent(*test)} | "
            f"{len(found)} | {share:.3f} | {others} |"
        )
    return "\n".join(lines) + "\n"


def accuracy(found: Sequence[dict], key: str) -> tuple[float, float | None]:
    """Return mean and, of two or more seeds, standard deviation of a final accuracy."""
    values = [f["final"][key] for f in found]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def percent(mean: float, deviation: float | None) -> str:
    """Write 0.5123, 0.004 as 51.23 ± 0.40."""
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")
