"""Masked momentum SGD over flat tensors: one fused pass, and a drop-in torch Optimizer on top.

    g = grad / grad_scale + weight_decay * theta + prox * (theta - anchor) + correction
    b = momentum * b + (1 - dampening) * g            first step: b = g
    d = g + momentum * b  if nesterov else  b
    theta = theta - lr * d                            where mask, else nothing changes

With an all-ones mask this is torch.optim.SGD. A frozen entry (mask False) keeps its bits whatever
its gradient holds, Inf and NaN included, and its momentum is neither read nor written.
Source: Sutskever et al. 2013 in PyTorch's convention; masking as in TaLoS (arXiv:2504.02620); the
proximal term of FedProx (arXiv:1812.06127), the correction of SCAFFOLD (arXiv:1910.06378).

    import torch; from sparse_sgdm import SparseSGDM
    net = torch.nn.Linear(2, 1); net(torch.ones(2)).sum().backward()
    SparseSGDM(net.named_parameters(), masks={"weight": net.weight > 0, "bias": None}).step()
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the reference serves there
    triton = None

CPU_CHUNK = 262_144  # elements; the operands stay in cache from one operation to the next
TRITON_BLOCK = 512


def sparse_sgdm_reference_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    mask: Tensor | None = None,
    compute_copy: Tensor | None = None,
    anchor: Tensor | None = None,
    correction: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    prox: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
) -> None:
    """Step `theta` with plain PyTorch operations; arguments as in `sparse_sgdm_`."""
    if found_inf is not None and found_inf.item():
        return
    chunk = CPU_CHUNK if theta.device.type == "cpu" else max(theta.numel(), 1)
    operands = (theta, grad, momentum_buffer, mask, compute_copy, anchor, correction)
    if mask is not None:
        zero = theta.new_zeros(())  # a tensor: torch.where is twice as fast with it as with 0.0
    for start in range(0, theta.numel(), chunk):
        part, g, b, m, copy, near, extra = (
            x if x is None else x[start : start + chunk] for x in operands
        )
        g = g.to(part.dtype)
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            g = g / grad_scale
        if weight_decay:
            g = g.add(part, alpha=weight_decay)
        if near is not None:
            g = g.add(part - near, alpha=prox)
        if extra is not None:
            g = g + extra
        if m is not None:
            g = torch.where(m, g, zero)
        if b is None:
            d = g
        else:
            into = b if m is None else None  # without a mask in place
            new = g if first else torch.mul(b, momentum, out=into).add_(g, alpha=1 - dampening)
            if new is not b:
                b.copy_(new if m is None else torch.where(m, new, b))
            d = g.add(new, alpha=momentum) if nesterov else new
            if m is not None:
                d = torch.where(m, d, zero)
        if isinstance(lr, Tensor):
            part.sub_(d * lr)
        else:
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
        anchor_ptr,
        correction_ptr,
        lr_ptr,
        scale_ptr,
        found_inf_ptr,
        count,
        lr,
        momentum,
        rate,  # 1 - dampening
        weight_decay,
        prox,
        grad_scale,
        HAS_MOMENTUM: tl.constexpr,
        HAS_MASK: tl.constexpr,
        HAS_COPY: tl.constexpr,
        HAS_ANCHOR: tl.constexpr,
        HAS_CORRECTION: tl.constexpr,
        HAS_LR: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_FOUND_INF: tl.constexpr,
        NESTEROV: tl.constexpr,
        FIRST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if HAS_FOUND_INF:
            count = tl.where(tl.load(found_inf_ptr) == 0.0, count, 0)
        trains = at < count
        if HAS_MASK:
            trains = trains & (tl.load(mask_ptr + at, mask=trains, other=0) != 0)
        # a block in which nothing trains reads its mask and moves no other byte
        theta = tl.load(theta_ptr + at, mask=trains, other=0.0)
        if HAS_LR:
            lr = tl.load(lr_ptr).to(theta.dtype)
        if HAS_SCALE:
            grad_scale = tl.load(scale_ptr)
        g = tl.load(grad_ptr + at, mask=trains, other=0.0).to(theta.dtype) / grad_scale
        g += weight_decay * theta
        if HAS_ANCHOR:
            g += prox * (theta - tl.load(anchor_ptr + at, mask=trains, other=0.0))
        if HAS_CORRECTION:
            g += tl.load(correction_ptr + at, mask=trains, other=0.0)
        d = g
        if HAS_MOMENTUM:
            b = g
            if not FIRST:
                b = momentum * tl.load(momentum_ptr + at, mask=trains, other=0.0) + rate * g
            tl.store(momentum_ptr + at, b, mask=trains)
            d = b
            if NESTEROV:
                d = g + momentum * b
        theta -= lr * d
        tl.store(theta_ptr + at, theta, mask=trains)
        if HAS_COPY:
            tl.store(copy_ptr + at, theta.to(copy_ptr.dtype.element_ty), mask=trains)


def sparse_sgdm_triton_(
    theta: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    mask: Tensor | None = None,
    compute_copy: Tensor | None = None,
    anchor: Tensor | None = None,
    correction: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    prox: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
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
    lr_tensor, scale = (x if isinstance(x, Tensor) else None for x in (lr, grad_scale))
    optional = dict(
        MOMENTUM=momentum_buffer,
        MASK=mask if mask is None else mask.view(torch.uint8),
        COPY=compute_copy,
        ANCHOR=anchor,
        CORRECTION=correction,
        LR=lr_tensor,
        SCALE=scale,
        FOUND_INF=found_inf,
    )
    on = torch.cuda.device(theta.device) if theta.is_cuda else contextlib.nullcontext()
    with on:
        _sparse_sgdm_kernel[(triton.cdiv(count, TRITON_BLOCK),)](
            theta,
            grad,
            *(theta if x is None else x for x in optional.values()),
            count,
            lr if lr_tensor is None else 0.0,
            momentum,
            1.0 - dampening,
            weight_decay,
            prox,
            grad_scale if scale is None else 1.0,
            **{f"HAS_{name}": x is not None for name, x in optional.items()},
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
    anchor: Tensor | None = None,
    correction: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    prox: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take one step of masked momentum SGD in place.

    Mutates `theta`, `momentum_buffer` and `compute_copy`, but no frozen entry; all operands are
    contiguous (P,) tensors on one device.

    Args:
        theta: (P,) parameters, fp32 or fp64.
        grad: (P,) gradient in any floating dtype, multiplied by `grad_scale`.
        momentum_buffer: (P,) in theta's dtype, or None for plain SGD.
        mask: (P,) bool, True = trainable; None trains all.
        compute_copy: (P,) half-precision copy of `theta` that the forward pass reads, up to date
            on entry, or None.
        anchor: (P,) in theta's dtype, what the proximal term pulls towards, or None.
        correction: (P,) in theta's dtype, added to the gradient, or None.
        lr: step size of this local step, a number or a scalar tensor on theta's device, which a
            CUDA graph reads anew in every replay.
        first: the momentum buffer holds nothing yet; it is overwritten by g.
        prox: strength of the proximal term.
        grad_scale: the loss scale that `grad` still carries, a number or a scalar tensor.
        found_inf: scalar tensor; where it is not zero, no step is taken.
        backend: "auto" (Triton for CUDA tensors where it compiles), "triton" or "reference".

    Raises:
        ValueError: an operand of another shape or layout, a mask that is not bool, unknown backend,
            or Triton forced where it cannot run.
    """
    check_sgd_options(lr, momentum, dampening, weight_decay, nesterov)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be auto, triton or reference, not {backend!r}")
    tensors = (theta, grad, momentum_buffer, mask, compute_copy, anchor, correction)
    check_vectors(tensors)
    options = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    options |= dict(nesterov=nesterov, first=first, prox=prox)
    options |= dict(grad_scale=grad_scale, found_inf=found_inf)
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


