"""Masked momentum SGD over flat tensors: one fused pass, and a drop-in torch Optimizer on top.

    g = where(mask, grad / grad_scale + weight_decay * theta, 0)
    b = momentum * b + (1 - dampening) * g            first step: b = g
    d = g + momentum * b  if nesterov else  b
    theta = theta - lr * d

With an all-ones mask this is torch.optim.SGD. A frozen entry (mask False) keeps its bits whatever
its gradient holds, Inf and NaN included, and its momentum is zero.
Source: Sutskever et al. 2013 in PyTorch's convention; masking as in TaLoS (arXiv:2504.02620).

    import torch; from sparse_sgdm import SparseSGDM
    w = torch.nn.Parameter(torch.ones(4)); (w ** 2).sum().backward()
    SparseSGDM([w], lr=0.1, masks=[torch.tensor([True, True, False, False])]).step()
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the reference serves there
    triton = None

CPU_CHUNK = 65_536  # elements: four fp32 operands of this length stay in a core's L2 cache
TRITON_BLOCK = 1024


def sparse_sgdm_reference_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    mask: Tensor | None = None,
    compute_copy: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Step `theta` with plain PyTorch operations; arguments as in `sparse_sgdm_`."""
    chunk = CPU_CHUNK if theta.device.type == "cpu" else max(theta.numel(), 1)
    operands = (theta, grad, momentum_buffer, mask, compute_copy)
    zero = theta.new_zeros(())  # a tensor: torch.where is twice as fast with it as with 0.0
    for start in range(0, theta.numel(), chunk):
        part, g, b, m, copy = (x if x is None else x[start : start + chunk] for x in operands)
        g = g.to(part.dtype)
        if grad_scale != 1.0:
            g = g / grad_scale
        if weight_decay:
            g = g.add(part, alpha=weight_decay)
        if m is not None:
            g = torch.where(m, g, zero)
        if b is None:
            d = g
        else:
            if first:
                b.copy_(g)
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
                if m is not None:  # a mask that grew tighter between steps leaves no stale momentum
                    torch.where(m, b, zero, out=b)
            d = g.add(b, alpha=momentum) if nesterov else b
        part.add_(d, alpha=-lr)
        if copy is not None:
            copy.copy_(part)


