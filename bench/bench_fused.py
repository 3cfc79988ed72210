"""A block's passes between matrix products, forward and backward: fused, and PyTorch's own.

    python bench/bench_fused.py --device cuda [--csv FILE]

add_norm    x + branch + bias and its LayerNorm, twice a block
bias_gelu   GELU after fc1's bias
attention   x W' + b cut into heads, and their attention
product     x W' of it alone, without a bias: what is left of attention's time is not matrix units'
Gradients of biases, weights and of LayerNorm's weights are part of each. On a GPU a repetition is a
CUDA graph of ten calls. Sizes are the headline job's: 64 images, 197 tokens, width 384, 6 heads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from timing import interleaved, keep_memory, quantiles, write_csv

import fused
from machine.cuda_graph import record

CALLS = 10  # of a repetition


def operations(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> dict[tuple[str, str], Callable[[], object]]:
    """Return {(operation, method): a call of it and its gradients} for N, T, D and heads."""
    n, t, d, heads = sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    x, branch, bias, norm = draw(n, t, d), draw(n, t, d), draw(d), nn.LayerNorm(d, eps=1e-6)
    hidden, hidden_bias, weight, qkv_bias = (
        draw(n, t, 4 * d),
        draw(4 * d),
        draw(3 * d, d),
        draw(3 * d),
    )
    norm.to(device, dtype)

    def add_norm() -> list[Tensor]:
        total = x + (branch + bias)
        return [total, norm(total)]

    def attention() -> list[Tensor]:
        qkv = F.linear(x, weight, qkv_bias).view(n, t, 3, heads, d // heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)]

    def with_gradients(outputs: Callable[[], list[Tensor]], *leaves: Tensor):
        upstream = [torch.randn_like(y) for y in outputs()]
        return lambda: torch.autograd.grad(outputs(), leaves, upstream)

    rows, linear = (x, branch, bias, *norm.parameters()), (x, weight, qkv_bias)
    return {
        ("add_norm", "fused"): with_gradients(
            lambda: [*fused.add_norm(x, branch, bias, norm)], *rows
        ),
        ("add_norm", "PyTorch"): with_gradients(add_norm, *rows),
        ("bias_gelu", "fused"): with_gradients(
            lambda: [fused.bias_gelu(hidden, hidden_bias)], hidden, hidden_bias
        ),
        ("bias_gelu", "PyTorch"): with_gradients(
            lambda: [F.gelu(hidden + hidden_bias)], hidden, hidden_bias
        ),
        ("attention", "fused"): with_gradients(lambda: [fused.attention(*linear, heads)], *linear),
        ("attention", "PyTorch"): with_gradients(attention, *linear),
        ("product", "PyTorch"): with_gradients(lambda: [F.linear(x, weight)], x, weight),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = dict(nargs=4, type=int, metavar=("N", "T", "D", "HEADS"))
    parser.add_argument("--sizes", **sizes, default=(64, 197, 384, 6), help="[64 197 384 6]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--csv", type=Path, default="results/bench/fused.csv")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16
    calls, repeated = operations(options.sizes, dtype, options.device), 1
    if device.type == "cuda":
        repeated = CALLS
        several = {key: lambda call=c: [call() for _ in range(CALLS)] for key, c in calls.items()}
        calls = {key: record(run, device)[0].replay for key, run in several.items()}
    seconds = interleaved(calls, options.repetitions, device.type)
    rows = []
    for (operation, method), values in seconds.items():
        pytorch = seconds[operation, "PyTorch"]
        figures = {f"{k}_ms": v for k, v in quantiles(values / repeated, 1e-3).items()}
        ratio = quantiles(values / pytorch)["median"]
        rows.append({"operation": operation, "method": method, **figures, "to_pytorch": ratio})
        print(f"{operation:10} {method:8} {figures['median_ms']:8.4f} ms  {ratio:.2f} of PyTorch's")
    n, t, width, heads = options.sizes
    why = fused.attends(device, dtype, width, heads, t)
    if why:
        print(f"attention is PyTorch's in both: {why}")
    facts = {"sizes": " ".join(map(str, options.sizes)), "dtype": str(dtype).removeprefix("torch.")}
    write_csv(options.csv, rows, options.device, **facts, attention=why or "fused")


if __name__ == "__main__":
    keep_memory()
    main()
