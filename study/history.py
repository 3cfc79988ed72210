"""Runs that somebody made, by whatever commands: where each stands, what differs, their table.

    runs = [read(folder) for folder in machine.runs.folders_below("runs")]
    lines(runs, columns(runs))      # heading first; a row is a mean over seeds

Options that may change while a run goes on, paths and hashes are no difference; the seed is what a
row is a mean over. N_c and the concentration of a Dirichlet sharding are one column, `sharding`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import masks
from machine import safe_files
from machine.runs import Run, folders_below
from study.tables import TEST, VALIDATION, Measure

MEASURES = (
    *(VALIDATION, TEST),
    Measure("best validation %", "best_by_validation/val_acc", 100, 2),
    Measure("test % there", "best_by_validation/test_acc", 100, 2),
)
SEEDS = "seeds"
ABSENT = "-"  # an option that a run does not have, or leaves off
LEADING = (  # of the columns; the others follow in the order of the command line
    *("command", "train", "head", "sharding", "J", "aggregate", "server"),
    *("mask", "mask_rule", "sparsity", "threshold", "calibration_rounds", "schedule"),
)
UNCOMPARED = {  # what no row is told by
    *("seed", "name", "runs_dir", "data_dir", "device", "threads", "pixels", "nc", "dirichlet"),
    *("search", "search_lr", "search_weight_decay", "search_schedule", "search_length", "fresh"),
    *("eval_every", "eval_test", "eval_batch", "cuda_graph", "fused", "processes", "diagnostics"),
    *("tensorboard", "wandb", "micro_batch", "early_stop"),
}
SCORING = (  # options of how clients score for a mask
    *("calibration_rounds", "calibration_images", "calibration_fraction", "damp"),
    *("fisher_labels", "fisher_score", "consensus", "quorum", "score_precision"),
)
TUNED = ("weight_decay", "lr")  # chosen by validation where they are no column
WORDY = {"command", "sharding", "mask_rule", "schedule", "aggregate", "server", "consensus"}


class History(NamedTuple):
    """A run's past: its options, log and summary, or what is wrong with its folder."""

    folder: Path
    options: dict
    records: list[dict]
    summary: dict | None
    fault: str = ""

    @property
    def unit(self) -> str:
        """Return round or epoch; nothing for a run without either."""
        return next((u for u in ("round", "epoch") if f"{u}s" in self.options), "")

    @property
    def reached(self) -> float:
        """Return the last round or epoch of the log."""
        return max((r[self.unit] for r in self.records if self.unit in r), default=0)

    @property
    def finished(self) -> bool:
        """Tell whether the run has come to its end, or stopped early."""
        if self.summary is None or not self.unit:
            return self.summary is not None
        early = "stopped_early" in self.summary
        return early or self.summary.get(self.unit, 0) >= self.options[f"{self.unit}s"]

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
        """Return when a file of the run was last written, in seconds since 1970."""
        files = [path for path in self.folder.iterdir() if path.is_file()]
        return max((path.stat().st_mtime for path in files), default=0.0)

    def accuracy(self, key: str) -> float | None:
        """Return val_acc or test_acc: the last logged, of a finished run that of its summary."""
        final = (self.summary or {}).get("final", {}) if self.finished else {}
        return next((r[key] for r in (final, *reversed(self.records)) if key in r), None)


def read(folder: str | Path) -> History:
    """Read a run's folder; what is wrong with it is said in place of what it holds."""
    run = Run(folder)
    try:
        options = run.config()["options"]
        options |= sharding(options) | masked(options, run.folder)
        past = History(run.folder, options, run.records(), None)
        return past._replace(summary=run.sound_summary(unbound=True))
    except (ValueError, OSError) as error:
        return History(run.folder, {}, [], None, str(error))


def read_all(folders: Iterable[str]) -> list[History]:
    """Return the pasts of the runs that these folders are or hold; each once."""
    paths = [path for folder in folders for path in folders_below(folder) or [Path(folder)]]
    return [read(path) for path in dict.fromkeys(paths)]


def sharding(options: Mapping) -> dict[str, str]:
    """Return what says how images are spread over clients: iid, nc5 or dir0.3; {} without any."""
    if "clients" not in options:
        return {}
    if options.get("nc") is not None:
        return {"sharding": f"nc{options['nc']}"}
    alpha = options.get("dirichlet")
    return {"sharding": "iid" if alpha is None else f"dir{alpha:g}"}


