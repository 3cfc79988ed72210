"""A federated round against its floor: the bare passes plus the bytes that must move.

    python bench/bench_round.py [--settings vit_ti16 vit_demo vit_s16] [--csv FILE]
    python bench/bench_round.py --device cuda --settings vit_s16 vit_ti16_224 [--graphs auto]

round   all sampled clients through FedAvg.advance: draws, pixels, local steps, the average
floor   forward and backward of the same batches, made beforehand, the gradients dropped;
        plus bytes / copy bandwidth: 5 P fp32 a step (read gradient, parameter, momentum; write
        two), 1 copy a client, and a client's sum (read two P fp32, read and write P int64)
Clients take turns, one of the round, then the floor of its batches; a ratio is one round's sum over
the other. On CUDA a setting is measured under every --cuda-graph of --graphs, each with --fused off
and auto, and with --compile once more, compiled and in a graph; the floor is always launched kernel
by kernel, and a step is timed apart. Rows say what came of it: whether a graph was replayed and
passes were fused. What fails is said, and the rest goes on. The bandwidth is that of copies around
a ring as large as the round's own buffers. vit_s16 and vit_ti16_224 have the sizes of the headline
job, for a GPU, whose rate is compared with that of a product of two 8,192 x 8,192 matrices in the
same precision.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from timing import interleaved, keep_memory, quantiles, timed, write_csv
from work import build_learner, build_loop, opened

import data
from fedavg import FedAvg
from machine.rates import product_rate
from training.workspace import Workspace

SHARED = (
    "fedavg --data synthetic --weights none --head linear --clients 100 --fraction 0.1 --J 4 "
    "--lr 0.01"
)
SETTINGS = {  # options, rounds, goal
    "vit_ti16": ("--model vit_ti16 --image-size 64 --batch-size 32 --precision fp32", 5, 1.05),
    "vit_demo": ("--model vit_demo --image-size 32 --batch-size 8 --precision fp32", 40, 1.15),
    "vit_s16": ("--model vit_s16 --image-size 224 --batch-size 64 --augment", 5, None),
    "vit_ti16_224": ("--model vit_ti16 --image-size 224 --batch-size 64 --augment", 5, None),
}


class Floor:
    """The bare passes of a round's clients, on a model of its own."""

    def __init__(self, workspace: Workspace, options: SimpleNamespace, shards: list[np.ndarray]):
        self.workspace, self.shards, self.options = workspace, shards, options
        self.model, self.preprocess = workspace.build_model(), workspace.preprocess()
        with torch.no_grad():
            self.model.head.weight.normal_(std=0.02)  # so that the backward pass carries values
        self.model.to(workspace.dtype)
        self.parameters = list(self.model.parameters())

    def batches(self, client: int, round: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the client's inputs and labels, ready for the model."""
        train_set, (steps, size) = self.workspace.sets["train"], self.options.local_steps
        draws = data.draw_batches(
            self.shards[client],
            size,
            steps,
            seed=self.options.source.seed,
            round=round,
            client=client,
        )
        at = [d[:, 0].to(train_set.labels.device) for d in draws]
        return [(self.preprocess(train_set.images[i]), train_set.labels[i]) for i in at]

    def passes(self, batches: list) -> None:
        """Run forward and backward of every batch; the gradients are dropped."""
        for x, y in batches:
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            torch.autograd.grad(loss, self.parameters)


def bytes_of_round(size: int, clients: int, steps: int) -> int:
    """Return the bytes that a round must read and write over P = `size` parameters."""
    step, copy, total = 5 * 4 * size, 2 * 4 * size, (2 * 4 + 2 * 8) * size
    return clients * (steps * step + copy + total)


def copy_bandwidth(size: int, device: str) -> float:
    """Return bytes a second, read and written, of copies of (P,) around a ring of seven."""
    ring = [torch.ones(size, device=device) for _ in range(7)]  # theta, grad, momentum, global, sum
    loops = max(1, 2_000_000 // size)

    def around() -> None:
        for _ in range(loops):
            for source, target in zip(ring, ring[1:] + ring[:1], strict=True):
                target.copy_(source)

    seconds = interleaved({"around": around}, 15, device)["around"]
    return 2 * 4 * size * len(ring) * loops / np.median(seconds)


def seconds_of_a_step(loop: FedAvg, client: int, device: str) -> np.ndarray:
    """Return the seconds of a local step, as the loop takes it, at a rate of zero."""
    learner, clients = loop.train.learner, loop.train
    batches = clients.batches(client, 1).to(learner.workspace.device)
    graphed = clients.graphed or learner.local_step
    rate, scale = torch.zeros((), device=batches.device), torch.ones((), device=batches.device)
    steps = {"steps": lambda: [graphed(draws=d, lr=rate, loss_scale=scale) for d in batches]}
    return interleaved(steps, 15, device)["steps"] / len(batches)


def measure(name: str, graph: str, fused: str, options: argparse.Namespace) -> list[dict]:
    """Return one row per figure of a setting.

    Args:
        graph: as --cuda-graph, or "on --compile".
        fused: as --fused; "" leaves it away, on a CPU.
    """
    arguments, count, goal = SETTINGS[name]
    arguments = f"{SHARED} {arguments} --device {options.device} --threads {options.threads}"
    arguments += f" --cuda-graph {graph}" + (f" --fused {fused}" if fused else "")
    o, workspace = opened(arguments)
    precision = str(workspace.dtype).removeprefix("torch.")
    shards, device = workspace.shards, workspace.device.type
    learner = build_learner(workspace, o)
    federation, floor = build_loop(learner, o), Floor(workspace, o, shards)
    sums = []
    for round in range(1, 2 + (options.rounds or count)):
        seconds = np.zeros(2)
        clients = federation.cohort(round).clients
        for client in clients:
            batches = floor.batches(int(client), round)
            seconds += (
                timed(federation.advance, device),
                timed(lambda batches=batches: floor.passes(batches), device),
            )
        sums.append(seconds)
    with FlopCounterMode(display=False) as counter:
        floor.passes(batches)
    operations = len(clients) * counter.get_total_flops()
    graphed, ways = federation.train.graphed, {"cuda_graph": graph, "fused": "no"}
    if graphed is not None:
        ways["cuda_graph"] = graphed.status + " --compile" * graph.endswith("--compile")
    if learner.fuses:
        ways["fused"] = "yes"
    rounds, passes = np.array(sums[1:]).T
    images = len(clients) * o.local_steps.J * o.local_steps.batch_size
    size = federation.theta.numel()
    bandwidth = copy_bandwidth(size, device)
    moved = bytes_of_round(size, len(clients), o.local_steps.J) / bandwidth
    rows = [
        {"figure": "round, s", **quantiles(rounds)},
        {"figure": "bare passes, s", **quantiles(passes)},
        {"figure": "bytes, s", "median": float(f"{moved:.4g}")},
        {"figure": "copy bandwidth, GB/s", "median": float(f"{bandwidth / 1e9:.4g}")},
        {"figure": "round / floor", **quantiles(rounds / (passes + moved)), "goal": goal},
        {"figure": "round / passes", **quantiles(rounds / passes)},
        {"figure": "images/s", **quantiles(images / rounds)},
        {"figure": "TFLOP/s", **quantiles(operations / rounds, 1e12)},
    ]
    if device != "cpu":
        peak = product_rate(workspace.dtype, workspace.device)
        rows.append({"figure": "matrix product, TFLOP/s", "median": float(f"{peak / 1e12:.4g}")})
        step = seconds_of_a_step(federation, int(clients[-1]), device)
        rate = operations / len(clients) / o.local_steps.J / step / peak
        rows += [
            {"figure": "share of the product's rate", **quantiles(operations / rounds / peak)},
            {"figure": "step, ms", **quantiles(step, 1e-3)},
            {"figure": "share of it in a step", **quantiles(rate)},
        ]
    ratio = rows[4]
    print(
        f"{name}, {precision}: P = {learner.entries.size:,}, CUDA graph {ways['cuda_graph']}, "
        f"fused {ways['fused']}; a round {rows[0]['median']:.3f} s, "
        f"passes {rows[1]['median']:.3f} s, bytes {moved:.4f} s; round / floor "
        f"{ratio['median']:.3f} (p20 {ratio['p20']:.3f}, p80 {ratio['p80']:.3f}), goal {goal}; "
        + ", ".join(f"{row['figure']} {row['median']:g}" for row in rows[6:])
    )
    about = {"setting": name, "precision": precision, **ways, "parameters": learner.entries.size}
    return [about | row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", nargs="+", choices=tuple(SETTINGS), default=["vit_ti16", "vit_demo"]
    )
    parser.add_argument("--rounds", type=int, help="after the first [by setting]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--graphs", nargs="+", choices=("off", "on", "auto"), default=["off", "on"], help="on CUDA"
    )
    parser.add_argument("--compile", action="store_true", help="on CUDA, a compiled step too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default="results/bench/round.csv")
    options = parser.parse_args()
    ways = [("off", "")]
    if options.device != "cpu":
        ways = list(itertools.product(options.graphs, ("off", "auto")))
        ways += [("on --compile", "off")] * options.compile
    rows, failed = [], 0
    for name, (graph, fused) in itertools.product(options.settings, ways):
        try:
            rows += measure(name, graph, fused, options)
        except Exception:  # what a GPU raises; the others may do
            failed += 1
            traceback.print_exc(limit=-3)
            print(f"{name}, CUDA graph {graph}, fused {fused or 'off'}: failed", flush=True)
        if rows:
            write_csv(options.csv, rows, options.device)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    keep_memory()
    main()
