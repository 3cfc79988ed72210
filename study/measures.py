"""A figure of runs: where their summaries have it, its mean over seeds, its difference to others.

VALIDATION.text(VALIDATION.over(runs))      51.23 ± 0.40
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from study.past import Past

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
INTERVAL = 3  # seeds, from which on a difference has an interval
MOVED = 0.3  # points: what another machine's rounding moves, of 5,000 images
NO_DIFFERENCE = "none"
LARGEST = 1e300  # figure of a run
Choice = TypeVar("Choice")


class Sample(NamedTuple):
    """A figure of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Return their mean; None of none."""
        return float(np.mean(self.values)) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Return their standard deviation; None of fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


class Measure(NamedTuple):
    """A column: the figure that lies at `path` in a run's summary, times `factor`."""

    heading: str
    path: str
    factor: float = 1.0
    digits: int = 3

    def of(self, run: Past) -> float | None:
        """Return the figure; None where the run has none."""
        value = run.summary
        for key in self.path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        number = isinstance(value, int | float) and abs(value) < LARGEST  # others' may be any
        return self.factor * value if number else None

    def over(self, runs: Iterable[Past]) -> Sample:
        """Return the figures of the runs that have it."""
        figures = (self.of(run) for run in runs)
        return Sample(tuple(figure for figure in figures if figure is not None))

    def text(self, sample: Sample) -> str:
        """Write a mean, with the standard deviation of two or more: 51.23 ± 0.40."""
        parts = [f"{x:.{self.digits}f}" for x in (sample.mean, sample.deviation) if x is not None]
        return " ± ".join(parts)


SECONDS = Measure("seconds", "wall_seconds", digits=0)
VALIDATION = Measure("validation %", "final/val_acc", 100, 2)
TEST = Measure("test %", "final/test_acc", 100, 2)
BYTES = Measure("bytes to dense", "bytes_to_dense")


def merits(tried: Mapping[Choice, Iterable[tuple[int, float | None]]]) -> dict[Choice, float]:
    """Return each choice's mean validation accuracy.

    Args:
        tried: choice -> (seed, accuracy) of its runs. Choices are compared on the seeds that all of
            them have run, or on all where there are none.
    """
    runs = {choice: list(pairs) for choice, pairs in tried.items()}
    shared = set.intersection(*({seed for seed, _ in pairs} for pairs in runs.values()))

    def merit(choice: Choice) -> float:
        chosen = [acc or 0.0 for seed, acc in runs[choice] if not shared or seed in shared]
        return float(np.mean(chosen))

    return {choice: merit(choice) for choice in runs}


def best_of(tried: Mapping[Choice, Iterable[tuple[int, float | None]]]) -> Choice:
    """Return the choice of the best merit, the first of equals; tried: as in `merits`."""
    accuracy = merits(tried)
    return max(accuracy, key=accuracy.__getitem__)


def gain(measure: Measure, runs: Mapping[int, Past], against: Mapping[int, Past]) -> str:
    """Write the difference to another row, taken seed by seed.

    From INTERVAL seeds on their mean and its 95 % interval, +2.01 [+1.40, +2.62]; of fewer the
    differences themselves. None is said of less than MOVED, whatever the interval.
    """
    pairs = [
        (measure.of(runs[seed]), measure.of(against[seed])) for seed in runs if seed in against
    ]
    gains = Sample(tuple(a - b for a, b in pairs if a is not None and b is not None))
    count = len(gains.values)
    if not count:
        return ""
    text = ", ".join(f"{x:+.{measure.digits}f}" for x in gains.values)
    if count >= INTERVAL:
        half = (
            T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1] * gains.deviation / math.sqrt(count)
        )
        ends = (gains.mean, gains.mean - half, gains.mean + half)
        text = "{} [{}, {}]".format(*(f"{x:+.{measure.digits}f}" for x in ends))
    return text if abs(gains.mean) >= MOVED else f"{NO_DIFFERENCE} ({text})"
