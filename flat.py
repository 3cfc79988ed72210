"""The entries that train, whether all of a flat view or those of a mask, and their step.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import model as vit
from sparse_sgdm import sparse_sgdm_

CHUNK = 262_144  # elements whose norm a CPU takes at once
COMPACT_BELOW = 0.7  # density below which a CPU steps the unmasked entries alone (bench_compact.py)


class Entries:
    """The entries of a flat view that train, as one vector: all of them, or those of a mask.

    Rounds, checkpoints and messages know `theta` and `momentum` alone. On a CPU, below a density of
    COMPACT_BELOW, so does the optimiser; elsewhere the fused kernel steps the whole view under the
    mask. The bits are the same.

    Args:
        kept: (P,) bool in the layout of the view, or None.
    """

    def __init__(self, flat: vit.FlatView, kept: Tensor | None, options: argparse.Namespace):
        self.flat, self.options = flat, options
        self.index = None if kept is None else kept.nonzero()[:, 0]
        self.theta = flat.theta if kept is None else flat.theta[self.index]
        few = kept is not None and len(self.index) < COMPACT_BELOW * flat.size
        self.compact = few and flat.theta.is_cpu
        self.kept = None if self.compact else kept
        self.momentum = torch.zeros_like(self.theta) if options.momentum else None
        self.stepped = [self.theta, self.momentum]  # what the optimiser works on
        if not self.compact:
            dense = self.momentum is not None and kept is not None
            self.stepped = [flat.theta, torch.zeros_like(flat.theta) if dense else self.momentum]
        self.size = flat.size if kept is None else len(self.index)
        prox = getattr(options, "prox", 0.0)
        self.anchor = torch.empty_like(self.stepped[0]) if prox else None
        scaffold = getattr(options, "scaffold", False)
        self.correction = torch.zeros_like(self.stepped[0]) if scaffold else None

    def clipped(self, grad: Tensor, loss_scale: float | Tensor = 1.0) -> float | Tensor:
        """Return what a gradient (P',) of the entries that train is divided by: the loss scale,
        with --clip-norm times what brings the norm down to that."""
        bound = self.options.clip_norm
        return loss_scale if bound is None else clip_divisor(grad, bound, loss_scale)

    @property
    def state(self) -> list[Tensor]:
        """Return the tensors that a step changes in place."""
        flat = self.flat
        return [x for x in (*self.stepped, flat.compute, flat.grad) if x is not None]

    def start(self) -> None:
        """Note where a client starts: the proximal term pulls back to it."""
        if self.anchor is not None:
            self.anchor.copy_(self.stepped[0])

    def correct(self, correction: Tensor) -> None:
        """Set what every step adds to its gradient: one value per entry that trains."""
        if self.stepped[0] is self.theta:
            self.correction.copy_(correction)
        else:
            self.correction[self.index] = correction

    def clear_momentum(self) -> None:
        """Zero the momentum: a step that reads it then does what a first step does."""
        if self.momentum is not None:
            self.stepped[1].zero_()

    @torch.no_grad()
    def scatter(self) -> None:
        """Bring the model, and what the optimiser works on, up to date with theta and momentum."""
        if self.index is not None:
            self.flat.theta[self.index] = self.theta
            if not self.compact and self.momentum is not None:
                self.stepped[1][self.index] = self.momentum
        self.flat.refresh()

    def gather(self) -> None:
        """Bring theta and momentum up to date with what the optimiser worked on."""
        if self.index is not None and not self.compact:
            for own, stepped in zip((self.theta, self.momentum), self.stepped, strict=True):
                if own is not None:
                    torch.index_select(stepped, 0, self.index, out=own)

    def load(self, theta: Tensor) -> None:
        """Set `theta`, and the model with it."""
        self.theta.copy_(theta)
        self.scatter()

    def step(
        self, lr: float | Tensor, first: bool = False, loss_scale: float | Tensor = 1.0
    ) -> None:
        """Take one optimiser step from the flat gradient."""
        flat, (theta, momentum) = self.flat, self.stepped
        gathers = self.index is not None and (self.compact or self.options.clip_norm is not None)
        grad = flat.grad[self.index] if gathers else flat.grad
        changing = dict(lr=lr, first=first, grad_scale=self.clipped(grad, loss_scale))
        if self.compact:
            terms = None, None, self.anchor, self.correction
            self.step_flat(theta, grad, momentum, *terms, **changing)
            self.scatter()
        else:
            terms = self.kept, flat.compute, self.anchor, self.correction
            self.step_flat(theta, flat.grad, momentum, *terms, **changing)

    def step_flat(self, *tensors: Tensor | None, **changing) -> None:
        """Call `sparse_sgdm_` with the run's constants."""
        options = self.options
        constants = dict(momentum=options.momentum, weight_decay=options.weight_decay)
        constants["prox"] = getattr(options, "prox", 0.0)  # of fedavg alone
        sparse_sgdm_(*tensors, nesterov=options.nesterov, **constants, **changing)


@torch.no_grad()
def clip_divisor(grad: Tensor, bound: float, loss_scale: float | Tensor = 1.0) -> Tensor:
    """Return the scalar that takes the loss scale off a gradient and its norm down to a bound.

    It is loss_scale / min(1, bound / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it, and
    the loss scale itself, to the bit, where the norm is smaller. Nothing waits for the device. The
    norm is summed in fp64: in fp32 that of 21.7 million entries was 0.1 % short on a CPU.

    Args:
        grad: (P,) in any floating dtype, times `loss_scale`.
        bound: largest L2 norm.

    Returns:
        fp32; Inf or NaN where the gradient holds one.
    """
    parts = grad.split(CHUNK if grad.is_cpu else max(1, grad.numel()))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    norm = torch.linalg.vector_norm(torch.stack(norms)) / loss_scale
    return (loss_scale * ((norm + 1e-6) / bound).clamp(min=1.0)).float()
