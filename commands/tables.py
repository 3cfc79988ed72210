"""train.py runs, table, plot: the runs that there are, as a list, a table and a picture."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

from commands.costs import batch_of, train_images
from commands.options import Line
from federated.cohort import cohort_size
from machine import runs
from study import history, plots
from study.measures import VALIDATION
from study.past import Past
from study.typeset import latex_table, markdown_table

FORMATS = ("md", "tex", "csv")
MOST_PANELS = 5
METRICS = {"accuracy": ("acc",), "loss": ("loss",), "both": ("loss", "acc")}
TIMES = {"round", "epoch"}  # of a record, what figures are drawn against
MASK = ("mask_rule", "sparsity", "threshold")  # what a run under a mask is listed with


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
    metric: Annotated[
        str, "what is drawn: accuracy, loss, both, or a figure of the log, as update_cosine"
    ] = "both"
    split: Annotated[
        str | None, "whose figures [of one run all, of several val]", ("val", "test")
    ] = None
    labels: Annotated[list[str] | None, "names of the curves, in their order", "NAME"] = None


LIST, TABLE, PLOT = (Listed,), (Tabled,), (Plotted,)


def run_list(line: Line) -> None:
    """List the runs: what differs, how far each is, its accuracy, its last change."""
    folders = line.groups.listed.folders or ["runs"]
    pasts = [*{p.folder: p for folder in folders for p in history.runs_below(folder)}.values()]
    if not pasts:
        raise ValueError(f"no run in {', '.join(folders)}: give the folder that they lie in")
    table = [["run", "what differs", "reached", "validation %", "test %", "changed"]]
    for past in sorted(pasts, key=lambda past: past.changed):
        alike = [p for p in pasts if p.options.get("command") == past.options.get("command")]
        under = [name for name in MASK if past.options.get(name) is not None]
        names = list(dict.fromkeys([*history.columns(alike), *under, "seed"]))
        names = [] if past.fault else names
        values = [history.text(past.options.get(name)) for name in names]
        accuracies = [past.accuracy(key) for key in ("val_acc", "test_acc")]
        shown = ["" if a is None else f"{100 * a:.2f}" for a in accuracies]
        differs = history.label(names, values, plain=True) if names else ""
        changed = ago(time.time() - past.changed) if past.changed else ""
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
    every, twice = history.distinct(good)
    good, names, tuned = history.arranged(every, o.by)
    ends = history.at_ends(every, names) if "lr" in tuned else []
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
    along = history.along(good, [*names, *tuned])
    for note in [*ends, *history.split_by(good, o.by, names), *along, *twice, *notes]:
        print(note, file=sys.stderr)


def run_plot(line: Line) -> None:
    """Draw loss and accuracy: of one run all of its curves, of several bands over seeds."""
    o = line.groups.plotted
    pasts = history.read_all(o.run_folders)
    for past in pasts:
        if past.fault:
            raise ValueError(past.fault)
    pasts = [past._replace(records=records_of(past)) for past in pasts]
    single = len(pasts) == 1 and pasts[0].folder.is_dir()
    out = o.out or str((pasts[0].folder if single else Path()) / "curves.png")
    if len(pasts) == 1 and o.by is None and o.split is None and o.metric == "both":
        name = (o.labels or [pasts[0].folder.name])[0]
        print(f"written to {plots.plot_curves({name: pasts[0].records}, out)}")
        return
    keys = keys_of(o, pasts)
    pasts, notes = with_figures(pasts, keys)
    pasts, twice = history.distinct(pasts)
    every = pasts
    pasts, names, tuned = history.arranged(every, o.by)
    labels = labels_of(pasts, names, o.labels)
    curves = panels(in_one_unit(pasts), names, labels, o.by is not None)
    print(f"written to {plots.plot_bands(curves, out, keys)}")
    groups = history.rows(pasts, names)
    for rate in rates_of(groups, history.rows(every, names), names, tuned):
        print(rate)
    notes += [*twice, *history.split_by(pasts, o.by, names)]
    notes += [*history.along(pasts, [*names, *tuned], "labels"), *caveats(groups, names)]
    for note in notes:
        print(note, file=sys.stderr)


def records_of(past: Past) -> list[dict]:
    """Return the records that a run's checkpoint knows; of a line in a table's file its own."""
    return runs.Run(past.folder).vouched_records() if past.folder.is_dir() else past.records


def in_one_unit(pasts: list[Past]) -> list[Past]:
    """Return runs of rounds beside runs of epochs, or of other rounds, counted in passes over the
    training images, of whole cohorts that take all J steps; others as they are."""
    try:
        passes = [passes_of(past.options) if past.unit == "round" else 1.0 for past in pasts]
    except KeyError:  # an option that another version did not have
        return pasts
    if len({past.unit for past in pasts}) == 1 and len(set(passes)) == 1:
        return pasts
    counted = [
        [{"pass": each * r[past.unit]} | r for r in past.records if past.unit in r]
        for past, each in zip(pasts, passes, strict=True)
    ]
    return [p._replace(records=records) for p, records in zip(pasts, counted, strict=True)]


def passes_of(o: dict) -> float:
    """Return how often a round draws each training image, on average."""
    clients = cohort_size(o["clients"], o["fraction"])
    return clients * o["J"] * batch_of(o) / train_images(o)


def rates_of(
    groups: dict[tuple[str, ...], list[Past]],
    every: dict[tuple[str, ...], list[Past]],
    names: list[str],
    tuned: list[str],
) -> list[str]:
    """Return a line on the rate of each curve, which may be the best of several."""
    lines = []
    for key, group in groups.items() if tuned else ():
        rate = history.label(tuned, [history.text(group[0].options.get(n)) for n in tuned])
        best = ", best by validation" * (len(history.rows(every[key], tuned)) > 1)
        lines.append(f"{history.label(names, key, plain=True)}: {rate}{best}")
    return lines


def keys_of(o: Plotted, pasts: list[Past]) -> list[str]:
    """Return the figures of the logs that are drawn.

    Raises:
        ValueError: no log holds them, or --split is given with a figure that has none.
    """
    if o.split and o.metric not in METRICS:
        raise ValueError(f"--split {o.split} is for --metric {', '.join(METRICS)}: leave it out")
    logged = sorted({key for past in pasts for r in past.records for key in r if number(r[key])})
    keys = [f"{o.split or 'val'}_{what}" for what in METRICS.get(o.metric, ())] or [o.metric]
    if any(key in logged for key in keys):
        return keys
    if o.metric in METRICS and o.split == "test":
        raise ValueError(
            "--split test: these runs have no test figures in their logs, as they were made "
            "without --eval-test; draw --split val, or make them anew with --eval-test"
        )
    figures = ", ".join(name for name in logged if name not in TIMES) or "none"
    raise ValueError(f"--metric {o.metric}: no log holds it; the figures of these are: {figures}")


def number(value: object) -> bool:
    """Tell whether a log's value can be drawn."""
    return isinstance(value, (int, float))


