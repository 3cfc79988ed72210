"""One masked optimiser step against a copy of as many bytes and torch.optim.SGD. CPU or GPU.

    python bench/bench_sparse_sgdm.py [--device cuda] [--threads 2] [--csv FILE]

copy            Tensor.copy_ that reads and writes as many bytes as the step must
sparse_sgdm_    the reference on a CPU; on a GPU the Triton kernel, and the reference beside it
compact         the gradient's unmasked entries gathered, a step on these alone, then put back
SGD             torch.optim.SGD without a mask; fused=True beside its default
SGD * mask      the gradient times a float mask, then the step: wrong once weights decay, or Inf * 0
SGD, restored   the step, then frozen entries set back: right, but their momentum keeps moving
A step reads gradient, theta, momentum and mask, writes two: 21 bytes an entry, 20 without a mask
(density 1). GB/s counts those bytes for every method, whatever it moves beside them. On a GPU a
repetition is a CUDA graph of 20 steps, so that no launch from Python counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from timing import interleaved, keep_memory, quantiles, write_csv

from machine.cuda_graph import record
from sparse_sgdm import sparse_sgdm_

DENSITIES = (1.0, 0.5, 0.1, 0.01)
LR, MOMENTUM = 1e-6, 0.9


def methods(density: float, size: int, device: str) -> dict[str, Callable[[], object]]:
    """Return every method as a callable on its own copies of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    mask = (torch.rand(size, generator=generator) < density).to(device) if density < 1 else None

    def ours(backend: str) -> Callable[[], None]:
        theta, momentum = start.clone(), torch.zeros_like(start)
        options = dict(lr=LR, momentum=MOMENTUM, backend=backend)
        return lambda: sparse_sgdm_(theta, grad, momentum, mask, **options)

    def compact() -> None:
        sparse_sgdm_(values, grad[index], compact_momentum, lr=LR, momentum=MOMENTUM)
        scattered[index] = values

    def torch_sgd(how: str, fused: bool | None) -> Callable[[], None]:
        p, as_float = torch.nn.Parameter(start.clone()), None if mask is None else mask.float()
        p.grad = grad.clone()
        optimiser = torch.optim.SGD([p], lr=LR, momentum=MOMENTUM, fused=fused)
        before = torch.empty_like(start)

        @torch.no_grad()
        def step() -> None:
            if how == "multiplied":
                p.grad.mul_(as_float)
            elif how == "restored":
                before.copy_(p)
            optimiser.step()
            if how == "restored":
                torch.where(mask, p, before, out=p.data)

        return step

    source = torch.zeros(size * (20 if mask is None else 21) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    backends = ("triton", "reference") if device != "cpu" else ("reference",)
    steps_of = {"copy": lambda: target.copy_(source)}
    steps_of |= {f"sparse_sgdm_ {backend}": ours(backend) for backend in backends}
    if mask is not None:
        index, scattered = mask.nonzero()[:, 0], start.clone()
        values, compact_momentum = start[index], torch.zeros_like(start[index])
        steps_of["compact"] = compact
    for fused in (None, True):
        name = "SGD fused" if fused else "SGD"
        steps_of[name] = torch_sgd("", fused)
        if mask is not None:
            steps_of[f"{name} * mask"] = torch_sgd("multiplied", fused)
            steps_of[f"{name}, restored"] = torch_sgd("restored", fused)
    return steps_of


def measure(density: float, options: argparse.Namespace) -> list[dict]:
    """Return one row per method."""
    steps_of = methods(density, options.size, options.device)
    steps = 1
    if options.device != "cpu":
        steps, device = 20, torch.device(options.device)
        several = {name: lambda m=m: [m() for _ in range(steps)] for name, m in steps_of.items()}
        steps_of = {name: record(run, device)[0].replay for name, run in several.items()}
    seconds = interleaved(steps_of, options.repetitions, options.device)
    seconds = {name: values / steps for name, values in seconds.items()}
    rows, moved = [], options.size * (20 if density == 1 else 21)
    for name, values in seconds.items():
        figures = quantiles(values, 1e-3)
        row = {"density": density, "method": name, **{f"{k}_ms": v for k, v in figures.items()}}
        row["GB/s"] = round(moved / figures["median"] / 1e6, 2)
        row["to_copy"] = round(figures["median"] / quantiles(seconds["copy"], 1e-3)["median"], 2)
        rows.append(row)
        spread = f"(p20 {figures['p20']:.3f}, p80 {figures['p80']:.3f})"
        rates = f"{row['GB/s']:6.2f} GB/s  {row['to_copy']:.2f} of the copy"
        print(f"density {density:<4g} {name:24} {figures['median']:8.3f} ms {spread}  {rates}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=21_665_664, help="P [ViT-S/16's]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--csv", type=Path, default="results/bench/sparse_sgdm.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for density in DENSITIES for row in measure(density, options)]
    write_csv(options.csv, rows, options.device, parameters=options.size)


if __name__ == "__main__":
    keep_memory()
    main()
