"""Parameters as one vector: a flat view of them, the entries of it that train, and their step.

    theta (P,) fp32, contiguous; every parameter a view of it, its gradient a view of grad (P,)
    under a mask the entries that train are a vector of their own (P',): rounds, checkpoints and
    messages know no others

Takes sparse_sgdm.py along.

    import torch; from flat import Entries, FlatView, Sgd
    model = torch.nn.Linear(4, 3)
    flat = FlatView(model.named_parameters())
    mask = flat.marked(["weight"])  # (P,) bool: the bias is frozen
    entries = Entries(flat, mask, Sgd(lr=0.1, momentum=0.9))
    flat.fill_grad(model(torch.ones(2, 4)).square().sum())
    entries.step(lr=0.1, first=True); entries.gather()  # (12,) parameters after the step
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from sparse_sgdm import sparse_sgdm_

ALIGNMENT = 64  # elements: 128 bytes in half precision, 256 in fp32
CHUNK = 262_144  # elements whose norm a CPU takes at once
COMPACT_BELOW = 0.7  # density from which on a CPU steps all entries (bench_sparse_sgdm.py)
LOST = "make it after model.to(), a deep copy, or load_state_dict(assign=True)"


class Sgd(NamedTuple):
    """How a step follows its gradient."""

    lr: Annotated[
        float | None,
        "learning rate of a step; under a mask that of dense training (--mask-lr)",
        "0 <= x <= 1e38",
    ] = None
    momentum: Annotated[float, "momentum", "0 <= x <= 1"] = 0.9
    nesterov: Annotated[bool, "Nesterov momentum"] = False
    weight_decay: Annotated[float | None, "L2 factor [0]", "0 <= x <= 1e38"] = None
    clip_norm: Annotated[
        float | None,
        "largest L2 norm of a step's gradient, of all that trains [none]",
        "1e-30 <= x <= 1e30",
        "S",
    ] = None


class FlatView:
    """Make parameters views of one contiguous vector `theta` (P,), their gradients of `grad` (P,).

    Every parameter starts at a multiple of ALIGNMENT elements; `size` counts the parameters alone,
    without the padding between them (which stays zero). With a half-precision `compute_dtype` the
    model reads `compute` (P,), a cast of `theta`, and `grad` has that type too: what is loaded into
    that model is lost at the next step, and `reset` takes weights in. Otherwise `compute` is None
    and the model reads `theta` itself.

    Pairs carry no buffers: the running statistics of a BatchNorm stay each model's own. A module's
    floating-point buffers, as its state_dict has them, are entries of theta too: the model changes
    them in place, servers average them. Integer ones stay the model's own, and so do constants
    that hold an infinity, as an attention's mask does: it has no average.

    Args:
        parameters: (name, parameter) pairs, or a module; all are made trainable.
        dtype: of theta, fp32 or fp64.

    Raises:
        ValueError: no parameters, one that is not of real floating-point numbers, two of a name or
            in the same memory, one of two names, or a module with such buffers in a half-precision
            compute_dtype.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]] | nn.Module,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ):
        model = parameters if isinstance(parameters, nn.Module) else None
        buffers = {} if model is None else _buffers(model)
        if model is not None:
            parameters = model.named_parameters()
        pairs = list(parameters)
        parameters, names = dict(pairs), {id(p): name for name, p in pairs}
        memory: dict = {}
        if not pairs:
            raise ValueError("a flat view needs at least one parameter")
        for name, p in pairs:
            if p is not parameters[name]:
                raise ValueError(f"two parameters are called {name}: give each a name of its own")
            if names[id(p)] != name:
                raise ValueError(f"{name} and {names[id(p)]} are one parameter: give it once")
            if not p.is_floating_point():
                raise ValueError(f"{name} is {p.dtype}: a flat view holds real floating-point ones")
            if (twin := memory.setdefault(p.data_ptr() or name, name)) != name:
                raise ValueError(f"{twin} and {name} share memory: make them one parameter")
        carried = {**parameters, **buffers}
        self.shapes = {name: tuple(p.shape) for name, p in carried.items()}
        self.offsets, end = {}, 0
        for name, p in carried.items():
            self.offsets[name] = end
            end += math.ceil(p.numel() / ALIGNMENT) * ALIGNMENT
        self.size = sum(p.numel() for p in carried.values())
        device = next(iter(parameters.values())).device
        half = compute_dtype not in (None, dtype)
        if half and buffers:
            raise ValueError(
                f"{next(iter(buffers))} is a buffer: it needs a compute_dtype of {dtype}"
            )
        self.theta = torch.zeros(end, dtype=dtype, device=device)
        self.compute = torch.zeros(end, dtype=compute_dtype, device=device) if half else None
        weights = self.theta if self.compute is None else self.compute
        self.grad = torch.zeros_like(weights)
        self.parameters = list(parameters.values())
        self.grads = [self.view(self.grad, name) for name in parameters]
        for (name, p), grad in zip(parameters.items(), self.grads, strict=True):
            self.view(self.theta, name).copy_(p.detach())
            p.requires_grad_(True)
            p.data, p.grad = self.view(weights, name), grad
        for name, buffer in buffers.items():
            self.view(self.theta, name).copy_(buffer)
            buffer.data = self.view(self.theta, name)
        self.model, self.named = model, parameters
        self.places = {name: tensor.data_ptr() for name, tensor in carried.items()}
        self.buffers = self.marked(buffers) if buffers else None  # (P,) bool
        self.refresh()

    def fill_grad(self, loss: Tensor, add: bool = False) -> None:
        """Set `grad` to the gradient of a scalar loss, or add that to it.

        On a GPU all parameters' gradients move at once, where backward() adds one after the other.

        Raises:
            ValueError: a loss of none of the parameters; as `recover_grad`.
        """
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if all(grad is None for grad in grads):
            raise ValueError(f"the loss depends on none of the flat view's parameters: {LOST}")
        pairs = zip(self.parameters, grads, strict=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        grads = [g.to_dense() if g.is_sparse else g for g in grads]  # as embeddings may have them
        self.recover_grad()
        with torch.no_grad():
            (torch._foreach_add_ if add else torch._foreach_copy_)(self.grads, grads)

    @torch.no_grad()
    def recover_grad(self) -> None:
        """Take gradients in that lie outside `grad`, as after model.zero_grad() and backward().

        A parameter whose gradient is None, as zero_grad() leaves it, has zeros.

        Raises:
            ValueError: as `check_places`.
        """
        self.check_places()
        for p, grad in zip(self.parameters, self.grads, strict=True):
            if p.grad is not grad:
                grad.zero_() if p.grad is None else grad.copy_(p.grad.to_dense())
                p.grad = grad

    def check_places(self) -> None:
        """Raise ValueError where the model has other memory than the view's, which no step reaches.

        What the model replaces itself is seen where the view is of a module.
        """
        tensors = self.named
        if self.model is not None:
            tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, at in self.places.items():
            if name not in tensors or tensors[name].data_ptr() != at:
                raise ValueError(f"the model's {name} no longer lies in the flat view: {LOST}")

    def view(self, vector: Tensor, name: str) -> Tensor:
        """Return the view of parameter `name` in a flat (..., P) tensor, as (..., *shape)."""
        shape, start = self.shapes[name], self.offsets[name]
        part = vector[..., start : start + math.prod(shape)]
        return part.view((*vector.shape[:-1], *shape))

    def marked(self, names: Iterable[str] | None = None) -> Tensor:
        """Return which entries of a flat vector belong to these parameters, or to any: (P,) bool.

        The others are padding, or other parameters'.
        """
        marks = torch.zeros_like(self.theta, dtype=torch.bool)
        for name in self.shapes if names is None else names:
            self.view(marks, name).fill_(True)
        return marks

    @torch.no_grad()
    def reset(self, theta: Tensor) -> None:
        """Set all parameters to another flat vector (P,); ValueError as `check_places`."""
        self.check_places()
        self.theta.copy_(theta)
        self.refresh()

    def refresh(self) -> None:
        """Bring the compute copy up to date with theta."""
        if self.compute is not None:
            self.compute.copy_(self.theta)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers that a module's state_dict has, by name."""
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return {name: b for name, b in buffers.items() if b.is_floating_point() and not b.isinf().any()}


class Entries:
    """The entries of a flat view that train, as one vector: all of them, or those of a mask.

    Rounds, checkpoints and messages know `theta` and `momentum` alone. On a CPU, below a density of
    COMPACT_BELOW, so does the optimiser; elsewhere the fused kernel steps the whole view under the
    mask. The bits are the same.

    Args:
        mask: (P,) bool in the layout of the view, True = trainable, or None. Buffers are entries
            under any mask, and no step touches them.
        prox: strength of each step's pull towards `pull_to`'s vector; 0: none.
        corrected: each step adds `correct`'s vector to its gradient.

    Raises:
        ValueError: a mask that is not of the view.
    """

    def __init__(
        self,
        flat: FlatView,
        mask: Tensor | None,
        sgd: Sgd,
        *,
        prox: float = 0.0,
        corrected: bool = False,
    ):
        self.flat, self.sgd, self.prox = flat, sgd, prox
        if mask is not None and (mask.shape, mask.dtype) != (flat.theta.shape, torch.bool):
            needed = f"{tuple(flat.theta.shape)} bool in the view's layout, padding included"
            raise ValueError(f"a mask must be {needed}, not {tuple(mask.shape)} {mask.dtype}")
        stepped = mask
        if flat.buffers is not None:
            stepped = ~flat.buffers if mask is None else mask & ~flat.buffers
            mask = None if mask is None else mask | flat.buffers
        self.index = None if mask is None else mask.nonzero()[:, 0]
        self.theta = flat.theta if mask is None else flat.theta[self.index]
        few = mask is not None and len(self.index) < COMPACT_BELOW * flat.size
        self.compact = few and flat.theta.is_cpu and flat.buffers is None
        self.mask = None if self.compact else stepped
        self.momentum = torch.zeros_like(self.theta) if sgd.momentum else None
        self.stepped = [self.theta, self.momentum]  # what the optimiser works on
        if not self.compact:
            dense = self.momentum is not None and mask is not None
            self.stepped = [flat.theta, torch.zeros_like(flat.theta) if dense else self.momentum]
        self.size = flat.size if mask is None else len(self.index)
        self.anchor = torch.empty_like(self.stepped[0]) if prox else None
        self.correction = torch.zeros_like(self.stepped[0]) if corrected else None

    @property
    def state(self) -> list[Tensor]:
        """Return the tensors that a step changes in place."""
        flat = self.flat
        return [x for x in (*self.stepped, flat.compute, flat.grad) if x is not None]

    def pull_to(self, theta: Tensor) -> None:
        """Set what the proximal term of every step pulls towards (P',)."""
        self._spread(self.anchor, theta)

    def correct(self, correction: Tensor) -> None:
        """Set what every step adds to its gradient (P',)."""
        self._spread(self.correction, correction)

    def _spread(self, stepped: Tensor, entries: Tensor) -> None:
        """Bring a vector of the entries that train into the layout that the optimiser works on."""
        if self.stepped[0] is self.theta:
            stepped.copy_(entries)
        else:
            stepped[self.index] = entries

    def clear_momentum(self) -> None:
        """Zero the momentum: a step that reads it then does what a first step does."""
        if self.momentum is not None:
            self.stepped[1].zero_()

    @torch.no_grad()
    def scatter(self) -> None:
        """Bring the model, and what the optimiser works on, up to date with theta and momentum."""
        self.flat.check_places()
        if self.index is not None:
            self.flat.theta[self.index] = self.theta
            if not self.compact and self.momentum is not None:
                self.stepped[1][self.index] = self.momentum
        self.flat.refresh()

    def gather(self) -> Tensor:
        """Bring theta and momentum up to date with the view and the optimiser; returns theta."""
        if self.index is not None:
            torch.index_select(self.flat.theta, 0, self.index, out=self.theta)
            if self.momentum is not None and not self.compact:
                torch.index_select(self.stepped[1], 0, self.index, out=self.momentum)
        return self.theta

    def load(self, theta: Tensor) -> None:
        """Set `theta`, and the model with it."""
        self.theta.copy_(theta)
        self.scatter()

    def step(
        self, lr: float | Tensor, first: bool = False, grad_scale: float | Tensor = 1.0
    ) -> None:
        """Take one optimiser step from the flat gradient, which still carries `grad_scale`."""
        flat, (theta, momentum) = self.flat, self.stepped
        flat.recover_grad()
        gathers = self.index is not None and (self.compact or self.sgd.clip_norm is not None)
        entries = flat.grad[self.index] if gathers else flat.grad
        if self.compact:
            self.gather()  # the view may have been reset, or the model loaded
        sparse_sgdm_(
            theta,
            entries if self.compact else flat.grad,
            momentum,
            self.mask,
            None if self.compact else flat.compute,
            self.anchor,
            self.correction,
            lr=lr,
            momentum=self.sgd.momentum,
            weight_decay=self.sgd.weight_decay or 0.0,
            nesterov=self.sgd.nesterov,
            first=first,
            prox=self.prox,
            grad_scale=self.clipped(entries, grad_scale),
        )
        if self.compact:
            self.scatter()

    def clipped(self, grad: Tensor, grad_scale: float | Tensor = 1.0) -> float | Tensor:
        """Return what a gradient (P',) is divided by: its scale, with a bound on the norm times
        what brings the norm down to that."""
        bound = self.sgd.clip_norm
        return grad_scale if bound is None else clip_divisor(grad, bound, grad_scale)


@torch.no_grad()
def clip_divisor(grad: Tensor, bound: float, grad_scale: float | Tensor = 1.0) -> Tensor:
    """Return the scalar that takes the scale off a gradient and its norm down to a bound.

    It is grad_scale / min(1, bound / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it, and
    the scale itself, to the bit, where the norm is smaller. Nothing waits for the device. The
    norm is summed in fp64: in fp32 that of 21.7 million entries was 0.1 % short on a CPU.

    Args:
        grad: (P,) in any floating dtype, times `grad_scale`.
        bound: largest L2 norm.

    Returns:
        fp32; Inf or NaN where the gradient holds one.
    """
    parts = grad.split(CHUNK if grad.is_cpu else max(1, grad.numel()))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    norm = torch.linalg.vector_norm(torch.stack(norms)) / grad_scale
    return (grad_scale * ((norm + 1e-6) / bound).clamp(min=1.0)).float()
