"""Client-level differential privacy, and pairwise masks under which the server sees a sum alone.

    every client takes part with probability C, on its own       (Poisson sampling)
    delta_k <- delta_k * min(1, S / |delta_k|)                    clip: a client's change is bounded
    theta <- theta + (sum of delta_k + N(0, (Z S)^2)) / (C K)     noise in every entry that trains

Source: McMahan 2018, arXiv:1710.06963, algorithm 1, with its fixed-denominator estimator and
uniform weights. Epsilon is of adding or removing one client, by Renyi accounting of the
Poisson-sampled Gaussian mechanism in Google's dp-accounting, which is optional. Who takes part and
what noise there is come from a `Secret`: the operating system's randomness, which the run's own
checkpoint holds and nothing else. Whoever knows it can subtract the noise; a secret made from a
seed protects nobody. Masks that cancel: Bonawitz 2017, doi 10.1145/3133956.3133982.

    import torch; from privacy import Secret, add_noise_, clip_factor, conceal_
    clip_factor(torch.tensor([3.0, 4.0]), torch.zeros(2), bound=1.0)  # 1 / 5
    total = torch.zeros(2, dtype=torch.int64)  # in units of 2^-48
    add_noise_(total, 1.0 * 1.0 / (0.1 * 100), unit=2.0**-48, seed=Secret().key, round=1)
    conceal_(total, client=3, clients=[3, 7], round=1, seed=0)  # uniform, until 7's is added
"""

from __future__ import annotations

import importlib.util
import secrets
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

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
        bool,
        "hide each client's update under pairwise masks that cancel in the sum; a demonstration: "
        "the masks come from the run's options, not from a key agreement of the clients",
    ] = False
    dp_noise: Annotated[
        float | None,
        "noise multiplier: the sum of the clients' changes gets Gaussian noise of standard "
        "deviation Z S, from the operating system's secret randomness [no privacy]; 0 clips alone",
        "0 <= x <= 1000",
        "Z",
    ] = None
    dp_clip: Annotated[
        float | None, "largest L2 norm of a client's change", "1e-30 <= x <= 1e30", "S"
    ] = None
    dp_seed: Annotated[
        int | None,
        "draw the noise and who takes part from this seed, for studies that are repeated: whoever "
        "reads it subtracts the noise, so that the run protects nobody [a secret of the run]",
        "0 <= x <= 9223372036854775807",
    ] = None
    dp_delta: Annotated[
        float | None,
        "delta at which epsilon is told [1e-5, or K^-1.1 where that is less]",
        "0 < x <= 0.1",
    ] = None


class Secret:
    """The randomness of a private run: a State of the loop, so that resuming is exact.

    Args:
        seed: None draws 128 bits from the operating system.
    """

    bytes = 0

    def __init__(self, seed: int | None = None):
        self.key = secrets.randbits(128) if seed is None else seed

    def merge(self, group: Any) -> None:
        """Let every process of a group have the first one's."""
        self.key = group.gather(self.key)[0]

    def next_round(self) -> None:
        """Do nothing: rounds are counters."""

    def state_dict(self) -> dict[str, str]:
        """Return the secret itself."""
        return {"key": f"{self.key:032x}"}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Continue with the run's secret."""
        self.key = int(state["key"], 16)


def check_whole(vector: Tensor) -> None:
    """Raise ValueError unless a tensor is a vector (P,) of int64."""
    if vector.dim() != 1 or vector.dtype != torch.int64:
        raise ValueError(
            f"needed is one vector (P,) int64, not {tuple(vector.shape)} {vector.dtype}"
        )


def _random(seed: int, purpose: str, round: int) -> np.random.Generator:
    seed = int(seed)  # numpy's would overflow
    key = [seed % 2**64, zlib.crc32(purpose.encode()) ^ seed >> 64]
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
        total: (P,) int64, once a round: a second vector would get the same noise.
        std: standard deviation of the noise, in the scale of the parameters.
        seed: of up to 128 bits, as a Secret's key.
        unit: what 1 in `total` stands for.
        where: (P,) bool, the entries that get noise; None: all.

    Raises:
        ValueError: the fixed point does not hold the noise, or a total that is no such vector.
    """
    check_std(std, unit=unit)
    check_whole(total)
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

    Raises:
        ValueError: noise that is not above 0.
    """
    if not noise > 0:
        raise ValueError(f"epsilon is of noise above 0, not {noise}")
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if not rounds:
        return 0.0
    accountant = RdpAccountant(ORDERS)
    accountant.compose(PoissonSampledDpEvent(fraction, GaussianDpEvent(noise)), int(rounds))
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
        contribution: (P,) int64: all that a client sends in a round, as a second vector would be
            hidden under the same numbers.
        seed: up to 128 bits.

    Raises:
        ValueError: a contribution that is no such vector.
    """
    check_whole(contribution)
    seed = int(seed)
    for other in map(int, clients):
        if other != client:
            pair = [0, min(client, other), max(client, other), round]
            key = [seed % 2**64, zlib.crc32(b"pairwise masks") ^ seed >> 64]
            stream = np.random.Philox(key=key, counter=pair)
            mask = torch.from_numpy(stream.random_raw(contribution.numel()).view(np.int64))
            contribution.add_(mask.to(contribution.device), alpha=1 if client < other else -1)
