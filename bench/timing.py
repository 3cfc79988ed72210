"""What the benches share: interleaved repetitions, quantiles, and a CSV that says what made it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine.device import processor

ROOT = Path(__file__).parent.parent
# glibc gives large blocks back to the kernel and faults them in again; these keep them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_memory() -> None:
    """Start this script again under MALLOC's settings, which are read when a process starts."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of one call, its work on a GPU included."""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def interleaved(
    methods: dict[str, Callable[[], object]], repetitions: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Call all methods in turn, again and again; returns each one's seconds, the first left out."""
    seconds = {name: [] for name in methods}
    for _ in range(repetitions + 1):
        for name, method in methods.items():
            seconds[name].append(timed(method, device))
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def quantiles(values: np.ndarray, unit: float = 1.0) -> dict[str, float]:
    """Return median, p20 and p80 of values / unit, to four digits."""
    cut = np.quantile(np.asarray(values) / unit, (0.5, 0.2, 0.8))
    return {k: float(f"{q:.4g}") for k, q in zip(("median", "p20", "p80"), cut, strict=True)}


def write_csv(path: str | Path, rows: list[dict], device: str = "cpu", **facts) -> None:
    """Write the rows below '#' lines that name command, machine, versions, date and commit."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "hardware": f"{processor(torch.device(device))}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "malloc": "kept" if "MALLOC_TOP_PAD_" in os.environ else "default",
    }
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in (made_by | facts).items())
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"see {path}")


def megabytes(field: str = "VmHWM") -> int:
    """Return this process's largest resident size so far; VmRSS is what it holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3)


def commit() -> str:
    """Return the commit of this code, '-dirty' where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
