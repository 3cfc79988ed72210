"""Centralised training, one batch per call, and the learning-rate schedules.

Source: SGD with momentum; cosine decay of Loshchilov 2017 (arXiv:1608.03983) without restarts.

    from centralized import learning_rate
    [learning_rate("cosine", t, total=10, lr=0.1, warmup=2) for t in range(10)]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

SCHEDULES = ("constant", "step", "exponential", "cosine")
DECAYS = {"step": 0.1, "exponential": 0.01}  # of one step, of the whole decay


def learning_rate(
    schedule: str,
    at: float,
    *,
    total: float,
    lr: float,
    warmup: float = 0,
    decay: float | None = None,
) -> float:
    """Return the learning rate at time `at` of `total` (rounds or epochs, fractions allowed).

    Linear from lr / (warmup + 1) over the first `warmup`; then, with p from 0 to 1 over the rest,
    constant; "step": times `decay` at p = 1/2 and at 3/4; "exponential": decay^p; "cosine" to zero.

    Args:
        decay: None: DECAYS.

    Raises:
        ValueError: unknown schedule, or a warm-up that is negative or as long as the run.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
    if warmup and not 0 <= warmup < total:
        raise ValueError(
            f"the warm-up ({warmup}) must be at least 0 and shorter than the run ({total})"
        )
    if at < warmup:
        return lr * (at + 1) / (warmup + 1)
    p = (at - warmup) / (total - warmup) if total > warmup else 0.0
    decay = DECAYS.get(schedule) if decay is None else decay
    if schedule == "step":
        return lr * (1.0 if p < 0.5 else decay if p < 0.75 else float(Fraction(str(decay)) ** 2))
    if schedule == "exponential":
        return lr * decay**p
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * min(p, 1.0)))
    return lr


class Schedule(NamedTuple):
    """How the learning rate goes on."""

    schedule: Annotated[str, "learning rate over the run", SCHEDULES] = "constant"
    warmup: Annotated[float, "rounds or epochs of linear warm-up", ">= 0"] = 0
    decay: Annotated[
        float | None,
        "step: factor on the rate at half and at three quarters of the run; exponential: factor "
        "that it ends at [step 0.1, exponential 0.01]",
        "0 < x <= 1",
    ] = None

    def at(self, at: float, *, total: float, lr: float) -> float:
        """Return the learning rate at a time, as `learning_rate` does."""
        schedule, warmup, decay = self
        return learning_rate(schedule, at, total=total, lr=lr, warmup=warmup, decay=decay)


class Epochs(NamedTuple):
    """How long central training goes on."""

    epochs: Annotated[int | None, "passes over the data", ">= 1"] = None
    batch_size: Annotated[int | None, "images a step", ">= 1", "--batch-size --B"] = None
    eval_every: Annotated[
        int | float | None,
        "epochs between evaluations; below 1 a share: 0.1 evaluates ten times an epoch [a 20th of "
        "the run; further apart where they would cost a tenth of its time]",
        ">= 1 or share",
    ] = None


class Diverged(ValueError):
    """A loss is not finite; the message names epoch and step."""


class Centralized:
    """The centralised loop: `advance` trains one batch; an epoch's last call returns a record.

    A record holds the epochs so far, and loss and seconds since the record before.

    Args:
        draw: epoch (from 0) -> (steps, B, ...) tensor of the epoch's batches.
        train_batch: (batch, time in epochs) -> scalar loss tensor; steps the parameters.
        tensors: name -> tensor that training mutates (theta, momentum); saved and restored.
        on_load: called after the tensors were overwritten.
        every: below 1, a record also after each batch that reaches a multiple of this share of its
            epoch.

    Raises:
        Diverged: a loss is not finite.
    """

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        train_batch: Callable[[Tensor, float], Tensor],
        tensors: dict[str, Tensor],
        on_load: Callable[[], None] = lambda: None,
        every: float = 1,
    ):
        self.draw, self.train_batch, self.tensors = draw, train_batch, tensors
        self.on_load, self.every = on_load, Fraction(str(every))  # 0.1 is a tenth, exactly
        self.whole, self.step = 0, 0  # epochs that are complete, batches of the next one
        self.losses, self.seconds = [], 0.0  # since the last record
        self._drawn = None

    @property
    def epoch(self) -> int | float:
        """Return how many epochs have been trained, to the millionth where one is in hand."""
        if not self.step:
            return self.whole
        share = min(self.step / len(self._batches()), 0.999999)  # an epoch ends with its last batch
        return round(self.whole + share, 6)

    def _batches(self) -> Tensor:
        if self._drawn is None:
            self._drawn = self.draw(self.whole)
        return self._drawn

    def advance(self) -> dict | None:
        """Train the next batch; returns a record where one is due, else None."""
        started = time.perf_counter()
        batches, at = self._batches(), self.whole + self.step / len(self._batches())
        self.losses.append(self.train_batch(batches[self.step], at))
        self.step += 1
        self.seconds += time.perf_counter() - started
        if not self._due():
            return None
        losses = self._checked_losses()
        if self.step == len(batches):
            self.whole, self.step, self._drawn = self.whole + 1, 0, None
        record = {
            "epoch": self.epoch,
            "train_loss": math.fsum(losses) / len(losses),
            "seconds": float(f"{self.seconds:.4f}"),
        }
        self.losses, self.seconds = [], 0.0
        return record

    def _due(self) -> bool:
        """Tell whether the batch just trained ends its epoch or reaches a multiple of `every`."""
        steps = len(self._batches())
        before, now = ((step // (self.every * steps)) for step in (self.step - 1, self.step))
        return self.step == steps or now > before

    def _checked_losses(self) -> list[float]:
        """Bring the losses to the CPU, in one transfer, and refuse those of a divergence."""
        fresh = [loss for loss in self.losses if isinstance(loss, Tensor)]
        earlier = self.losses[: len(self.losses) - len(fresh)]
        self.losses = earlier + (torch.stack(fresh).tolist() if fresh else [])
        for step, loss in enumerate(self.losses, self.step - len(self.losses) + 1):
            if not math.isfinite(loss):
                raise Diverged(
                    f"epoch {self.whole + 1}, step {step}: the loss is {loss}; try a lower --lr"
                )
        return list(self.losses)

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on; refuses to save a diverged state."""
        state = {"epoch": self.epoch, "whole": self.whole, "step": self.step}
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        state |= {"seconds": self.seconds, "tensors": tensors}
        return state | {"losses": self._checked_losses()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer, to the same bits."""
        self.whole = state.get("whole", int(state["epoch"]))  # older states have the epoch alone
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self._drawn = list(state["losses"]), None
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        self.on_load()
