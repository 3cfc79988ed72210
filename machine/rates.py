"""What a machine can do at most: the rate of a large matrix product, the bandwidth of a large copy,
a plain pass over some memory.

Each is the fastest of several, measured in a second or two. A GPU works off what is launched while
Python launches more: there, calls that are short are timed several at a time.

    import torch; from rates import copy_bandwidth, product_rate
    product_rate(torch.float32, torch.device("cpu"))  # operations a second
    copy_bandwidth(torch.device("cpu"))  # bytes a second, read and written
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices
COPIED = {"cuda": 1 << 28, "cpu": 1 << 26}  # bytes of a copy: more than any cache holds
BUDGET = 1.5  # seconds that a figure may take, once it is warm
MOST = 15  # repetitions of which the median counts
SPAN = 0.02  # seconds of a GPU's calls that are timed together


def synchronise(device: torch.device) -> None:
    """Wait for what runs on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    budget: float = BUDGET,
    warm: bool = False,
    choose: Callable[[Sequence[float]], float] = statistics.median,
) -> float:
    """Return the median seconds of a call, in all about `budget`; if not warm, the first is left
    out."""
    first = 0 if warm else 1
    seconds: list[float] = []
    spent, calls = 0.0, 1
    while len(seconds) <= first or (len(seconds) <= MOST and spent < budget):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(device)
        taken = time.perf_counter() - started
        spent += taken if len(seconds) >= first else 0.0
        seconds.append(taken / calls)
        if device.type == "cuda":
            calls = max(1, round(SPAN / seconds[-1]))
    return choose(seconds[first:])


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations a second of a product of two large square matrices."""
    side = SIDES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    return 2 * side**3 / seconds_of(lambda: a @ b, device, choose=min)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, choose=min)


def pass_seconds(moved: int, device: torch.device) -> float:
    """Return the seconds of a pass that reads and writes a vector, `moved` bytes in all.

    Where so many fit a cache they come from there, as in any other work of this size.
    """
    vector = torch.ones(max(1, moved // 8), device=device)
    return seconds_of(lambda: vector.mul_(1.0), device, BUDGET / 5, choose=min)
