"""An experiment as a table: the runs that each row needs, in which order, and what they came to.

A row tries its learning rates on its first seed; the one with the best validation accuracy runs on
the other seeds too. Rows share seeds, hence splits, shards, clients and batches: differences are
taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machine.runs import Run
from machine.safe_files import read_json
from study.typeset import NOT_RUN, markdown_table

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


LARGEST = 1e300  # figure of a run


class Cell(NamedTuple):
    """One run: its row's name, the command and its options, a learning rate and a seed."""

    row: str
    command: str
    options: tuple[str, ...]
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        rate = [f"lr{self.lr:g}"] if self.lr is not None else []
        return "-".join([self.row, *rate, f"seed{self.seed}"]).replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """What train.py is called with, but for where the run goes."""
        rate = ["--lr", f"{self.lr:g}"] if self.lr is not None else []
        return [self.command, *self.options, *rate, "--seed", f"{self.seed}"]


class Row(NamedTuple):
    """One line of a table: its key (the first columns), its runs' options, the rates to try.

    name: of its runs' folders, made of the key where it is empty.
    """

    key: tuple[str, ...]
    options: tuple[str, ...]
    rates: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    command: str = "fedavg"
    name: str = ""

    def cell(self, lr: float | None, seed: int) -> Cell:
        """Return the row's run at one learning rate on one seed."""
        return Cell(self.name or "-".join(self.key), self.command, self.options, lr, seed)


class Measure(NamedTuple):
    """A column: the figure that lies at `path` in a run's summary, times `factor`."""

    heading: str
    path: str
    factor: float = 1.0
    digits: int = 3

    def of(self, summary: dict) -> float | None:
        """Return the figure; None where the run has none."""
        for key in self.path.split("/"):
            summary = summary.get(key) if isinstance(summary, dict) else None
        number = isinstance(summary, int | float) and abs(summary) < LARGEST  # others' may be any
        return self.factor * summary if number else None

    def text(self, values: list[float], sign: str = "") -> str:
        """Write a mean, with the standard deviation of two or more: 51.23 ± 0.40."""
        if not values:
            return ""
        spread = f" ± {np.std(values, ddof=1):.{self.digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.{self.digits}f}{spread}"


SECONDS = Measure("seconds", "wall_seconds")
VALIDATION = Measure("validation %", "final/val_acc", 100, 2)
TEST = Measure("test %", "final/test_acc", 100, 2)
BYTES = Measure("bytes to dense", "bytes_to_dense")


