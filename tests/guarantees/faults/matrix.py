"""What a run does, how it is stopped, in how many processes: typed again, it ends in the same bits.

The quick set has every pair of a feature, a signal and a number of processes; the full one has the
whole product, each run stopped five times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from world import Child, Ended, Tally, fresh, lines, outcome, run, wait_for

SMALL = "--data synthetic --clients 10 --J 2 --batch-size 8 --name x"
FEDAVG = f"fedavg {SMALL} --rounds 16 --eval-every 2"
FEATURES = {
    "plain": FEDAVG,
    "masked": f"{FEDAVG} --head ridge --mask-rule least-sensitive --mask-lr raw "
    "--calibration-images 40",
    "scaffold": f"{FEDAVG} --scaffold --fraction 0.3",
    "local norms": f"{FEDAVG} --local-norm --fraction 0.3 --early-stop 20",
    "fedadam": f"{FEDAVG} --server fedadam --aggregate fednova --straggler-fraction 0.5",
    "ties": f"{FEDAVG} --aggregate ties --dropout 0.3 --diagnostics",
    "private": f"{FEDAVG} --dp-noise 1 --dp-clip 0.3 --dp-seed 0",
    "secure aggregation": f"{FEDAVG} --secure-aggregation --fraction 0.4",
    "head only": f"{FEDAVG} --train head --head ridge --nc 10 --scaffold --fraction 0.5",
    "centralised": "centralized --data synthetic --name x --epochs 2 --batch-size 16 "
    "--eval-every 0.3 --schedule cosine --warmup 1 --early-stop 20",
    "calibrate": "calibrate --data synthetic --clients 10 --name x --calibration-images 40",
}
ALONE = ("centralised", "calibrate")  # in one process only
PIPE = "closed pipe"
STATUSES = {  # of a process that was stopped, before it handles signals and after
    "SIGKILL": (-9,),
    "SIGTERM": (-15, 143),
    "SIGINT": (130,),
    PIPE: (141,),
}
GONE = "another process of the job has gone"


class Case(NamedTuple):
    """What a run does, how it is stopped, in how many processes."""

    feature: str
    signal: str
    processes: int


def cases(feature: str, full: bool) -> list[Case]:
    """Return a feature's cases: all of them, or those that all features' pairs need."""
    some, first = [], [*FEATURES].index(feature)
    for number, name in enumerate(STATUSES):
        pair = 1 + (first + number) % 2
        counts = (1,) if feature in ALONE else (1, 2) if full else (pair,)
        some += [Case(feature, name, processes) for processes in counts]
    return some


def check_feature(tally: Tally, where: Path, kind: str, feature: str, full: bool) -> None:
    """Stop a feature's run in each way at random moments; it goes on when typed again."""
    whole, command, started = fresh(where / "whole"), FEATURES[feature], time.monotonic()
    if (ended := run(whole, command)).code:
        raise RuntimeError(ended)
    seconds, expected = time.monotonic() - started, outcome(whole)
    for case in cases(feature, full):
        moments, folder, what = random.Random(repr(case)), fresh(where / "victim"), f"{case}"
        for _ in range(5 if full else 1):
            stopped = []
            while not any(process.code for process in stopped):
                stopped = stop(folder, command, case, moments, seconds, lines(whole))
                if not any(process.code for process in stopped):
                    fresh(folder)  # the signal came after the end: once more
                    seconds /= 2
            if wrong := misbehaved(stopped, case):
                tally.add(kind, "tracebacks", f"{what}: {wrong}")
                break
        else:
            ended = end_all(start(folder, command, case.processes))
            worst = max(ended, key=lambda process: process.code != 0)
            tally.judge(kind, what, folder, worst, expected)


def start(folder: Path, command: str, processes: int, pipe: tuple[int, int] | None = None):
    """Start a command in one process, or in a group; the pipe takes what the first one says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes)
        place |= dict(MASTER_ADDR="localhost", MASTER_PORT=port)

        def prepare(rank=rank, place=place):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where "&" began it
            if processes > 1:
                os.environ.update({name: f"{value}" for name, value in place.items()})
            if pipe:
                os.close(pipe[0])
                if rank == 0:  # stdout on a pipe from the start
                    os.dup2(pipe[1], 1)
                    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
                os.close(pipe[1])

        children.append(Child(folder, command, prepare))
    return children


def stop(
    folder: Path, command: str, case: Case, moments: random.Random, seconds: float, total: int
) -> list[Ended]:
    """Start a command, stop it at a random moment after the last stop, and wait for its end.

    Args:
        seconds: that the whole run takes; `total`: lines of its log.
    """
    pipe = os.pipe() if case.signal == PIPE else None
    children = start(folder, command, case.processes, pipe)
    if pipe:
        os.close(pipe[1])
    before = lines(folder)
    wanted = before + int(moments.random() * 0.8 * (total - before))
    while not ((folder / "runs/x/config.json").exists() and lines(folder) >= wanted):
        if children[0].ended():
            break
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.7) * seconds / (total + 1))
    if pipe:
        os.close(pipe[0])
    else:
        struck = children if case.signal == "SIGINT" else [moments.choice(children)]
        for child in struck:  # Ctrl-C reaches all of a terminal's
            child.kill(signal.Signals[case.signal])
    return end_all(children)


def end_all(children: list[Child], patience: float = 30.0) -> list[Ended]:
    """Wait for a group's end; as torchrun does, end those that outlive another for long."""
    while not any([child.ended() for child in children]):
        time.sleep(0.005)
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: all([child.ended() for child in children]), patience)
    for child in children:
        child.kill()
    return [child.end() for child in children]


def misbehaved(ended: list[Ended], case: Case) -> str:
    """Return what is wrong about how a case's processes ended; nothing where nothing is."""
    stopped = [process.code in STATUSES[case.signal] for process in ended]
    for process in ended:
        also = process.code == 143 or process.code == 1 and GONE in process.said
        if "Traceback" in process.said or not (process.code in STATUSES[case.signal] or also):
            return f"ended by {process}"
    return "" if any(stopped) else f"nothing was stopped: {ended}"


def planned(full: bool) -> list[tuple]:
    """Return what to try: name, function, arguments."""
    kinds = {f"matrix, {feature}": feature for feature in FEATURES}
    return [(kind, check_feature, (kind, feature, full)) for kind, feature in kinds.items()]
