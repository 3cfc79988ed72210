"""Task vectors: what changed from a common start, added, negated, merged, and how they interfere.

    tau_k = theta_k - theta_0,    theta = theta_0 + scale * merge(tau_1, ..., tau_m)
    mean    sum of p_k tau_k
    ties    keep each tau_k's largest entries; per entry elect the sign of their sum, and average
            those that have it
    sign    the same of all entries, rescaled to the norm of the mean
    dare    the mean of tau_k / (1 - drop), each entry of which is zero with probability `drop`
    fisher  sum of p_k F_k tau_k / sum of p_k F_k, per entry
Source: task arithmetic, Ilharco 2023, arXiv:2212.04089; TIES, Yadav 2023, arXiv:2306.01708; DARE,
Yu 2024, arXiv:2311.03099; Fisher-weighted averaging, Matena 2022, arXiv:2111.09832; the
disentanglement error and edits as linear maps, Ortiz-Jimenez 2023, arXiv:2305.12827.

The rules take `parts`, (m, P): what each has to say with its weight p_k in it, p_k tau_k. Parts are
floating-point, or int64 in any unit: sums of integers do not depend on the order of the parts, and
where every part agrees, `ties` and `sign` give the very sum, and so does `fisher` at equal F_k.

    import torch; from editing import add_task_vectors, ties
    start, tuned = torch.zeros(4), torch.tensor([[1.0, 2.0, 0.0, -1.0], [3.0, -1.0, 0.1, -1.0]])
    tau = ties((tuned - start) / 2, [0.5, 0.5], keep=0.5)  # 2, 2, 0, -1 on average
    add_task_vectors(start, tau[None], scale=-1.0)  # the model that has unlearned it
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CHUNK = 262_144  # entries of each part at a time; keeps temporaries small
BITS = 48  # of the weights' sum, as integers: their order does not matter


# ---------------------------------------------------------------------------- merging


@torch.no_grad()
def add_task_vectors(theta: Tensor, vectors: Tensor, scale: float = 1.0) -> Tensor:
    """Return theta (P,) + scale * the sum of vectors (m, P); a negative scale takes them away."""
    return theta + scale * vectors.sum(dim=0)


def check_keep(keep: float) -> None:
    """Raise ValueError unless `keep` lies in (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"the share that is kept must lie in (0, 1], not {keep:g}")


def check_drop(drop: float) -> None:
    """Raise ValueError unless `drop` lies in [0, 1)."""
    if not 0 <= drop < 1:
        raise ValueError(f"the share that is dropped must lie in [0, 1), not {drop:g}")


@torch.no_grad()
def ties(
    parts: Tensor, weights: Sequence[float], *, keep: float = 0.2, size: int | None = None
) -> Tensor:
    """Merge by trimming, electing a sign per entry, and averaging the parts that have it.

    With weights, the elected sign is that of sum of p_k tau_k over what trimming left, and what
    agrees is averaged as sum of p_k tau_k / sum of p_k, both over those that agree; equal weights
    give the published rule. The result is (sum of all p_k) times that average, in the scale of the
    plain sum of the parts. An entry whose parts cancel out elects no sign and stays.

    Args:
        parts: (m, P) p_k tau_k.
        weights: (m,) p_k, of any sum: sample counts will do.
        keep: share of entries that each part keeps, its largest by magnitude, in (0, 1]; entries
            that equal the last of them are kept too.
        size: entries that the share is taken of, where P holds padding zeros too.

    Returns:
        (P,) in the dtype of the parts.

    Raises:
        ValueError: `keep` outside its range, weights that do not fit the parts, or a part that is
            not finite, whose sign no election would notice.
    """
    check_keep(keep)
    if keep == 1:
        return _agreeing_mean(parts, weights, None)
    exact = Fraction(float(keep)).limit_denominator(10**9)  # 0.29 of 50 is a half
    count = max(1, math.floor(exact * (size or parts.shape[1]) + Fraction(1, 2)))
    return _agreeing_mean(parts, weights, torch.stack([_largest(part, count) for part in parts]))