VECTORS = ("theta", "grad", "momentum_buffer", "mask", "compute_copy", "anchor", "correction")


def check_vectors(tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless VECTORS are contiguous and (P,) as theta is, and the mask bool."""
    for name, x in zip(VECTORS, tensors, strict=True):
        if x is not None and (x.dim(), x.shape, x.is_contiguous()) != (1, tensors[0].shape, True):
            needed = f"a contiguous vector as long as theta {tuple(tensors[0].shape)}"
            raise ValueError(f"{name} must be {needed}, not {tuple(x.shape)} {x.stride()}")
        if name == "mask" and x is not None and x.dtype != torch.bool:
            raise ValueError(f"the mask must be bool, not {x.dtype}")


def check_sgd_options(lr, momentum, dampening, weight_decay, nesterov) -> None:
    """Raise ValueError for what torch.optim.SGD refuses as well."""
    for name, value in dict(lr=lr, momentum=momentum, weight_decay=weight_decay).items():
        if not isinstance(value, Tensor) and not value >= 0:  # a tensor would have to be waited for
            raise ValueError(f"{name} must not be negative: {value}")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")


def masks_in_order(masks, parameters: Sequence[Tensor], names: Sequence[str]) -> list:
    """Return a mask or None per parameter, as the parameter lies in memory, or raise ValueError."""
    if isinstance(masks, Mapping):
        if not names:
            raise ValueError("masks by name need the names: pass model.named_parameters()")
        if unknown := sorted(masks.keys() - {*names}, key=str):
            raise ValueError(f"masks of no parameter: {', '.join(map(str, unknown))}")
        if lacking := [name for name in names if name not in masks]:
            lack = ", ".join(lacking)
            raise ValueError(f"parameters without a mask (None trains all of one): {lack}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"several parameters of one name: {', '.join(sorted(twice))}")
        masks = [masks[name] for name in names]
    masks = [None] * len(parameters) if masks is None else list(masks)
    if len(masks) != len(parameters):
        raise ValueError(f"{len(masks)} masks for {len(parameters)} parameters")
    for i, (p, mask) in enumerate(zip(parameters, masks, strict=True)):
        dtype, shape = getattr(mask, "dtype", type(mask)), tuple(getattr(mask, "shape", ()))
        if mask is not None and (dtype, shape) != (torch.bool, tuple(p.shape)):
            at, fit = names[i] if names else i, tuple(p.shape)
            raise ValueError(f"mask {at} must be a bool tensor of shape {fit}, not {dtype} {shape}")
        if mask is not None and (mask.device, mask.stride()) != (p.device, p.stride()):
            masks[i] = torch.empty_like(p, dtype=torch.bool).copy_(mask)
    return masks


class SparseSGDM(torch.optim.Optimizer):
    """Step any model by masked momentum SGD; options, steps and state are torch.optim.SGD's.

    The masks lie in the parameter groups, in group["masks"]: copies, pickles and state_dict() have
    them, and torch.optim.SGD can load those. Loading replaces the masks that a state_dict has and
    keeps the others. torch.amp.GradScaler hands over scale and overflow, at no pass of their own.

    Args:
        params: parameters, named or not, or groups of them, each with its "masks" or without.
        lr: per step, a number or a scalar tensor; weight_decay: L2, of unmasked entries only.
        masks: bool tensors of the parameters' shapes (True = trainable) or None for a parameter
            that trains whole; in the order of `params`, or a dict by name if these are named.
        foreach, fused, capturable: without effect; differentiable: only False.

    Raises:
        ValueError: an invalid option, masks that do not match, complex values, sparse gradients.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        masks: Mapping[str, Tensor | None] | Iterable[Tensor | None] | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ):
        check_sgd_options(lr, momentum, dampening, weight_decay, nesterov)
        options = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        options |= dict(nesterov=nesterov, maximize=maximize, differentiable=differentiable)
        super().__init__(params, options | dict(foreach=foreach, fused=fused))
        if masks is not None:
            if self.masks:
                raise ValueError("masks are given twice: as an argument and in a parameter group")
            parameters = [p for group in self.param_groups for p in group["params"]]
            names = [name for g in self.param_groups for name in g.get("param_names", [])]
            in_order = iter(masks_in_order(masks, parameters, names))
            for group in self.param_groups:
                group["masks"] = [next(in_order) for _ in group["params"]]

    @property
    def masks(self) -> dict[Tensor, Tensor]:
        """The mask of each parameter that has one."""
        pairs = [zip(g["params"], g["masks"], strict=True) for g in self.param_groups]
        return {p: mask for group in pairs for p, mask in group if mask is not None}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, with its "masks" or dense; one that is refused is not added."""
        super().add_param_group(param_group)
        self._check(group := self.param_groups.pop())
        self.param_groups.append(group)

    @staticmethod
    def _check(group: dict) -> None:
        params = group["params"]
        if group.get("differentiable"):
            raise ValueError("SparseSGDM steps in place, it is not differentiable")
        if any(p.is_complex() or getattr(p.grad, "layout", p.layout) != p.layout for p in params):
            raise ValueError("SparseSGDM takes neither complex parameters nor sparse gradients")
        group["masks"] = masks_in_order(group.get("masks"), params, group.get("param_names", []))

    def __setstate__(self, state: dict) -> None:
        present = self.__dict__.get("param_groups", state["param_groups"])  # none yet in a copy
        for group, before in zip(state["param_groups"], present, strict=True):
            self._check(group), self._check(before)  # a refusal comes before any change
            masks = zip(group["masks"], before["masks"], strict=True)
            group["masks"] = [old if new is None else new for new, old in masks]
            names, old = (g.get("param_names", []) for g in (group, before))
            if names != old and sorted(names) == sorted(old):
                raise ValueError(f"the state_dict has its parameters in another order: {names}")
        super().__setstate__(state)

    def __repr__(self) -> str:
        brief = object.__new__(type(self))  # without the masks, which fill pages
        brief.param_groups = [{k: g[k] for k in g if k != "masks"} for g in self.param_groups]
        return super(SparseSGDM, brief).__repr__()

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step on every parameter that has a gradient; returns the closure's loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:  # all of them before the first step
            self._check(group)
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            options = {k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay")}
            options["nesterov"] = group["nesterov"] and group["momentum"] != 0
            sign = -1.0 if group.get("maximize") else 1.0
            options["grad_scale"] = sign if scale is None else sign * scale
            options["found_inf"] = getattr(self, "found_inf", None)
            for p, mask in zip(group["params"], group["masks"], strict=True):
                if p.grad is not None:
                    self._step_parameter(p, mask, options)
        return loss

    def _step_parameter(self, p: Tensor, mask: Tensor | None, options: dict) -> None:
        buffer = self.state[p].get("momentum_buffer") if options["momentum"] else None
        if first := buffer is None and options["momentum"] != 0:
            if options["found_inf"] is not None and options["found_inf"].item():
                return  # the next step is the first
            buffer = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        laid = [p, p.grad, buffer, mask]
        if not p.is_contiguous():  # its entries in the order of memory
            order = sorted(range(p.dim()), key=p.stride, reverse=True)
            laid = [x if x is None else x.permute(order) for x in laid]
        flat = [x if x is None else x.contiguous().view(-1) for x in laid]
        sparse_sgdm_(*flat, first=first, **options)
        for x, moved in zip(laid[::2], flat[::2], strict=True):
            if x is not None and not x.is_contiguous():
                x.copy_(moved.view(x.shape))
