"""Which weights stay trainable: rules, exact budgets, the rate, calibration in rounds, consensus.

A rule ranks entries by a key; the lowest keys are kept, and `sparsity` is the FROZEN share:
    least-sensitive   F_i          most-sensitive    -F_i
    lowest-magnitude  |theta_i|    highest-magnitude -|theta_i|    random
In calibration round r of R the network is scored with its dropped weights multiplied by `damp`, and
of those alive the share density^(r/R) is kept; what is dropped never returns. With damp = 1 and the
same scores R rounds give the one-round mask: damping is what makes rounds matter.
Source: TaLoS, Iurada 2025, arXiv:2504.02620.

    import torch; from masks import calibrate, ranking
    theta = torch.randn(1000)  # the network reads it
    def keys(alive, keep): return ranking("least-sensitive", theta, scores=theta ** 2)
    mask = calibrate(theta, keys, sparsity=0.9)  # (1000,) bool, 100 True
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CONSENSUS = ("mean", "max", "median-rank", "vote")
RANKS = CONSENSUS[2:]  # those that make ranks of the clients' keys
LEVELS = 0.01, 0.1, 0.5, 0.9, 0.99  # of the quantiles that a calibration round reports
RATES = {"matched": 0.5, "functional": 1.0, "raw": 0.0}  # the exponent of `rate_factor`
CHUNK = 1 << 18  # entries; bounds the temporaries that hold every client's value of an entry


class NothingKept(ValueError):
    """No key is at most the threshold; `low` and `high` are the keys' extremes."""

    def __init__(self, round: int, threshold: float, low: float, high: float):
        super().__init__(
            f"calibration round {round}: no key is at most {threshold:g}; "
            f"they lie between {low:.3g} and {high:.3g}"
        )
        self.round, self.low, self.high = round, low, high


# ---------------------------------------------------------------------------- keys and budgets


class Rule(NamedTuple):
    """What a mask keeps: the entries of the lowest keys.

    keys: (theta (P,), scores (P,) or None, seed) -> (P,).
    scores: whether it ranks by sensitivities, for which images are scored.
    sign: of the key against the quantity that a threshold is compared with.
    """

    keys: Callable[[Tensor, Tensor | None, int], Tensor]
    scores: bool = False
    sign: int = 1


def _random_keys(theta: Tensor, scores: Tensor | None, seed: int) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"random mask")]))
    return torch.from_numpy(generator.random(theta.numel())).to(theta.device)


RULES = {
    "least-sensitive": Rule(lambda theta, scores, seed: scores, scores=True),
    "most-sensitive": Rule(lambda theta, scores, seed: -scores, scores=True, sign=-1),
    "lowest-magnitude": Rule(lambda theta, scores, seed: theta.abs()),
    "highest-magnitude": Rule(lambda theta, scores, seed: -theta.abs(), sign=-1),
    "random": Rule(_random_keys),
}


def needs_scores(rule: str) -> bool:
    """Tell whether a rule ranks by sensitivities, for which images are scored."""
    return RULES[rule].scores


def ranking(rule: str, theta: Tensor, scores: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return the keys (P,) by which a rule ranks entries; the lowest are kept.

    Args:
        scores: (P,) sensitivities; only rules that need them see them.
        seed: of the random rule.

    Raises:
        ValueError: an unknown rule, or one that does not give every entry a key.
    """
    if rule not in RULES:
        raise ValueError(f"unknown mask rule {rule!r}: choose from {', '.join(RULES)}")
    if scores is None and RULES[rule].scores:
        raise ValueError(f"mask rule {rule!r} ranks by sensitivity: give scores")
    try:
        keys = RULES[rule].keys(theta, scores, seed)
    except TypeError as error:
        hint = "" if RULES[rule].scores else "; scores are None without scores=True"
        raise ValueError(f"mask rule {rule!r}: {error}{hint}") from error
    if keys.shape != theta.shape:
        shapes = f"{tuple(keys.shape)}, of entries {tuple(theta.shape)}"
        raise ValueError(f"mask rule {rule!r}: a key for every entry is needed, not {shapes}")
    return keys


def budget(size: int, sparsity: float) -> int:
    """Return how many of `size` entries a mask of this sparsity (the FROZEN share) keeps: a whole
    number, halves rounded up, of the sparsity as it is written.

    Raises:
        ValueError: sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity must lie in [0, 1), not {sparsity}")
    exact = 1 - Fraction(float(sparsity)).limit_denominator(10**9)
    return math.floor(exact * size + Fraction(1, 2))


def split_budget(count: int, sizes: Sequence[int]) -> list[int]:
    """Split `count` over groups in proportion to their sizes, by largest remainder."""
    exact = count * np.asarray(sizes, dtype=np.int64) / sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: count - counts.sum()]] += 1
    return counts.tolist()


