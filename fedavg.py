"""FedAvg over flat tensors: sample clients, let each take local steps, add up what they changed.

    theta <- theta + server_lr * sum over sampled k of p_k (theta_k - theta),   p_k = n_k / sum of n
Source: McMahan 2017, arXiv:1602.05629, algorithm 1, with J local steps in place of epochs.

The sum is kept in int64, in units of 2^-48: integer addition is associative, so the result does not
depend, to the bit, on the order of clients or on how they are spread over processes. It may even be
taken of vectors hidden by pairwise masks that cancel mod 2^64 (Bonawitz 2017, doi
10.1145/3133956.3133982).

    import torch; from fedavg import FedAvg
    theta, targets = torch.zeros(3), torch.eye(3)
    def train(client, round):  # one local step on |theta - target|^2 / 2
        theta.add_(targets[client] - theta, alpha=0.5); return torch.zeros(1)
    federation = FedAvg(theta, [10, 20, 30], train, fraction=1.0)
    while (record := federation.advance()) is None: pass  # one client a call, the record at the end
"""

from __future__ import annotations

import functools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

FIXED_POINT = 2.0**48  # units per 1.0 of the int64 totals
LIMIT = 2.0**14  # largest weighted change of a parameter in one round: far above sense
CHUNK = 262_144  # elements; keeps the temporaries of a CPU in cache
NO_CLIENT = "no client took part"  # in the log


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
    chunk = max(1, min(CHUNK, theta.numel()) if theta.is_cpu else theta.numel())
    dtypes = (theta.dtype, torch.float64, torch.int64)
    buffers = [torch.empty(chunk, dtype=dtype, device=theta.device) for dtype in dtypes]
    extremes = []
    for here, before, units in zip(*(x.split(chunk) for x in (theta, start, total)), strict=True):
        delta, scaled, whole = (buffer[: len(here)] for buffer in buffers)
        torch.sub(here, before, out=delta)
        extremes.extend(torch.aminmax(delta))
        units += whole.copy_(scaled.copy_(delta).mul_(weight * FIXED_POINT).round_())
    return torch.stack(extremes).abs().max()


@torch.no_grad()
def apply_total_(
    theta: Tensor, total: Tensor, unit: float = 1 / FIXED_POINT, server_lr: float = 1.0
) -> None:
    """Move `theta` by server_lr times the fixed-point total, in place."""
    chunk = CHUNK if theta.is_cpu else max(1, theta.numel())
    for part, units in zip(theta.split(chunk), total.split(chunk), strict=True):
        part.copy_(units.double().mul_(server_lr * unit).add_(part))


