"""Client-level differential privacy, and pairwise masks under which the server sees a sum alone.

    every client takes part with probability C, on its own       (Poisson sampling)
    delta_k <- delta_k * min(1, S / |delta_k|)                    clip: a client's change is bounded
    theta <- theta + (sum of delta_k + N(0, (Z S)^2)) / (C K)     noise in every entry that trains

Source: McMahan 2018, arXiv:1710.06963, algorithm 1, with its fixed-denominator estimator and
uniform weights. Epsilon is of adding or removing one client, by Renyi accounting of the
Poisson-sampled Gaussian mechanism in Google's dp-accounting, which is optional. The noise comes
from a seed, so that runs can be repeated: whoever knows the seed knows the noise, and a deployment
draws it afresh. Masks that cancel: Bonawitz 2017, doi 10.1145/3133956.3133982.

    import torch; from privacy import add_noise_, clip_factor, conceal_
    clip_factor(torch.tensor([3.0, 4.0]), torch.zeros(2), bound=1.0)  # 1 / 5
    total = torch.zeros(2, dtype=torch.int64)  # in units of 2^-48
    add_noise_(total, 1.0 * 1.0 / (0.1 * 100), unit=2.0**-48, seed=0, round=1)
    conceal_(total, client=3, clients=[3, 7], round=1, seed=0)  # uniform, until 7's is added
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 262_144  # elements drawn at a time
HEADROOM = 16.0  # standard deviations of noise in the range of int64: the rest is for the sum
PACKAGE = "dp_accounting"
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)  # whole: each has a finite sum


class Privacy(NamedTuple):
    """Client-level privacy: DP-FedAvg (arXiv:1710.06963); each client takes part with probability
    C, all weigh alike."""

    secure_aggregation: Annotated[
        bool, "hide each client's update under pairwise masks that cancel in the sum"
    ] = False
    dp_noise: Annotated[
        float | None,
        "noise multiplier: the sum of the clients' changes gets Gaussian noise of standard "
        "deviation Z S [no privacy]; 0 clips alone",
        "0 <= x <= 1000",
        "Z",
    ] = None
    dp_clip: Annotated[float | None, "largest L2 norm of a client's change", "> 0", "S"] = None
    dp_delta: Annotated[
        float | None,
        "delta at which epsilon is told [1e-5, or K^-1.1 where that is less]",
        "0 < x <= 0.1",
    ] = None


def _random(seed: int, purpose: str, round: int) -> np.random.Generator:
    key = [seed, zlib.crc32(purpose.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, round, 0]))


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


# ---------------------------------------------------------------------------- secure aggregation


def conceal_(
    contribution: Tensor, client: int, clients: Sequence[int], round: int, *, seed: int = 0
) -> None:
    """Hide a client's contribution, in place, under masks that cancel in the sum over `clients`.

    Every pair of clients shares a stream of uniform 64-bit numbers, which one adds and the other
    subtracts mod 2^64: a single contribution looks uniform, and the sum is exact. Here a pair's
    stream comes from `seed`; a deployment derives it from a key agreement that the server is not
    part of, and needs secret sharing to unmask clients that drop out.

    Args:
        contribution: (P,) int64.
    """
    for other in map(int, clients):
        if other != client:
            pair = [0, min(client, other), max(client, other), round]
            stream = np.random.Philox(key=[seed, zlib.crc32(b"pairwise masks")], counter=pair)
            mask = torch.from_numpy(stream.random_raw(contribution.numel()).view(np.int64))
            contribution.add_(mask.to(contribution.device), alpha=1 if client < other else -1)
