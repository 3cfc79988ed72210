"""train.py sweep: what the experiments lack, their runs in one file a table, and the tables."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from commands.cells import Work, run_cells
from commands.options import Line
from commands.timing import Times
from machine import safe_files
from machine.status import duration
from study import experiments
from study.packed import FIELDS, FILE, add, line_of, lines, pack, read, unpacked, write
from study.past import Past
from study.tables import INSIDE, Experiment, placed

Tables = dict[str, Experiment]  # by name


class Sweep(NamedTuple):
    """Which runs."""

    experiment: Annotated[
        Sequence[str] | None,  # list is a field here
        f"{', '.join(experiments.NAMES)} [all of them]",
        "NAME",
        "positional",
    ] = None
    scale: Annotated[
        str,
        "sizes: paper for a GPU, colab for thirty hours of a small one, gpu for questions answered "
        "in minutes at a time, gpu-64px the same on two cores, cpu for two cores, smoke to see "
        "that all works",
        experiments.SCALES,
    ] = "paper"
    list: Annotated[bool, "say what is done, what is missing, and how long that takes here"] = False
    jobs: Annotated[int, "runs at a time", ">= 1"] = 1
    minutes: Annotated[
        float | None, "stop after M minutes; what runs then goes on next time [never]", "> 0", "M"
    ] = None
    hours: Annotated[
        float | None,
        "start only what fits into what is left of H hours, by this machine's measure [all]",
        "> 0",
        "H",
    ] = None
    imported: Annotated[
        str | None,
        "take in the runs that a sweep packed elsewhere (<results>/<scale>.jsonl.xz); with "
        "--minutes or --hours go on from them [none]",
        "path",
        "--import",
        "FILE",
    ] = None
    keep: Annotated[
        bool, "keep the folders of runs that are done, with weights and pictures [one line each]"
    ] = False
    results: Annotated[str, "where runs and tables go, by scale", "path"] = "results"


OPTIONS = (Sweep,)


def run(line: Line) -> None:
    """Run what is missing of the experiments, several runs at a time, and write their tables.

    A table keeps its runs in one file, runs.jsonl, a line a run; a run's own folder goes when it is
    done. With --minutes or --hours all tables' runs are packed into one file for another machine.
    """
    o = line.groups.sweep
    results, start = Path(o.results) / o.scale, time.monotonic()
    planned = chosen(o)
    times = Times(results / "times.json", planned.values())
    if o.list and not o.imported:
        list_runs(planned, o.jobs, times)
        return
    stop = start + 60 * (o.minutes or math.inf)

    def missing(failed: set[str]) -> Iterator[Work]:
        for folder, cell in work_of(o, failed):
            left = 3600 * (o.hours or math.inf) - (time.monotonic() - start)
            if o.hours is None or times.seconds_of(cell) <= left:
                yield folder, cell

    next(missing(set()), None)  # refuses what is not of this version before anything is made
    with contextlib.ExitStack() as folders_held:
        for folder in sorted({experiment.at for experiment in planned.values()}):
            folders_held.enter_context(safe_files.held(folder))
        if o.imported:
            take_in(Path(o.imported), o.scale, chosen(o))
        failed: set[str] = set()
        try:
            tidy(planned.values(), o.keep)
            if not o.list and (not o.imported or o.minutes or o.hours):
                failed = run_cells(missing, o.jobs, stop, lambda f, c: pack(f, c.name, o.keep))
        finally:
            write_tables(chosen(o), results)
            if o.minutes or o.hours:
                pack_together(o.scale, chosen(o), results.with_suffix(".jsonl.xz"))
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(sorted(failed))}")
    list_runs(chosen(o), o.jobs, times)
    print(f"tables: {results}/*/table.md")


def work_of(o: Sweep, failed: set[str]) -> list[Work]:
    """Return what is missing, in the order of the tables: all of a first seed, then the others."""
    work: list[Work] = []
    for experiment in chosen(o).values():  # anew: the first tables size later ones
        cells = experiment.missing(failed)
        work += [(experiment.at, cell) for cell in cells]
        if experiment.decides and cells:
            break
    return sorted(work, key=lambda item: item[1].seed)


def chosen(o: Sweep) -> Tables:
    """Return the experiments of a sweep in their order, as far as their sizes are known."""
    results = Path(o.results) / o.scale
    every = placed(experiments.at_scale(o.scale, results), results)
    for name in o.experiment or ():
        if name not in every:
            raise ValueError(f"no experiment is called {name!r}: choose from {', '.join(every)}")
    return {name: every[name] for name in o.experiment or every}


# ---------------------------------------------------------------------------- files


def tidy(planned: Iterable[Experiment], keep: bool) -> None:
    """Pack the runs that are done and still have a folder of their own."""
    for experiment in planned:
        folder = experiment.at
        packed = read(folder / FILE)
        for row in experiment.rows:
            for run in experiment.runs(row):
                if (folder / run.name).is_dir():
                    if run.name not in packed:
                        pack(folder, run.name, keep)
                    elif not keep:
                        shutil.rmtree(folder / run.name)


def write_tables(tables: Tables, results: Path) -> None:
    """Write every experiment's table.md."""
    for name, experiment in tables.items():
        text = experiment.table()
        write = lambda path, text=text: path.write_text(text, encoding="utf-8")  # noqa: E731
        (results / name).mkdir(exist_ok=True)
        safe_files.write_atomically(results / name / "table.md", write)