@torch.no_grad()
def sign_elected(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """Merge by averaging, per entry, what has the sign of the sum, at the norm of the sum.

    What disagrees shortens the sum; here it does not count, and the length is that of the sum all
    the same, so that only the direction differs from FedAvg's. Arguments and result as of `ties`.
    """
    plain, merged = parts.sum(dim=0), _agreeing_mean(parts, weights, None)
    norms = [torch.linalg.vector_norm(x.double()) for x in (plain, merged)]
    if norms[0] == norms[1]:  # both may be zero
        return merged
    return _as(merged.double() * (norms[0] / norms[1]), parts.dtype)


def _largest(part: Tensor, count: int) -> Tensor:
    """Return the count-th largest magnitude."""
    sizes, at = part.abs(), len(part) - count
    # kthvalue has no deterministic form on CUDA
    return sizes.kthvalue(at + 1).values if part.is_cpu else sizes.sort().values[at]


def _agreeing_mean(parts: Tensor, weights: Sequence[float], bars: Tensor | None) -> Tensor:
    """Average per entry the parts that have the sign of the sum; bars (m,): what trimming keeps."""
    units, exact = _units(weights, parts), not parts.is_floating_point()
    whole = units.sum()
    result = torch.empty_like(parts[0])
    for start in range(0, parts.shape[1], CHUNK):
        block = parts[:, start : start + CHUNK]
        block = block if exact else block.double()
        if bars is not None:
            block = block.masked_fill(block.abs() < bars[:, None], 0)
        elected = block.sum(dim=0).sign()
        against = (block.sign() != elected) | (elected == 0)
        total = block.masked_fill(against, 0).sum(dim=0)
        share = units.expand_as(block).masked_fill(against, 0).sum(dim=0)
        result[start : start + CHUNK] = _rescaled(total, share, whole, parts.dtype)
    return result


def _units(weights: Sequence[float], parts: Tensor) -> Tensor:
    """Return weights (m, 1) in proportion as integers, whose sums do not depend on their order."""
    values = np.asarray(weights, np.float64)
    if values.shape != parts.shape[:1]:
        raise ValueError(f"{len(parts)} parts need as many weights, not {values.size}")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"weights must be finite and at least 0, not {values.tolist()}")
    if parts.is_floating_point():
        for k, part in enumerate(parts):
            if not part.isfinite().all():
                raise ValueError(f"part {k} holds NaN or infinite values")
    whole = math.fsum(values)
    units = np.ldexp(values, BITS - (round(math.log2(whole)) if whole else 0))
    return torch.from_numpy(units).round().long().to(parts.device)[:, None]


