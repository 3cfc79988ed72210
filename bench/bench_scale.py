"""Set-up, seconds a round and memory as clients go from 100 to 100,000, and as rounds go to 1,000.

    python bench/bench_scale.py [--rounds 40] [--csv FILE]

Labels of 200,000 samples are dealt to K clients, 10 of whom train a round; samples share the 20,000
images of the synthetic data set (index modulo 20,000, which keeps the class). vit_demo, B = 8,
J = 4: `all` trains everything, `head` only the head, where a round is short and overheads show. For
time, one round of every K in turn, and the ratio to K = 100 in the same turn; for memory, a process
each, with the allocator's defaults.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from timing import MALLOC, interleaved, keep_memory, megabytes, quantiles, timed, write_csv
from work import build_learner, build_loop, one_round, opened

import data
from fedavg import FedAvg
from training.learner import Learner

CLIENTS = (100, 1_000, 10_000, 100_000)
LABELS = np.arange(200_000) % 100
SHARDINGS = {
    "iid": lambda labels, k: data.shard_iid(labels, k, seed=0),
    "nc1": lambda labels, k: data.shard_by_class(labels, k, 1, seed=0),
    "dirichlet0.3": lambda labels, k: data.shard_dirichlet(labels, k, 0.3, seed=0),
}
GOALS = {"round, to K = 100": 1.05, "set-up, s": 2.0}


def make_learner(what: str, folder: str, threads: int) -> tuple[Learner, SimpleNamespace]:
    """Return a learner of the synthetic data set, head or all, and its options."""
    arguments = (
        f"fedavg --data synthetic --head linear --batch-size 8 --J 4 --lr 0.01 --val-fraction 0 "
        f"--train {what} --data-dir {folder} --device cpu --threads {threads}"
    )
    options, workspace = opened(arguments)
    return build_learner(workspace, options), options


def deal(learner: Learner, clients: int, sharding: str = "nc1") -> list[np.ndarray]:
    """Return the clients' shards, indices into the images."""
    images = len(learner.labels["train"])
    return [shard % images for shard in SHARDINGS[sharding](LABELS, clients)]


def make_loop(learner: Learner, options: SimpleNamespace, shards: list[np.ndarray]) -> FedAvg:
    """Return the loop over these clients, 10 of whom train a round."""
    options.participation = options.participation._replace(fraction=10 / len(shards))
    learner.workspace.shards = shards
    return build_loop(learner, options)


def setups(learner: Learner, options: SimpleNamespace) -> list[dict]:
    """Return the seconds that dealing the samples and building the loop take."""
    rows = []
    for clients in CLIENTS:
        shards = deal(learner, clients)
        calls = {name: lambda s=s, k=clients: s(LABELS, k) for name, s in SHARDINGS.items()}
        calls["loop"] = lambda shards=shards: make_loop(learner, options, shards)
        for name, seconds in interleaved(calls, 5).items():
            rows.append(row("set-up, s", name, quantiles(seconds), clients))
    return rows


def rounds(learner: Learner, options: SimpleNamespace, repetitions: int) -> list[dict]:
    """Return seconds a round for every K, and the ratio to the smallest K of the same turn."""
    loops = {k: make_loop(learner, options, deal(learner, k)) for k in CLIENTS}
    calls = {k: lambda loop=loop: one_round(loop) for k, loop in loops.items()}
    seconds, rows = interleaved(calls, repetitions), []
    for clients, values in seconds.items():
        what = options.training.train
        rows.append(row("round, s", what, quantiles(values), clients))
        ratio = quantiles(values / seconds[CLIENTS[0]])
        rows.append(row("round, to K = 100", what, ratio, clients))
    return rows


def memory(clients: int, checkpoints: list[int], threads: int) -> list[dict]:
    """Return this process's peak above data and model, after so many head-only rounds."""
    with tempfile.TemporaryDirectory() as folder:
        learner, options = make_learner("head", folder, threads)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = megabytes("VmRSS")
        loop, rows, done = make_loop(learner, options, deal(learner, clients)), [], 0
        for goal in checkpoints:
            seconds = timed(lambda g=goal, d=done: [one_round(loop) for _ in range(d, g)])
            figures = {"median": megabytes() - before}
            rows.append(row("peak above data, MB", "head", figures, clients, goal))
            figures = {"median": float(f"{seconds / (goal - done):.4g}")}
            rows.append(row("mean round, s", "head", figures, clients, goal))
            done = goal
    return rows


def row(figure: str, what: str, figures: dict, clients: int, rounds: int | None = None) -> dict:
    """Return a row, after printing it."""
    goal = GOALS.get(figure)
    shown = ", ".join(f"{k} {v:g}" for k, v in figures.items())
    print(f"K {clients:>7,} {what:16} {figure:20} {shown}", end="")
    print(f", rounds {rounds}" if rounds else "", f", goal {goal}" if goal else "", flush=True)
    labels = {"clients": clients, "rounds": rounds, "what": what, "figure": figure}
    return labels | figures | {"goal": goal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default="results/bench/scale.csv")
    options = parser.parse_args()
    rows, settings = [], {name: os.environ.pop(name) for name in MALLOC}  # peaks of default malloc
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for clients in CLIENTS:
            rows += pool.apply(memory, (clients, [10], options.threads))
        rows += pool.apply(memory, (CLIENTS[0], [10, 100, 1000], options.threads))
    os.environ |= settings
    with tempfile.TemporaryDirectory() as folder:
        for what in ("head", "all"):
            learner, o = make_learner(what, folder, options.threads)
            rows += setups(learner, o) if what == "head" else []
            rows += rounds(learner, o, options.rounds * (5 if what == "head" else 1))
    torch.set_num_threads(options.threads)
    write_csv(options.csv, rows, samples=len(LABELS))


if __name__ == "__main__":
    keep_memory()
    main()
