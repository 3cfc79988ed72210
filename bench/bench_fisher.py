"""Sensitivity scoring against a training step and against the per-sample loop, per image.

    python bench/bench_fisher.py [--image-size 96] [--threads 2] [--json FILE]
    python bench/bench_fisher.py --device cuda --methods training half [--json FILE]

training    SGD steps of ViT-Ti/16: forward, backward and update, a batch at a time
scoring     fisher_diagonal of all backbone parameters, a batch at a time
half        on a GPU, as runs score there: passes in --precision's type, a batch as a CUDA graph
per-sample  one forward and backward an image, its gradient squared and added up
Random weights and images: the time depends on neither. Interleaved repetitions, in one process; on
a CPU the peak is that of the whole process, on a GPU that of each method's tensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from fisher import Scorer, fisher_diagonal
from flat import FlatView
from machine.cuda_graph import GraphedStep
from machine.device import choose_precision
from model import HEAD, build_vit, trained_names
from sparse_sgdm import sparse_sgdm_


def methods(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return each method as a callable that works through all batches."""
    device = options.device
    model = build_vit(options.model, 100, seed=0).to(device)
    names = trained_names(model, "all", freeze_head=True)
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    model.requires_grad_(False)
    flat = FlatView([(n, p) for n, p in model.named_parameters() if n in names])
    momentum, squares = torch.zeros_like(flat.theta), torch.zeros_like(flat.theta)
    count, size = options.batch * options.batches, options.image_size
    images = torch.randn(count, 3, size, size).to(device).split(options.batch)
    labels = torch.randint(100, (count,)).to(device).split(options.batch)
    batches = list(zip(images, labels, strict=True))

    def training() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True  # as in runs, which score without
        for x, y in batches:
            flat.fill_grad(torch.nn.functional.cross_entropy(model(x), y))
            sparse_sgdm_(flat.theta, flat.grad, momentum, lr=1e-6, momentum=0.9)
        torch.backends.cuda.matmul.allow_tf32 = False

    def scoring() -> None:
        fisher_diagonal(model, batches, parameters=names, labels="true")

    def per_sample() -> None:
        for x, y in batches:
            for image, label in zip(x, y, strict=True):
                flat.grad.zero_()
                model(image[None]).log_softmax(dim=1)[0, label].backward()
                squares.addcmul_(flat.grad, flat.grad)

    chosen = {"training": training, "scoring": scoring, "per-sample": per_sample}
    if device != "cpu":
        chosen["half"] = half_scoring(model, batches, names, torch.device(device))
    return {name: chosen[name] for name in options.methods or chosen}


def half_scoring(
    model: torch.nn.Module, batches: list, names: list[str], device: torch.device
) -> Callable[[], None]:
    """Return the scoring of these batches in half precision, each a replay of one graph."""
    half, dtype = copy.deepcopy(model), choose_precision("auto", device)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in HEAD else dtype)
    cast = [(x.to(dtype), y) for x, y in batches]
    replay = lambda step, state: GraphedStep(step, state, device)  # noqa: E731
    scorer = Scorer(half, parameters=names, labels="true", replay=replay)
    return lambda: scorer.diagonal(cast)


def measure(method: Callable[[], None], device: str) -> tuple[float, float]:
    """Return seconds and peak bytes of one call."""
    if device == "cpu":
        started = time.perf_counter()
        method()
        seconds = time.perf_counter() - started
        return seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    method()
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_ti16")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--methods", nargs="+", help="[all; half: on a GPU alone]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, medians = [], {}
    all_methods = methods(options)
    results = {name: [] for name in all_methods}
    for repetition in range(options.repetitions + 1):  # the first warms up
        for name, method in all_methods.items():
            result = measure(method, options.device)
            if repetition:
                results[name].append(result)
    for name, values in results.items():
        seconds, peaks = zip(*values, strict=True)
        per_image = 1e3 * np.quantile(seconds, (0.5, 0.2, 0.8))
        per_image /= options.batch * options.batches
        medians[name] = per_image[0]
        rows.append({"method": name, "ms_per_image": per_image.round(4).tolist()})
        rows[-1]["peak_mb"] = round(max(peaks) / 1e6, 1)
        print(f"{name:11} {per_image[0]:8.3f} ms an image (p20 {per_image[1]:.3f}, ", end="")
        print(f"p80 {per_image[2]:.3f}), peak {rows[-1]['peak_mb']:.0f} MB")
    ratios = {}
    for above, below in (("scoring", "training"), ("per-sample", "scoring"), ("half", "training")):
        if {above, below} <= medians.keys():
            ratio = medians[above] / medians[below]
            ratios[f"{above.replace('-', '_')}_to_{below}"] = round(ratio, 3)
            print(f"{f'{above} / {below}':20} {ratio:.2f}")
    if options.json:
        made_by = {k: v for k, v in vars(options).items() if k != "json"}
        made_by |= {"torch": str(torch.__version__)}
        text = json.dumps({"made_by": made_by, "rows": rows, "ratios": ratios}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