def pack_together(scale: str, tables: Tables, path: Path) -> None:
    """Write the runs of all these tables into one file, each line with its scale and table."""
    folders = sorted({experiment.at for experiment in tables.values()})
    runs = [(folder.name, run) for folder in folders for run in read(folder / FILE).values()]
    write(path, ({"scale": scale, "table": name} | line_of(run) for name, run in runs))
    print(f"{len(runs)} runs are packed in {path}; sweep --import takes them in elsewhere")


def take_in(path: Path, scale: str, tables: Tables) -> None:
    """Add the runs that `pack_together` wrote to the tables' files, where they are not there yet.

    Raises:
        ValueError: no such file, a damaged one, or one of other tables.
    """
    if not path.is_file():
        raise ValueError(f"--import {path}: no such file")
    new: dict[Path, list[Past]] = {experiment.at: [] for experiment in tables.values()}
    by_name = {folder.name: folder for folder in new}
    for line in lines(path, ("scale", "table", *FIELDS)):
        if line["scale"] != scale or line["table"] not in by_name:
            raise ValueError(
                f"--import {path}: it holds runs of {line['table']!r} at the scale "
                f"{line['scale']!r}, and this is a sweep of {', '.join(by_name)} at {scale!r}"
            )
        folder = by_name[line["table"]]
        if line["name"] not in read(folder / FILE):
            new[folder].append(unpacked(line))
    for folder, runs in new.items():
        if runs:
            add(folder, runs)
    print(f"{sum(map(len, new.values()))} runs are new here, of those in {path}")


def list_runs(tables: Tables, jobs: int, times: Times) -> None:
    """Say of every table how many of its runs are done, how many of its rows are bracketed, and how
    long what is missing will take, by what this machine measures.

    What tables share counts once in the sum of all.
    """
    total, counted, waiting = 0.0, set(), set()
    for name, experiment in tables.items():
        takes, fresh, done, needed = 0.0, 0.0, 0, 0
        for row, count in experiment.left():
            cell = row.cell(row.rates[0], row.seeds[0])
            seconds = count * times.seconds_of(cell) / jobs if count else 0.0
            takes += seconds
            waiting |= {(row.command, row.options)} if count else set()
            fresh += seconds if (experiment.at, cell.name) not in counted else 0.0
            counted.add((experiment.at, cell.name))
            runs = len(experiment.runs(row))
            done, needed = done + runs, needed + runs + count
        places = [place for row in experiment.rows if (place := experiment.place(row))]
        ends = sum(place != INSIDE for place in places)
        marks = f", {ends} of {len(places)} rows not bracketed" if ends else ""
        state = f"{done} of {needed} runs done"
        print(f"{name:15} {state:24} time left: {time_left(takes)}{marks}")
        total += fresh
    if len(tables) > 1:
        print(f"{'all':15} {'':24} time left: {time_left(total)}")
    results = next(iter(tables.values())).at.parent.parent
    if (results / "README.md").exists() and any(e.runs(r) for e in tables.values() for r in e.rows):
        print("runs that came with the project count as done; --results mine keeps yours apart")
    if waiting:
        print(f"{'features':15} {'':24} once, at most: {time_left(times.features(waiting))}")
        print(f"estimated for this machine ({times.processor}) by the parts in {times.path}")


def time_left(seconds: float) -> str:
    """Write an estimate, which is no number where a command cannot be timed here."""
    if math.isnan(seconds):
        return "unknown: a package that it needs is missing"
    return duration(seconds) if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} hours"
