"""Who takes part in a round, for how many local steps, and with what weight.

Clients that do not answer, clients that are slow, shards of unequal size: whatever happens is a
function of (seed, round, client), and the weights of those that remain are what keeps the average
unbiased.

    FedAvg       p_k = n_k / sum of n over the round      McMahan 2017, arXiv:1602.05629
    FedVC        clients drawn by n_k, p_k = 1 / m         Hsu 2020, arXiv:2003.08082
    FedNova      p_k times (sum of p_i |a_i|) / |a_k|, |a_k| the weight of k's local steps in its
                 change (tau_k without momentum)           Wang 2020, arXiv:2007.07481

    import numpy as np; from cohort import drop_out, sample_by_size, shares
    clients = sample_by_size([100, 300, 50], 0.7, seed=0, round=1)  # two of three
    clients = drop_out(clients, 0.2, seed=0, round=1)  # those that answer
    shares([100, 300, 50], clients)  # p_k: adds up to 1 over them
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, NamedTuple

import numpy as np


class Participation(NamedTuple):
    """Who takes part."""

    fraction: Annotated[
        float, "share C of the clients in a round", "0 < x <= 1", "--fraction --C"
    ] = 0.1
    fedvc: Annotated[
        bool, "FedVC: clients drawn in proportion to their samples, and weighted alike"
    ] = False
    straggler_fraction: Annotated[
        float, "share of the clients that take fewer than J steps in a round", "0 <= x <= 1"
    ] = 0.0
    dropout: Annotated[
        float, "probability that a sampled client does not answer", "0 <= x <= 1"
    ] = 0.0


def _random(seed: int, purpose: str, round: int, client: int = 0) -> np.random.Generator:
    seed = int(seed)  # of up to 128 bits, where numpy's has 64
    key = [seed % 2**64, zlib.crc32(purpose.encode()) ^ seed >> 64]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, client, round, 0]))


# ---------------------------------------------------------------------------- who


def cohort_size(clients: int, fraction: float) -> int:
    """Return how many of K clients a round samples: C * K, halves rounded up, at least one.

    Raises:
        ValueError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the client fraction must lie in (0, 1], not {fraction}")
    exact = Fraction(float(fraction)).limit_denominator(10**9)  # 0.29 of 50 is a half
    return max(1, math.floor(exact * clients + Fraction(1, 2)))


def sample_clients(clients: int, fraction: float, *, seed: int, round: int) -> np.ndarray:
    """Draw a round's distinct clients, as many as `cohort_size` says: (m,) int64."""
    generator = _random(seed, "clients", round)
    return generator.choice(clients, cohort_size(clients, fraction), replace=False)


def sample_by_size(sizes: Sequence[int], fraction: float, *, seed: int, round: int) -> np.ndarray:
    """Draw as many distinct clients as `cohort_size` says, large ones more often.

    With equal weights a large client then counts by being drawn more often, not by a longer step.
    One after the other is drawn in proportion to its samples among those that are left: so a large
    one counts for less than its share where a round takes many of few clients.

    Args:
        sizes: (K,) samples per client.

    Returns:
        (m,) int64.
    """
    sizes = np.asarray(sizes, np.float64)
    count, generator = cohort_size(len(sizes), fraction), _random(seed, "clients by size", round)
    return generator.choice(len(sizes), count, replace=False, p=sizes / sizes.sum())


def drop_out(clients: np.ndarray, probability: float, *, seed: int, round: int) -> np.ndarray:
    """Return those of a round's clients that answer; each fails on its own with `probability`."""
    draws = [_random(seed, "dropout", round, int(k)).random() for k in clients]
    return clients[np.array(draws) >= probability] if len(clients) else clients


def sample_poisson(clients: int, fraction: float, *, seed: int, round: int) -> np.ndarray:
    """Draw a round's clients, each on its own with probability `fraction`: (m,) int64, m >= 0."""
    draws = _random(seed, "poisson clients", round).random(clients)
    return np.flatnonzero(draws < fraction).astype(np.int64)


# ---------------------------------------------------------------------------- how many steps


def local_steps(
    steps: int, straggler_fraction: float, *, seed: int, round: int, client: int
) -> int:
    """Return how many of `steps` local steps a client manages in a round.

    A straggler, which each client is with probability `straggler_fraction`, manages 1..steps - 1,
    all equally likely (arXiv:1812.06127, section 5.2).
    """
    if steps == 1 or not straggler_fraction:
        return steps
    generator = _random(seed, "stragglers", round, client)
    slow = generator.random() < straggler_fraction
    return int(generator.integers(1, steps)) if slow else steps


def step_weight_sum(steps: int, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Return ||a||_1, the sum over local steps of how often a step's gradient enters the change.

    theta moves by -lr * sum over j of a_j g_j; without momentum every a_j is 1. Source: FedNova,
    arXiv:2007.07481, section 4.
    """
    total = 0.0
    for left in range(1, steps + 1):
        geometric = sum(momentum**i for i in range(left))
        total += 1 + momentum * geometric if nesterov else geometric
    return total


# ---------------------------------------------------------------------------- with what weight


def shares(sizes: Sequence[int], clients: np.ndarray) -> np.ndarray:
    """Return each client's share of the samples of all `clients`: (m,) float64; zeros of none."""
    samples = np.array([sizes[k] for k in clients], np.int64)
    return samples / max(1, samples.sum())


def normalised_averaging(weights: np.ndarray, efforts: Sequence[float]) -> np.ndarray:
    """Return FedNova's weights: clients count alike however many steps they took.

    Args:
        weights: (m,) p_k, which add up to 1.
        efforts: (m,) |a_k|, the sum of the weights of a client's local steps in its change.

    Returns:
        (m,) weights of the changes; `weights` itself, to the bit, where all efforts are equal.
    """
    efforts = np.asarray(efforts, np.float64)
    ratios = [1 + float(weights @ (efforts / effort - 1)) for effort in efforts]
    return weights * np.array(ratios)
