"""Run the cells of experiments, each in a process of its own, several at a time.

A process is forked from one that has imported everything already; where there is no fork, it
imports for itself.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path

from tables import Cell

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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
        context.set_forkserver_preload(["train", "matplotlib.pyplot", "torch._dynamo"])
    running: dict[str, tuple] = {}
    failed: set[str] = set()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores, as --threads 1 says
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while True:
            waiting = [x for x in missing(failed) if x[1].name not in running]
            waiting = list(dict.fromkeys(waiting))  # tables share runs
            for folder, cell in waiting[: jobs - len(running)]:
                said = tempfile.NamedTemporaryFile("r", suffix=".txt")
                arguments = [*cell.arguments, "--name", cell.name, "--runs-dir", str(folder)]
                process = context.Process(target=run, args=(arguments, said.name))
                process.start()
                running[cell.name] = process, said, folder, time.monotonic()
            if not running:
                return failed
            wait([process.sentinel for process, *_ in running.values()])
            for name, (process, said, folder, started) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[name]
                took = f"done in {time.monotonic() - started:.0f} s"
                reason = said.read().strip() or f"exit status {process.exitcode}"
                print(f"{folder.name}/{name}: {reason if process.exitcode else took}", flush=True)
                if process.exitcode:
                    failed.add(name)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Let this process be killed when its parent ends, so that a killed sweep leaves no runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(arguments: list[str], said: str) -> None:
    """Call train.py in this process; what it prints as errors goes to the file `said`."""
    import train

    end_with_parent()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    errors = os.open(said, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(errors, sys.stderr.fileno())
    sys.exit(train.main(arguments))
