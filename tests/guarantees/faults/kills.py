"""kill -9: at random moments, and at every file operation; of one process of several."""

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
from world import ROOT, Child, Ended, Tally, canonical, fresh, reference, run

from machine import runs, safe_files
from training import session

SMALL = "--data synthetic --clients 10 --J 2 --batch-size 8 --name x"
FEDAVG = f"fedavg {SMALL} --rounds 40 --eval-every 8"
TRAINING = {
    "fedavg": FEDAVG,
    "fedavg, SCAFFOLD": f"{FEDAVG} --scaffold --fraction 0.3",
    "fedavg, local norm, mask": f"{FEDAVG} --local-norm --head ridge --mask-rule random "
    "--mask-lr raw",
    "centralized": "centralized --data synthetic --name x --epochs 2 --batch-size 8 --eval-every 1",
    "calibrate": f"calibrate {SMALL.replace('--J 2 --batch-size 8', '')} --calibration-images 100",
}
WRITES_ALL = (  # every kind of file that a run writes
    "fedavg --data synthetic --clients 4 --fraction 0.5 --J 1 --batch-size 8 --name x --rounds 1 "
    "--scaffold --head ridge --mask-rule lowest-magnitude --mask-lr raw "
    "--early-stop 5 --eval-every 1"
)


def random_kills(tally: Tally, where: Path, kind: str, kills: int, seed: int) -> None:
    """Kill a command again and again, until it ends, and then others like it."""
    command, moments, number = TRAINING[kind], random.Random(f"{seed} {kind}"), 0
    expected, seconds = reference(where / "whole", command)
    while tally.of(f"kill -9, {kind}")["tried"] < kills:
        number += 1
        folder, deaths = fresh(where / f"killed{number}"), 0
        for _ in range(min(8, kills)):
            child = Child(folder, command)
            time.sleep(moments.uniform(0, 0.6) * seconds)
            died = time.time()
            child.kill()
            if child.end().code == -signal.SIGKILL:
                deaths += 1
                saved = folder / "runs" / "x" / "checkpoint.pt"
                age = died - saved.stat().st_mtime if saved.exists() else 1e9
                tally.lost(f"kill -9, {kind}", min(age, time.monotonic() - child.started))
        what = f"{kind}, victim {number}"
        if deaths:
            ended = run(folder, command)
            tally.judge(f"kill -9, {kind}", what, folder, ended, expected, times=deaths)


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
        """Patch what safe_files.py, runs.py and session.py write by."""
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
        safe_files.open = runs.open = session.open = File
        pathlib.Path.write_text = lambda p, text, **_: at.write(p, text.encode())
        pathlib.Path.write_bytes = at.write
        for name in ("fsync", "replace", "rename", "unlink", "truncate", "mkdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        runs.drive.__kwdefaults__["save_seconds"] = 0.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_every_operation(
    tally: Tally, where: Path, kind: str, act: Callable[[], None], first: int = 1, step: int = 1
) -> None:
    """Let `act` happen at operation `first`, `first` + `step`, ... until the run meets none."""
    expected, _ = reference(where / "whole", WRITES_ALL)
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
PAIR = f"{FEDAVG} --threads 1".replace("--rounds 40", "--rounds 400")


def command_line(folder: Path, *arguments: str) -> subprocess.Popen:
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, **options)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError
        time.sleep(0.01)


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def one_of_two(tally: Tally, where: Path, kills: int, seed: int) -> None:
    """Kill one process of torchrun's two; the job ends, says so, and goes on when typed again."""
    kind, moments = "kill -9 of one of two processes", random.Random(seed)
    expected, _ = reference(where / "alone", PAIR)
    script = str(Path(__file__).with_name("world.py"))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script)
    folder, log = fresh(where / "pair"), where / "pair" / "runs" / "x" / "log.jsonl"
    for number in range(kills):
        before, job = lines(log), command_line(folder, *launcher, *PAIR.split())
        wait_for(lambda b=before, job=job: lines(log) > b + 3 or job.poll() is not None)
        time.sleep(moments.uniform(0, 0.2))
        died = time.time()
        os.kill(moments.choice(children(job.pid)), signal.SIGKILL)
        saved = log.with_name("checkpoint.pt")
        if saved.exists():
            tally.lost(kind, died - saved.stat().st_mtime)
        said, _ = job.communicate(timeout=120)
        told = "another process of the job has gone" in said or "SIGKILL" in said
        result = "survived" if job.returncode and told else "tracebacks"
        tally.add(kind, result, f"kill {number}: {job.returncode} {said[-500:]}")
    job = command_line(folder, *launcher, *PAIR.split())
    said, _ = job.communicate(timeout=300)
    tally.judge(kind, "end", folder, Ended(job.returncode, said), expected)


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
        before = sum(lines(log) for log in folder.rglob("log.jsonl"))
        job = command_line(folder, *command)
        wait_for(lambda b=before: sum(lines(log) for log in folder.rglob("log.jsonl")) > b + 5)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=60)
    job = command_line(folder, *command)
    said, _ = job.communicate(timeout=300)
    same = job.returncode == 0 and found(folder) == expected
    result = "survived" if same else "wrong_results" if job.returncode == 0 else "lost_runs"
    tally.add(kind, result, said[-600:], kills)


def outcome_of_cells(folder: Path) -> dict:
    """Return the last state of every run of a sweep."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["state"]["process"]
        for path in sorted(folder.rglob("checkpoint.pt"))
    }
