"""Sensitivity of every weight: the diagonal of the Fisher information, exactly, in batches.

    F_i = mean over x of (d log p(y|x) / d theta_i)^2,  y drawn from the model's own p(y|x)

The square is of each sample's gradient; the mean gradient's square is another quantity. For a
linear layer with inputs A (N, T, I) and gradients G (N, T, O) of the summed log-likelihood
    F[o, i] = 1/N * sum over n of (sum over t of G[n, t, o] A[n, t, i])^2
so one batched forward and backward pass gives every sample's squared gradient.
Source: Goodfellow 2015, arXiv:1510.01799, with its sums over tokens; the Fisher as in Kunstner
2019, arXiv:1905.12558.

    import torch; from fisher import fisher_diagonal
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    scores = fisher_diagonal(model, [torch.randn(32, 4)])  # {"0.weight": (8, 4), ...}
"""

from __future__ import annotations

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the reference serves there
    triton = None

CPU_CHUNK = 1_000_000  # elements of per-sample gradients held at a time: they stay in cache
GPU_CHUNK = 1 << 27  # the same on a GPU: half a gigabyte of fp32
SQUARES_BLOCK = 1024
BATCH = 64  # images to score at a time; changes no score
HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------- squares of sums


def square_accumulate_reference_(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add the squares with plain PyTorch operations; arguments as in `square_accumulate_`."""
    chunk = max(1, (CPU_CHUNK if total.is_cpu else GPU_CHUNK) // total.numel())
    buffer = grads.new_empty(min(chunk, len(grads)), *total.shape)  # fresh pages would cost as much
    for start in range(0, len(grads), chunk):
        rows, inputs_ = grads[start : start + chunk], inputs[start : start + chunk]
        products = torch.bmm(rows.transpose(1, 2), inputs_, out=buffer[: len(rows)])  # (n, O, I)
        products = products.to(total.dtype)
        if total.is_cpu:  # one pass over what is still in cache
            for product in products:
                total.addcmul_(product, product)
        else:
            total += products.square_().sum(dim=0)


if triton is not None:

    @triton.jit
    def _add_squares_kernel(total_ptr, products_ptr, samples, size, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < size
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        source = products_ptr + at
        for _ in range(samples):
            product = tl.load(source, live, other=0.0).to(tl.float32)
            squares += product * product
            source += size
        tl.store(total_ptr + at, tl.load(total_ptr + at, live, other=0.0) + squares, live)


def square_accumulate_triton_(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add the squares in one fused pass over cuBLAS's products; arguments as in
    `square_accumulate_`."""
    if triton is None:
        raise ValueError("backend 'triton': the triton package is not installed here")
    if total.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' needs CUDA tensors; on a CPU it runs only in Triton's interpreter "
            "(set TRITON_INTERPRET=1 before this file is imported)"
        )
    if total.dtype != torch.float32 or grads.dtype not in HALF_OR_SINGLE:
        raise ValueError(f"backend 'triton' sums in fp32, not {grads.dtype} into {total.dtype}")
    chunk = max(1, GPU_CHUNK // total.numel())
    blocks = (triton.cdiv(total.numel(), SQUARES_BLOCK),)
    for start in range(0, len(grads), chunk):
        part = slice(start, start + chunk)
        products = torch.bmm(grads[part].transpose(1, 2), inputs[part])
        with torch.cuda.device(total.device) if total.is_cuda else contextlib.nullcontext():
            _add_squares_kernel[blocks](
                total, products, len(products), total.numel(), BLOCK=SQUARES_BLOCK
            )


_devices_without_triton: set[torch.device] = set()


def square_accumulate_(
    total: Tensor, grads: Tensor, inputs: Tensor, *, backend: str = "auto"
) -> None:
    """Add sum over n of (grads[n]' inputs[n])^2 to `total` in place.

    Args:
        total: (O, I) contiguous.
        grads: (N, T, O) gradients by a linear layer's outputs.
        inputs: (N, T, I) its inputs, in the same dtype; a half one rounds each product before the
            square.
        backend: "auto" takes Triton for fp32 sums on CUDA devices and PyTorch elsewhere;
            "reference" and "triton" force one of them.

    Raises:
        ValueError: backend "triton" where it cannot run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be auto, triton or reference, not {backend!r}")
    serves = triton is not None and total.is_cuda and total.dtype == torch.float32
    serves = serves and total.device not in _devices_without_triton
    if backend == "reference" or (backend == "auto" and not serves):
        return square_accumulate_reference_(total, grads, inputs)
    try:
        return square_accumulate_triton_(total, grads, inputs)
    except Exception as error:  # compilers fail in many ways, all of them before the first launch
        if backend == "triton" or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        warnings.warn(
            f"Triton does not run on {total.device}, using PyTorch: {error}", stacklevel=2
        )
        _devices_without_triton.add(total.device)
        return square_accumulate_reference_(total, grads, inputs)


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
        model: on one device.
        batches: inputs (N, ...), or pairs (inputs, given (N,)); logits (N, C) come out.
        parameters: names to score; None scores all.
        labels: "sampled" draws y from the model's own p(y|x), by `seed` and the sample's place in
            the stream, or by the uniform numbers in [0, 1) that are `given`; "true" takes the int64
            labels that are `given` (empirical Fisher).
        score: "log-prob" differentiates log p(y|x), "logit" the logit of y (TaLoS's release).
        dtype: of the sums.

    Returns:
        name -> tensor of the parameter's shape, in `dtype`; all are views of one vector.

    Raises:
        ValueError: nothing to score, no samples, an unknown option, or a score that is not finite.
    """
    scorer = Scorer(model, parameters=parameters, labels=labels, score=score, dtype=dtype)
    return scorer.diagonal(batches, seed)


class Scorer:
    """`fisher_diagonal` of one model, as often as its weights or the samples change.

    How each parameter's gradients are had is found out at the first batch, not again for every
    client. Arguments and errors are those of `fisher_diagonal`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Sequence[str] | None = None,
        labels: str = "sampled",
        score: str = "log-prob",
        dtype: torch.dtype = torch.float32,
    ):
        if labels not in ("sampled", "true") or score not in ("log-prob", "logit"):
            raise ValueError(f"unknown labels {labels!r} or score {score!r}")
        self.model, self.parameters = model, dict(model.named_parameters())
        self.names = list(self.parameters) if parameters is None else list(parameters)
        if not self.names:
            raise ValueError("the model has no parameters to score")
        self.labels, self.score, self.dtype = labels, score, dtype
        self._kinds: dict[torch.Size, _Kinds] = {}  # by the shape of a sample

    def diagonal(self, batches: Iterable, seed: int = 0) -> dict[str, Tensor]:
        """Return what `fisher_diagonal` does of these batches, of the weights as they are now."""
        own = self.parameters
        sizes = [own[n].numel() for n in self.names]
        flat = torch.zeros(sum(sizes), dtype=self.dtype, device=own[self.names[0]].device)
        parts = zip(self.names, flat.split(sizes), strict=True)
        sums = {name: part.view(own[name].shape) for name, part in parts}
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"fisher labels")]))
        trainable = {name: p.requires_grad for name, p in own.items()}
        count = 0
        try:
            for p in own.values():
                p.requires_grad_(False)
            for batch in batches:
                inputs, given = batch if isinstance(batch, tuple | list) else (batch, None)
                kinds = self._sorted(inputs)
                if self.labels == "sampled" and (given is None or not given.is_floating_point()):
                    given = torch.from_numpy(generator.random(len(inputs)))
                elif given is None or (self.labels == "true" and given.is_floating_point()):
                    raise ValueError("labels 'true' needs batches of (inputs, labels)")
                self._add(sums, kinds, inputs, given)
                count += len(inputs)
        finally:
            for name, p in own.items():
                p.requires_grad_(trainable[name])
        if count == 0:
            raise ValueError("the calibration set is empty")
        flat /= count
        if not torch.isfinite(flat).all():
            name = next(n for n, total in sums.items() if not torch.isfinite(total).all())
            raise ValueError(f"the sensitivity of {name} is not finite")
        return sums

    def _sorted(self, inputs: Tensor) -> _Kinds:
        """Return how the parameters' per-sample gradients are had of such inputs (N, ...)."""
        shape = inputs.shape[1:]
        if shape in self._kinds:
            return self._kinds[shape]
        probe = torch.cat([inputs[:1], inputs[:1]])
        hooked, out = _modules_called_once(self.model, probe)
        covered = {name for names in hooked.values() for name in names.values()}
        rest = [name for name in self.names if name not in covered]
        broadcast = self._broadcasting(rest, probe, out)
        kinds = _Kinds(hooked, broadcast, [name for name in rest if name not in broadcast])
        if kinds.single:
            warnings.warn(
                f"per-sample gradients one by one for {', '.join(kinds.single)}", stacklevel=4
            )
        if torch.isfinite(out).all():  # else no comparison told anything
            self._kinds[shape] = kinds
        return kinds

    @torch.no_grad()
    def _broadcasting(self, names: list[str], probe: Tensor, out: Tensor) -> list[str]:
        """Return the parameters of which each sample reads its own copy, along the first axis."""
        names = [n for n in names if self.parameters[n].shape[:1] == (1,)]
        copies = {n: torch.cat([self.parameters[n], self.parameters[n] + 1]) for n in names}
        try:
            changed = torch.func.functional_call(self.model, copies, (probe,))
            alone = torch.allclose(changed[0], out[0], rtol=1e-4, atol=1e-5)
        except (RuntimeError, IndexError):
            alone = False
        if alone or len(names) < 2:
            return names if alone else []
        return [n for name in names for n in self._broadcasting([name], probe, out)]

    def _add(self, sums: dict[str, Tensor], kinds: _Kinds, inputs: Tensor, given: Tensor) -> None:
        """Add the squared per-sample gradients of one batch; floats `given` stand for draws."""
        copies = {}
        for name in kinds.broadcast:
            p = self.parameters[name].detach()
            copies[name] = p.expand(len(inputs), *p.shape[1:]).clone().requires_grad_()
        with torch.enable_grad(), self._hooked(sums, kinds):
            logits = torch.func.functional_call(self.model, copies, (inputs,))
            labels = _sampled_labels(logits, given) if given.is_floating_point() else given
            if logits.requires_grad:  # something is hooked or copied
                _summed_score(logits, labels, self.score).backward()
        for name, copy in copies.items():
            sums[name] += copy.grad.square().sum(dim=0, keepdim=True)
        if kinds.single:
            self._add_one_by_one(sums, kinds.single, inputs, labels)

    @contextlib.contextmanager
    def _hooked(self, sums: dict[str, Tensor], kinds: _Kinds) -> Iterator[None]:
        """Let the batched modules add their squares to `sums` in the block's backward pass."""
        handles = []
        for module, names in kinds.hooked.items():
            if mine := {kind: sums[name] for kind, name in names.items() if name in sums}:
                handles.append(module.register_forward_hook(_recorder(mine)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_one_by_one(
        self, sums: dict[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor
    ) -> None:
        chosen = {name: self.parameters[name].detach() for name in names}

        def sample_score(values: dict, x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.model, values, (x[None],))
            return _summed_score(logits, y[None], self.score)

        gradients = torch.func.vmap(torch.func.grad(sample_score), in_dims=(None, 0, 0))
        for name, grad in gradients(chosen, inputs, labels).items():
            sums[name] += grad.square().sum(dim=0)


class _Kinds(NamedTuple):
    """The ways to per-sample gradients: modules in a batch, copies, the other names one by one."""

    hooked: dict[nn.Module, dict[str, str]]  # weight or bias -> its name in the model
    broadcast: list[str]
    single: list[str]


def _sampled_labels(logits: Tensor, u: Tensor) -> Tensor:
    """Return labels (N,) drawn from the softmax of `logits` by inversion of its CDF at u (N,)."""
    cdf = logits.detach().double().softmax(dim=1).cpu().cumsum(dim=1)  # not deterministic on CUDA
    return (cdf < u.cpu().double()[:, None] * cdf[:, -1:]).sum(dim=1).to(logits.device)


def _summed_score(logits: Tensor, labels: Tensor, score: str) -> Tensor:
    values = logits if score == "logit" else logits.log_softmax(dim=1)
    return values.gather(1, labels[:, None]).sum()


def _modules_called_once(
    model: nn.Module, probe: Tensor
) -> tuple[dict[nn.Module, dict[str, str]], Tensor]:
    """Return the modules whose per-sample gradients can be had in a batch, with the names of their
    parameters, and the logits."""
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
            out = model(probe)
    finally:
        for handle in handles:
            handle.remove()
    once = [module for module, times in calls.items() if times == 1]
    return {
        m: {k: f"{known[m]}.{k}".lstrip(".") for k, _ in m.named_parameters()} for m in once
    }, out


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        simple = module.kernel_size == module.stride and module.padding in ((0, 0), "valid")
        return simple and module.groups == 1 and module.dilation == (1, 1)
    return isinstance(module, nn.Linear | nn.LayerNorm)


def _recorder(sums: dict[str, Tensor]) -> Callable:
    """Return the forward hook that adds a module's squared per-sample gradients to `sums`."""

    def forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            x = inputs[0].detach()
            if not output.requires_grad:
                output.requires_grad_()  # nothing trains: the graph begins here
            output.register_hook(lambda grad: _add_squares(module, sums, x, grad.detach()))

    return forward


def _patches(images: Tensor, height: int, width: int) -> Tensor:
    """Return the patches (N, T, C height width) of images (N, C, H, W), by rows."""
    rows = images.unfold(2, height, height).unfold(3, width, width)  # (N, C, rows, columns, h, w)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


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
        x = _patches(x, *module.kernel_size)
        grad = grad.flatten(2).transpose(1, 2)
    x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    if "weight" in sums:
        square_accumulate_(sums["weight"].view(sums["weight"].shape[0], -1), grad, x)
    if "bias" in sums:
        sums["bias"] += grad.sum(dim=1).square_().sum(dim=0)