class Experiment(NamedTuple):
    """A table.

    columns: headings of the rows' keys.
    baseline: the end of the key of the row that those with the same beginning are compared with.
    folder: of its runs, where another experiment's hold some of them; else that of its own name.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...] = (VALIDATION, TEST)
    baseline: tuple[str, ...] = ()
    folder: str = ""

    def cells(self, folder: Path, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that the rows need, in the order in which a part of them says most.

        Args:
            given_up: names of runs that will not come.
        """
        tries = range(max(len(row.rates) for row in self.rows))
        cells = [
            row.cell(lr, row.seeds[0])
            for i in tries
            for row in self.rows
            for lr in row.rates[i : i + 1]
        ]
        for row in self.rows:
            tried = self.tried(folder, row)
            names = [row.cell(lr, row.seeds[0]).name for lr in row.rates if lr not in tried]
            if tried and len(row.seeds) > 1 and all(name in given_up for name in names):
                cells += [row.cell(best_of(tried)[0], seed) for seed in row.seeds[1:]]
        return [cell for cell in cells if cell.name not in given_up]

    def missing(self, folder: Path, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that can be done now and are not."""
        cells = self.cells(folder, given_up)
        return [cell for cell in cells if summary(folder, cell) is None]

    def left(self, folder: Path) -> list[tuple[Row, int]]:
        """Return how many runs each row still lacks."""
        left = []
        for row in self.rows:
            tried = self.tried(folder, row)
            seeds = len(best_of(tried)[1]) if tried else 1  # that the chosen rate has, or will have
            left.append((row, len(row.rates) - len(tried) + len(row.seeds) - seeds))
        return left

    def seconds(self, folder: Path, row: Row) -> float | None:
        """Return how long a run of the row takes, by those that are done."""
        tried = self.tried(folder, row).values()
        took = [seconds for runs in tried for seconds in values(SECONDS, runs)]
        return float(np.mean(took)) if took else None

    def tried(self, folder: Path, row: Row) -> dict[float | None, dict[int, dict]]:
        """Return the summaries, by seed, of every learning rate that the first seed has run."""
        runs = {
            lr: {s: done for s in row.seeds if (done := summary(folder, row.cell(lr, s)))}
            for lr in row.rates
        }
        return {lr: by_seed for lr, by_seed in runs.items() if row.seeds[0] in by_seed}

    def best(self, folder: Path, row: Row) -> tuple[float | None, dict[int, dict]] | None:
        """Return what `best_of` says of the row's rates; None where none has run."""
        tried = self.tried(folder, row)
        return best_of(tried) if tried else None

    def lines(self, folder: Path) -> list[list[str]]:
        """Return the table's lines from the runs' summaries, the heading first."""
        rated = any(row.rates != (None,) for row in self.rows)
        compared = f"{self.measures[0].heading} to {' '.join(self.baseline)}"
        heading = [*self.columns, *["lr"] * rated, *(m.heading for m in self.measures)]
        heading += [compared] * bool(self.baseline) + ["seeds"] + ["other lr"] * rated
        lines, keys = [heading], {row.key: row for row in self.rows}
        for row in self.rows:
            if not (chosen := self.best(folder, row)):
                lines.append([*row.key, NOT_RUN, *[""] * (len(heading) - len(row.key) - 1)])
                continue
            lr, summaries = chosen
            lines.append([*row.key, *[f"{lr:g}" if lr is not None else ""] * rated])
            lines[-1] += [m.text(values(m, summaries)) for m in self.measures]
            if self.baseline:
                base = keys.get((*row.key[: -len(self.baseline)], *self.baseline))
                against = self.best(folder, base) if base and base is not row else None
                lines[-1].append(gain(self.measures[0], summaries, against[1]) if against else "")
            lines[-1] += [f"{len(summaries)}"] + [self.other_rates(folder, row, lr)] * rated
        return lines

    def other_rates(self, folder: Path, row: Row, chosen: float | None) -> str:
        """Return what the rates that were not chosen came to, on validation."""
        return ", ".join(
            f"{lr:g}: {mean(VALIDATION, summaries):.1f}"
            for lr, summaries in self.tried(folder, row).items()
            if lr != chosen
        )

    def table(self, folder: Path) -> str:
        """Return the table in Markdown."""
        return markdown_table(self.lines(folder))


def best_of(tried: dict[float | None, dict[int, dict]]) -> tuple[float | None, dict[int, dict]]:
    """Return the rate of the best mean validation accuracy, and its summaries by seed.

    Rates are compared on the seeds that all of them have run.
    """
    shared = set.intersection(*(set(summaries) for summaries in tried.values()))
    return max(tried.items(), key=lambda item: mean(VALIDATION, item[1], shared))


def summary(folder: Path, cell: Cell) -> dict | None:
    """Return a finished run's summary, or None.

    Raises:
        ValueError: the folder holds another run under this name.
    """
    run = Run(folder / cell.name)
    if (finished := run.summary(unbound=True)) is None:
        return None
    try:
        options = read_json(run.config_path)["options"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{run.folder} is damaged: delete it, to have it run again") from None
    if differing := next(
        (d for d in given(cell).items() if not same(options.get(d[0]), d[1])), None
    ):
        name, value = differing
        raise ValueError(
            f"{run.folder} was made by another version of its experiment: {name} is "
            f"{options.get(name)} there and {value} here; give another --results, or delete it"
        )
    for unit in ("round", "epoch"):
        reached, wanted = finished.get(unit), options.get(f"{unit}s")
        if reached != wanted and None not in (reached, wanted) and "stopped_early" not in finished:
            return None  # it has been told to go on since, and has not got there
    return finished


def given(cell: Cell) -> dict[str, str]:
    """Return the options of a run that have a value, by the names that its config has."""
    words, options = cell.arguments, {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and not value.startswith("--"):
            options[word[2:].replace("-", "_")] = value
    return options


def same(stored: object, value: str) -> bool:
    """Tell whether a stored option is what was typed; raw is stored as None (--mask-lr)."""
    try:
        return float(stored) == float(value)
    except (TypeError, ValueError):
        return str("raw" if stored is None else stored) == value


def values(measure: Measure, summaries: dict[int, dict]) -> list[float]:
    """Return a measure of several seeds, as far as they have it."""
    figures = (measure.of(figures) for figures in summaries.values())
    return [figure for figure in figures if figure is not None]


def mean(
    measure: Measure, summaries: dict[int, dict], seeds: Collection[int] | None = None
) -> float:
    """Return the mean of a measure over these seeds, or over all; 0 where there is none."""
    chosen = {s: f for s, f in summaries.items() if seeds is None or s in seeds}
    return float(np.mean(values(measure, chosen) or [0.0]))


def gain(measure: Measure, summaries: dict[int, dict], against: dict[int, dict]) -> str:
    """Write the mean difference over shared seeds, with its 95 % interval: +2.01 [+1.40, +2.62]."""
    pairs = [(measure.of(summaries[s]), measure.of(against[s])) for s in summaries if s in against]
    gains = [a - b for a, b in pairs if a is not None and b is not None]
    text = measure.text(gains[:1], sign="+") if len(gains) == 1 else ""
    if len(gains) > 1:
        quantile = T_QUANTILES[min(len(gains) - 1, len(T_QUANTILES)) - 1]
        middle, half = np.mean(gains), quantile * np.std(gains, ddof=1) / math.sqrt(len(gains))
        low, high = (f"{x:+.{measure.digits}f}" for x in (middle - half, middle + half))
        text = f"{middle:+.{measure.digits}f} [{low}, {high}]"
    return text
