"""What is around a run: a full or read-only disk, a folder that goes, other processes, a clock."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from damage import COMMAND
from world import Child, Tally, fresh, reference, run, wait_for

from machine import drive, runs
from training import learner


def limited_files(tally: Tally, where: Path, tries: int) -> None:
    """No file may grow beyond a limit, as on a disk that is full at that byte."""
    kind, expected = "no space beyond a size", reference(where / "whole", COMMAND)
    sizes = [path.stat().st_size for path in (where / "whole").rglob("*") if path.is_file()]
    for number in range(tries):
        limit = int(max(sizes) * (number + 0.5) / tries) if number else 300
        folder = fresh(where / "victim")

        def prepare(limit=limit):
            drive.drive.__kwdefaults__["save_seconds"] = 0.0
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = run(folder, COMMAND, prepare)
        retry = functools.partial(run, folder, COMMAND)
        tally.judge(kind, f"{limit} bytes", folder, ended, expected, retry=retry)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of so many bytes."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disks(tally: Tally, where: Path, tries: int) -> None:
    """A file system that is full, more or less, and then has room again."""
    kind, expected = "full file system", reference(where / "whole", COMMAND)
    used = sum(p.stat().st_size for p in (where / "whole").rglob("*") if p.is_file())
    for number in range(tries):
        folder = fresh(where / f"victim{number}")
        with mounted(folder / "runs", 4 * used):
            with open(ballast := folder / "runs" / "ballast", "wb") as file:
                file.write(b"x" * (4 * used - int(used * (number + 0.1) / tries)))

            def retry(folder=folder, ballast=ballast):
                ballast.unlink()
                return run(folder, COMMAND)

            ended = run(folder, COMMAND)
            tally.judge(kind, f"{number} of {tries}", folder, ended, expected, retry=retry)


def read_only_disks(tally: Tally, where: Path) -> None:
    """A file system that takes nothing; it cannot become so while a run has its lock open."""
    kind, command = "read-only file system", COMMAND.replace("--rounds 8", "--rounds 9")
    expected, folder = reference(where / "whole", command), fresh(where / "victim")
    for before in (None, COMMAND):  # from the start, and a run that goes on
        shutil.rmtree(folder)
        with mounted(folder / "runs", 1 << 28):

            def remount(how: str) -> None:
                line = ["mount", "-o", f"remount,{how}", str(folder / "runs")]
                subprocess.run(line, check=True)

            def retry(remount=remount):
                remount("rw")
                return run(folder, command)

            if before:
                run(folder, before)
            remount("ro")
            ended = run(folder, command)
            tally.judge(kind, f"{before}", folder, ended, expected, retry=retry, names="runs")


def at_round(round: int, act: Callable[[runs.Run], None]) -> None:
    """Let something happen before the record of a round is logged."""
    log = runs.Run.log

    def logged(run, record):
        if record.get("round") == round:
            act(run)
        log(run, record)

    runs.Run.log = logged


def places(tally: Tally, where: Path, tries: int) -> None:
    """A file in the folder's place; a folder that is deleted, or made anew, during the run."""
    expected = reference(where / "whole", COMMAND)
    kind, folder = "file in place of a folder", fresh(where / "file")
    for name in ("runs/x", "runs", "data")[:tries]:
        folder = fresh(where / "file")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

        def retry(folder=folder, name=name):
            (folder / name).unlink()
            return run(folder, COMMAND)

        ended = run(folder, COMMAND)
        tally.judge(kind, name, folder, ended, expected, retry=retry, names=name)
    kind = "run folder deleted"
    for round in (4, 1, 8)[:tries]:
        folder = fresh(where / "deleted")
        prepare = functools.partial(at_round, round, lambda run: shutil.rmtree(run.folder))
        ended = run(folder, COMMAND, prepare)
        retry = functools.partial(run, folder, COMMAND)
        tally.judge(kind, f"round {round}", folder, ended, expected, retry=retry, names="runs/x")


def two_processes(tally: Tally, where: Path) -> None:
    """A second process on a folder is refused; the lock of a dead one does not hold."""
    kind, expected = "two processes on a folder", reference(where / "whole", COMMAND)
    folder = fresh(where / "shared")
    wait = functools.partial(at_round, 3, lambda run: time.sleep(600))
    first = Child(folder, COMMAND, wait)
    wait_for(lambda: (folder / "runs" / "x" / "log.jsonl").exists())
    second = run(folder, COMMAND)
    refused = second.code == 2 and "is open in another process" in second.said
    tally.add(kind, "survived" if refused else "wrong_results", f"second: {second}")
    first.kill()
    first.end()
    tally.judge(kind, "after the first died", folder, run(folder, COMMAND), expected)


def clocks(tally: Tally, where: Path) -> None:
    """A clock that jumps back and forth."""
    kind, expected = "clock that jumps", reference(where / "whole", COMMAND)
    jumps = random.Random(0)
    now = time.time

    def prepare():
        time.time = lambda: now() + jumps.uniform(-1e9, 1e9)

    ended = run(fresh(where / "victim"), COMMAND, prepare)
    tally.judge(kind, "time.time", where / "victim", ended, expected)


def signals(tally: Tally, where: Path, evaluations: int) -> None:
    """SIGTERM within an evaluation."""
    kind, expected = "SIGTERM in an evaluation", reference(where / "whole", COMMAND)
    for number in range(evaluations):
        folder = fresh(where / "victim")

        def prepare(number=number):
            evaluate, calls = learner.Learner.evaluate, []

            def stopped(self, *sets):
                calls.append(self)
                if len(calls) == number + 1:
                    signal.raise_signal(signal.SIGTERM)
                return evaluate(self, *sets)

            learner.Learner.evaluate = stopped

        ended, last = run(folder, COMMAND, prepare), number == evaluations - 1
        saved = ended.code == 143 and "saved at round" in ended.said or last and ended.code == 0
        if not saved:
            tally.add(kind, "lost_runs", f"evaluation {number}: {ended}")
            continue
        tally.judge(kind, f"evaluation {number}", folder, run(folder, COMMAND), expected)


def planned(full: bool) -> list[tuple[str, Callable, tuple]]:
    """Return what to try: name, function, arguments."""
    tries = [
        ("no space beyond a size", limited_files, (8 if full else 1,)),
        ("file in place of a folder, run folder deleted", places, (3 if full else 1,)),
        ("two processes on a folder", two_processes, ()),
        ("clock that jumps", clocks, ()),
        ("SIGTERM in an evaluation", signals, (9 if full else 1,)),
    ]
    if full and os.geteuid() == 0 and shutil.which("mount"):
        tries.append(("full file system", full_disks, (8,)))
        tries.append(("read-only file system", read_only_disks, ()))
    return tries
