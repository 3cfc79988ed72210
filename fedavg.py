"""FedAvg over flat tensors: sample clients, let each take local steps, add up what they changed.

    theta <- theta + server_lr * sum over sampled k of p_k (theta_k - theta),   p_k = n_k / sum of n
Source: McMahan 2017, arXiv:1602.05629, algorithm 1, with J local steps in place of epochs.

The sum is kept in int64, in units of 2^-48: integer addition is associative, so the result does not
depend, to the bit, on the order of clients or on how they are spread over processes.

    import torch; from fedavg import FedAvg
    theta, targets = torch.zeros(3), torch.eye(3)
    def train(client, round):  # one local step on |theta - target|^2 / 2
        theta.add_(targets[client] - theta, alpha=0.5); return torch.zeros(1)
    federation = FedAvg(theta, [10, 20, 30], train, fraction=1.0)
    while (record := federation.advance()) is None: pass  # one client a call, the record at the end
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FIXED_POINT = 2.0**48  # units per 1.0 of the int64 totals
LIMIT = 2.0**14  # largest change of a parameter in one round: far from overflow, far above sense
CHUNK = 65_536  # elements; keeps the temporaries of a CPU in cache


class ClientError(ValueError):
    """A client's result cannot be used; the message names round, client and what is wrong."""


def sample_clients(clients: int, fraction: float, *, seed: int, round: int) -> np.ndarray:
    """Draw the round's max(1, round(fraction * clients)) distinct clients: (m,) int64."""
    key = [seed, zlib.crc32(b"clients")]
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, round, 0]))
    return generator.choice(clients, max(1, int(fraction * clients + 0.5)), replace=False)


@torch.no_grad()
def add_delta_(total: Tensor, theta: Tensor, start: Tensor, weight: float) -> Tensor:
    """Add weight * (theta - start) to the fixed-point `total` in place.

    Args:
        total: (P,) int64 in units of 1 / FIXED_POINT.
        theta, start: (P,) the client's result and what it started from.
        weight: p_k, in [0, 1].

    Returns:
        The largest absolute change as a scalar tensor; a result outside LIMIT, NaN included, means
        that `total` is no longer valid.
    """
    chunk = CHUNK if theta.device.type == "cpu" else max(theta.numel(), 1)
    largest = []
    for at in range(0, theta.numel(), chunk):
        part = slice(at, at + chunk)
        delta = theta[part] - start[part]
        largest.append(torch.linalg.vector_norm(delta, math.inf))
        total[part] += delta.double().mul_(weight * FIXED_POINT).round_().to(torch.int64)
    return torch.stack(largest).max()


@torch.no_grad()
def apply_total_(theta: Tensor, total: Tensor, server_lr: float = 1.0) -> None:
    """Move `theta` by server_lr times the fixed-point total, in place."""
    theta.copy_(total.double().mul_(server_lr / FIXED_POINT).add_(theta))


def local_sgd(
    batches: Iterable,
    loss_of: Callable[..., Tensor],
    grad: Tensor,
    step: Callable[[int], None],
    loss_scale: float = 1.0,
) -> Tensor:
    """Take one optimiser step per batch.

    Args:
        batches: the J batches of the local steps, each handed to `loss_of`.
        grad: the flat gradient that backward adds into; zeroed before each step.
        step: callable of the local step 0..J-1; updates the parameters from `grad`.
        loss_scale: factor on the loss before backward; `step` has to undo it.

    Returns:
        (J,) losses, each before its step.
    """
    losses = []
    for j, batch in enumerate(batches):
        grad.zero_()
        loss = loss_of(batch)
        (loss if loss_scale == 1.0 else loss * loss_scale).backward()
        step(j)
        losses.append(loss.detach())
    return torch.stack(losses)


class LossScale:
    """The loss scale of half-precision training: fixed within a round, adapted between rounds.

    A client that overflows is trained again at half the scale, whatever the others did, so neither
    order nor process matters. `state` (3,) float64 is all there is to save: the scale, the lowest
    that this round needed, and the rounds since the last change.
    """

    def __init__(self, start: float = 2.0**14, patience: int = 200):
        self.patience = patience
        self.state = torch.tensor([start, start, 0.0], dtype=torch.float64)

    @property
    def active(self) -> bool:
        """Whether losses are scaled at all."""
        return self.state[0].item() > 1.0

    def attempt(
        self, train: Callable[[float], Tensor], overflowed: Callable[[], bool]
    ) -> tuple[Tensor, float]:
        """Return train(scale) and scale: the round's, halved until it does not overflow."""
        scale = self.state[0].item()
        while True:
            result = train(scale)
            if scale <= 1.0 or not overflowed():
                self.state[1] = min(self.state[1].item(), scale)
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


