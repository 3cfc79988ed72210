"""Which learning rates ended highest under each mask, against the rate that follows the mask.

    python -m study.rates [results/cpu]    writes its rates.csv, rate_powers.csv, update_norms.csv,
                                           and docs/rates.png

A mask that keeps the share s of all sensitivity takes dense training's rate times s^(-1/2)
(matched: dense training's update norm) or s^-1 (functional: its change of the loss). Dense
training's rate is the best of those that it tried itself. Where nothing is scored s is the density;
of the masks that score it is in shares.csv (bench/bench_masks.py). All of seed 0, on which every
rate was tried; the best is by validation accuracy.
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import masks
from study import figures, packed
from study.past import Past
from study.tables import INSIDE, best_rate, place

SEED = 0
LEAST = 1e-4  # a mask of a smaller share holds next to no sensitivity
FOLDER = "rules"  # which holds the runs of the tables rules and sparsity
HEADING = (
    *("sharding", "rule", "sparsity", "calibration_rounds", "sensitivity_share", "rates", "best"),
    *("bracketed", "matched", "best_to_matched", "functional", "best_to_functional"),
)


class Key(NamedTuple):
    """What a row of runs is of; dense training has rule dense and sparsity 0."""

    sharding: str
    rule: str
    sparsity: float
    rounds: int  # of calibration; 0 where nothing is scored


class Tried(NamedTuple):
    """The rates that one mask has tried.

    accuracy: rate -> validation accuracy.
    share: of all sensitivity, that the mask keeps.
    dense: the best rate of dense training on the same clients.
    """

    key: Key
    accuracy: Mapping[float, float]
    share: float
    dense: float

    @property
    def best(self) -> float:
        """The rate with the highest validation accuracy, the lowest of equals."""
        return best_rate(self.accuracy)

    @property
    def bracketed(self) -> bool:
        """Whether both a lower and a higher rate were tried that ended lower than the best."""
        return place(self.accuracy) == INSIDE

    def follows(self, how: str) -> float:
        """Return the rate that follows the mask; how: of masks.RATES."""
        return self.dense * masks.rate_factor(self.share, how)

    def line(self) -> list[str]:
        """Return the row's cells, as HEADING has them."""
        rates = " ".join(f"{rate:g}" for rate in sorted(self.accuracy))
        cells = [*map(str, self.key), f"{self.share:.4g}", rates, f"{self.best:g}"]
        cells.append("yes" if self.bracketed else "no")
        for how in ("matched", "functional"):
            rate = self.follows(how)
            cells += [f"{rate:.3g}", two_digits(self.best / rate)]
        return cells


def two_digits(value: float) -> str:
    """Write a ratio to two digits, without an exponent from a hundred on."""
    return f"{float(f'{value:.2g}'):g}"


def tried(results: Path) -> list[Tried]:
    """Return the rates of every mask whose share is there, from the runs of a scale's results."""
    accuracy: dict[Key, dict[float, float]] = {}
    for run in packed.read(results / FOLDER / packed.FILE).values():
        options = run.options
        scores = options["consensus"], options["calibration_fraction"]
        if options["seed"] == SEED and scores in ((None, None), ("mean", 1)):
            rates = accuracy.setdefault(key_of(run), {})
            rates[options["lr"]] = run.summary["final"]["val_acc"]
    shares = read_shares(results / "shares.csv")
    rows = []
    accuracy = {key: dict(sorted(rates.items())) for key, rates in sorted(accuracy.items())}
    for key, rates in accuracy.items():
        dense = best_rate(accuracy[Key(key.sharding, "dense", 0.0, 0)])
        share = shares.get(key) if key.rounds else 1 - key.sparsity
        rows += [Tried(key, rates, share, dense)] if share is not None else []
    return rows


def key_of(run: Past) -> Key:
    """Return what a run is of, by its options."""
    if (rule := run.options["mask_rule"]) is None:
        return Key(run.sharding, "dense", 0.0, 0)
    rounds = run.options["calibration_rounds"] if masks.needs_scores(rule) else 0
    return Key(run.sharding, rule, run.options["sparsity"], rounds)


