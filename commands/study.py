"""train.py sweep, report: the experiments' missing runs, their tables, and the report's material.

Each run of a sweep has a process of its own, forked from one that has imported everything already;
where there is no fork, it imports for itself.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from commands.options import Line
from machine import safe_files
from machine.ranks import end_with_parent
from machine.status import duration
from study import blank, experiments, history, report, tables
from study.tables import Cell

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PRELOAD = (
    *("commands.fedavg", "commands.centralized", "commands.calibrate", "commands.ridge"),
    *("matplotlib.pyplot", "torch._dynamo", "study.warm"),
)


class Sweep(NamedTuple):
    """Which runs."""

    experiment: Annotated[
        Sequence[str] | None,  # list is a field here
        f"{', '.join(experiments.at_scale('smoke'))} [all of them]",
        "NAME",
        "positional",
    ] = None
    scale: Annotated[
        str,
        "sizes: paper for a GPU, cpu for two cores, smoke for minutes",
        experiments.SCALES,
    ] = "paper"
    list: Annotated[bool, "say what is done and what is missing"] = False
    jobs: Annotated[int, "runs at a time", ">= 1"] = 1
    results: Annotated[str, "where runs and tables go, by scale", "path"] = "results"


class Report(NamedTuple):
    """Which material."""

    runs: Annotated[
        list[str] | None,
        "your own runs, or folders of them: a blank report with their tables and figures",
        "path",
        "RUN",
    ] = None
    scale: Annotated[
        str | None, "in their place the experiments' runs of this scale [paper]", experiments.SCALES
    ] = None
    results: Annotated[str, "where the scales' runs lie", "path"] = "results"
    out: Annotated[
        str | None, "where it all goes [report; of a scale study/latex/generated]", "path"
    ] = None


SWEEP, REPORT = (Sweep,), (Report,)


def run_sweep(line: Line) -> None:
    """Run what is missing of the experiments, several runs at a time, and write their tables."""
    o = line.groups.sweep
    every = experiments.at_scale(o.scale)
    for name in o.experiment or ():
        if name not in every:
            raise ValueError(f"no experiment is called {name!r}: choose from {', '.join(every)}")
    chosen = {name: every[name] for name in o.experiment or every}
    results = Path(o.results) / o.scale
    folders = {name: results / (e.folder or name) for name, e in chosen.items()}
    if o.list:
        list_runs(chosen, folders, o.jobs)
        return

    def missing(failed: set[str]) -> Iterator[tuple[Path, tables.Cell]]:
        for name, experiment in chosen.items():
            for cell in experiment.missing(folders[name], failed):
                yield folders[name], cell

    next(missing(set()), None)  # refuses what is not of this version before anything is made
    with contextlib.ExitStack() as folders_held:
        for folder in sorted(set(folders.values())):
            folders_held.enter_context(safe_files.held(folder))
        try:
            failed = run_cells(missing, o.jobs)
        finally:
            for name, experiment in chosen.items():
                text = experiment.table(folders[name])
                write = lambda path, text=text: path.write_text(text, encoding="utf-8")  # noqa: E731
                (results / name).mkdir(exist_ok=True)
                safe_files.write_atomically(results / name / "table.md", write)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(sorted(failed))}")
    list_runs(chosen, folders, o.jobs)
    print(f"tables: {results}/*/table.md")


def list_runs(chosen: dict[str, tables.Experiment], folders: dict[str, Path], jobs: int) -> None:
    """Say of every table how many of its runs are done, and how long the others will take.

    What tables share counts once in the sum of all.
    """
    estimates, counted = [], set()
    for name, experiment in chosen.items():
        left = experiment.left(folders[name])
        took = [experiment.seconds(folders[name], row) for row, _ in left]
        measured = [seconds for seconds in took if seconds is not None]
        usual = float(np.mean(measured)) if measured else math.nan  # of a row that has not run
        seconds = [usual if row is None else row for row in took]
        counts = [count for _, count in left]
        needed = sum(len(row.rates) + len(row.seeds) - 1 for row in experiment.rows)
        takes = [n * s / jobs if n else 0 for n, s in zip(counts, seconds, strict=True)]
        rows = [(folders[name], row.cell(row.rates[0], row.seeds[0]).name) for row, _ in left]
        fresh = [t for row, t in zip(rows, takes, strict=True) if row not in counted]
        counted |= set(rows)
        estimate = sum(takes)
        estimates.append(sum(fresh))
        shown = "unknown: none has run" if math.isnan(estimate) else duration(estimate)
        done = f"{needed - sum(counts)} of {needed} runs done"
        print(f"{name:15} {done:24} time left: {shown}")
    if len(chosen) > 1:
        estimated = [estimate for estimate in estimates if not math.isnan(estimate)]
        unknown = len(estimates) - len(estimated)
        more = f", and {unknown} tables of unknown length" if unknown else ""
        total = f"{duration(sum(estimated))}{more}" if estimated else "unknown: none has run"
        print(f"{'all':15} {'':24} time left: {total}")


def run_report(line: Line) -> None:
    """Write a report's tables, figures and numbers: of your runs a blank one, of a scale ours.

    With --runs the folder is a LaTeX project, zipped beside it for Overleaf; none is needed here.
    Made again it has new results, and the text that you wrote.
    """
    o = line.groups.report
    if o.runs is None:
        out = Path(o.out or "study/latex/generated")
        pieces = report.write(o.scale or "paper", Path(o.results), out)
        print(f"written to {out}: numbers.tex, {', '.join(pieces) or 'nothing else has run'}")
        return
    if o.scale is not None:
        raise ValueError("--scale: not allowed with --runs")
    out = Path(o.out or "report")
    pieces, notes = blank.write(history.read_all(o.runs), out)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"written to {out}: report.tex, {', '.join(pieces)}")
    print(f"for Overleaf: {blank.zipped(out)}")


def run_cells(missing: Callable[[set[str]], Iterable[tuple[Path, Cell]]], jobs: int) -> set[str]:
    """Run cells until none is missing; a stop is handed on to them, and each resumes next time.

    Args:
        missing: names of cells that failed -> (folder of its runs, cell) of those not done, in
            their order; asked anew whenever a process is free.
        jobs: processes at a time.

    Returns:
        the names of the cells that failed; their reason is printed.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([*PRELOAD])
    running: dict[str, tuple] = {}
    failed: set[str] = set()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores, as --threads 1 says
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while True:
            waiting = [x for x in missing(failed) if x[1].name not in running]
            waiting = list(dict.fromkeys(waiting))  # tables share runs
            for folder, cell in waiting[: jobs - len(running)]:
                errors = tempfile.NamedTemporaryFile("r", suffix=".txt")
                arguments = [*cell.arguments, "--name", cell.name, "--runs-dir", str(folder)]
                process = context.Process(target=run_train, args=(arguments, errors.name))
                process.start()
                running[cell.name] = process, errors, folder, time.monotonic()
            if not running:
                return failed
            wait([process.sentinel for process, *_ in running.values()])
            for name, (process, errors, folder, started) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[name]
                took = f"done in {time.monotonic() - started:.0f} s"
                reason = errors.read().strip() or f"exit status {process.exitcode}"
                print(f"{folder.name}/{name}: {reason if process.exitcode else took}", flush=True)
                if process.exitcode:
                    failed.add(name)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def run_train(arguments: list[str], errors: str) -> None:
    """Run train.py in this process; what it prints as errors goes to the file `errors`."""
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(errors, os.O_WRONLY), sys.stderr.fileno())
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")