def keep_lowest(keys: Tensor, count: int) -> Tensor:
    """Return the bool mask (P,) of the `count` lowest keys; among equal keys the first ones win.

    Raises:
        ValueError: keys that are no vector, or hold NaN, which has no place in an order.
    """
    if keys.dim() != 1:
        raise ValueError(f"keys to rank must be a vector (P,), not {tuple(keys.shape)}")
    if keys.isnan().any():
        raise ValueError(f"{int(keys.isnan().sum())} of {len(keys)} keys to rank are NaN")
    if count <= 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    bar = keys.sort().values[count - 1]  # kthvalue has no deterministic form on CUDA
    mask = keys < bar
    ties = (keys == bar).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def mask_from_scores(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return bool masks that keep the least sensitive entries of all tensors together.

    Raises:
        ValueError: a tensor holds NaN, or the sparsity is not in [0, 1).
    """
    for name, values in scores.items():
        if values.isnan().any():
            raise ValueError(f"the scores of {name} hold NaN")
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = keep_lowest(flat, budget(len(flat), sparsity))
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


# ---------------------------------------------------------------------------- the rate


def sensitivity_share(mask: Tensor, scores: Tensor | None = None) -> float:
    """Return the share of all sensitivity that a mask (P,) keeps: sum_i m_i F_i / sum_i F_i.

    Args:
        mask: bool.
        scores: F (P,) of the undamped network; None, where nothing is scored, counts entries.

    Raises:
        ValueError: a mask that is not bool, or scores that add up to nothing.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool, not {mask.dtype}")
    weights = torch.ones_like(mask, dtype=torch.float64) if scores is None else scores.double()
    if not weights.sum() > 0:
        raise ValueError("no entry has a sensitivity above 0")
    return (weights[mask].sum() / weights.sum()).item()


def rate_factor(share: float, how: str = "matched") -> float:
    """Return what dense training's learning rate is multiplied by under a mask.

    A step of rate lr has the expected norm lr * sqrt(sum_i m_i F_i), and changes the loss by lr *
    sum_i m_i F_i to first order, so that with s the share of all sensitivity that the mask keeps
        matched     s^(-1/2)   the update has the norm of dense training's
        functional  s^-1       the loss changes as in dense training
        raw         1

    Args:
        share: s, above 0.
    """
    return share ** -RATES[how]


# ---------------------------------------------------------------------------- calibration


class CalibrationRound(NamedTuple):
    """What a round of calibration came to.

    of: entries that it ranked; alive: how many of them it leaves; bar: the highest of their keys;
    quantiles: of all keys that it ranked, at LEVELS.
    """

    round: int
    of: int
    alive: int
    bar: float
    quantiles: tuple[float, ...]


def calibrate(
    theta: Tensor,
    keys: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    rounds: int = 4,
    damp: float = 0.1,
    group_sizes: Sequence[int] | None = None,
    within: Tensor | None = None,
    report: Callable[[CalibrationRound], None] | None = None,
) -> Tensor:
    """Return the mask (P,) of the entries that stay trainable, True = trainable.

    Args:
        theta: (P,) parameters; damped in place while scoring, restored to the bit in any case.
        keys: callable of (alive, keep) that returns the keys (P,) of the network as theta stands,
            the lowest of which are kept. `alive` (P,) bool; keep(keys) -> the mask that this round
            would make of those keys.
        sparsity: the frozen share, met to the entry; or instead
        threshold: keep the entries alive whose key is at most this.
        group_sizes: sizes of consecutive groups that split theta; each keeps the same share by
            itself (a budget per tensor). None ranks all entries together.
        within: (P,) bool, the entries that may be kept; None: all. The budget stays that of all.
        report: hears of every round.

    Raises:
        ValueError: sparsity outside [0, 1) or that keeps nothing, rounds below 1, a key that is not
            finite, `within` smaller than the budget, or a threshold that keeps nothing
            (NothingKept).
    """
    if rounds < 1:
        raise ValueError(f"calibration needs at least one round, not {rounds}")
    if (sparsity is None) == (threshold is None):
        raise ValueError("a mask needs either a sparsity or a threshold")
    sizes = [theta.numel()] if group_sizes is None else list(group_sizes)
    if sparsity is not None:
        if not (count := budget(theta.numel(), sparsity)):
            raise ValueError(f"a sparsity of {sparsity:g} keeps none of {theta.numel()} entries")
        final = split_budget(count, sizes)
        check_within(within, final, sizes)
    original, alive = theta.clone(), torch.ones_like(theta, dtype=torch.bool)

    def keep(r: int, alive: Tensor, values: Tensor) -> Tensor:
        """Return the mask that a round makes of these keys."""
        values = values.masked_fill(~alive, math.inf)
        if threshold is not None:
            return values <= threshold
        share = (1 - sparsity) ** (r / rounds)
        counts = [
            last if r == rounds else max(last, math.ceil(share * size))
            for last, size in zip(final, sizes, strict=True)
        ]
        groups = zip(values.split(sizes), counts, strict=True)
        return torch.cat([keep_lowest(group, count) for group, count in groups]) & alive

    try:
        for r in range(1, rounds + 1):
            keep_in_round = functools.partial(keep, r, alive if within is None else alive & within)
            _set(theta, torch.where(alive, original, original * damp))
            values = keys(alive, keep_in_round)
            if not torch.isfinite(values).all():
                raise ValueError(f"calibration round {r}: a score is not finite")
            ranked, alive = values[alive], keep_in_round(values)
            if threshold is not None and not alive.any():
                raise NothingKept(r, threshold, values.min().item(), values.max().item())
            if report is not None:
                bar = values[alive].max().item()
                report(CalibrationRound(r, len(ranked), int(alive.sum()), bar, quantiles(ranked)))
    finally:
        _set(theta, original)
    return alive


@torch.no_grad()
def _set(theta: Tensor, values: Tensor) -> None:
    """Set parameters in place: they may be a leaf that trains."""
    theta.copy_(values)


def check_within(within: Tensor | None, counts: Sequence[int], sizes: Sequence[int]) -> None:
    """Raise ValueError where fewer entries may be kept than the budget of a group is."""
    parts = () if within is None else within.split(list(sizes))
    for count, part in zip(counts, parts, strict=False):
        if count > (allowed := int(part.sum())):
            raise ValueError(f"{count} entries are to be kept, and only {allowed} may be")


def quantiles(values: Tensor) -> tuple[float, ...]:
    """Return the values (n,) that the shares LEVELS of them do not exceed."""
    ordered = values.sort().values
    return tuple(ordered[round(level * (len(ordered) - 1))].item() for level in LEVELS)


# ---------------------------------------------------------------------------- many clients


def consensus(
    keys: Iterable[Tensor],
    weights: Sequence[float],
    how: str = "mean",
    *,
    alive: Tensor,
    keep: Callable[[Tensor], Tensor],
    quorum: int | None = None,
) -> Tensor:
    """Combine the clients' keys (P,) each into the keys (P,) by which the server ranks.

    Args:
        keys: one tensor per client, in the order of `weights`; "mean" and "max" hold one at a time.
        weights: samples per client.
        how: "mean" weighted by samples; "max", an entry ranks as by the client that wants it least;
            "median-rank" of the clients' own rankings of those alive; "vote", the entries that at
            least `quorum` clients would keep come first, by weighted mean within and after.
        alive, keep: as `calibrate` hands them on.
        quorum: of the vote; None is the majority.
    """
    if how not in CONSENSUS:
        raise ValueError(f"unknown consensus {how!r}: choose from {', '.join(CONSENSUS)}")
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    total, votes, ranks = None, 0, []
    for share, client in zip(shares, keys, strict=True):
        if how == "median-rank":
            ranks.append(_ranks(client.masked_fill(~alive, math.inf)).cpu())
            continue
        if total is None:
            total = client.clone() if how == "max" else client * share
        elif how == "max":
            torch.maximum(total, client, out=total)
        else:
            total.add_(client, alpha=share)
        if how == "vote":
            votes = votes + keep(client).int()
    if how == "median-rank":  # of an even number of clients the lower of the middle two
        columns = zip(*(r.split(CHUNK) for r in ranks), strict=True)
        medians = [torch.stack(column).median(dim=0).values for column in columns]
        return torch.cat(medians).to(alive.device, torch.float64)
    if how == "vote":
        behind = votes < (len(shares) // 2 + 1 if quorum is None else quorum)
        return _ranks(total).double() + behind * float(total.numel())
    return total


def _ranks(keys: Tensor) -> Tensor:
    """Return the place of every key in the sorted order, (P,) int32; equal keys in their order."""
    ranks = torch.empty_like(keys, dtype=torch.int32)
    order = keys.argsort(stable=True)
    ranks[order] = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    return ranks


def overlap(halves: Sequence[tuple[Tensor, Tensor]]) -> dict:
    """Measure how far clients agree, from two masks (P,) bool each, made from halves of its data.

    Returns:
        iou: mean intersection over union of one client's first half and another's second half;
            ceiling: of a client's own two halves, what the noise of sampling leaves;
            chance: d / (2 - d), what random masks of this density d have;
        matrix: of every client's first half (rows) and every client's second half.
    """
    first, second = (torch.stack(side) for side in zip(*halves, strict=True))  # (K, P) bool
    both = torch.zeros(len(first), len(first), dtype=torch.float64)
    for start in range(0, first.shape[1], CHUNK):
        a, b = (side[:, start : start + CHUNK].float() for side in (first, second))
        both += (a @ b.T).double().cpu()
    sizes = [side.sum(dim=1).double().cpu() for side in (first, second)]
    iou = both / (sizes[0][:, None] + sizes[1] - both)
    clients, density = len(iou), (sum(sizes) / (2 * first.shape[1])).mean().item()
    diagonal = iou.trace().item()
    others = (iou.sum().item() - diagonal) / (clients * (clients - 1)) if clients > 1 else None
    chance = density / (2 - density)
    return {"iou": others, "ceiling": diagonal / clients, "chance": chance, "matrix": iou.tolist()}


# ---------------------------------------------------------------------------- storage


def pack(mask: Tensor) -> Tensor:
    """Return the mask (P,) as ceil(P / 8) bytes, uint8 on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, size: int) -> Tensor:
    """Return the (size,) bool mask that `pack` made into `bits`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size).astype(bool))
