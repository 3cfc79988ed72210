"""The same federated rounds in this project, plain PyTorch loops, pfl, FedLab and Flower.

    python bench/bench_peers.py [--settings vit_demo ...] [--methods project ...] [--csv FILE]
    python bench/bench_peers.py --device cuda --settings vit_s16 --csv FILE

Equal work: start, clients, batches, precision, fresh momentum for every client and round, no
evaluation, the same number of threads in all. Drawing, gathering and resizing are this project's
functions for all but the careful loop, which resizes by itself. Every method runs in a process of
its own; `project` runs first and last, which shows how far the machine drifted. Final weights must
agree with the project's to TOLERANCE. On a GPU the project, its step a CUDA graph, and the careful
loop take turns. With --starts N it is the time from the command to the end of round 1 that is
measured, N times, the methods in turn.

usual   as the tutorials do it: a DataLoader per client and round, torch.optim.SGD's defaults
best    batches gathered by index, torch.optim.SGD(fused=True), and what else a peer has to offer
pair    best, under torchrun in two processes of half the threads
careful a plain ViT, autocast, resize on the device, fused SGD, _foreach average (careful.py)
transport: nothing trains, a client returns theta + a constant; vit_s16, 21.7 M parameters
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers
from careful import careful
from timing import ROOT, keep_memory, megabytes, quantiles, write_csv
from work import Work, build_learner, build_loop, one_round

from machine.ranks import launched_group

SHARED = "fedavg --data synthetic --weights none --head linear --clients 100 --fraction 0.1 --J 4"
SETTINGS = {  # options, rounds with the first
    "vit_demo": ("--model vit_demo --image-size 32 --batch-size 8 --lr 0.01", 21),
    "vit_ti16": ("--model vit_ti16 --image-size 64 --batch-size 32 --lr 0.01", 6),
    "transport": ("--model vit_s16 --image-size 224 --lr 0.01", 7),
    "vit_s16": ("--model vit_s16 --image-size 224 --batch-size 64 --lr 0.01", 7),
}
METHODS = {  # function of Work, setting
    "project": ("project", ""),
    "project pair": ("project", "pair"),
    "plain usual": ("plain_usual", "usual"),
    "plain best": ("plain_best", "best"),
    "careful": ("careful", "best"),
    "pfl usual": ("pfl", "usual"),
    "pfl best": ("pfl", "best"),
    "pfl pair": ("pfl", "pair"),
    "fedlab usual": ("fedlab", "usual"),
    "fedlab best": ("fedlab", "best"),
    "flower usual": ("flower", "usual"),
    "flower best": ("flower", "best"),
    "project again": ("project", ""),
    "careful again": ("careful", "best"),
}
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2.5e-3}  # of weights that move by 0.03
ON_A_CPU = list(METHODS)[:-1]
ON_A_GPU = ("project", "careful", "project again", "careful again")


def arguments_of(setting: str, threads: int, rounds: int, device: str = "cpu") -> str:
    """Return the fedavg command line of a setting."""
    where = f"--device {device} --threads {threads}"
    return f"{SHARED} {SETTINGS[setting][0]} {where} --rounds {rounds}"


def project(work: Work) -> dict[str, torch.Tensor]:
    """Run this project's loop."""
    with launched_group() as group:
        work.workspace.group = group
        learner = build_learner(work.workspace, work.options)
        loop = build_loop(learner, work.options)
        if not work.trains:
            loop.train = lambda theta, clients, round: work.shifted(learner, theta, clients)
        work.tick()
        for _ in range(work.rounds):
            one_round(loop)
            work.tick()
        learner.entries.load(loop.theta)
    flat = learner.flat  # in fp32, where the model reads a copy in half precision
    return learner.model.state_dict() | {n: flat.view(flat.theta, n) for n in flat.shapes}


def plain_usual(work: Work) -> dict[str, torch.Tensor]:
    """Run the loop of most FedAvg repositories: a deep copy per client, a mean of state_dicts."""
    model = work.workspace.build_model()
    work.tick(model)
    for round in range(1, work.rounds + 1):
        states = []
        for client in work.clients(round):
            local = copy.deepcopy(model)
            work.local_training(local, client, round)
            states.append(local.state_dict())
        mean = {name: sum(s[name] for s in states) / len(states) for name in states[0]}
        model.load_state_dict(mean)
        work.tick(model)
    return model.state_dict()


@torch.no_grad()
def plain_best(work: Work) -> dict[str, torch.Tensor]:
    """Run the same with one local model, and a running sum over lists of tensors."""
    model = work.workspace.build_model()
    local = copy.deepcopy(model)
    ours, theirs = list(model.parameters()), list(local.parameters())
    work.tick()
    for round in range(1, work.rounds + 1):
        total = [torch.zeros_like(p) for p in ours]
        for client in work.clients(round):
            torch._foreach_copy_(theirs, ours)
            with torch.enable_grad():
                work.local_training(local, client, round)
            torch._foreach_add_(total, theirs, alpha=1 / len(work.clients(round)))
        torch._foreach_copy_(ours, total)
        work.tick()
    return model.state_dict()


