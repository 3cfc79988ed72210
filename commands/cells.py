"""Runs of experiments, several at a time.

Each has a process of its own, forked from one that has imported everything already; where there is
no fork, it imports for itself.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path

from machine.ranks import end_with_parent
from study.tables import Cell

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PRELOAD = (
    *("commands.fedavg", "commands.centralized", "commands.calibrate", "commands.ridge"),
    *("matplotlib.pyplot", "torch._dynamo", "study.warm"),
)
Work = tuple[Path, Cell]  # the folder of a table's runs, and one that is missing there


def run_cells(
    missing: Callable[[set[str]], Iterable[Work]],
    jobs: int,
    stop: float = math.inf,
    done: Callable[[Path, Cell], None] = lambda folder, cell: None,
) -> set[str]:
    """Run cells until none is missing; a stop is handed on to them, and each resumes next time.

    Args:
        missing: names of cells that failed -> (folder of its runs, cell) of those not done, in
            their order; asked anew whenever a process is free.
        jobs: processes at a time.
        stop: when to stop, by time.monotonic().
        done: called with each cell that is done.

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
            if time.monotonic() >= stop:
                for name in running:
                    print(f"{name}: the time is up; it goes on next time", flush=True)
                return failed
            for folder, cell in waiting[: jobs - len(running)]:
                errors = tempfile.NamedTemporaryFile("r", suffix=".txt")
                arguments = [*cell.arguments, "--name", cell.name, "--runs-dir", str(folder)]
                process = context.Process(target=run_train, args=(arguments, errors.name))
                process.start()
                running[cell.name] = process, errors, folder, cell, time.monotonic()
            if not running:
                return failed
            left = None if stop == math.inf else max(0.0, stop - time.monotonic())
            wait([process.sentinel for process, *_ in running.values()], left)
            for name, (process, errors, folder, cell, started) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[name]
                took = f"done in {time.monotonic() - started:.0f} s"
                reason = errors.read().strip() or f"exit status {process.exitcode}"
                print(f"{folder.name}/{name}: {reason if process.exitcode else took}", flush=True)
                if process.exitcode:
                    failed.add(name)
                else:
                    done(folder, cell)
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