def _rescaled(total: Tensor, share: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total * whole / share, and total itself, to the bit, where the share is the whole."""
    mean = _as(total.double() * (whole.double() / share.clamp(min=1)), dtype)
    return torch.where(share == whole, total.to(dtype), mean)


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)


@torch.no_grad()
def drop_(vector: Tensor, drop: float, *, seed: int = 0, round: int = 0, client: int = 0) -> Tensor:
    """Zero each entry of a vector (P,), in place, with probability `drop`.

    The pattern is a function of seed, round and client: whoever knows them need not be told it.

    Returns:
        (P,) bool, the entries that are kept.
    """
    key = [seed, zlib.crc32(b"dare")]
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, round, client]))
    stays = torch.from_numpy(generator.random(len(vector), dtype=np.float32) >= drop)
    stays = stays.to(vector.device)
    vector.masked_fill_(~stays, 0)
    return stays


def dare(vector: Tensor, drop: float, *, seed: int = 0, round: int = 0, client: int = 0) -> Tensor:
    """Return the vector (P,) with entries dropped and the others divided by 1 - drop.

    Its expectation over patterns is the vector itself; `drop_` says what decides the pattern.

    Raises:
        ValueError: `drop` outside [0, 1).
    """
    check_drop(drop)
    result = vector / (1 - drop)
    drop_(result, drop, seed=seed, round=round, client=client)
    return result


@torch.no_grad()
def fisher_mean(parts: Tensor, weights: Sequence[float], scores: Tensor) -> Tensor:
    """Average each entry by p_k F_k: (sum of all p_k) times sum of p_k F_k tau_k / sum of p_k F_k.

    Scores matter by their ratios within an entry. Where they are all equal, zero too, the result is
    the plain sum of the parts.

    Args:
        parts: (m, P) p_k tau_k.
        weights: (m,) p_k.
        scores: (m, P) F_k, at least 0.

    Returns:
        (P,) in the dtype of the parts.

    Raises:
        ValueError: weights that do not fit the parts, a part that is not finite, or a score that is
            not, or is below 0.
    """
    units, exact = _units(weights, parts), not parts.is_floating_point()
    for k, row in enumerate(scores):
        if not (row.isfinite() & (row >= 0)).all():
            raise ValueError(f"scores {k} hold values that are not finite, or below 0")
    whole, result = units.sum(), torch.empty_like(parts[0])
    for start in range(0, parts.shape[1], CHUNK):
        at = slice(start, start + CHUNK)
        block = parts[:, at] if exact else parts[:, at].double()
        counted = scores[:, at].double().masked_fill(units == 0, 0)
        top = counted.amax(dim=0)
        missing = torch.where(top > 0, 1 - counted / top, 0.0)  # to the entry's largest score
        total = (block - _as(block.double() * missing, block.dtype)).sum(dim=0)
        share = (units - _as(units.double() * missing, units.dtype)).sum(dim=0)
        result[at] = _rescaled(total, share, whole, parts.dtype)
    return result


# ---------------------------------------------------------------------------- interference


class Interference(NamedTuple):
    """How vectors relate: norms (m,), and over all pairs the mean cosine and sign agreement."""

    norms: Tensor
    cosine: float | None
    sign_agreement: float | None


@torch.no_grad()
def interference(vectors: Tensor) -> Interference:
    """Compare vectors (m, P), of any numeric dtype, two by two.

    The sign agreement of a pair is the share of equal signs among the entries that neither has at
    zero. A mean is None where no pair has it: of one vector, or beside vectors of zeros.
    """
    m = len(vectors)
    dots, signs, both = torch.zeros(3, m, m, dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[1], CHUNK):
        block = vectors[:, start : start + CHUNK].double()
        sign = block.sign()
        dots += block @ block.T
        signs += sign @ sign.T
        both += sign.abs() @ sign.abs().T
    norms = dots.diagonal().sqrt()
    first, second = torch.triu_indices(m, m, offset=1, device=vectors.device)
    cosines = (dots / (norms[:, None] * norms))[first, second]
    agreements = ((both + signs) / (2 * both))[first, second]
    return Interference(norms, _known_mean(cosines), _known_mean(agreements))


def _known_mean(values: Tensor) -> float | None:
    mean = values.nanmean().item()
    return None if mean != mean else mean


@torch.no_grad()
def displacement(function: Callable[[Tensor], Tensor], theta: Tensor, tau: Tensor) -> float:
    """Return the root mean square of f(theta + tau) - f(theta): how far a move is felt."""
    change = (function(theta + tau) - function(theta)).double()
    return change.square().mean().sqrt().item()


def scale_to(
    function: Callable[[Tensor], Tensor],
    theta: Tensor,
    tau: Tensor,
    target: float,
    *,
    tolerance: float = 0.01,
    attempts: int = 20,
) -> float | None:
    """Return the factor s at which `displacement` of s tau is `target`, to a relative tolerance.

    Moves of different rules are compared at one such target: a smaller move is more linear and
    disturbs less whatever its direction. None where no factor is found, as of a move of zeros.
    """
    scale, low, high = 1.0, 0.0, float("inf")
    for _ in range(attempts):
        felt = displacement(function, theta, scale * tau)
        if abs(felt / target - 1) <= tolerance:
            return scale
        low, high = (scale, high) if felt < target else (low, scale)
        guess = scale * min(10.0, target / felt) if felt > 0 else 10 * scale
        middle = 2 * low if high == float("inf") else (low + high) / 2
        scale = guess if low < guess < high else middle
    return None


def linearity_error(function: Callable[[Tensor], Tensor], theta: Tensor, tau: Tensor) -> float:
    """Return ||f(theta + tau) - f(theta) - J tau|| / ||f(theta + tau) - f(theta)||.

    J tau is exact, by one forward-mode product (which only attention's MATH
    backend has). Zero for a model that is linear in its parameters;
    zero too where nothing changes.

    Args:
        function: theta (P,) -> outputs of any shape, made of differentiable operations.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it has no forward-mode product either
        with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            before, slope = torch.func.jvp(function, (theta,), (tau,))
            change = (function(theta + tau) - before).double()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    left = torch.linalg.vector_norm(change - slope)
    return (left / torch.linalg.vector_norm(change)).item() if change.any() else left.item()


@torch.no_grad()
def disentanglement_error(
    logits: Callable[[Tensor, Tensor], Tensor],
    theta: Tensor,
    vectors: Tensor,
    inputs: Sequence[Tensor],
) -> float:
    """Return the sum over tasks of the share of predictions that the other vectors change.

    For task k it compares, on its own inputs, the classes that theta + vectors[k] predicts with
    those of theta + the sum of all vectors. Zero: no vector disturbs the others.

    Args:
        logits: (theta (P,), inputs) -> (N, C).
        vectors: (m, P).
        inputs: of each task.
    """
    together, total = add_task_vectors(theta, vectors), 0.0
    for vector, task in zip(vectors, inputs, strict=True):
        alone = logits(theta + vector, task).argmax(dim=-1)
        total += (logits(together, task).argmax(dim=-1) != alone).double().mean().item()
    return total