if triton is not None:

    @triton.jit
    def _sparse_sgdm_kernel(
        theta_ptr,
        grad_ptr,
        momentum_ptr,
        mask_ptr,
        copy_ptr,
        count,
        lr,
        momentum,
        rate,  # 1 - dampening
        weight_decay,
        inverse_scale,
        HAS_MOMENTUM: tl.constexpr,
        HAS_MASK: tl.constexpr,
        HAS_COPY: tl.constexpr,
        NESTEROV: tl.constexpr,
        FIRST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < count
        if HAS_MASK:
            trains = tl.load(mask_ptr + at, mask=live, other=0) != 0
        else:
            trains = live
        theta = tl.load(theta_ptr + at, mask=live, other=0.0)
        g = tl.load(grad_ptr + at, mask=trains, other=0.0).to(theta.dtype) * inverse_scale
        g = tl.where(trains, g + weight_decay * theta, 0.0)
        d = g
        if HAS_MOMENTUM:
            if FIRST:
                b = g
            else:
                b = tl.load(momentum_ptr + at, mask=trains, other=0.0)
                b = momentum * b + rate * g
            tl.store(momentum_ptr + at, b, mask=live)
            d = b
            if NESTEROV:
                d = g + momentum * b
        theta = tl.where(trains, theta - lr * d, theta)
        tl.store(theta_ptr + at, theta, mask=trains)
        if HAS_COPY:
            tl.store(copy_ptr + at, theta.to(copy_ptr.dtype.element_ty), mask=live)


def sparse_sgdm_triton_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    mask: Tensor | None = None,
    compute_copy: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Step `theta` with the fused kernel: every operand is read once and written once."""
    if triton is None:
        raise ValueError("backend 'triton': the triton package is not installed here")
    if theta.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' needs a CUDA tensor; on a CPU it runs only in Triton's interpreter "
            "(set TRITON_INTERPRET=1 before this file is imported)"
        )
    if theta.dtype != torch.float32:
        raise ValueError(f"backend 'triton' steps fp32 parameters, not {theta.dtype}")
    count = theta.numel()
    if count == 0:
        return
    _sparse_sgdm_kernel[(triton.cdiv(count, TRITON_BLOCK),)](
        theta,
        grad,
        momentum_buffer if momentum_buffer is not None else theta,
        mask.view(torch.uint8) if mask is not None else theta,
        compute_copy if compute_copy is not None else theta,
        count,
        lr,
        momentum,
        1.0 - dampening,
        weight_decay,
        1.0 / grad_scale,
        HAS_MOMENTUM=momentum_buffer is not None,
        HAS_MASK=mask is not None,
        HAS_COPY=compute_copy is not None,
        NESTEROV=nesterov,
        FIRST=first,
        BLOCK=TRITON_BLOCK,
    )


_devices_without_triton: set[torch.device] = set()


def _triton_serves(theta: Tensor) -> bool:
    known_bad = theta.device in _devices_without_triton
    return triton is not None and theta.is_cuda and theta.dtype == torch.float32 and not known_bad


def sparse_sgdm_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    mask: Tensor | None = None,
    compute_copy: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """Take one step of masked momentum SGD in place.

    Mutates `theta`, `momentum_buffer` and `compute_copy`; all operands are contiguous (P,) tensors
    on one device.

    Args:
        theta: (P,) parameters, fp32 or fp64.
        grad: (P,) gradient in any floating dtype, multiplied by `grad_scale`.
        momentum_buffer: (P,) in theta's dtype, or None for plain SGD.
        mask: (P,) bool, True = trainable; None trains all.
        compute_copy: (P,) half-precision copy of `theta` that the forward pass reads, or None.
        lr: step size of this local step.
        first: the momentum buffer holds nothing yet; it is overwritten by g.
        grad_scale: the loss scale that `grad` still carries.
        backend: "auto" (Triton for CUDA tensors where it compiles), "triton" or "reference".

    Raises:
        ValueError: unknown backend, or Triton forced where it cannot run.
    """
    check_sgd_options(lr, momentum, dampening, weight_decay, nesterov)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be auto, triton or reference, not {backend!r}")
    assert theta.dim() == 1 and grad.shape == theta.shape, (theta.shape, grad.shape)
    tensors = (theta, grad, momentum_buffer, mask, compute_copy)
    options = dict(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        first=first,
        grad_scale=grad_scale,
    )
    if backend == "reference" or (backend == "auto" and not _triton_serves(theta)):
        return sparse_sgdm_reference_(*tensors, **options)
    try:
        return sparse_sgdm_triton_(*tensors, **options)
    except Exception as error:  # compilers fail in many ways, all of them before the first launch
        if backend == "triton" or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        warnings.warn(
            f"Triton does not run on {theta.device}, using PyTorch: {error}", stacklevel=2
        )
        _devices_without_triton.add(theta.device)
        return sparse_sgdm_reference_(*tensors, **options)


def check_sgd_options(lr, momentum, dampening, weight_decay, nesterov) -> None:
    """Raise ValueError for what torch.optim.SGD refuses as well."""
    for name, value in dict(lr=lr, momentum=momentum, weight_decay=weight_decay).items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative: {value}")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")


class SparseSGDM(torch.optim.Optimizer):
    """Step any model by masked momentum SGD; the options are those of torch.optim.SGD.

    Args:
        params: parameters or parameter groups.
        lr: per step; weight_decay: L2, added to the gradient of unmasked entries only.
        masks: one bool tensor per parameter in the order of `params` (True = trainable, of the
            parameter's shape), or None for a parameter that trains whole; None trains everything.

    Raises:
        ValueError: an invalid option, or masks that do not match the parameters.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        masks: Iterable[Tensor | None] | None = None,
    ):
        check_sgd_options(lr, momentum, dampening, weight_decay, nesterov)
        options = dict(lr=lr, momentum=momentum, dampening=dampening)
        super().__init__(params, options | dict(weight_decay=weight_decay, nesterov=nesterov))
        self.masks = self._check_masks(masks)

    def _check_masks(self, masks) -> dict[Tensor, Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        masks = [None] * len(parameters) if masks is None else list(masks)
        if len(masks) != len(parameters):
            raise ValueError(f"{len(masks)} masks for {len(parameters)} parameters")
        for i, (p, mask) in enumerate(zip(parameters, masks, strict=True)):
            if mask is not None and (mask.shape != p.shape or mask.dtype != torch.bool):
                raise ValueError(
                    f"mask {i} must be a bool tensor of shape {tuple(p.shape)}, "
                    f"not {mask.dtype} {tuple(mask.shape)}"
                )
        pairs = zip(parameters, masks, strict=True)
        return {p: m.to(p.device).reshape(-1) for p, m in pairs if m is not None}

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step on every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {k: v for k, v in group.items() if k in self.defaults}
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(p, options)
        return loss

    def _step_parameter(self, p: Tensor, options: dict) -> None:
        state, first = self.state[p], False
        if options["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.empty_like(p, memory_format=torch.contiguous_format)
            first = True
        buffer = state["momentum_buffer"].view(-1) if options["momentum"] else None
        theta = p.data.contiguous().view(-1)
        sparse_sgdm_(theta, p.grad.reshape(-1), buffer, self.masks.get(p), first=first, **options)
        if not p.data.is_contiguous():
            p.data.copy_(theta.view(p.shape))
