"""kill -9, and a full disk, at every file operation; kill -9 of a sweep."""

from __future__ import annotations

import builtins
import errno
import functools
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from world import ROOT, Tally, canonical, fresh, reference, run, wait_for

from machine import drive, runs, safe_files
from training import run_folder

WRITES_ALL = (  # every kind of file that a run writes
    "fedavg --data synthetic --clients 4 --fraction 0.5 --J 1 --batch-size 8 --name x --rounds 1 "
    "--scaffold --head ridge --mask-rule lowest-magnitude --mask-lr raw "
    "--early-stop 5 --eval-every 1"
)


class AtOperation:
    """Does something at this process's n-th operation on files: open, write, fsync, rename, ...

    A write is two operations, half of the bytes each.

    Args:
        act: what happens in place of the operation.
    """

    def __init__(self, n: int, act: Callable[[], None]):
        self.left, self.act = n, act

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def counted(self, function: Callable) -> Callable:
        def call(*arguments, **options):
            self()
            return function(*arguments, **options)

        return call

    def write(self, path: Path, content: bytes, mode: str = "wb") -> None:
        self()
        with builtins.open(path, mode, buffering=0) as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                self()
                file.write(half)

    def install(self) -> None:
        """Patch what safe_files.py, runs.py and run_folder.py write by."""
        at = self

        class File:
            def __init__(self, path, mode="r", **options):
                at()
                self.file = builtins.open(path, mode, **options)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                    at()
                    self.file.write(half)
                    self.file.flush()
                return len(content)

        save = torch.save

        def save_bytes(value, path):
            save(value, whole := Path(f"{path}.whole"))
            content = whole.read_bytes()
            os_unlink(whole)
            at.write(path, content)

        os_unlink = os.unlink
        torch.save = save_bytes
        safe_files.open = runs.open = run_folder.open = File
        pathlib.Path.write_text = lambda p, text, **_: at.write(p, text.encode())
        pathlib.Path.write_bytes = at.write
        for name in ("fsync", "replace", "rename", "unlink", "truncate", "mkdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        drive.drive.__kwdefaults__["save_seconds"] = 0.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_every_operation(
    tally: Tally, where: Path, kind: str, act: Callable[[], None], first: int = 1, step: int = 1
) -> None:
    """Let `act` happen at operation `first`, `first` + `step`, ... until the run meets none."""
    expected = reference(where / "whole", WRITES_ALL)
    met = where / "met"

    def acting() -> None:
        met.touch()
        act()

    for n in itertools.count(first, step):
        folder = fresh(where / "victim")
        met.unlink(missing_ok=True)
        ended = run(folder, WRITES_ALL, AtOperation(n, acting).install)
        if not met.exists():
            return
        again = functools.partial(run, folder, WRITES_ALL)
        if ended.code == -signal.SIGKILL:
            ended = again()
        tally.judge(kind, f"operation {n}", folder, ended, expected, retry=again)


# ---------------------------------------------------------------------------- real processes

ENVIRONMENT = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command_line(folder: Path, *arguments: str) -> subprocess.Popen:
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, **options)


def sweeps(tally: Tally, where: Path, kills: int, seed: int) -> None:
    """Kill a sweep of two jobs; its runs end with it, and it goes on when typed again."""
    kind, moments = "kill -9 of a sweep", random.Random(seed)
    script = str(Path(__file__).with_name("world.py"))
    command = (sys.executable, script, "sweep", "rules", "--scale", "smoke")
    command += ("--jobs", "2", "--results", "runs", "--keep")

    def found(folder: Path) -> dict:
        return {k: canonical(v) for k, v in outcome_of_cells(folder).items()}

    whole = command_line(fresh(where / "whole"), *command)
    said, _ = whole.communicate(timeout=300)
    expected = found(where / "whole")
    if whole.returncode or len(expected) != 4:
        raise RuntimeError(said)
    folder = fresh(where / "killed")
    for _ in range(kills):
        before, job = logged(folder), command_line(folder, *command)
        wait_for(lambda before=before: logged(folder) > before + 5)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=60)
    job = command_line(folder, *command)
    said, _ = job.communicate(timeout=300)
    same = job.returncode == 0 and found(folder) == expected
    result = "survived" if same else "wrong_results" if job.returncode == 0 else "lost_runs"
    tally.add(kind, result, said[-600:], kills)


def logged(folder: Path) -> int:
    """Return how many lines the logs of a sweep have."""
    return sum(log.read_bytes().count(b"\n") for log in folder.rglob("log.jsonl"))


def outcome_of_cells(folder: Path) -> dict:
    """Return the last state of every run of a sweep."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["state"]["process"]
        for path in sorted(folder.rglob("checkpoint.pt"))
    }
