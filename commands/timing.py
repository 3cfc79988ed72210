"""How long a run takes on this machine, before it starts: parts that are measured, times their
counts.

    Times(Path("times.json"), tables).seconds_of(cell)

What parts cost is measured once for every model and image size, on a GPU every batch, as
commands/trial.py says, with half of the weights masked and a ridge head; a file keeps it.
Where runs of this machine are done, their row takes what they took, and the estimates of the others
are corrected by the median of what such rows took over what was estimated. Not counted: start-up,
diagnostics, noise, compiling; features, which all runs share, are counted apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from commands.costs import Costs, images_of
from commands.options import GROUPS, Command, Line, parse
from commands.trial import costs
from machine import safe_files
from machine.device import choose_device, processor
from study.measures import SECONDS
from study.tables import Cell, Experiment


def nothing(line: Line) -> None:
    """Do nothing: a command that is parsed and not run."""


COMMANDS = {name: Command(nothing, groups) for name, groups in GROUPS.items()}

NAMES = ("data", "model", "image_size", "keep_tokens", "precision", "device", "threads")


class Times:
    """Seconds that runs take here.

    Args:
        path: of the file that keeps what was measured.
        tables: experiments, whose finished runs refine estimates.
    """

    def __init__(self, path: Path, tables: Iterable[Experiment]):
        self.path, self.tables = path, list(tables)
        self.processor = processor(choose_device("auto"))
        self.parts: dict[str, dict[str, float]] = {}
        if path.exists():
            stored = safe_files.read_json(path)
            self.parts = stored["parts"] if stored.get("processor") == self.processor else {}

    def seconds_of(self, cell: Cell) -> float:
        """Return how long a run takes; NaN where a package that it needs is missing here."""
        if (took := self.measured.get((cell.command, cell.options))) is not None:
            return took
        return self.correction * self.estimate(cell.command, cell.options)

    @functools.cached_property
    def measured(self) -> dict[tuple, float]:
        """Return the mean seconds of the finished runs of this machine, by their row's options."""
        took: dict[tuple, list[float]] = {}
        for experiment in self.tables:
            for row in experiment.rows:
                for run in experiment.runs(row):
                    if run.config.get("processor") == self.processor:
                        seconds = SECONDS.of(run)
                        took.setdefault((row.command, row.options), []).append(seconds)
        return {row: float(np.mean(s)) for row, s in took.items() if None not in s}

    @functools.cached_property
    def correction(self) -> float:
        """Return what rows that are done took over what was estimated: the median."""
        pairs = [(took, self.estimate(*row)) for row, took in self.measured.items()]
        return float(np.median([took / e for took, e in pairs if e > 0] or [1.0]))

    @functools.cache  # noqa: B019  (as long as the sweep)
    def estimate(self, command: str, options: tuple[str, ...]) -> float:
        """Return the seconds of a command by its parts."""
        if (line := parsed(command, options)) is None:
            return math.nan
        parts = self.of(line.stored).parts(line.stored)
        return sum(seconds for name, seconds in parts.items() if name != "features")

    def of(self, o: dict) -> Costs:
        """Return what parts cost in a command's setting, from the file or measured now."""
        heads = o.get("train") == "head"
        words = [
            f"--{name.replace('_', '-')}={o[name]}"
            for name in NAMES
            if o.get(name) is not None and (name, o[name]) != ("keep_tokens", 1.0)
        ]
        gpu = choose_device(o["device"]).type == "cuda"
        if heads or gpu:  # else an image takes the same in a batch of any size
            words.append(f"--batch-size={o.get('batch_size') or 64}")
        words += ["--train=head"] if heads else ["--mask-rule=least-sensitive", "--sparsity=0.5"]
        words += ["--weights=none", "--head=ridge"]
        key = " ".join(words)
        if key not in self.parts:
            what = ", the head alone" if heads else ""
            print(f"timing {o['model']} at {o['image_size']} px{what} ...", flush=True)
            self.parts[key] = costs(parsed("fedavg", tuple(words)))._asdict()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"processor": self.processor, "parts": self.parts}
            safe_files.write_json(self.path, content)
        return Costs(**self.parts[key])

    def features(self, rows: Iterable[tuple[str, tuple[str, ...]]]) -> float:
        """Return the seconds of the features that these commands need, each once."""
        settings: dict[tuple, dict] = {}
        for command, options in rows:
            line = parsed(command, options)
            if line and (command == "ridge" or line.stored.get("head") not in (None, "linear")):
                settings[line.stored["model"], line.stored["image_size"]] = line.stored
        return sum(sum(images_of(o)) * self.of(o).feature for o in settings.values())


@functools.cache
def parsed(command: str, options: tuple[str, ...]) -> Line | None:
    """Return a command line; None where a package that it needs is missing here."""
    try:
        return parse([command, *options], {command: COMMANDS[command]})
    except ValueError:
        return None
