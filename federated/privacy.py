"""Client-level differential privacy: DP-FedAvg, so that a model hardly depends on any one client.

    every client takes part with probability C, on its own       (Poisson sampling)
    delta_k <- delta_k * min(1, S / |delta_k|)                    clip: a client's change is bounded
    theta <- theta + (sum of delta_k + N(0, (Z S)^2)) / (C K)     noise in every entry that trains

Source: McMahan 2018, arXiv:1710.06963, algorithm 1, with its fixed-denominator estimator and
uniform weights. Epsilon is of adding or removing one client, by Renyi accounting of the
Poisson-sampled Gaussian mechanism in Google's dp-accounting, which is optional. The noise comes
from a seed, so that runs can be repeated: whoever knows the seed knows the noise, and a deployment
draws it afresh.

    import torch; from privacy import add_noise_, clip_factor, sample_poisson
    clients = sample_poisson(100, 0.1, seed=0, round=1)  # ten or so, sometimes none
    clip_factor(torch.tensor([3.0, 4.0]), torch.zeros(2), bound=1.0)  # 1 / 5
    total = torch.zeros(2, dtype=torch.int64)  # in units of 2^-48
    add_noise_(total, 1.0 * 1.0 / (0.1 * 100), unit=2.0**-48, seed=0, round=1)
"""

from __future__ import annotations

import importlib.util
import zlib

import numpy as np
import torch
from torch import Tensor

CHUNK = 262_144  # elements drawn at a time
HEADROOM = 16.0  # standard deviations of noise in the range of int64: the rest is for the sum
PACKAGE = "dp_accounting"
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)  # whole: each has a finite sum


def _random(seed: int, purpose: str, round: int) -> np.random.Generator:
    key = [seed, zlib.crc32(purpose.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, round, 0]))


def sample_poisson(clients: int, fraction: float, *, seed: int, round: int) -> np.ndarray:
    """Draw a round's clients, each on its own with probability `fraction`: (m,) int64, m >= 0."""
    draws = _random(seed, "poisson clients", round).random(clients)
    return np.flatnonzero(draws < fraction).astype(np.int64)


@torch.no_grad()
def clip_factor(theta: Tensor, start: Tensor, bound: float) -> float:
    """Return min(1, bound / |theta - start|), in float64: what keeps a change within `bound`."""
    square = torch.zeros((), dtype=torch.float64, device=theta.device)
    size = CHUNK if theta.is_cpu else max(1, theta.numel())
    for here, before in zip(theta.split(size), start.split(size), strict=True):
        square += (here.double() - before.double()).square().sum()
    return (bound / square.sqrt()).clamp(max=1.0).item()


@torch.no_grad()
def add_noise_(
    total: Tensor,
    std: float,
    *,
    unit: float,
    seed: int,
    round: int,
    where: Tensor | None = None,
) -> None:
    """Add a round's Gaussian noise to a fixed-point total, in place.

    It is drawn on the CPU in float64, whatever the device, and rounded to the unit, so that it is
    the same everywhere to the bit.

    Args:
        total: (P,) int64.
        std: standard deviation of the noise, in the scale of the parameters.
        unit: what 1 in `total` stands for.
        where: (P,) bool, the entries that get noise; None: all.

    Raises:
        ValueError: the fixed point does not hold the noise.
    """
    check_std(std, unit=unit)
    generator = _random(seed, "dp noise", round)
    for start in range(0, len(total), CHUNK):
        part = total[start : start + CHUNK]
        noise = torch.from_numpy(generator.standard_normal(len(part))).mul_(std / unit)
        noise = noise.round_().long().to(total.device)
        if where is not None:
            noise.mul_(where[start : start + CHUNK])
        part.add_(noise)


def check_std(std: float, *, unit: float) -> None:
    """Raise ValueError where int64 in `unit` cannot hold noise of a standard deviation."""
    largest = 2.0**63 / HEADROOM * unit
    if not std <= largest:
        raise ValueError(
            f"noise of standard deviation {std:g} in each parameter is more than the fixed point "
            f"holds, {largest:g}: less noise, a lower clipping norm, or more clients a round"
        )


def check_accountant() -> None:
    """Raise ValueError unless the package that computes epsilon is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError("epsilon needs Google's accountant: pip install dp-accounting")


def epsilon(noise: float, fraction: float, rounds: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after `rounds` rounds.

    Args:
        noise: Z, the noise multiplier, above 0.
        fraction: C, the probability with which each client takes part in a round.
        delta: in (0, 1), well below one over the number of clients.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if not rounds:
        return 0.0
    accountant = RdpAccountant(ORDERS)
    accountant.compose(PoissonSampledDpEvent(fraction, GaussianDpEvent(noise)), rounds)
    return float(accountant.get_epsilon(delta))
