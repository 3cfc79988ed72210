"""What a client does in a round: its local steps, one client after the other or all at once.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import data
import fedavg
import head
import participation
from centralized import learning_rate
from client_states import ClientStates, LocalEntries, Scaffold
from learner import Learner
from workspace import HEAD


def train_together(options: argparse.Namespace) -> bool:
    """Tell whether a round's clients train at once: heads do, if all take equal steps."""
    o = options
    alike = not (o.straggler_fraction or o.fedir or o.batch_size == "full")
    return o.train == "head" and alike


class ClientTraining:
    """The local training of clients, with what they keep from round to round.

    Args:
        store: (name, bytes of one client's state) -> keyword arguments of ClientStates: where the
            clients' states lie.
    """

    def __init__(
        self,
        learner: Learner,
        shards: list[np.ndarray],
        store: Callable[[str, int], dict] = lambda name, each: {},
    ):
        self.learner, self.shards, self.options = learner, shards, learner.options
        entries, options = learner.entries, self.options
        self.graphed = learner.graphed(learner.local_step)
        self.states: dict[str, ClientStates] = {}
        self.scaffold = self.local = None
        self.own_entries: Tensor | None = None  # of the client that trained last, with --local-norm
        if options.scaffold:
            kept = store("scaffold", entries.theta.nbytes)
            zeros = torch.zeros_like(entries.theta)
            self.scaffold = self.states["scaffold"] = Scaffold(zeros, len(shards), **kept)
        if options.local_norm:
            at = local_entries(learner)
            kept = store("local_norm", len(at) * entries.theta.itemsize)
            self.local = LocalEntries(entries.theta, at, len(shards), **kept)
            self.states["local_norm"] = self.local
        if options.fedir:
            learner.class_weights = torch.ones(
                learner.workspace.classes, device=entries.theta.device
            )

    def lr(self, round: int) -> float:
        """Return the round's client learning rate."""
        options = self.options
        schedule = dict(total=options.rounds, lr=options.lr, warmup=options.warmup)
        return learning_rate(options.schedule, round - 1, **schedule)

    def steps(self, client: int, round: int) -> int:
        """Return how many local steps a client takes in a round: J, of a straggler fewer."""
        o, where = self.options, dict(round=round, client=int(client))
        return participation.local_steps(o.J, o.straggler_fraction, seed=o.seed, **where)

    def effort(self, client: int, round: int) -> float:
        """Return the sum of the weights of a client's local steps in its change."""
        o = self.options
        return fedavg.step_weight_sum(self.steps(client, round), o.momentum, o.nesterov)

    def draws(self, client: int, round: int) -> Tensor:
        """Draw the batches of the client's local steps: (steps, B, 4 + R)."""
        o, shard, steps = self.options, self.shards[client], self.steps(client, round)
        size = len(shard) if o.batch_size == "full" else o.batch_size
        where = dict(seed=o.seed, round=round, client=int(client), keep=self.learner.kept)
        return data.draw_batches(shard, size, steps, **where)

    def one(self, client: int, round: int) -> Tensor:
        """Take the client's local steps on the learner's parameters; returns their losses."""
        learner, entries, lr = self.learner, self.learner.entries, self.lr(round)
        draws = self.draws(client, round).to(entries.theta.device, non_blocking=True)
        self._enter(client)
        start = entries.theta.clone() if learner.loss_scale.active else None
        entries.start()

        def attempt(scale: float) -> Tensor:
            if start is not None:
                entries.load(start)
            if self.graphed is not None:
                entries.clear_momentum()
                return torch.stack([self.graphed(draws=d, lr=lr, loss_scale=scale) for d in draws])
            losses = []
            for j, batch in enumerate(draws):
                losses.append(learner.backward(batch, scale))
                entries.step(lr, first=j == 0, loss_scale=scale)
            return torch.stack(losses)

        losses, _ = learner.loss_scale.attempt(attempt, learner.overflowed)
        entries.gather()
        if self.local is not None:
            self.own_entries = self.local.leave_(entries.theta)
        return losses

    def _enter(self, client: int) -> None:
        """Set up what is the client's own."""
        learner, entries = self.learner, self.learner.entries
        if self.local is not None:
            self.local.enter_(entries.theta, client)
            entries.scatter()
        if self.scaffold is not None:
            entries.correct(self.scaffold.correction(client))
        if self.options.fedir:
            workspace, shard = learner.workspace, self.shards[client]
            labels = workspace.dataset.train.labels.numpy()
            everywhere, here = labels[workspace.train_index], labels[shard]
            weights = participation.importance_weights(everywhere, here, workspace.classes)
            learner.class_weights.copy_(torch.from_numpy(weights))

    def keep(self, client: int, round: int, theta_k: Tensor, theta_global: Tensor) -> None:
        """Let the client that has just trained keep what is its own.

        Raises:
            ClientError: its state would leave the fixed point's range.
        """
        try:
            if self.scaffold is not None:
                if rate := self.lr(round) * self.effort(client, round):
                    self.scaffold.update(client, theta_global, theta_k, rate)
            if self.local is not None:
                self.local.put(client, self.own_entries)
        except ValueError as error:
            rate = "higher" if self.scaffold is not None else "lower"
            raise fedavg.ClientError(f"round {round}: {error}; try a {rate} --lr") from None

    def heads(self, theta_global: Tensor, clients: np.ndarray, round: int) -> Iterator:
        """Train the heads of all `clients` together on features; yields each (theta_k, losses)."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        theta = theta_global.repeat(len(clients), 1)  # (m, P)
        grad = torch.zeros_like(theta)
        momentum = torch.empty_like(theta) if self.options.momentum else None
        anchor = theta.clone() if self.options.prox else None
        correction = None
        if self.scaffold is not None:
            correction = torch.stack([self.scaffold.correction(int(k)) for k in clients])
        tensors = theta, grad, momentum, None, None, anchor, correction
        flattened = [x if x is None else x.view(-1) for x in tensors]

        def step(j: int) -> None:
            if self.options.clip_norm is not None:  # each client's, by a norm that knows no other
                grad.div_(torch.stack([learner.entries.clipped(own) for own in grad])[:, None])
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


def local_entries(learner: Learner) -> Tensor:
    """Return which entries belong to LayerNorm parameters: (S,) int64.

    Raises:
        ValueError: none of what trains does.
    """
    flat, entries = learner.flat, learner.entries
    marked = flat.marked(name for name in flat.shapes if "norm" in name)
    at = (marked if entries.index is None else marked[entries.index]).nonzero()[:, 0]
    if not len(at):
        raise ValueError("--local-norm keeps LayerNorm parameters local, and none of them trains")
    return at