def step_weight_sum(steps: int, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Return ||a||_1, the sum over local steps of how often a step's gradient enters the change.

    theta moves by -lr * sum over j of a_j g_j; without momentum every a_j is 1. Source: FedNova,
    arXiv:2007.07481, section 4.
    """
    total = 0.0
    for left in range(1, steps + 1):
        geometric = sum(momentum**i for i in range(left))
        total += 1 + momentum * geometric if nesterov else geometric
    return total


class Companion(Protocol):
    """What lives beside theta through a federated run: a loss scale, server or client state.

    One that has `bytes` is counted in the rounds' records, under state_bytes.
    """

    def merge(self, group: Any) -> None:
        """Bring a group's processes to one value; called before `state_dict` and `next_round`."""

    def next_round(self) -> None:
        """Take in the round that ends, before the server's step."""

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer."""


class _Alone:
    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        pass

    def gather(self, value: Any) -> list:
        return [value]


def conceal_(
    contribution: Tensor, client: int, clients: Sequence[int], round: int, *, seed: int = 0
) -> None:
    """Hide a client's contribution, in place, under masks that cancel in the sum over `clients`.

    Every pair of clients shares a stream of uniform 64-bit numbers, which one adds and the other
    subtracts mod 2^64: a single contribution looks uniform, and the sum is exact. Here a pair's
    stream comes from `seed`; a deployment derives it from a key agreement that the server is not
    part of, and needs secret sharing to unmask clients that drop out.

    Args:
        contribution: (P,) int64.
    """
    for other in map(int, clients):
        if other != client:
            pair = [0, min(client, other), max(client, other), round]
            stream = np.random.Philox(key=[seed, zlib.crc32(b"pairwise masks")], counter=pair)
            mask = torch.from_numpy(stream.random_raw(contribution.numel()).view(np.int64))
            contribution.add_(mask.to(contribution.device), alpha=1 if client < other else -1)


class FedAvg:
    """The federated loop, one client per call of `advance`, so that it can stop and save anywhere.

    Several processes share the sampled clients: each calls everything here at the same times, and
    trains one client of its own in each call of `advance`, or all of a quick round.

    Args:
        theta: (P,) the live parameters that local training mutates; holds the start on entry.
        shard_sizes: samples per client; the weights of the average.
        train_client: (client, round) -> (J,) losses; trains `theta` in place from where it stands.
        fraction: share C of the clients that take part in a round, in (0, 1].
        sample: optional (round) -> the distinct clients that are sent the model, in place of the
            uniform draw.
        answering: optional (clients, round) -> (m,) those of them that take part; where there are
            none the round changes nothing, unless `step_empty`.
        weigh: optional (clients, round) -> (m,) the weights p_k, in place of shares of samples.
        server_lr: factor on the averaged change, where there is no server_step.
        server_step: optional (theta, total (P,) int64, unit) that moves theta in place by a rule of
            its own; total * unit is the averaged change.
        client_bytes: what a client that takes part sends in a round, and what one that is sent the
            model receives.
        on_reset: called after `theta` was overwritten, to bring copies of it up to date.
        train_clients: optional (theta_global, clients, round) -> iterable of (theta_k, losses), for
            clients that are trained together; replaces `train_client`.
        keep: optional (client, round, theta_k, theta_global), called once a client's result is
            good: what stays with the client may change now. Raises ClientError where it cannot.
        clip: optional (theta_k, theta_global) -> factor on a client's change, in [0, 1].
        step_empty: the server takes its step, of no change, in a round without clients too.
        edit: optional (contribution (P,) int64, client, clients, round) that changes a client's
            contribution in place, before it is added; must not make an entry larger, unless it
            hides them all such that the round's sum stays what it is. May return what the client
            then sends, in place of client_bytes[0].
        apart: optional (round) -> whether the round keeps its contributions apart, (m, P) int64 by
            place in the sample, in place of their sum (1, P).
        combine: optional (contributions, weights (m,), clients, round) -> (P,) int64 that takes the
            place of their sum; must not depend on their order. A round that was saved in the
            middle is combined as it was begun.
        companions: by name, what else changes over the rounds; merged, saved and restored.
        group: the processes that share the work, with rank, size, sum_(tensor) in place and
            gather(plain value) -> list by rank; None is this process alone.
        quick: a group's processes meet once a round, in place of after every client, where the
            round before took fewer seconds than this.

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
        sample: Callable[[int], np.ndarray] | None = None,
        answering: Callable[[np.ndarray, int], np.ndarray] | None = None,
        weigh: Callable[[np.ndarray, int], Sequence[float]] | None = None,
        server_lr: float = 1.0,
        server_step: Callable[[Tensor, Tensor, float], None] | None = None,
        client_bytes: tuple[int, int] = (0, 0),
        on_reset: Callable[[], None] = lambda: None,
        train_clients: Callable | None = None,
        keep: Callable[[int, int, Tensor, Tensor], None] | None = None,
        clip: Callable[[Tensor, Tensor], float] | None = None,
        step_empty: bool = False,
        edit: Callable[[Tensor, int, np.ndarray, int], int | None] | None = None,
        apart: Callable[[int], bool] = lambda round: False,
        combine: Callable[[Tensor, np.ndarray, np.ndarray, int], Tensor] | None = None,
        companions: dict[str, Companion] | None = None,
        group: Any = None,
        quick: float = 5.0,
    ):
        if not 0 < fraction <= 1:
            raise ValueError(f"the client fraction must lie in (0, 1], not {fraction}")
        self.theta, self.theta_global = theta, theta.clone()
        self.total = self._zeros(1)  # or a row for each sampled client
        self.shard_sizes = shard_sizes
        drawn = functools.partial(sample_clients, len(shard_sizes), fraction, seed=seed)
        self.sample = sample or (lambda round: drawn(round=round))
        self.answering = answering or (lambda clients, round: clients)
        self.weigh = weigh or self._shares
        self.client_bytes, self.on_reset = client_bytes, on_reset
        self.server_step = server_step or functools.partial(apply_total_, server_lr=server_lr)
        self.train_client, self.edit = train_client, edit
        self.apart, self.combine = apart, combine or (lambda rows, *_: add_up(rows))
        self.keep = keep or (lambda *result: None)
        self.clip, self.step_empty = clip, step_empty
        self.companions = companions or {}
        self.train_clients = train_clients or self._one_by_one
        self.group = group or _Alone()
        self.round, self.seconds = 0, 0.0
        self.quick, self._meet_once = quick, False
        self._sampled = self._clients = np.empty(0, np.int64)  # for the round in hand
        self.losses: dict[int, float] = {}  # by place among them
        self._sent: dict[int, int] = {}  # bytes, of those whose edit says so
        self._queue: list[list[int]] | None = None  # places still to train: one a process, a call

    def _shares(self, clients: np.ndarray, round: int) -> np.ndarray:
        held = np.array([self.shard_sizes[k] for k in clients], np.int64)
        return held / held.sum()

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self.theta.shape, dtype=torch.int64, device=self.theta.device)

    def _one_by_one(self, theta_global: Tensor, clients: Sequence[int], round: int):
        for client in clients:
            self.theta.copy_(theta_global)
            self.on_reset()
            yield self.theta, self.train_client(int(client), round)

    def _start_round(self) -> None:
        """Sample the round's clients, and deal out those that have not trained yet."""
        round, size, rank = self.round + 1, self.group.size, self.group.rank
        self._sampled = self.sample(round)
        self._clients = self.answering(self._sampled, round)
        self._weights = np.asarray(self.weigh(self._clients, round), np.float64)
        rows = len(self._clients) if self.apart(round) and len(self._clients) else 1
        if not self.losses and rows != len(self.total):
            self.total = self._zeros(rows)
        left = [i for i in range(len(self._clients)) if i not in self.losses]
        stride = len(left) if self._meet_once else size
        self._queue = [left[i : i + stride] for i in range(0, len(left), stride)] if left else []
        mine = self._clients[left[rank::size]]
        self._results = iter(self.train_clients(self.theta_global, mine, round))

    def advance(self) -> dict | None:
        """Train the next client, of several processes one each, or all of a quick round.

        Returns:
            the round's record after its last client, else None.
        """
        started = time.perf_counter()
        if self._queue is None:
            self._start_round()
        round, rank, clients = self.round + 1, self.group.rank, self._clients
        places, problem = self._queue.pop(0) if self._queue else [], None
        try:
            for place in places[rank :: self.group.size]:
                self._take_in(place, clients, round)
        except ClientError as error:
            problem = str(error)
        taken = self.seconds + time.perf_counter() - started
        known = ({}, {}) if self._queue else (self.losses, self._sent)
        told = self.group.gather((problem, taken, *known))
        problems, seconds, losses, sent = zip(*told, strict=True)
        if any(problems):
            raise ClientError(next(filter(None, problems)))
        record = None
        if not self._queue:
            record = self._finish_round(clients, _united(losses), _united(sent))
            self._meet_once = self.group.size > 1 and max(seconds) < self.quick
        self.seconds += time.perf_counter() - started
        if record is not None:
            record["seconds"] = round_seconds(self.seconds)
            self.seconds = 0.0
        return record

    def _take_in(self, place: int, clients: np.ndarray, round: int) -> None:
        """Let the next client train, and add what it changed to this process's total."""
        theta_k, losses = next(self._results)
        client, row = int(clients[place]), self.total[place % len(self.total)]
        target = row if self.edit is None else torch.zeros_like(row)
        weight = float(self._weights[place])
        weight *= self.clip(theta_k, self.theta_global) if self.clip else 1.0
        largest = add_delta_(target, theta_k, self.theta_global, weight)
        check_client(round, client, losses, largest * max(1.0, float(sum(self._weights))))
        self.keep(client, round, theta_k, self.theta_global)
        self.losses[place] = losses.double().mean().item()
        if self.edit is not None:
            sent = self.edit(target, client, clients, round)
            if sent is not None:
                self._sent[place] = sent
            row += target  # mod 2^64

    def _merge(self) -> None:
        for companion in self.companions.values():
            companion.merge(self.group)

    def _finish_round(
        self, clients: np.ndarray, losses: dict[int, float], sent: dict[int, int]
    ) -> dict:
        self.round += 1
        record = {"round": self.round}
        if len(clients) or self.step_empty:
            self.group.sum_(self.total)
            self._merge()
            for companion in self.companions.values():
                companion.next_round()
            total = self.combine(self.total, self._weights, clients, self.round)
            self.server_step(self.theta_global, total, 1 / FIXED_POINT)
        if len(clients):
            weighted = [weight * losses[i] for i, weight in enumerate(self._weights)]
            record["train_loss"] = math.fsum(weighted) / math.fsum(self._weights)
        elif not self.step_empty:
            record["unchanged"] = NO_CLIENT
        if dropped := [int(k) for k in self._sampled if k not in clients]:
            record["dropped_out"] = dropped
        self.theta.copy_(self.theta_global)
        self.on_reset()
        self.total.zero_()
        self.losses, self._sent, self._queue = {}, {}, None
        kept = {name: getattr(one, "bytes", 0) for name, one in self.companions.items()}
        if any(kept.values()):
            record["state_bytes"] = {name: count for name, count in kept.items() if count}
        return record | {
            "seconds": 0.0,
            "bytes_up": sum(sent.get(i, self.client_bytes[0]) for i in range(len(clients))),
            "bytes_down": self.client_bytes[1] * len(self._sampled),
            "clients": [int(k) for k in clients],
        }

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on, a round in hand included."""
        self._merge()
        companions = {name: one.state_dict() for name, one in self.companions.items()}
        state = {"theta": self.theta_global, "round": self.round, "companions": companions}
        if self._queue is not None or self.losses:
            total = self.total.clone()
            self.group.sum_(total)
            known = self.group.gather((self.losses, self._sent))
            losses, sent = map(_united, zip(*known, strict=True))
            state |= {"total": total, "losses": losses, "sent": sent, "seconds": self.seconds}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer, to the same bits, in a group of any size."""
        self.theta_global.copy_(state["theta"])
        for name, companion in self.companions.items():
            companion.load_state_dict(state["companions"][name])
        self.theta.copy_(self.theta_global)
        self.on_reset()
        self.round, self.seconds = state["round"], state.get("seconds", 0.0)
        self.losses, self._sent = (dict(state.get(key, {})) for key in ("losses", "sent"))
        self._queue = None
        total = state["total"] if self.losses else self.total[:1]
        self.total = self._zeros(len(total))
        if self.losses and self.group.rank == 0:
            self.total.copy_(total)


def _united(parts: Iterable[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def add_up(rows: Tensor) -> Tensor:
    """Return the sum (P,) of rows (m, P)."""
    return rows[0] if len(rows) == 1 else rows.sum(dim=0)


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
