"""The loss scale of half-precision training, without hidden state: fixed within a round.

Gradients of a loss times `scale` stay within fp16's range; the optimiser divides by it again.
Source: Micikevicius 2018, arXiv:1710.03740, with the retry of a client in place of a skipped step.

    from loss_scale import LossScale
    scale = LossScale(1024.0)
    result, used = scale.attempt(train=lambda s: s * 100.0, overflowed=lambda: False)
    scale.next_round()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LossScale:
    """The loss scale of half-precision training: fixed within a round, adapted between rounds.

    A client that overflows is trained again at half the scale, whatever the others did, so neither
    order nor process matters. `state` (3,) float64: the scale, the lowest that this round needed,
    and the rounds since the last change.
    """

    def __init__(self, start: float = 2.0**14, patience: int = 200):
        self.patience = patience
        self.state = torch.tensor([start, start, 0.0], dtype=torch.float64)

    def merge(self, group: Any) -> None:
        """Let every process of a group know the lowest scale that one of them needed."""
        if self.active:
            self.state[1] = min(group.gather(self.state[1].item()))

    @property
    def active(self) -> bool:
        """Whether losses are scaled at all."""
        return self.state[0].item() > 1.0

    def attempt(
        self, train: Callable[[float], Tensor], overflowed: Callable[[], bool]
    ) -> tuple[Tensor, float]:
        """Return train(scale) and scale: the round's, halved until nothing overflows or it is 1."""
        scale = self.state[0].item()
        while True:
            result = train(scale)
            failed = self.active and overflowed()
            if not failed:  # what fails at any scale says nothing about the scale
                self.state[1] = min(self.state[1].item(), scale)
            if not failed or scale <= 1.0:
                return result, scale
            scale /= 2

    def next_round(self) -> None:
        """Adapt the scale: down to what the round needed, doubled after `patience` quiet rounds."""
        if not self.active:
            return
        scale, lowest, quiet = self.state.tolist()
        quiet = 0.0 if lowest < scale else quiet + 1
        if quiet >= self.patience:
            lowest, quiet = min(scale * 2, 2.0**24), 0.0
        self.state[:] = torch.tensor([lowest, lowest, quiet])

    def state_dict(self) -> dict[str, Tensor]:
        """Return all there is to save."""
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s answer."""
        self.state.copy_(state["state"])
