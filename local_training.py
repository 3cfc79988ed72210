"""What a client does in a round: its local steps, one client after the other or all at once.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import data
import fedavg
import head
from centralized import learning_rate
from learner import Learner
from workspace import HEAD


class ClientTraining:
    """The local training of clients: one after the other on images, all at once on features."""

    def __init__(self, learner: Learner, shards: list[np.ndarray]):
        self.learner, self.shards, self.options = learner, shards, learner.options

    def lr(self, round: int) -> float:
        """Return the round's client learning rate."""
        options = self.options
        schedule = dict(total=options.rounds, lr=options.lr, warmup=options.warmup)
        return learning_rate(options.schedule, round - 1, **schedule)

    def draws(self, client: int, round: int) -> Tensor:
        """Draw the client's J batches: (J, B, 4 + R)."""
        o, where = self.options, dict(round=round, client=int(client), keep=self.learner.kept)
        return data.draw_batches(self.shards[client], o.batch_size, o.J, seed=o.seed, **where)

    def one(self, client: int, round: int) -> Tensor:
        """Take the client's J local steps on the learner's parameters; returns the (J,) losses."""
        learner, entries, lr = self.learner, self.learner.entries, self.lr(round)
        draws = self.draws(client, round).to(entries.theta.device, non_blocking=True)
        start = entries.theta.clone() if learner.loss_scale.active else None
        entries.start()

        def attempt(scale: float) -> Tensor:
            if start is not None:
                entries.load(start)

            def step(j: int) -> None:
                entries.step(lr, first=j == 0, loss_scale=scale)

            return fedavg.local_sgd(draws, learner.loss, learner.flat.grad, step, scale)

        losses, _ = learner.loss_scale.attempt(attempt, learner.overflowed)
        entries.gather()
        return losses

    def heads(self, theta_global: Tensor, clients: np.ndarray, round: int) -> Iterator:
        """Train the heads of all `clients` together on features; yields each (theta_k, losses)."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        theta = theta_global.repeat(len(clients), 1)  # (m, P)
        grad = torch.zeros_like(theta)
        momentum = torch.empty_like(theta) if self.options.momentum else None
        flattened = [x if x is None else x.view(-1) for x in (theta, grad, momentum)]
        if self.options.prox:
            flattened += [None, None, theta.clone().view(-1)]

        def step(j: int) -> None:
            learner.entries.step_flat(*flattened, lr=lr, first=j == 0)

        indices = torch.stack([self.draws(k, round)[..., 0] for k in clients]).to(theta.device)
        losses = head.train_heads(
            *(flat.view(theta, name) for name in HEAD),
            learner.inputs["train"],
            learner.labels["train"],
            indices,
            step,
            *(flat.view(grad, name) for name in HEAD),
        )
        yield from zip(theta, losses, strict=True)
