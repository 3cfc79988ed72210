"""Masked optimiser step: dense over all P entries, or compact over the unmasked ones. CPU or GPU.

    python bench/bench_compact.py [--device cuda] [--threads 1] [--json FILE]

dense    sparse_sgdm_ on theta, grad, momentum, mask (P,)
compact  gather the gradient's unmasked entries, step on (dP,), scatter the result into theta
ViT-Ti/16's P. Median, p20 and p80 of interleaved repetitions, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_sgdm import sparse_sgdm_

SIZE = 5_524_416
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.01)
OPTIONS = dict(lr=0.01, momentum=0.9)


def steps(density: float, device: str) -> dict:
    """Return the two steps as callables on their own copies of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    theta, grad, momentum = (torch.randn(SIZE, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand(SIZE, generator=generator) < density).to(device)
    index = mask.nonzero()[:, 0]
    scattered, values, compact_momentum = theta.clone(), theta[index], momentum[index]

    def dense() -> torch.Tensor:
        sparse_sgdm_(theta, grad, momentum, mask, **OPTIONS)
        return theta

    def compact() -> torch.Tensor:
        sparse_sgdm_(values, grad[index], compact_momentum, **OPTIONS)
        scattered[index] = values
        return scattered

    return {"dense": dense, "compact": compact}


def timed(function, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for density in DENSITIES:
        both = steps(density, options.device)
        assert torch.equal(*(step() for step in both.values()))  # the same bits
        times = {name: [] for name in both}
        for _ in range(options.repetitions):
            for name, step in both.items():
                times[name].append(timed(step, options.device))
        quantiles = {name: np.quantile(t, (0.5, 0.2, 0.8)).round(3) for name, t in times.items()}
        rows.append({"density": density} | {name: q.tolist() for name, q in quantiles.items()})
        ratio = quantiles["dense"][0] / quantiles["compact"][0]
        print(
            f"density {density:<5g}", *(f"{n} {q[0]:7.3f} ms" for n, q in quantiles.items()), end=""
        )
        print(f"  dense / compact {ratio:.2f}")
    if options.json:
        made_by = {"torch": torch.__version__, "device": options.device, "threads": options.threads}
        options.json.write_text(json.dumps({"made_by": made_by, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
