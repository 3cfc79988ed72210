"""An experiment as a table: the runs that each row needs, in which order, and what they came to.

A row tries its learning rates on its first seed, and further ones while the best of them lies at
an end; the one with the best validation accuracy runs on the other seeds too. Rows share seeds,
hence splits, shards, clients and batches: differences are taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from study.measures import TEST, VALIDATION, Measure, gain, merits
from study.packed import run_of
from study.past import Past
from study.typeset import NOT_RUN, markdown_table

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WIDENED = 3  # rates that a row may try beyond its own
PLACE, INSIDE = "of the rates tried", "inside"
ONE_SEED = "1: no spread"


def rung(lr: float, offset: int = 0) -> float:
    """Return the rate `offset` rungs above `lr`."""
    return LADDER[LADDER.index(lr) + offset]


def around(lr: float, tries: int) -> tuple[float, ...]:
    """Return `lr`, then the rungs below and above it, as many as are tried."""
    return (lr, rung(lr, -1), rung(lr, 1))[:tries]


def place(accuracy: Mapping[float, float]) -> str:
    """Say where the best of these rates lies; where an end is as good it is not inside."""
    low, high, best = min(accuracy), max(accuracy), best_rate(accuracy)
    if low == high:
        return "the only one"
    for end, name in ((high, "the highest"), (low, "the lowest")):
        if accuracy[end] == accuracy[best]:
            return name if best == end else f"level with {name}"
    return INSIDE


def best_rate(accuracy: Mapping[float, float]) -> float:
    """Return the rate of the highest accuracy, the first of equals."""
    return max(accuracy, key=accuracy.__getitem__)


def beyond(accuracy: Mapping[float, float]) -> float | None:
    """Return the next rate of LADDER beyond the end at which the best of these lies; or None.

    Of a single rate it is the higher neighbour.
    """
    where = place(accuracy)
    if where == INSIDE:
        return None
    if where.endswith("the lowest"):
        return next((lr for lr in reversed(LADDER) if lr < min(accuracy)), None)
    return next((lr for lr in LADDER if lr > max(accuracy)), None)


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


Tried = dict[float | None, dict[int, Past]]  # learning rate -> seed -> run


class Experiment(NamedTuple):
    """A table.

    columns: headings of the rows' keys.
    baseline: the end of the key of the row that those with the same beginning are compared with.
    folder: of its runs, where another experiment's hold some of them; else that of its own name.
    at: where that lies.
    decides: whether the experiments after it wait for its runs, which say what they are.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...] = (VALIDATION, TEST)
    baseline: tuple[str, ...] = ()
    folder: str = ""
    decides: bool = False
    at: Path = Path()

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

    def grid(self, row: Row, given_up: Collection[str] = ()) -> tuple[float | None, ...]:
        """Return the rates that a row tries on its first seed, as far as its runs tell.

        Args:
            given_up: names of runs that will not come.
        """
        rates, seed = row.rates, row.seeds[0]
        for _ in range(row.widened if row.rates != (None,) else 0):
            tried = first_of(self.at, row, rates)
            waiting = (row.cell(lr, seed).name for lr in rates if lr not in tried)
            if not tried or any(name not in given_up for name in waiting):
                break
            if (further := beyond(accuracy_of(tried))) is None or further in rates:
                break
            rates = (*rates, further)
        return rates

    def cells(self, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that the rows need, in the order in which a part of them says most."""
        grids = [(row, self.grid(row, given_up)) for row in self.rows]
        tries = range(max(len(rates) for _, rates in grids))
        cells = [
            row.cell(lr, row.seeds[0])
            for i in tries
            for row, rates in grids
            for lr in rates[i : i + 1]
        ]
        for row, rates in grids:
            tried = self.tried(row)
            names = [row.cell(lr, row.seeds[0]).name for lr in rates if lr not in tried]
            if tried and len(row.seeds) > 1 and all(name in given_up for name in names):
                cells += [row.cell(chosen(tried), seed) for seed in row.seeds[1:]]
        return [cell for cell in cells if cell.name not in given_up]

    def missing(self, given_up: Collection[str] = ()) -> list[Cell]:
        """Return the runs that can be done now and are not."""
        cells = self.cells(given_up)
        return [cell for cell in cells if done(self.at, cell) is None]

    def left(self) -> list[tuple[Row, int]]:
        """Return how many runs each row still lacks, by the rates that it is known to try."""
        left = []
        for row in self.rows:
            tried = self.tried(row)
            seeds = len(tried[chosen(tried)]) if tried else 1  # of the chosen rate, now or soon
            rates = set(self.grid(row)) | tried.keys()
            left.append((row, len(rates) - len(tried) + len(row.seeds) - seeds))
        return left

    def runs(self, row: Row) -> list[Past]:
        """Return the row's runs that are done, of every rate."""
        return [run for by_seed in self.tried(row).values() for run in by_seed.values()]

    def tried(self, row: Row) -> Tried:
        """Return the runs of every learning rate that the first seed has run."""
        tried = first_of(self.at, row, self.grid(row))
        for lr, by_seed in tried.items():
            runs = {seed: done(self.at, row.cell(lr, seed)) for seed in row.seeds[1:]}
            by_seed |= {seed: run for seed, run in runs.items() if run}
        return tried

    def best(self, row: Row) -> tuple[float | None, dict[int, Past]] | None:
        """Return the row's best learning rate, with its runs by seed; None where none has run."""
        tried = self.tried(row)
        return (chosen(tried), tried[chosen(tried)]) if tried else None

    def place(self, row: Row) -> str:
        """Say where the best rate lies among those tried: only inside is it bracketed."""
        tried = self.tried(row)
        return "" if not tried or None in tried else place(accuracy_of(tried))

    def lines(self) -> list[list[str]]:
        """Return the table's lines from the runs' summaries, the heading first."""
        rated = any(row.rates != (None,) for row in self.rows)
        compared = f"{self.measures[0].heading} to {' '.join(self.baseline)}"
        heading = [*self.columns, *["lr", PLACE] * rated, *(m.heading for m in self.measures)]
        heading += [compared] * bool(self.baseline) + ["seeds"] + ["other lr"] * rated
        lines, keys = [heading], {row.key: row for row in self.rows}
        for row in self.rows:
            if not (best := self.best(row)):
                lines.append([*row.key, NOT_RUN, *[""] * (len(heading) - len(row.key) - 1)])
                continue
            lr, runs = best
            rate = f"{lr:g}" if lr is not None else ""
            lines.append([*row.key, *[rate, self.place(row)] * rated])
            lines[-1] += [m.text(m.over(runs.values())) for m in self.measures]
            if self.baseline:
                base = keys.get((*row.key[: -len(self.baseline)], *self.baseline))
                against = self.best(base) if base and base is not row else None
                lines[-1].append(gain(self.measures[0], runs, against[1]) if against else "")
            seeds = f"{len(runs)}" if len(runs) > 1 else ONE_SEED
            lines[-1] += [seeds] + [self.other_rates(row, lr)] * rated
        return lines

    def other_rates(self, row: Row, chosen: float | None) -> str:
        """Return what the rates that were not chosen came to, on validation."""
        return ", ".join(
            f"{lr:g}: {VALIDATION.over(runs.values()).mean or 0:.1f}"
            for lr, runs in self.tried(row).items()
            if lr != chosen
        )

    def table(self) -> str:
        """Return the table in Markdown."""
        return markdown_table(self.lines())


def placed(experiments: Mapping[str, Experiment], results: Path) -> dict[str, Experiment]:
    """Return experiments by name, whose runs lie below `results`."""
    return {n: e._replace(at=results / (e.folder or n)) for n, e in experiments.items()}


def accuracy_of(tried: Tried) -> dict[float | None, float]:
    """Return the mean validation accuracy of each rate, in the order in which they were tried."""
    return merits(
        {lr: [(seed, VALIDATION.of(run)) for seed, run in tried[lr].items()] for lr in tried}
    )


def chosen(tried: Tried) -> float | None:
    """Return the rate of the best mean validation accuracy, of equals the first that was tried."""
    return best_rate(accuracy_of(tried))


def first_of(folder: Path, row: Row, rates: Collection[float | None]) -> Tried:
    """Return the runs that the first seed has done at these rates."""
    runs = {lr: done(folder, row.cell(lr, row.seeds[0])) for lr in rates}
    return {lr: {row.seeds[0]: run} for lr, run in runs.items() if run}


def done(folder: Path, cell: Cell) -> Past | None:
    """Return a run that is done, or None; also where it was told to go on, and has not got there.

    Raises:
        ValueError: the folder holds another run under this name.
    """
    run, where = run_of(folder, cell.name), folder / cell.name
    if run is None:
        return None
    if run.fault or not run.options:
        fault = run.fault or "no options"
        raise ValueError(f"{where} is damaged: delete it, to have it run again ({fault})")
    for name, value in given(cell).items():
        if not same(run.options.get(name), value):
            raise ValueError(
                f"{where} was made by another version of its experiment: {name} is "
                f"{run.options.get(name)} there and {value} here; give another --results, or "
                "delete it"
            )
    return run if run.finished else None


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
