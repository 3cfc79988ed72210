"""What a client does in a round: its local steps, one client after the other or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import fedavg
import head
import model as vit
from centralized import Schedule
from federated import cohort
from federated.client_states import Scaffold, Term
from sparse_sgdm import sparse_sgdm_

if TYPE_CHECKING:
    from training.learner import Learner


class LocalSteps(NamedTuple):
    """A client's steps in a round."""

    J: Annotated[int, "local steps a round", ">= 1", "--J --local-steps"] = 4
    batch_size: Annotated[
        int | str | None,
        "images a step; full: all of a client's, which with --J 1 is FedSGD",
        ">= 1 or full",
        "--batch-size --B",
    ] = None


class Clients:
    """What clients do: each starts from theta and takes its local steps.

    Args:
        shards: each client's indices into the training images.
        schedule: learning rate over `rounds`.
        straggler_fraction: share of the clients that take fewer steps in a round.
        terms: what is a client's own; entered in this order, left in reverse.
        cuda_graph: "auto", "on" or "off".
    """

    def __init__(
        self,
        learner: Learner,
        shards: Sequence[np.ndarray],
        steps: LocalSteps,
        schedule: Schedule,
        rounds: int,
        *,
        straggler_fraction: float = 0.0,
        terms: Sequence[Term] = (),
        cuda_graph: str = "auto",
    ):
        self.learner, self.shards, self.steps = learner, shards, steps
        self.schedule, self.rounds, self.terms = schedule, rounds, terms
        self.straggler_fraction, self.sgd = straggler_fraction, learner.entries.sgd
        self.seed = learner.workspace.source.seed
        full = steps.batch_size == "full"
        obstacle = "--batch-size full makes batches of many sizes" if full else None
        self.graphed = learner.graphed(learner.local_step, cuda_graph, obstacle)

    def __call__(
        self, theta: Tensor, clients: np.ndarray, round: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what each of these clients makes of theta (P,), and its losses (steps,)."""
        for client in map(int, clients):
            theta_k, losses = self.train_client(theta, client, round)
            yield self.leave(theta_k, theta, client, round, losses), losses

    def train_client(self, theta: Tensor, client: int, round: int) -> tuple[Tensor, Tensor]:
        """Take a client's local steps on the learner's parameters."""
        learner, entries, lr = self.learner, self.learner.entries, self.lr(round)
        device = entries.theta.device
        batches = self.batches(client, round).to(device, non_blocking=True)
        start = self.enter(theta.to(device), client)

        def walk(loss_scale: float) -> Tensor:
            entries.load(start)
            if self.graphed is not None:
                entries.clear_momentum()
                steps = [self.graphed(draws=d, lr=lr, loss_scale=loss_scale) for d in batches]
                return torch.stack(steps)
            losses = []
            for j, batch in enumerate(batches):
                losses.append(learner.backward(batch, loss_scale))
                entries.step(lr, first=j == 0, grad_scale=loss_scale)
            return torch.stack(losses)

        losses, _ = learner.loss_scale.attempt(walk, learner.overflowed)  # fp16 alone walks twice
        return entries.gather().to(theta.device), losses.to(theta.device)

    def enter(self, theta: Tensor, client: int) -> Tensor:
        """Set up what is the client's own; returns where it starts (P,)."""
        for term in self.terms:
            theta = term.enter(theta, client)
        return theta

    def leave(
        self, theta_k: Tensor, theta: Tensor, client: int, round: int, losses: Tensor
    ) -> Tensor:
        """Let the client keep what is its own; returns what it sends (P,).

        Raises:
            ClientError: a loss is not finite, or a state leaves the fixed point's range.
        """
        if not self.terms:
            return theta_k
        fedavg.check_losses(round, client, losses)
        rate = self.lr(round) * self.effort(client, round)
        try:
            for term in reversed(self.terms):
                theta_k = term.leave(theta_k, theta, client, rate)
        except ValueError as error:
            raise fedavg.ClientError(f"round {round}: {error}; try another --lr") from None
        return theta_k

    def lr(self, round: int) -> float:
        """Return the round's client learning rate."""
        return self.schedule.at(round - 1, total=self.rounds, lr=self.sgd.lr)

    def local_steps(self, client: int, round: int) -> int:
        """Return how many local steps a client takes in a round: J, of a straggler fewer."""
        slow = self.straggler_fraction
        return cohort.local_steps(self.steps.J, slow, seed=self.seed, round=round, client=client)

    def effort(self, client: int, round: int) -> float:
        """Return the sum of the weights of a client's local steps in its change."""
        steps = self.local_steps(int(client), round)
        return cohort.step_weight_sum(steps, self.sgd.momentum, self.sgd.nesterov)

    def batches(self, client: int, round: int) -> Tensor:
        """Draw the batches of the client's local steps: (steps, B, 4 + R)."""
        shard, size = self.shards[client], self.steps.batch_size
        return data.draw_batches(
            shard,
            len(shard) if size == "full" else size,
            self.local_steps(client, round),
            seed=self.seed,
            round=round,
            client=client,
            keep=self.learner.seen_patches,
        )


class HeadsTogether(Clients):
    """The same where the head alone trains, and all take equal steps: at once, on features."""

    def __call__(
        self, theta: Tensor, clients: np.ndarray, round: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what each of these clients makes of theta (P,), and its losses (steps,)."""
        if not len(clients):
            return
        learner, entries, flat = self.learner, self.learner.entries, self.learner.flat
        device = entries.theta.device
        theta_k = theta.to(device).repeat(len(clients), 1)  # (m, P)
        grad, lr = torch.zeros_like(theta_k), self.lr(round)
        momentum = torch.empty_like(theta_k) if self.sgd.momentum else None
        anchor = theta_k.clone() if entries.prox else None
        scaffold = next((term for term in self.terms if isinstance(term, Scaffold)), None)
        correction = None
        if scaffold is not None:
            correction = torch.stack([scaffold.correction(int(k)) for k in clients])

        def step(j: int) -> None:
            if self.sgd.clip_norm is not None:  # each client's, by a norm that knows no other
                grad.div_(torch.stack([entries.clipped(row) for row in grad])[:, None])
            sparse_sgdm_(
                theta_k.view(-1),
                grad.view(-1),
                momentum if momentum is None else momentum.view(-1),
                anchor=anchor if anchor is None else anchor.view(-1),
                correction=correction if correction is None else correction.view(-1),
                lr=lr,
                momentum=self.sgd.momentum,
                weight_decay=self.sgd.weight_decay or 0.0,
                nesterov=self.sgd.nesterov,
                first=j == 0,
                prox=entries.prox,
            )

        indices = [self.batches(int(k), round)[..., 0] for k in clients]
        losses = head.train_heads(
            *(flat.view(theta_k, name) for name in vit.HEAD),
            learner.inputs["train"],
            learner.labels["train"],
            torch.stack(indices).to(device),
            step,
            *(flat.view(grad, name) for name in vit.HEAD),
        )
        theta_k, losses = theta_k.to(theta.device), losses.to(theta.device)
        for client, row, client_losses in zip(map(int, clients), theta_k, losses, strict=True):
            yield self.leave(row, theta, client, round, client_losses), client_losses


def trains_together(
    train: str, steps: LocalSteps, straggler_fraction: float = 0.0, fedir: bool = False
) -> bool:
    """Tell whether a round's clients train at once: heads do, if all take equal steps."""
    return train == "head" and not (straggler_fraction or fedir or steps.batch_size == "full")
