"""An experiment as a table: the runs that each row needs, in which order, and what they came to.

A row tries its learning rates on its first seed, and further ones while the best of them lies at
an end; the one with the best validation accuracy runs on the other seeds too. Rows share seeds,
hence splits, shards, clients and batches: differences are taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machine.safe_files import DamagedFile
from study.packed import Finished, finished
from study.typeset import NOT_RUN, markdown_table

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # of rates
WIDENED = 3  # rates that a row may try beyond its own
MOVED = 0.3  # points: what another machine's rounding moves, of 5,000 images
NO_DIFFERENCE = "none"
PLACE, INSIDE = "of the rates tried", "inside"
ONE_SEED = "1: no spread"
INTERVAL = 3  # seeds, from which on a difference has an interval


def rung(lr: float, offset: int = 0) -> float:
    """Return the rate `offset` rungs above `lr`."""
    return LADDER[LADDER.index(lr) + offset]


def around(lr: float, tries: int) -> tuple[float, ...]:
    """Return `lr`, then the rungs below and above it, as many as are tried."""
    return (lr, rung(lr, -1), rung(lr, 1))[:tries]


def beyond(best: float, rates: Collection[float]) -> float | None:
    """Return the next rate of LADDER beyond the end of `rates` that the best of them is; or None.

    Of a single rate it is the higher neighbour.
    """
    if best == max(rates):
        return next((lr for lr in LADDER if lr > best), None)
    if best == min(rates):
        return next((lr for lr in reversed(LADDER) if lr < best), None)
    return None


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
    widened: rates that it may try beyond these, while the best lies at an end of those tried.
    """

    key: tuple[str, ...]
    options: tuple[str, ...]
    rates: tuple[float | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    command: str = "fedavg"
    name: str = ""
    widened: int = WIDENED

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


SECONDS = Measure("seconds", "wall_seconds", digits=0)
VALIDATION = Measure("validation %", "final/val_acc", 100, 2)
TEST = Measure("test %", "final/test_acc", 100, 2)
BYTES = Measure("bytes to dense", "bytes_to_dense")


class Experiment(NamedTuple):
    """A table.

    columns: headings of the rows' keys.
    baseline: the end of the key of the row that those with the same beginning are compared with.
    folder: of its runs, where another experiment's hold some of them; else that of its own name.
    decides: whether the experiments after it wait for its runs, which say what they are.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...] = (VALIDATION, TEST)
    baseline: tuple[str, ...] = ()
    folder: str = ""
    decides: bool = False

    def thinned(self) -> Experiment:
        """Return the first rows that have, together, every value of every column; none widens."""
        rows, seen = [], set()
        for row in self.rows:
            if not seen >= {*enumerate(row.key)}:
                rows.append(row)
            seen |= {*enumerate(row.key)}
        return self._replace(rows=tuple(rows)).limited(0)

    def limited(self, widened: int) -> Experiment:
        """Return the experiment whose rows try no more than so many rates beyond their own."""
        rows = tuple(row._replace(widened=min(row.widened, widened)) for row in self.rows)
        return self._replace(rows=rows)

    def grid(
        self, folder: Path, row: Row, given_up: Collection[str] = ()
    ) -> tuple[float | None, ...]:
        """Return the rates that a row tries on its first seed, as far as its runs tell.

        Args:
            given_up: names of runs that will not come.
        """
        rates, seed = row.rates, row.seeds[0]
        for _ in range(row.widened if row.rates != (None,) else 0):
            runs = {lr: summary(folder, row.cell(lr, seed)) for lr in rates}
            tried = {lr: {seed: done} for lr, done in runs.items() if done}
            waiting = (row.cell(lr, seed).name for lr in rates if lr not in tried)
            if not tried or any(name not in given_up for name in waiting):
                break
            if (further := beyond(best_of(tried)[0], tried)) is None or further in rates:
                break
            rates = (*rates, further)
        return rates

    def cells(self, folder: Path, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that the rows need, in the order in which a part of them says most."""
        grids = [(row, self.grid(folder, row, given_up)) for row in self.rows]
        tries = range(max(len(rates) for _, rates in grids))
        cells = [
            row.cell(lr, row.seeds[0])
            for i in tries
            for row, rates in grids
            for lr in rates[i : i + 1]
        ]
        for row, rates in grids:
            tried = self.tried(folder, row)
            names = [row.cell(lr, row.seeds[0]).name for lr in rates if lr not in tried]
            if tried and len(row.seeds) > 1 and all(name in given_up for name in names):
                cells += [row.cell(best_of(tried)[0], seed) for seed in row.seeds[1:]]
        return [cell for cell in cells if cell.name not in given_up]

    def missing(self, folder: Path, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that can be done now and are not."""
        cells = self.cells(folder, given_up)
        return [cell for cell in cells if summary(folder, cell) is None]

    def left(self, folder: Path) -> list[tuple[Row, int]]:
        """Return how many runs each row still lacks, by the rates that it is known to try."""
        left = []
        for row in self.rows:
            tried = self.tried(folder, row)
            seeds = len(best_of(tried)[1]) if tried else 1  # that the chosen rate has, or will have
            rates = set(self.grid(folder, row)) | tried.keys()
            left.append((row, len(rates) - len(tried) + len(row.seeds) - seeds))
        return left

    def runs(self, folder: Path, row: Row) -> list[Finished]:
        """Return the row's runs that are done, of every rate."""
        names = [row.cell(lr, s).name for lr, done in self.tried(folder, row).items() for s in done]
        return [finished(folder, name) for name in names]

    def tried(self, folder: Path, row: Row) -> dict[float | None, dict[int, dict]]:
        """Return the summaries, by seed, of every learning rate that the first seed has run."""
        runs = {
            lr: {s: done for s in row.seeds if (done := summary(folder, row.cell(lr, s)))}
            for lr in self.grid(folder, row)
        }
        return {lr: by_seed for lr, by_seed in runs.items() if row.seeds[0] in by_seed}

    def best(self, folder: Path, row: Row) -> tuple[float | None, dict[int, dict]] | None:
        """Return what `best_of` says of the row's rates; None where none has run."""
        tried = self.tried(folder, row)
        return best_of(tried) if tried else None

    def place(self, folder: Path, row: Row) -> str:
        """Say where the best rate lies among those tried: only inside is it bracketed."""
        tried = self.tried(folder, row)
        if not tried or None in tried:
            return ""
        if len(tried) == 1:
            return "the only one"
        lr = best_of(tried)[0]
        return {min(tried): "the lowest", max(tried): "the highest"}.get(lr, INSIDE)

    def lines(self, folder: Path) -> list[list[str]]:
        """Return the table's lines from the runs' summaries, the heading first."""
        rated = any(row.rates != (None,) for row in self.rows)
        compared = f"{self.measures[0].heading} to {' '.join(self.baseline)}"
        heading = [*self.columns, *["lr", PLACE] * rated, *(m.heading for m in self.measures)]
        heading += [compared] * bool(self.baseline) + ["seeds"] + ["other lr"] * rated
        lines, keys = [heading], {row.key: row for row in self.rows}
        for row in self.rows:
            if not (chosen := self.best(folder, row)):
                lines.append([*row.key, NOT_RUN, *[""] * (len(heading) - len(row.key) - 1)])
                continue
            lr, summaries = chosen
            rate = f"{lr:g}" if lr is not None else ""
            lines.append([*row.key, *[rate, self.place(folder, row)] * rated])
            lines[-1] += [m.text(values(m, summaries)) for m in self.measures]
            if self.baseline:
                base = keys.get((*row.key[: -len(self.baseline)], *self.baseline))
                against = self.best(folder, base) if base and base is not row else None
                lines[-1].append(gain(self.measures[0], summaries, against[1]) if against else "")
            seeds = f"{len(summaries)}" if len(summaries) > 1 else ONE_SEED
            lines[-1] += [seeds] + [self.other_rates(folder, row, lr)] * rated
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
    where = folder / cell.name
    try:
        if (run := finished(folder, cell.name)) is None:
            return None
        options = run.config["options"]
    except (OSError, DamagedFile, KeyError) as error:
        raise ValueError(f"{where} is damaged: delete it, to have it run again ({error})") from None
    if differing := next(
        (d for d in given(cell).items() if not same(options.get(d[0]), d[1])), None
    ):
        name, value = differing
        raise ValueError(
            f"{where} was made by another version of its experiment: {name} is "
            f"{options.get(name)} there and {value} here; give another --results, or delete it"
        )
    for unit in ("round", "epoch"):
        reached, wanted = run.summary.get(unit), options.get(f"{unit}s")
        early = "stopped_early" in run.summary
        if reached != wanted and None not in (reached, wanted) and not early:
            return None  # it has been told to go on since, and has not got there
    return run.summary


def given(cell: Cell) -> dict[str, str]:
    """Return the options of a run that have a value, by the names that its config has."""
    options: dict[str, list[str]] = {}
    for word in cell.arguments:
        if word.startswith("--"):
            values = options[word[2:].replace("-", "_")] = []
        elif options:
            values.append(word)
    return {name: " ".join(values) for name, values in options.items() if values}


def same(stored: object, value: str) -> bool:
    """Tell whether a stored option is what was typed; raw is stored as None (--mask-lr)."""
    if isinstance(stored, list):
        return " ".join(map(str, stored)) == value
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
    """Write the difference to another row, taken seed by seed.

    From INTERVAL seeds on their mean and its 95 % interval, +2.01 [+1.40, +2.62]; of fewer the
    differences themselves. None is said of less than MOVED, whatever the interval.
    """
    pairs = [(measure.of(summaries[s]), measure.of(against[s])) for s in summaries if s in against]
    gains = [a - b for a, b in pairs if a is not None and b is not None]
    if not gains:
        return ""
    text = ", ".join(f"{x:+.{measure.digits}f}" for x in gains)
    if len(gains) >= INTERVAL:
        quantile = T_QUANTILES[min(len(gains) - 1, len(T_QUANTILES)) - 1]
        middle, half = np.mean(gains), quantile * np.std(gains, ddof=1) / math.sqrt(len(gains))
        low, high = (f"{x:+.{measure.digits}f}" for x in (middle - half, middle + half))
        text = f"{middle:+.{measure.digits}f} [{low}, {high}]"
    return text if abs(np.mean(gains)) >= MOVED else f"{NO_DIFFERENCE} ({text})"
