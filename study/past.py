"""A run's past: what its folder, or its line in a table's file, says of it.

    run = read("runs/example")
    run.state, run.sharding, run.accuracy("val_acc")

Every table and figure is made of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from machine.runs import Run


class Past(NamedTuple):
    """What a run was told, what it logged, how it ended; or what is wrong with its folder."""

    name: str
    config: dict
    summary: dict | None
    records: list[dict]
    folder: Path = Path()
    fault: str = ""

    @property
    def options(self) -> dict:
        """Return the options that the run was made by."""
        return self.config.get("options", {})

    @property
    def sharding(self) -> str:
        """Return how images are spread over clients, as a table has it: iid, nc5 or dir0.3."""
        if self.options.get("nc") is not None:
            return f"nc{self.options['nc']}"
        alpha = self.options.get("dirichlet")
        return "iid" if alpha is None else f"dir{alpha:g}"

    @property
    def unit(self) -> str:
        """Return round or epoch; nothing for a run without either."""
        return next((unit for unit in ("round", "epoch") if self.options.get(f"{unit}s")), "")

    @property
    def reached(self) -> float:
        """Return the last round or epoch of the log."""
        return max((r[self.unit] for r in self.records if self.unit in r), default=0)

    @property
    def finished(self) -> bool:
        """Tell whether the run has come to its end, or stopped early."""
        if self.summary is None:
            return False
        end = self.summary.get(self.unit)
        early = "stopped_early" in self.summary
        return end is None or early or end >= self.options[f"{self.unit}s"]

    @property
    def state(self) -> str:
        """Return finished, round 40 of 200, or what is wrong."""
        if self.fault or self.finished:
            return self.fault or "finished"
        if not self.unit:
            return "not finished"
        return f"{self.unit} {self.reached:g} of {self.options[f'{self.unit}s']}"

    @property
    def changed(self) -> float:
        """Return when a file of the run was last written, in seconds since 1970; 0 of a line."""
        files = [path for path in self.folder.glob("*") if path.is_file()]
        return max((path.stat().st_mtime for path in files), default=0.0)

    def accuracy(self, key: str) -> float | None:
        """Return val_acc or test_acc: the last logged, of a finished run that of its summary."""
        final = self.summary.get("final", {}) if self.finished else {}
        return next((r[key] for r in (final, *reversed(self.records)) if key in r), None)


def read(folder: str | Path) -> Past:
    """Read a run's folder; what is wrong with it is said in place of what it holds."""
    run = Run(folder)
    try:
        config, summary = run.config(), run.summary(unbound=True)
        return Past(run.folder.name, config, summary, run.records(), run.folder)
    except (ValueError, OSError) as error:
        return Past(run.folder.name, {}, None, [], run.folder, str(error))