class FedAvg:
    """The federated loop, one client per call of `advance`, so that it can stop and save anywhere.

    Args:
        theta: (P,) the live parameters that local training mutates; holds the start on entry.
        shard_sizes: samples per client; the weights of the average.
        train_client: (client, round) -> (J,) losses; trains `theta` in place from where it stands.
        fraction: share C of the clients that take part in a round, in (0, 1].
        server_lr: factor on the averaged change.
        value_bytes: bytes one client sends, and receives, per round.
        on_reset: called after `theta` was overwritten, to bring copies of it up to date.
        on_round_end: called when all clients of a round are in.
        train_clients: optional (theta_global, clients, round) -> iterable of (theta_k, losses), for
            clients that are trained together; replaces `train_client`.
        tensors: further state by name that training mutates (a loss scale); saved and restored.

    Raises:
        ValueError: an option outside its range.
        ClientError: a client's loss or update is not finite, or beyond the fixed-point range.
    """

    def __init__(
        self,
        theta: Tensor,
        shard_sizes: Sequence[int],
        train_client: Callable[[int, int], Tensor] | None = None,
        *,
        fraction: float = 0.1,
        seed: int = 0,
        server_lr: float = 1.0,
        value_bytes: int = 0,
        on_reset: Callable[[], None] = lambda: None,
        on_round_end: Callable[[], None] = lambda: None,
        train_clients: Callable | None = None,
        tensors: dict[str, Tensor] | None = None,
    ):
        if not 0 < fraction <= 1:
            raise ValueError(f"the client fraction must lie in (0, 1], not {fraction}")
        self.theta, self.theta_global = theta, theta.clone()
        self.total = torch.zeros(theta.shape, dtype=torch.int64, device=theta.device)
        self.shard_sizes, self.fraction, self.seed = shard_sizes, fraction, seed
        self.server_lr, self.value_bytes, self.on_reset = server_lr, value_bytes, on_reset
        self.on_round_end = on_round_end
        self.train_client, self.tensors = train_client, tensors or {}
        self.train_clients = train_clients or self._one_by_one
        self.round, self.done, self.losses, self.seconds = 0, 0, [], 0.0
        self._results = None

    def _one_by_one(self, theta_global: Tensor, clients: Sequence[int], round: int):
        for client in clients:
            self.theta.copy_(theta_global)
            self.on_reset()
            yield self.theta, self.train_client(int(client), round)

    def advance(self) -> dict | None:
        """Train the next client; returns the round's record after its last client, else None."""
        started = time.perf_counter()
        round = self.round + 1
        clients = sample_clients(len(self.shard_sizes), self.fraction, seed=self.seed, round=round)
        if self._results is None:
            rest = clients[self.done :]
            self._results = iter(self.train_clients(self.theta_global, rest, round))
        sizes = [int(self.shard_sizes[k]) for k in clients]
        theta_k, losses = next(self._results)
        weight = sizes[self.done] / sum(sizes)
        largest = add_delta_(self.total, theta_k, self.theta_global, weight)
        check_client(round, int(clients[self.done]), losses, largest)
        self.losses.append(losses.double().mean().item())
        self.done += 1
        record = self._finish_round(clients, sizes) if self.done == len(clients) else None
        self.seconds += time.perf_counter() - started
        if record is not None:
            record["seconds"] = round_seconds(self.seconds)
            self.seconds = 0.0
        return record

    def _finish_round(self, clients: np.ndarray, sizes: list[int]) -> dict:
        apply_total_(self.theta_global, self.total, self.server_lr)
        self.on_round_end()
        self.theta.copy_(self.theta_global)
        self.on_reset()
        weighted = [n * loss for n, loss in zip(sizes, self.losses, strict=True)]
        self.round += 1
        record = {
            "round": self.round,
            "train_loss": math.fsum(weighted) / sum(sizes),
            "seconds": 0.0,
            "bytes_up": self.value_bytes * len(clients),
            "bytes_down": self.value_bytes * len(clients),
            "clients": [int(k) for k in clients],
        }
        self.total.zero_()
        self.done, self.losses, self._results = 0, [], None
        return record

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on, a round in hand included."""
        state = {"theta": self.theta_global, "round": self.round, "done": self.done}
        state["tensors"] = dict(self.tensors)
        if self.done:
            state |= {"total": self.total, "losses": list(self.losses), "seconds": self.seconds}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer, to the same bits."""
        self.theta_global.copy_(state["theta"])
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        self.theta.copy_(self.theta_global)
        self.on_reset()
        self.round, self.done, self._results = state["round"], state["done"], None
        self.losses, self.seconds = list(state.get("losses", [])), state.get("seconds", 0.0)
        self.total.zero_()
        if self.done:
            self.total.copy_(state["total"])


def check_client(round: int, client: int, losses: Tensor, largest: Tensor) -> None:
    """Raise ClientError if a client's losses or its largest change cannot be used."""
    finite = torch.isfinite(losses).tolist()
    if not all(finite):
        step = finite.index(False)
        raise ClientError(
            f"round {round}, client {client}, local step {step + 1}: the loss is "
            f"{losses[step].item()}; try a lower --lr"
        )
    if not largest.item() < LIMIT:
        raise ClientError(
            f"round {round}, client {client}: its update is {largest.item()} at its largest, "
            f"beyond the fixed-point range of {LIMIT:g}; try a lower --lr"
        )


def round_seconds(seconds: float) -> float:
    """Round a duration to the tenth of a millisecond, for the log."""
    return float(f"{seconds:.4f}")