def masked(options: Mapping, folder: Path) -> dict[str, object]:
    """Return what says which mask a run trains under; no way of scoring, of a rule without scores.

    Of a given mask the run's own copy says its rule and sparsity, else its file's name is told.
    """
    if options.get("mask") is not None:
        try:
            origin = safe_files.load_checked(folder / "mask.pt")["made"]
            return {name: origin[name] for name in ("mask_rule", "sparsity", "threshold")}
        except (OSError, ValueError, LookupError, TypeError):
            return {"mask_rule": rule_of(options)}
    rule = options.get("mask_rule")
    if rule not in masks.RULES or masks.needs_scores(rule):
        return {}
    return {name: None for name in SCORING if name in options}


def rule_of(options: Mapping) -> str:
    """Return the mask rule, of a given mask the name of its file or its folder, or dense."""
    if options.get("mask_rule") is not None or options.get("mask") is None:
        return options.get("mask_rule") or "dense"
    path = Path(options["mask"])
    return f"mask {path.parent.name if path.name == 'mask.pt' and path.parent.name else path.name}"


# ---------------------------------------------------------------------------- what differs


def text(value: object) -> str:
    """Write an option's value in a table."""
    if value is None or value is False:
        return ABSENT
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def differing(runs: Iterable[History]) -> list[str]:
    """Return the options in which runs differ, in the order of a table's columns."""
    runs = list(runs)
    names = dict.fromkeys(name for name in LEADING)
    names |= dict.fromkeys(name for run in runs for name in run.options)
    compared = [n for n in names if n not in UNCOMPARED and not n.endswith("_sha256")]
    return [n for n in compared if len({text(run.options.get(n)) for run in runs}) > 1]


def columns(runs: Sequence[History]) -> list[str]:
    """Return options that tell apart what differs; one that follows from those before is left out.

    The learning rate is the last of them, and among them wherever it differs.
    """
    names = differing(runs)
    chosen: list[str] = []
    for name in [*(n for n in names if n not in TUNED), *(n for n in TUNED if n in names)]:
        splits = len(rows(runs, [*chosen, name])) > len(rows(runs, chosen))
        if splits or name == "lr":
            chosen.append(name)
    return chosen or ["command"]


def arranged(runs: Sequence[History], by: str | None) -> tuple[list[History], list[str], list[str]]:
    """Return the runs to show, the columns that tell rows apart, and those that were tuned.

    Columns are those of --by, as nc,J, else all that differ. Of a row of --by the learning rate
    that is best by validation is shown, with the weight decay: a tuned column says which.

    Raises:
        ValueError: no run has such an option.
    """
    if by is None:
        return list(runs), columns(runs), []
    names = named(runs, by)
    tuned = [name for name in TUNED if name in differing(runs) and name not in names]
    return best_rates(runs, names), names, tuned


def named(runs: Sequence[History], by: str) -> list[str]:
    """Return the options that --by names; nc is part of the sharding."""
    names = [name.strip().replace("-", "_") for name in by.split(",")]
    names = ["sharding" if name in ("nc", "dirichlet") else name for name in names]
    for name in names:
        if not any(name in run.options for run in runs):
            differ = ", ".join(differing(runs)) or "in nothing but the seed"
            raise ValueError(f"--by {name}: no such option; the runs differ in: {differ}")
    return list(dict.fromkeys(names))


def rows(runs: Iterable[History], names: Sequence[str]) -> dict[tuple[str, ...], list[History]]:
    """Return the runs by the values of these options, in the order of the values."""
    groups: dict[tuple[str, ...], list[History]] = {}
    for run in runs:
        groups.setdefault(tuple(text(run.options.get(name)) for name in names), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [rank(value) for value in item[0]]))


def rank(value: str) -> tuple:
    """Return what sorts values: iid, then shardings and other numbers by size, then words."""
    number = value.removeprefix("nc").removeprefix("dir")
    try:
        return (1, float(number), "")
    except ValueError:
        return (0 if value in ("iid", ABSENT) else 2, 0.0, value)


def label(names: Sequence[str], values: Sequence[str], plain: bool = False) -> str:
    """Return a row's name in a figure: N_c = 5, J = 4; plain: as a terminal has it."""
    return worded(names, values, plain) or ("all runs" if not names else "default")


def worded(names: Sequence[str], values: Sequence[str], plain: bool = False) -> str:
    """Return the same; nothing where no value is set."""
    parts = []
    for name, value in zip(names, values, strict=True):
        if value == ABSENT:
            parts.append({"mask_rule": "dense"}.get(name, ""))
        elif name == "sharding" and value.startswith("nc") and not plain:
            parts.append(f"$N_c$ = {value[2:]}")
        else:
            said = name.replace("_", " ")
            parts.append(value if name in WORDY else said if value == "yes" else f"{said} {value}")
    return ", ".join(filter(None, parts))


