"""Try faults on small runs, and tell what came of them.

python tests/guarantees/faults/run.py           a quick set, part of the tests
python tests/guarantees/faults/run.py --full --out results/faults.json
                                                everything; root tries mounts too
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import world  # first: it imports torch with one thread, and finds the files of the tests

import damage  # isort: skip
import environment  # isort: skip
import kills  # isort: skip
import matrix  # isort: skip


def try_all(tally: world.Tally, where: Path, full: bool, only: str) -> None:
    """Try every kind of fault whose name holds `only`."""
    planned = matrix.planned(full)
    name = "kill -9 at a file operation"
    steps = dict(first=1, step=1 if full else 41)
    planned.append((name, kills.at_every_operation, (name, kills.die), steps))
    name, steps = "no space at a file operation", dict(first=2, step=3 if full else 71)
    planned.append((name, kills.at_every_operation, (name, kills.no_space), steps))
    planned += damage.planned(full)
    planned += environment.planned(full)
    if full:
        planned.append(("kill -9 of a sweep", kills.sweeps, (2, 0)))
    waiting, running = [plan for plan in planned if only in plan[0]], {}
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            plan, place = waiting.pop(), world.fresh(where / str(len(waiting)))
            if (pid := os.fork()) == 0:
                try_one(place, *plan)
            running[pid] = place
        pid, _ = os.wait()
        tally.kinds |= json.loads((running.pop(pid) / "tally.json").read_text())


def try_one(place: Path, name: str, function: Callable, arguments: tuple, options: dict = {}):  # noqa: B006
    """Try one kind of fault in this process, which ends with it."""
    tally, started = world.Tally(), time.monotonic()
    try:
        function(tally, place, *arguments, **options)
    except BaseException:
        tally.add(name, "tracebacks", traceback.format_exc())
    (place / "tally.json").write_text(json.dumps(tally.kinds))
    print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)
    os._exit(0)


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    import hypothesis
    import torch

    git = ["git", "-C", str(world.ROOT), "describe", "--always", "--dirty"]
    processor = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} cores, {processor[0]}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
    }


def main() -> int:
    """Try the faults; returns 1 where one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="many more faults: minutes")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    tally, started, made_with = world.Tally(), time.monotonic(), versions()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a quick disk
    with tempfile.TemporaryDirectory(prefix="faults", dir=memory) as where:
        try_all(tally, Path(where), options.full, options.only)
    figures = made_with | {
        "set": "full" if options.full else "quick",
        "seconds": round(time.monotonic() - started),
        "save_seconds": world.SAVE_SECONDS,
        "faults": tally.kinds,
    }
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for kind, found in tally.kinds.items():
        print(f"{kind}: {found['survived']} of {found['tried']} survived")
        for failure in found["failures"]:
            print(f"    {failure}")
    return int(any(found["failures"] for found in tally.kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