def read_shares(path: Path) -> dict[Key, float]:
    """Return the share of all sensitivity that each calibrated mask keeps."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {
        Key(row["sharding"], row["rule"], float(row["sparsity"]), int(row["rounds"])): float(
            row["sensitivity_share"]
        )
        for row in csv.DictReader(lines)
    }


def exponent(rows: Iterable[Tried]) -> float:
    """Return the a of best rate / dense training's = share^-a, by least squares of the logarithms.

    1/2 is the matched rate, 1 the functional one. Only of masks whose best rate is bracketed; NaN
    where none is.
    """
    pairs = [
        (-math.log(row.share), math.log(row.best / row.dense)) for row in rows if row.bracketed
    ]
    return sum(x * y for x, y in pairs) / (sum(x * x for x, _ in pairs) or math.nan)


def lines(rows: list[Tried]) -> list[list[str]]:
    """Return the table of rates, with its heading."""
    return [[*HEADING], *(row.line() for row in rows)]


def powers(rows: list[Tried]) -> list[list[str]]:
    """Return the powers of the share that best rates follow, with a heading.

    Of each sharding's masks, and of those whose share is not below LEAST, which have the longest
    lever; each with the interval that holds 95 % of the powers of masks drawn from them anew.
    """
    table = [["sharding", "shares_from", "masks", "bracketed", "power", "low", "high"]]
    shardings = dict.fromkeys(row.key.sharding for row in rows)
    for sharding, least in itertools.product(shardings, (0.0, LEAST)):
        masked = [
            row
            for row in rows
            if row.key.sharding == sharding and row.key.rule != "dense" and row.share >= least
        ]
        inside = [row for row in masked if row.bracketed]
        draws = np.random.default_rng(0).integers(len(inside) or 1, size=(2000, len(inside)))
        again = [-exponent([inside[i] for i in draw]) for draw in draws]
        cells = [-exponent(inside), *np.quantile(again, (0.025, 0.975))]
        counts = f"{len(masked)}", f"{len(inside)}"
        table.append([sharding, f"{least:g}", *counts, *(f"{cell:.2f}" for cell in cells)])
    return table


def norms(results: Path) -> list[list[str]]:
    """Return how long clients' updates were, over what the matched law says, with a heading.

    It says that a mask of share s, trained at lr, moves lr s^(1/2) where dense training moves its
    own rate: of the runs of `linearity`, each beside dense training's of its clients and seed.
    """
    shares, table, lengths = read_shares(results / "shares.csv"), [], {}
    for run in packed.read(results / "linearity" / packed.FILE).values():
        at = key_of(run), run.options["seed"], run.options["lr"]
        lengths[at] = run.summary["final"]["update_norm"]
    of_dense = {
        (key.sharding, seed): length / lr
        for (key, seed, lr), length in lengths.items()
        if key.rule == "dense"
    }
    for (key, seed, lr), length in sorted(lengths.items()):
        if key.rule == "dense" or (key.rounds and key not in shares):
            continue
        share = shares[key] if key.rounds else 1 - key.sparsity
        ratio = length / (of_dense[key.sharding, seed] * lr * math.sqrt(share))
        cells = key.sharding, key.rule, f"{key.sparsity}", f"{seed}", f"{lr:g}"
        table.append([*cells, f"{length:.4g}", f"{ratio:.2f}"])
    heading = ["sharding", "rule", "sparsity", "seed", "lr", "update_norm", "to_matched_law"]
    return [heading, *table]


def main(results: Path) -> None:
    """Write the tables of rates, of their powers and of updates' norms, and the figure."""
    rows = tried(results)
    tables = {"rates": lines(rows), "rate_powers": powers(rows), "update_norms": norms(results)}
    for name, table in tables.items():
        text = "\n".join(",".join(line) for line in table)
        (results / f"{name}.csv").write_text(f"{text}\n", encoding="utf-8")
    path = Path(__file__).resolve().parent.parent / "docs" / "rates.png"
    figures.draw_rates(rows, path)
    print(f"written: {', '.join(f'{results / name}.csv' for name in tables)}, {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/cpu"))