def run_one(setting: str, method: str, rounds: int, threads: int, device: str, out: Path) -> None:
    """Run one method in this process; leave its times and final weights in `out`."""
    name, kind = METHODS[method]
    threads //= int(os.environ.get("WORLD_SIZE", 1))
    function = {"careful": careful}.get(name) or globals().get(name) or getattr(peers, name)
    started = time.perf_counter()
    best, trains = kind != "usual", setting != "transport"
    work = Work(arguments_of(setting, threads, rounds, device), best=best, trains=trains)
    ready = time.perf_counter()
    weights = function(work)
    assert len(work.ticks) == rounds + 1, len(work.ticks)
    if work.rank == 0:
        times = {"seconds": np.diff([ready, *work.ticks]).tolist(), "ticks": work.ticks}
        times |= {"data_s": ready - started, "peak_mb": megabytes()}
        times["precision"] = str(work.workspace.dtype).removeprefix("torch.")
        weights = {name: tensor.float().cpu() for name, tensor in weights.items()}
        torch.save(times | {"weights": weights}, out)


def run(setting: str, method: str, rounds: int, threads: int, device: str = "cpu") -> dict | None:
    """Run one method in a new process, or two; returns what it left, None where it cannot run."""
    name, kind = METHODS[method]
    package = {"flower": "flwr"}.get(name, name)
    if package in ("pfl", "flwr", "fedlab") and importlib.util.find_spec(package) is None:
        print(f"{setting}, {method}: skipped, {package} is not installed")
        return None
    launcher = [sys.executable]
    if kind == "pair":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        task = json.dumps([setting, method, rounds, threads, device, str(out)])
        with open(Path(folder) / "log", "w+") as log:
            started = time.perf_counter()  # the same clock in all processes
            child = [*launcher, __file__, "--one", task]
            done = subprocess.run(child, stdout=log, stderr=log, cwd=ROOT)
            if done.returncode:
                log.seek(0)
                print(f"{setting}, {method}: failed\n{log.read()[-3000:]}")
                return None
        result = torch.load(out, weights_only=True)
    return result | {"command_s": result["ticks"][1] - started}


def command(setting: str, threads: int) -> float:
    """Return the seconds from `train.py fedavg` to its log of round 1, the start evaluated too."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{arguments_of(setting, threads, 2)} --eval-every 2"
        arguments += f" --runs-dir {folder} --name x"
        log = Path(folder) / "x" / "log.jsonl"
        started = time.perf_counter()
        child = [sys.executable, str(ROOT / "train.py"), *arguments.split()]
        process = subprocess.Popen(child, stdout=subprocess.DEVNULL)
        while not log.exists() or log.read_bytes().count(b"\n") < 2:
            assert process.poll() in (None, 0), "train.py failed"
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        process.wait()
    return seconds


def measure(setting: str, methods: list[str], options: argparse.Namespace) -> list[dict]:
    """Run the methods one after the other; returns one row for each."""
    rows, reference, rounds = [], None, options.rounds or SETTINGS[setting][1]
    for method in methods:
        if (result := run(setting, method, rounds, options.threads, options.device)) is None:
            continue
        setup, first, *steady = result["seconds"]
        reference = reference or result
        pairs = [(w, reference["weights"][k]) for k, w in result["weights"].items()]
        apart = max((a - b).abs().max().item() for a, b in pairs)
        ratio = np.median(steady) / np.median(reference["seconds"][2:])
        row = {"setting": setting, "method": method, "setup_s": round(setup, 3)}
        row |= {"first_round_s": float(f"{first:.4g}"), **quantiles(steady)}
        row |= {"to_project": round(ratio, 3), "peak_mb": result["peak_mb"]}
        row["precision"] = result["precision"]
        rows.append(row | {"largest_difference": float(f"{apart:.2g}")})
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        allowed = TOLERANCE[result["precision"]]
        assert apart <= allowed, f"{method}: its weights differ by {apart}"
    return rows


def measure_starts(setting: str, methods: list[str], options: argparse.Namespace) -> list[dict]:
    """Start each method `options.starts` times, in turn; returns one row for each."""
    found: dict[str, list] = {}
    for _ in range(options.starts):
        for method in methods:
            if (result := run(setting, method, 1, options.threads)) is not None:
                found.setdefault(method, []).append((result["command_s"], result["data_s"]))
        found.setdefault("train.py", []).append((command(setting, options.threads), np.nan))
    reference, rows = np.median(found[methods[0]], axis=0)[0], []
    for method, values in found.items():
        seconds, data_seconds = np.array(values).T
        row = {"setting": setting, "method": method, **quantiles(seconds)}
        row["to_" + methods[0]] = round(np.median(seconds) / reference, 3)
        rows.append(row | {"data_s": round(np.median(data_seconds), 3), "starts": len(seconds)})
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS)[:3]
    )
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), help="[all of the device's]"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: project and careful loop")
    parser.add_argument("--rounds", type=int, help="with the first [by setting]")
    parser.add_argument("--starts", type=int, default=0, help="times to start each [rounds]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default="results/bench/peers.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu = options.device == "cpu"
    options.methods = options.methods or list(ON_A_CPU if cpu else ON_A_GPU)
    if options.one:
        setting, method, rounds, threads, device, out = json.loads(options.one)
        run_one(setting, method, rounds, threads, device, Path(out))
        return
    torch.set_num_threads(options.threads)
    how = measure_starts if options.starts else measure
    rows = [row for s in options.settings for row in how(s, options.methods, options)]
    versions = {p: version(p) for p in ("pfl", "flwr", "ray", "fedlab")}
    write_csv(options.csv, rows, options.device, **{k: v for k, v in versions.items() if v})


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    keep_memory()
    main()
