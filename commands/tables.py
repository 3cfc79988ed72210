"""train.py runs, table, plot: the runs that there are, as a list, a table and a picture."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

from commands.options import Line
from machine import runs
from study import history, plots
from study.measures import VALIDATION
from study.past import Past
from study.typeset import latex_table, markdown_table

FORMATS = ("md", "tex", "csv")
MOST_PANELS = 5
METRICS = {"accuracy": ("acc",), "loss": ("loss",), "both": ("loss", "acc")}


class Listed(NamedTuple):
    """Which runs."""

    folders: Annotated[
        list[str] | None, "where they lie [runs]", "path", "positional", "FOLDER"
    ] = None


class Tabled(NamedTuple):
    """The table."""

    run_folders: Annotated[
        list[str], "run folders, or folders of them", "path", "RUN", "positional"
    ]
    by: Annotated[str | None, "options that make a row, as nc,J [all that differ]"] = None
    format: Annotated[str, "Markdown, a LaTeX tabular, or a spreadsheet's", FORMATS] = "md"


class Plotted(NamedTuple):
    """The picture."""

    run_folders: Annotated[
        list[str], "run folders, or folders of them", "path", "RUN", "positional"
    ]
    out: Annotated[
        str | None, "where the picture goes [curves.png, of one run in its folder]", "path"
    ] = None
    by: Annotated[str | None, "options that make a curve, as mask-rule [all that differ]"] = None
    metric: Annotated[str, "what is drawn", METRICS] = "both"
    split: Annotated[
        str | None, "whose figures [of one run all, of several val]", ("val", "test")
    ] = None
    labels: Annotated[list[str] | None, "names of the curves, in their order", "NAME"] = None


LIST, TABLE, PLOT = (Listed,), (Tabled,), (Plotted,)


def run_list(line: Line) -> None:
    """List the runs: what differs, how far each is, its accuracy, its last change."""
    folders = line.groups.listed.folders or ["runs"]
    paths = [path for folder in folders for path in runs.folders_below(folder)]
    if not paths:
        raise ValueError(f"no run in {', '.join(folders)}: give the folder that they lie in")
    pasts = [history.read(path) for path in dict.fromkeys(paths)]
    table = [["run", "what differs", "reached", "validation %", "test %", "changed"]]
    for past in sorted(pasts, key=lambda past: past.changed):
        alike = [p for p in pasts if p.options.get("command") == past.options.get("command")]
        names = [*history.columns(alike), "seed"] if not past.fault else []
        values = [history.text(past.options.get(name)) for name in names]
        accuracies = [past.accuracy(key) for key in ("val_acc", "test_acc")]
        shown = ["" if a is None else f"{100 * a:.2f}" for a in accuracies]
        differs = history.label(names, values, plain=True) if names else ""
        changed = ago(time.time() - past.changed)
        table.append([shortened(past.folder, folders), differs, past.state, *shown, changed])
    print(aligned(table))


def shortened(path: Path, folders: list[str]) -> str:
    """Return a run's name below the one folder that is listed, else its path."""
    single = len(folders) == 1 and path != Path(folders[0])
    return str(path.relative_to(folders[0]) if single else path)


def ago(seconds: float) -> str:
    """Write how long ago something was, in its largest unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (seconds >= size and unit != "days"):
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def aligned(table: list[list[str]]) -> str:
    """Return lines in columns, two spaces between them."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    padded = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(row.rstrip() for row in padded)


def run_table(line: Line) -> None:
    """Write finished runs as a table: a row for what differs, the mean over seeds."""
    o = line.groups.tabled
    good, notes = history.usable(history.read_all(o.run_folders))
    if not good:
        raise ValueError("; ".join(["no finished run with an accuracy", *notes]))
    good, names, tuned = history.arranged(good, o.by)
    if o.format == "csv":
        table = history.numbers(good, [*names, *tuned])
        csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    else:
        table = history.lines(good, names, tuned)
        shown = table[0][len(names) :]
        text = markdown_table(table)
        if o.format == "tex":
            text = latex_table(table, len(names), shown, best_by=VALIDATION.heading)
        print(text, end="")
    for note in [*history.mixed(good, [*names, *tuned]), *notes]:
        print(note, file=sys.stderr)


def run_plot(line: Line) -> None:
    """Draw loss and accuracy: of one run all of its curves, of several bands over seeds."""
    o = line.groups.plotted
    pasts = history.read_all(o.run_folders)
    for past in pasts:
        if past.fault:
            raise ValueError(past.fault)
    pasts = [past._replace(records=runs.Run(past.folder).vouched_records()) for past in pasts]
    out = o.out or str((pasts[0].folder if len(pasts) == 1 else Path()) / "curves.png")
    if len(pasts) == 1 and o.by is None and o.split is None and o.metric == "both":
        name = (o.labels or [pasts[0].folder.name])[0]
        print(f"written to {plots.plot_curves({name: pasts[0].records}, out)}")
        return
    pasts, names, tuned = history.arranged(pasts, o.by)
    labels = labels_of(pasts, names, o.labels)
    keys = [f"{o.split or 'val'}_{what}" for what in METRICS[o.metric]]
    if o.split == "test" and not any(
        key in r for past in pasts for r in past.records for key in keys
    ):
        raise ValueError("--split test: no log holds it, but of runs with --eval-test; take val")
    curves = panels(pasts, names, labels, o.by is not None)
    print(f"written to {plots.plot_bands(curves, out, keys)}")
    for key, group in history.rows(pasts, names).items() if tuned else ():
        rates = history.label(tuned, [history.text(group[0].options.get(n)) for n in tuned])
        print(f"{history.label(names, key, plain=True)}: {rates}, best by validation")
    for note in history.mixed(pasts, [*names, *tuned]):
        print(note, file=sys.stderr)


def labels_of(
    pasts: list[Past], names: list[str], given: list[str] | None
) -> dict[tuple[str, ...], str]:
    """Return the name of each curve: what tells it apart, or one of --labels.

    Raises:
        ValueError: there are more or fewer of these.
    """
    labels = {key: history.label(names, key) for key in history.rows(pasts, names)}
    if given is None:
        return labels
    if len(given) != len(labels):
        curves = "; ".join(history.label(names, key, plain=True) for key in labels)
        raise ValueError(f"--labels: {len(given)} for {len(labels)} curves, which are {curves}")
    return dict(zip(labels, given, strict=True))


def panels(
    pasts: list[Past], names: list[str], labels: dict[tuple[str, ...], str], split: bool
) -> dict[str, dict[str, list[list[dict]]]]:
    """Return the logs of each curve: in one panel, or of many in one for each first value.

    Args:
        split: may they be in several panels?
    """
    groups = history.rows(pasts, names)
    first = {key[0] for key in groups} if len(names) > 1 else set()
    apart = split and len(groups) > plots.MOST and 2 <= len(first) <= MOST_PANELS
    drawn: dict[str, dict[str, list[list[dict]]]] = {}
    for key, group in groups.items():
        title = history.label(names[:1], key[:1]) if apart else ""
        label = history.label(names[1:], key[1:]) if apart else labels[key]
        drawn.setdefault(title, {})[label] = [past.records for past in group]
    return drawn