def with_figures(pasts: list[Past], keys: list[str]) -> tuple[list[Past], list[str]]:
    """Return the runs whose logs hold some of these figures, and a line for each other."""
    having = [any(key in r for r in past.records for key in keys) for past in pasts]
    why = f"no {' or '.join(keys)} in its log"
    why += ", which --eval-test writes" * any(key.startswith("test") for key in keys)
    others = [past for past, has in zip(pasts, having, strict=True) if not has]
    notes = [f"left out: {past.folder}: {why}" for past in others]
    return [past for past, has in zip(pasts, having, strict=True) if has], notes


def caveats(groups: dict[tuple[str, ...], list[Past]], names: list[str]) -> list[str]:
    """Return lines on curves that do not compare, or that end before some of their runs do."""
    notes = []
    for key, group in groups.items():
        ends = sorted(past.reached for past in group)
        if ends[0] < ends[-1]:
            where = f"{group[0].unit} {ends[0]:g}, the last that all of its seeds have reached"
            notes.append(f"{history.label(names, key, plain=True)} is drawn to {where}")
    data = sorted({str(past.options.get("data")) for group in groups.values() for past in group})
    if len(data) > 1:
        notes.append(f"the data sets differ ({', '.join(data)}): these curves do not compare")
    return notes


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
