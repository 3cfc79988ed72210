"""Heads on fixed features: ridge (central or federated), linear probe, head-only local steps.

Ridge from sums that clients add up, centred, with one-hot targets Y and features Phi (N, D):
    (S + ridge * tr(S)/D * I) W = B,   S = Phi'Phi - N m m',   B = Phi'Y - N m y',   b = y - m W
The sums of the clients' shards are the sums of the whole, so the federated head is the central one.
Ridge outputs are no logits: one temperature, fitted on validation cross-entropy, makes them so.

    import torch; from head import RidgeSums, solve_ridge
    x, y = torch.randn(50, 8), torch.arange(50) % 5
    sums = RidgeSums(8, 5).update(x[:30], y[:30]) + RidgeSums(8, 5).update(x[30:], y[30:])
    weight, bias = solve_ridge(sums, ridge=1e-3)  # (5, 8), (5,), float64 as the sums
    scores = x @ weight.float().T + bias.float()  # (50, 5): the largest is the class
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8192  # rows added to the sums at a time
RIDGE_GRID = tuple(10.0**e for e in range(-7, 2))


class RidgeSums:
    """The sufficient statistics of a ridge head, in float64: all that a client has to send.

    count: (C,) samples per class; total: (D,) sum of phi; gram: (D, D) sum of phi phi';
    cross: (D, C) sum of phi y'.
    """

    def __init__(self, width: int, classes: int, device="cpu"):
        options = dict(dtype=torch.float64, device=device)
        self.count = torch.zeros(classes, **options)
        self.total = torch.zeros(width, **options)
        self.gram = torch.zeros(width, width, **options)
        self.cross = torch.zeros(width, classes, **options)

    def update(self, features: Tensor, labels: Tensor) -> RidgeSums:
        """Add samples with features (N, D) and labels (N,) int64; returns self.

        Raises:
            ValueError: more or fewer labels than features, or a label that is no class.
        """
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} features come with {len(labels)} labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.count):
            raise ValueError(f"labels must lie in 0..{len(self.count) - 1}")
        classes = torch.arange(len(self.count), device=labels.device)
        for start in range(0, len(labels), CHUNK):
            phi = features[start : start + CHUNK].double()
            y = labels[start : start + CHUNK]
            self.count += torch.bincount(y, minlength=len(self.count))
            self.total += phi.sum(dim=0)
            self.gram.addmm_(phi.T, phi)
            self.cross.addmm_(phi.T, (y[:, None] == classes).double())
        return self

    def __add__(self, other: RidgeSums) -> RidgeSums:
        if other.cross.shape != self.cross.shape:
            sizes = f"{tuple(self.cross.shape)} and {tuple(other.cross.shape)}"
            raise ValueError(f"sums of other features or classes: (D, C) are {sizes}")
        result = RidgeSums(*self.cross.shape, device=self.gram.device)
        for name, mine in vars(self).items():
            setattr(result, name, mine + getattr(other, name))
        return result

    @property
    def bytes(self) -> int:
        """What one client sends: the symmetric Gram matrix once."""
        width, classes = self.cross.shape
        return 8 * (classes + width + width * (width + 1) // 2 + width * classes)


def solve_ridge(sums: RidgeSums, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve the ridge head exactly in float64.

    Args:
        ridge: regularisation relative to the mean diagonal of the centred Gram matrix, positive.

    Returns:
        weight (C, D) and bias (C,), float64.

    Raises:
        ValueError: ridge is not positive, there are no samples, or a feature is not finite.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    n = sums.count.sum()
    if n == 0:
        raise ValueError("a ridge head needs at least one sample")
    if not (sums.gram.isfinite().all() and sums.cross.isfinite().all()):
        raise ValueError("a feature of the samples, or a sum of them, is not finite")
    mean, prior = sums.total / n, sums.count / n
    gram = sums.gram - n * torch.outer(mean, mean)
    cross = sums.cross - n * torch.outer(mean, prior)
    precision = torch.finfo(torch.float64)
    rounding = precision.eps * sums.gram.diagonal().mean()  # all that centring may have left
    level = (ridge * gram.diagonal().mean()).clamp_min(rounding).clamp_min(precision.tiny)
    gram.diagonal().add_(level)
    weight = torch.linalg.solve(gram, cross)
    return weight.T.contiguous(), prior - mean @ weight


def fit_temperature(scores: Tensor, labels: Tensor, steps: int = 60) -> float:
    """Return the T that minimises the cross-entropy of scores / T, by golden section on log T.

    Args:
        scores: (N, C); labels: (N,) int64, held out from what the scores were fitted on.
    """
    scores = scores.double()

    def loss(log_t: float) -> float:
        return F.cross_entropy(scores * math.exp(-log_t), labels).item()

    low, high, golden = math.log(1e-4), math.log(1e4), (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(steps):
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - golden * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + golden * (high - low)
            loss_b = loss(b)
    return math.exp((low + high) / 2)


def check_samples(features: Tensor, labels: Tensor, use: str) -> None:
    """Raise ValueError where samples are none, or a feature is not finite.

    use: what they are for: training or validation.
    """
    if not len(labels):
        raise ValueError(f"a head needs {use} samples, and there are none")
    if not features.isfinite().all():
        raise ValueError(f"a feature of the {use} samples is not finite")


@dataclasses.dataclass
class FittedHead:
    """A head (weight (C, D), bias (C,), float64) with the choices that validation made for it."""

    weight: Tensor
    bias: Tensor
    strength: float
    temperature: float
    val_acc: float

    def to(self, device) -> FittedHead:
        """Return the head on another device."""
        moved = dict(weight=self.weight.to(device), bias=self.bias.to(device))
        return dataclasses.replace(self, **moved)


def fit_ridge(
    sums: RidgeSums, val_features: Tensor, val_labels: Tensor, grid: Iterable[float] = RIDGE_GRID
) -> FittedHead:
    """Solve for every regularisation in `grid`, keep the best by validation, fit its temperature.

    Returns:
        The head with the temperature already divided into weight and bias.

    Raises:
        ValueError: as `check_samples` of those to validate on, and as `solve_ridge`.
    """
    check_samples(val_features, val_labels, "validation")
    val = val_features.double()
    best = None
    for ridge in grid:
        weight, bias = solve_ridge(sums, ridge)
        scores = val @ weight.T + bias
        accuracy = (scores.argmax(1) == val_labels).double().mean().item()
        if best is None or accuracy > best[0]:
            best = accuracy, ridge, weight, bias, scores
    accuracy, ridge, weight, bias, scores = best
    temperature = fit_temperature(scores, val_labels)
    return FittedHead(weight / temperature, bias / temperature, ridge, temperature, accuracy)


def train_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    val_features: Tensor,
    val_labels: Tensor,
    grid: Iterable[float] = (1e-6, 1e-5, 1e-4, 1e-3),
    iterations: int = 100,
) -> FittedHead:
    """Train a linear probe: multinomial logistic regression by full-batch L-BFGS from zero.

    Features are standardised while training and the scaling is folded into the result. The L2
    penalty is the best of `grid` on validation.

    Args:
        features: (N, D) fp32; labels: (N,) int64.

    Raises:
        ValueError: as `check_samples`, of either samples.
    """
    check_samples(features, labels, "training")
    check_samples(val_features, val_labels, "validation")
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x, val = (features - mean) / std, (val_features - mean) / std
    best = None
    for penalty in sorted(grid, reverse=True):
        weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(classes, device=x.device, requires_grad=True)
        _minimise(weight, bias, x, labels, penalty, iterations)
        accuracy = (F.linear(val, weight, bias).argmax(1) == val_labels).double().mean().item()
        if best is None or accuracy > best[0]:
            best = accuracy, penalty, weight.detach().double(), bias.detach().double()
    accuracy, penalty, weight, bias = best
    weight = weight / std.double()
    bias = bias - weight @ mean.double()
    temperature = fit_temperature(val_features.double() @ weight.T + bias, val_labels)
    return FittedHead(weight / temperature, bias / temperature, penalty, temperature, accuracy)


def _minimise(weight, bias, x, labels, penalty, iterations) -> None:
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)


@torch.no_grad()
def train_heads(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    labels: Tensor,
    indices: Tensor,
    step: Callable[[int], None],
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> Tensor:
    """Run the local steps of several clients at once, each on its own copy of a linear head.

    Args:
        weight, bias: (m, C, D) and (m, C), one head per client; `step` updates them in place.
        features, labels: (N, D) and (N,), shared by all clients.
        indices: (m, J, B) int64, the samples of every local step.
        step: callable of the local step 0..J-1; applies `grad_weight`, `grad_bias` to the heads.
        grad_weight, grad_bias: buffers shaped like the heads, overwritten in each step with the
            gradients of the clients' mean cross-entropies.

    Returns:
        (m, J) mean cross-entropy of each client's batch before each step.
    """
    m, steps, batch = indices.shape
    losses = torch.empty(m, steps, device=weight.device)
    classes = torch.arange(weight.shape[1], device=weight.device)
    for j in range(steps):
        at = indices[:, j].reshape(-1)
        x = features.index_select(0, at).view(m, batch, -1)
        y = labels.index_select(0, at).view(m, batch, 1)
        log_p = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)).log_softmax(dim=2)
        losses[:, j] = -log_p.gather(2, y)[..., 0].mean(dim=1)
        residual = log_p.exp_().sub_((y == classes).to(log_p.dtype)).div_(batch)  # (m, B, C)
        torch.bmm(residual.transpose(1, 2), x, out=grad_weight)
        torch.sum(residual, dim=1, out=grad_bias)
        step(j)
    return losses