def best_rates(runs: Sequence[History], names: Sequence[str]) -> list[History]:
    """Return of every row the runs whose rate and weight decay have the best mean validation.

    They are compared on the seeds that all of them have run, or on all where there are none.
    """
    chosen: list[History] = []
    for group in rows(runs, names).values():
        tried = list(rows(group, TUNED).values())
        shared = set.intersection(*({run.options["seed"] for run in some} for some in tried))

        def merit(some: list[History], shared: set = shared) -> float:
            seeds = [run for run in some if not shared or run.options["seed"] in shared]
            return float(np.mean([run.accuracy("val_acc") or 0.0 for run in seeds]))

        chosen += max(tried, key=merit)
    return chosen


# ---------------------------------------------------------------------------- the table


def usable(runs: Iterable[History]) -> tuple[list[History], list[str]]:
    """Return the runs that a table can hold, and a line for each that it cannot."""
    good, notes = [], []
    for run in runs:
        if run.fault or not run.finished:
            notes.append(f"left out: {run.fault or f'{run.folder}: {run.state}'}")
        elif not run.summary.get("final"):
            command = run.options.get("command")
            notes.append(f"left out: {run.folder}: a run of {command}, without accuracy")
        else:
            good.append(run)
    return good, notes


def measures_of(runs: Iterable[History]) -> list[Measure]:
    """Return the figures that some of the runs have."""
    runs = list(runs)
    return [m for m in MEASURES if any(m.of(run.summary) is not None for run in runs)]


def lines(
    runs: Sequence[History], names: Sequence[str], tuned: Sequence[str] = ()
) -> list[list[str]]:
    """Return the table's lines, heading first: means over seeds with standard deviations.

    Args:
        names: options that tell rows apart.
        tuned: options that each row has chosen, shown beside its figures.
    """
    measures = measures_of(runs)
    heading = [name.replace("_", " ") for name in (*names, *tuned)]
    table = [[*heading, *(m.heading for m in measures), SEEDS]]
    for key, group in rows(runs, names).items():
        figures = [m.text(values_of(m, group)) for m in measures]
        chosen = [text(group[0].options.get(name)) for name in tuned]
        seeds = len({run.options["seed"] for run in group})
        table.append([*key, *chosen, *figures, f"{seeds}"])
    return table


def numbers(runs: Sequence[History], names: Sequence[str]) -> list[list[str]]:
    """Return the same for a spreadsheet: mean and deviation apart, and the folders of each row."""
    measures = measures_of(runs)
    heads = [f"{m.heading} {what}" for m in measures for what in ("mean", "deviation")]
    table = [[*names, *heads, SEEDS, "runs"]]
    for key, group in rows(runs, names).items():
        figures = [part for m in measures for part in apart(values_of(m, group))]
        folders = " ".join(str(run.folder) for run in group)
        table.append([*key, *figures, f"{len({run.options['seed'] for run in group})}", folders])
    return table


def values_of(measure: Measure, runs: Iterable[History]) -> list[float]:
    """Return a figure of each run that has it."""
    figures = [measure.of(run.summary) for run in runs]
    return [figure for figure in figures if figure is not None]


def apart(values: Sequence[float]) -> tuple[str, str]:
    """Return mean and standard deviation in full; nothing where they are not defined."""
    mean = f"{np.mean(values):.6g}" if values else ""
    return mean, f"{np.std(values, ddof=1):.6g}" if len(values) > 1 else ""


def options_by_command(runs: Iterable[History]) -> dict[str, set[str]]:
    """Return the names of the options that each command's runs have."""
    names: dict[str, set[str]] = {}
    for run in runs:
        names.setdefault(text(run.options.get("command")), set()).update(run.options)
    return names


def mixed(runs: Sequence[History], names: Collection[str]) -> list[str]:
    """Return a line on what else differs: along with the columns, or within a row.

    Of runs of several commands the options that all of these have.
    """
    groups = rows(runs, list(names)).values()
    within = list(dict.fromkeys(name for group in groups for name in differing(group)))
    shared = set.intersection(*options_by_command(runs).values()) if runs else set()
    along = [n for n in differing(runs) if n not in (*names, *within) and n in shared]
    notes = []
    if within:
        notes.append(f"a row holds runs that differ in {', '.join(within)}: --by takes these too")
    if along:
        notes.append(f"along with these columns differ: {', '.join(along)}")
    return notes
