"""Sensitivity of every weight, and the masks it makes: the diagonal Fisher, exactly, in batches.

    F_i = mean over x of (d log p(y|x) / d theta_i)^2,  y drawn from the model's own p(y|x)

The square is of each sample's gradient; the mean gradient's square is another quantity. For a
linear layer with inputs A (N, T, I) and gradients G (N, T, O) of the summed log-likelihood
    F[o, i] = 1/N * sum over n of (sum over t of G[n, t, o] A[n, t, i])^2
so one batched forward and backward pass gives every sample's squared gradient.
Calibration over rounds with damping as in TaLoS (Iurada 2025, arXiv:2504.02620).

    import torch; from fisher import fisher_diagonal, mask_from_scores
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    scores = fisher_diagonal(model, [torch.randn(32, 4)])  # {"0.weight": (8, 4), ...}
    masks = mask_from_scores(scores, sparsity=0.9)         # the 10 % least sensitive train
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RULES = (
    "least-sensitive",
    "most-sensitive",
    "lowest-magnitude",
    "highest-magnitude",
    "random",
)
CPU_CHUNK = 2_000_000  # elements of per-sample gradients held at a time: they stay in cache


# ---------------------------------------------------------------------------- squares of sums


def square_accumulate_(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add sum over n of (grads[n]' inputs[n])^2 to `total` (O, I) in place.

    Args:
        grads: (N, T, O) gradients by a linear layer's outputs.
        inputs: (N, T, I) its inputs.
    """
    samples, _, width = grads.shape
    per_sample = width * inputs.shape[2]
    chunk = max(1, CPU_CHUNK // per_sample) if total.device.type == "cpu" else samples
    for start in range(0, samples, chunk):
        part = slice(start, start + chunk)
        products = torch.bmm(grads[part].transpose(1, 2), inputs[part])  # (n, O, I)
        total += products.square_().sum(dim=0)


# ---------------------------------------------------------------------------- sensitivity


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable,
    *,
    parameters: Sequence[str] | None = None,
    labels: str = "sampled",
    score: str = "log-prob",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the mean over samples of each parameter's squared per-sample gradient.

    Linear, LayerNorm and Conv2d with kernel = stride take part in one batched backward pass, and so
    do parameters (1, ...) that broadcast over the batch, such as class tokens and position grids.
    Any other parameter falls back to per-sample gradients by torch.func, which is said once.

    Args:
        batches: inputs (N, ...), or pairs (inputs, labels (N,) int64); logits (N, C) come out.
        parameters: names to score; None scores all.
        labels: "sampled" draws y from the model's own p(y|x), by `seed` and the sample's place in
            the stream, whatever the batch size; "true" takes the given ones (empirical Fisher).
        score: "log-prob" differentiates log p(y|x), "logit" the logit of y (TaLoS's release).
        dtype: of the sums.

    Returns:
        name -> tensor of the parameter's shape, in `dtype`.

    Raises:
        ValueError: nothing to score, no samples, an unknown option, or a score that is not finite.
    """
    if labels not in ("sampled", "true") or score not in ("log-prob", "logit"):
        raise ValueError(f"unknown labels {labels!r} or score {score!r}")
    own = dict(model.named_parameters())
    names = list(own) if parameters is None else list(parameters)
    if not names:
        raise ValueError("the model has no parameters to score")
    sums = {n: torch.zeros(own[n].shape, dtype=dtype, device=own[n].device) for n in names}
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"fisher labels")]))
    trainable = {name: p.requires_grad for name, p in own.items()}
    scorer, count = None, 0
    try:
        model.requires_grad_(False)
        for batch in batches:
            inputs, given = batch if isinstance(batch, tuple | list) else (batch, None)
            scorer = scorer or _Scorer(model, sums, inputs[:2])
            draw = _sampled_labels(generator) if labels == "sampled" else lambda _, y=given: y
            scorer.add(inputs, draw, score)
            count += len(inputs)
    finally:
        if scorer is not None:
            scorer.close()
        for name, p in own.items():
            p.requires_grad_(trainable[name])
    if count == 0:
        raise ValueError("the calibration set is empty")
    for name, total in sums.items():
        total /= count
        if not torch.isfinite(total).all():
            raise ValueError(f"the sensitivity of {name} is not finite")
    return sums


def _sampled_labels(generator: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Return logits (N, C) -> labels (N,) drawn from their softmax, by inversion of the CDF."""

    def draw(logits: Tensor) -> Tensor:
        cdf = logits.detach().double().softmax(dim=1).cumsum(dim=1)
        u = torch.from_numpy(generator.random((len(logits), 1))).to(cdf.device)
        return (cdf < u * cdf[:, -1:]).sum(dim=1)

    return draw


def _summed_score(logits: Tensor, labels: Tensor, score: str) -> Tensor:
    values = logits if score == "logit" else logits.log_softmax(dim=1)
    return values.gather(1, labels[:, None]).sum()


class _Scorer:
    """Sorts the parameters by how their per-sample gradients are had, and adds up the squares."""

    def __init__(self, model: nn.Module, sums: dict[str, Tensor], probe: Tensor):
        self.model, self.sums, self.parameters = model, sums, dict(model.named_parameters())
        hooked = _modules_called_once(model, probe)
        self.handles, covered, self.recording = [], set(), [True]
        for prefix, module in hooked.items():
            names = {k: f"{prefix}.{k}".lstrip(".") for k, _ in module.named_parameters()}
            mine = {k: sums[name] for k, name in names.items() if name in sums}
            covered |= {names[k] for k in mine}
            self.handles.append(module.register_forward_hook(_recorder(mine, self.recording)))
        rest = [name for name in sums if name not in covered]
        self.broadcast = [n for n in rest if self._broadcasts(n, probe)]
        self.single = [n for n in rest if n not in self.broadcast]
        if self.single:
            warnings.warn(
                f"per-sample gradients one by one for {', '.join(self.single)}", stacklevel=4
            )

    @torch.no_grad()
    def _broadcasts(self, name: str, probe: Tensor) -> bool:
        """Whether a copy of the parameter per sample, along its first axis, changes nothing."""
        parameter = self.parameters[name]
        if parameter.dim() == 0 or parameter.shape[0] != 1 or len(probe) < 2:
            return False
        copies = parameter.expand(len(probe), *parameter.shape[1:]) * torch.ones(
            len(probe), *[1] * (parameter.dim() - 1), device=parameter.device, dtype=parameter.dtype
        )
        try:
            out = torch.func.functional_call(self.model, {name: copies}, (probe,))
        except (RuntimeError, IndexError):
            return False
        return torch.allclose(out, self.model(probe), rtol=1e-4, atol=1e-5)

    def add(self, inputs: Tensor, draw: Callable[[Tensor], Tensor], score: str) -> None:
        """Add the squared per-sample gradients of one batch."""
        copies = {}
        for name in self.broadcast:
            p = self.parameters[name].detach()
            copies[name] = p.expand(len(inputs), *p.shape[1:]).clone().requires_grad_()
        with torch.enable_grad():
            logits = torch.func.functional_call(self.model, copies, (inputs,))
            labels = draw(logits)
            _summed_score(logits, labels, score).backward()
        for name, copy in copies.items():
            self.sums[name] += copy.grad.square().sum(dim=0, keepdim=True)
        if self.single:
            self._add_one_by_one(inputs, labels, score)

    def _add_one_by_one(self, inputs: Tensor, labels: Tensor, score: str) -> None:
        chosen = {name: self.parameters[name].detach() for name in self.single}

        def sample_score(values: dict, x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.model, values, (x[None],))
            return _summed_score(logits, y[None], score)

        self.recording[0] = False
        try:
            gradients = torch.func.vmap(torch.func.grad(sample_score), in_dims=(None, 0, 0))
            for name, grad in gradients(chosen, inputs, labels).items():
                self.sums[name] += grad.square().sum(dim=0)
        finally:
            self.recording[0] = True

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _modules_called_once(model: nn.Module, probe: Tensor) -> dict[str, nn.Module]:
    """Return the modules whose inputs and output gradients give their per-sample gradients."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    known = {
        module: prefix
        for prefix, module in model.named_modules()
        if _is_known(module) and all(owners[p] == 1 for p in module.parameters())
    }
    calls = dict.fromkeys(known, 0)

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        whole_batch = len(inputs[0]) == len(probe) and inputs[0].dim() > 1
        calls[module] += 1 if whole_batch else 2

    handles = [module.register_forward_hook(count) for module in known]
    try:
        with torch.no_grad():
            model(probe)
    finally:
        for handle in handles:
            handle.remove()
    return {known[module]: module for module, times in calls.items() if times == 1}


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        simple = module.kernel_size == module.stride and module.padding in ((0, 0), "valid")
        return simple and module.groups == 1 and module.dilation == (1, 1)
    return isinstance(module, nn.Linear | nn.LayerNorm)


def _recorder(sums: dict[str, Tensor], recording: list[bool]) -> Callable:
    """Return the forward hook that adds a module's squared per-sample gradients to `sums`."""

    def forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if recording[0] and torch.is_grad_enabled():
            x = inputs[0].detach()
            if not output.requires_grad:
                output.requires_grad_()  # nothing trains: the graph begins here
            output.register_hook(lambda grad: _add_squares(module, sums, x, grad.detach()))

    return forward


def _add_squares(module: nn.Module, sums: dict[str, Tensor], x: Tensor, grad: Tensor) -> None:
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        normal = F.layer_norm(x, shape, eps=module.eps)
        for name, value in (("weight", grad * normal), ("bias", grad)):
            if name in sums:
                per_sample = value.reshape(len(x), -1, *shape).sum(dim=1)
                sums[name] += per_sample.square_().sum(dim=0)
        return
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)  # (N, T, I)
        grad = grad.flatten(2).transpose(1, 2)
    x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    if "weight" in sums:
        square_accumulate_(sums["weight"].view(sums["weight"].shape[0], -1), grad, x)
    if "bias" in sums:
        sums["bias"] += grad.sum(dim=1).square_().sum(dim=0)


# ---------------------------------------------------------------------------- masks


def budget(size: int, sparsity: float) -> int:
    """Return how many of `size` entries a mask of this sparsity (the FROZEN share) keeps.

    Raises:
        ValueError: sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity must lie in [0, 1), not {sparsity}")
    return math.floor((1 - sparsity) * size + 0.5)


def keep_lowest(keys: Tensor, count: int) -> Tensor:
    """Return the bool mask (P,) of the `count` lowest keys; among equal keys the first ones win."""
    if count <= 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    bar = keys.kthvalue(count).values
    mask = keys < bar
    ties = (keys == bar).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def ranking(rule: str, theta: Tensor, scores: Tensor | None, seed: int = 0) -> Tensor:
    """Return the keys (P,) by which a rule ranks entries; the lowest are kept.

    Args:
        scores: (P,) sensitivities; only the two sensitivity rules need them.
    """
    if rule == "least-sensitive":
        return scores
    if rule == "most-sensitive":
        return -scores
    if rule == "lowest-magnitude":
        return theta.abs()
    if rule == "highest-magnitude":
        return -theta.abs()
    if rule == "random":
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"random mask")]))
        return torch.from_numpy(generator.random(theta.numel())).to(theta.device)
    raise ValueError(f"unknown mask rule {rule!r}: choose from {', '.join(RULES)}")


def calibrate(
    theta: Tensor,
    score: Callable[[], Tensor],
    *,
    sparsity: float,
    rounds: int = 4,
    damp: float = 0.1,
    rule: str = "least-sensitive",
    groups: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the mask (P,) of the entries that stay trainable, True = trainable.

    In round r the network is scored with its dropped weights multiplied by `damp`, and of those
    alive the share density^(r/rounds) that ranks lowest is kept; what is dropped never returns.

    Args:
        theta: (P,) parameters; damped in place while scoring, restored to the bit in any case.
        score: callable that returns the sensitivities (P,) of the network as theta stands.
        groups: index tensors that split range(P); each keeps the same share by itself (a threshold
            per tensor, budgets by largest remainder). None ranks all entries together.

    Raises:
        ValueError: sparsity outside [0, 1), rounds below 1, an unknown rule, or a non-finite score.
    """
    if rounds < 1:
        raise ValueError(f"calibration needs at least one round, not {rounds}")
    total = budget(theta.numel(), sparsity)
    everything = [torch.arange(theta.numel(), device=theta.device)]
    groups = everything if groups is None else list(groups)
    final = split_budget(total, groups)
    original = theta.clone()
    alive = torch.ones_like(theta, dtype=torch.bool)
    try:
        for r in range(1, rounds + 1):
            theta.copy_(torch.where(alive, original, original * damp))
            scores = score() if rule.endswith("sensitive") else None
            if scores is not None and not torch.isfinite(scores).all():
                raise ValueError(f"calibration round {r}: a score is not finite")
            keys = ranking(rule, original, scores, seed).masked_fill(~alive, math.inf)
            share = (1 - sparsity) ** (r / rounds)
            alive = torch.zeros_like(alive)
            for group, last in zip(groups, final, strict=True):
                kept = last if r == rounds else max(last, math.ceil(share * len(group)))
                alive[group] = keep_lowest(keys[group], kept)
    finally:
        theta.copy_(original)
    return alive


def split_budget(count: int, groups: Sequence[Tensor]) -> list[int]:
    """Split `count` over groups in proportion to their sizes, by largest remainder."""
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    exact = count * sizes / sizes.sum()
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: count - counts.sum()]] += 1
    return counts.tolist()


def mask_from_scores(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return bool masks that keep the least sensitive entries of all tensors together."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = keep_lowest(flat, budget(len(flat), sparsity))
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
