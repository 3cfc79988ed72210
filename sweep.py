"""Run the cells of an experiment, each in a process of its own, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import Cell

TRAIN = Path(__file__).parent / "train.py"


def run_cells(cells: Sequence[Cell], folder: Path, jobs: int) -> set[str]:
    """Run the cells in their order; a stop is handed on to them, and each resumes next time.

    Args:
        folder: where the runs go.
        jobs: processes at a time, one thread each.

    Returns:
        the names of the cells that failed; their reason is printed.
    """
    waiting, running, failed = list(cells), {}, set()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                command = [sys.executable, str(TRAIN), "fedavg", *cell.arguments]
                command += ["--name", cell.name, "--runs-dir", str(folder)]
                said = tempfile.TemporaryFile("w+")
                pipes = dict(stdout=subprocess.DEVNULL, stderr=said)
                running[cell.name] = subprocess.Popen(command, env=environment, **pipes), said
            time.sleep(0.2)
            for name, (process, said) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    said.seek(0)
                    reason = said.read().strip()
                    print(f"{name}: {'done' if process.returncode == 0 else reason}", flush=True)
                    if process.returncode:
                        failed.add(name)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed
