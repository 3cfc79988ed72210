"""FedAvg over flat tensors: a cohort of clients takes local steps, the server adds up the changes.

    theta <- server(theta, sum over the cohort of p_k (theta_k - theta)),   p_k = n_k / sum of n
Source: McMahan 2017, arXiv:1602.05629, algorithm 1, with J local steps in place of epochs.

The sum is kept in int64, in units of 2^-48: integer addition is associative, so the result does not
depend, to the bit, on the order of clients or on how they are spread over processes. It may even be
taken of vectors hidden by pairwise masks that cancel mod 2^64.

A run is six things that are handed to the loop: theta, how clients train, who takes part, what the
server does with the change, what a method changes in that, what else is remembered.

    import numpy as np; import torch; from fedavg import Cohort, FedAvg
    targets = torch.eye(3)
    def train(theta, clients, round):  # one local step each on |theta - target|^2 / 2
        for k in clients: yield theta + 0.5 * (targets[k] - theta), torch.zeros(1)
    everyone = Cohort(np.arange(3), np.arange(3), np.array([10, 20, 30]) / 60)
    federation = FedAvg(torch.zeros(3), train, cohort=lambda round: everyone)
    while (record := federation.advance()) is None: pass  # a client a call, the record at the end
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FIXED_POINT = 2.0**48  # units per 1.0 of the int64 totals
LIMIT = 2.0**14  # largest change of a parameter by one client in one round: far above sense
SUM_TOLERANCE = 1e-3  # of weights that add up to 1, in fp16 too
CHUNK = 262_144  # elements; keeps the temporaries of a CPU in cache
TOUCHED = "train has changed the global theta; hand the model that trains theta.clone()"
NO_CLIENT, NO_WEIGHT = "no client took part", "the round's clients weigh nothing"  # in the log


class ClientError(ValueError):
    """A client's result cannot be used; the message names round, client and what is wrong."""


# ---------------------------------------------------------------------------- the sum


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


def add_up(parts: Tensor) -> Tensor:
    """Return the sum (P,) of parts (m, P)."""
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def check_losses(round: int, client: int, losses: Tensor) -> None:
    """Raise ClientError unless a client has losses (J,), and they are finite."""
    finite = torch.isfinite(losses).tolist()
    if not finite:
        raise ClientError(f"round {round}, client {client}: it gives no loss, J of them are needed")
    if not all(finite):
        step = finite.index(False)
        raise ClientError(
            f"round {round}, client {client}, local step {step + 1}: the loss is "
            f"{losses[step].item()}; try a lower --lr"
        )


def check_change(round: int, client: int, largest: float) -> None:
    """Raise ClientError unless the fixed point holds a client's largest change."""
    if not largest < LIMIT:
        raise ClientError(
            f"round {round}, client {client}: its update is {largest} at its largest, "
            f"beyond the fixed-point range of {LIMIT:g}; try a lower --lr"
        )


# ---------------------------------------------------------------------------- what it is given


class Cohort(NamedTuple):
    """Who a round sends the model to, who answers, and with what weight p_k."""

    sent: np.ndarray  # (s,) int64
    clients: np.ndarray  # (m,) int64, some of them
    weights: np.ndarray  # (m,) at least 0, adding up to 1 unless the method has `any_sum`


class Method(NamedTuple):
    """What a federated method changes in a round; the defaults are the weighted mean.

    A method that builds on another replaces fields of it: `mean._replace(factor=...)`.
    """

    factor: Callable[[Tensor, Tensor], float] = lambda theta_k, theta: 1.0
    """(theta_k, theta) -> factor on a client's change: clipping"""
    send_: Callable[[Tensor, int, Cohort, int], int] | None = None
    """(part (P,) int64, client, cohort, round) -> bytes sent; may change in place what the client
    sends: make entries smaller, or hide them under what cancels in the round's sum"""
    apart: Callable[[int], bool] = lambda round: False
    """round -> keep its parts, (m, P) by place in the cohort, in place of their sum (1, P)?"""
    combine: Callable[[Tensor, Cohort, int], Tensor] = lambda parts, cohort, round: add_up(parts)
    """(parts (m or 1, P) int64, cohort, round) -> their one change (P,); knows no order of them"""
    after_: Callable[[Tensor], None] = lambda theta: None
    """(theta), in place, once the server has stepped"""
    report: Callable[[dict, Cohort], dict] = lambda record, cohort: record
    """(record, cohort) -> what the round's record says of it"""
    any_sum: bool = False
    """may weights add up to something else than 1, as with a fixed denominator? the change is
    their plain sum, the logged loss the weighted mean"""
    steps_empty: bool = False  # does the server step in a round without clients?
    saves_within: bool = True  # may a round in hand be saved, with its sum and losses?
    bytes_up: int = 0  # what a client that takes part sends
    bytes_down: int = 0  # what one that is sent the model receives


class State:
    """What lives beside theta through a run, with nothing in it: a base for those that have."""

    bytes = 0  # counted in the rounds' records, under state_bytes

    def merge(self, group: Any) -> None:
        """Bring a group's processes to one value; called before `state_dict` and `next_round`."""

    def next_round(self) -> None:
        """Take in the round that ends, before the server's step."""

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer."""


class MeanServer(State):
    """The server of plain FedAvg: theta moves by the averaged change."""

    def step_(self, theta: Tensor, change: Tensor, unit: float) -> None:
        """Move `theta` (P,) in place by the averaged change (P,) int64 * unit."""
        apply_total_(theta, change, unit)


class Alone:
    """A process that shares its work with no other."""

    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""

    def gather(self, value: Any) -> list:
        """Return every process's plain value, by rank."""
        return [value]


# ---------------------------------------------------------------------------- the loop


class FedAvg:
    """theta <- server(theta, sum of p_k (theta_k - theta)), a client per call of `advance`.

    A process that is alone can so stop, and save, after any client. Several processes share a
    round's clients: each calls everything here at the same times, trains its own in one call of
    `advance`, and meets the others at the end of the round.

    Args:
        theta: (P,) the global parameters, moved in place once a round.
        train: (theta, clients, round) -> iterator of (theta_k (P,), losses (J,) or a number), in
            the order of the clients; a theta_k is read before the next is asked for. theta is the
            global one, not a copy: a model that trains in its memory is handed theta.clone().
        cohort: round (from 1) -> Cohort, a pure function; lists do for arrays.
        server: has step_(theta, change, unit), and is a State.
        method: what it changes in a round.
        states: by name, what else changes over the rounds; merged, saved and restored.
        group: the processes that share the work, with rank, size, sum_(tensor) in place and
            gather(plain value) -> list by rank.

    Raises:
        ClientError: a client's loss or update is not finite, or beyond the fixed-point range; train
            yields too few results, too many, or of another shape, or changes theta.
        ValueError: a theta that is not finite; weights that are negative or not finite, or that
            add up to something else than 1 where the method does not allow it.
    """

    def __init__(
        self,
        theta: Tensor,
        train: Callable[[Tensor, np.ndarray, int], Iterator[tuple[Tensor, Tensor]]],
        cohort: Callable[[int], Cohort],
        server: Any = None,
        method: Method = Method(),  # noqa: B008  (immutable)
        states: Mapping[str, State] | None = None,
        group: Any = None,
    ):
        if not torch.isfinite(theta).all():
            raise ValueError("theta holds NaN or infinite values before any client has trained")
        self.theta, self.train, self.cohort, self.method = theta, train, cohort, method
        self.server, self.group = server or MeanServer(), group or Alone()
        self.states = {**(states or {}), "server": self.server}
        self.round, self.seconds = 0, 0.0
        self.done: dict[int, tuple[float, int]] = {}  # place in the cohort -> (loss, bytes sent)
        self.total: Tensor | None = None  # (1 or m, P) int64, of this process's clients
        self._loop = self._rounds()

    def advance(self) -> dict | None:
        """Train the next client, of several processes the whole round.

        Returns:
            the round's record after its last client, else None.
        """
        started = time.perf_counter()
        try:
            record = next(self._loop)
        except StopIteration:
            raise RuntimeError("an error has ended the loop: load a state first") from None
        self.seconds += time.perf_counter() - started
        if record is not None:
            record["seconds"], self.seconds = round_seconds(self.seconds), 0.0
        return record

    def _rounds(self) -> Iterator[dict | None]:
        """Yield None after every client but a round's last, and its record after that."""
        while True:
            t, group = self.round + 1, self.group
            cohort = checked(self.cohort(t), self.method.any_sum)
            if not self.done:
                self._clear(len(cohort.clients) if self.method.apart(t) else 1)
            left = [place for place in range(len(cohort.clients)) if place not in self.done]
            places, problem = left[group.rank :: group.size], None
            before, version = self.theta.detach().clone(), self.theta._version
            results = iter(self.train(self.theta, cohort.clients[places], t))
            try:
                for place in places:
                    if (result := next(results, None)) is None:
                        raise ClientError(f"round {t}: train yields fewer results than clients")
                    if place == places[0] or self.theta._version != version:
                        self._check_untouched(t, before)
                    self._take_in(t, cohort, place, *result)
                    if group.size == 1 and self.method.saves_within and place != places[-1]:
                        yield None
                if next(results, None) is not None:
                    raise ClientError(f"round {t}: train yields more results than clients")
                self._check_untouched(t, before)
            except ClientError as error:
                problem = str(error)
            self._meet(problem)
            record = self._close(t, cohort)
            self.round, self.done = t, {}
            yield record

    def _check_untouched(self, t: int, before: Tensor) -> None:
        """Raise ClientError where theta is not what it was at the start of a round."""
        if torch.equal(before, self.theta):
            return
        if not torch.allclose(before, self.theta, rtol=0, atol=0, equal_nan=True):  # NaN as well
            raise ClientError(f"round {t}: {TOUCHED}")

    def _clear(self, rows: int) -> None:
        """Let the total be zeros of so many rows, at least one."""
        shape, device = (max(1, rows), *self.theta.shape), self.theta.device
        if self.total is None or self.total.shape != shape:
            self.total = torch.zeros(shape, dtype=torch.int64, device=device)
        self.total.zero_()

    def _take_in(self, t: int, cohort: Cohort, place: int, theta_k: Tensor, losses: Tensor) -> None:
        """Add what a client changed to this process's total."""
        client, method = int(cohort.clients[place]), self.method
        if theta_k.shape != self.theta.shape:
            shapes = f"{tuple(theta_k.shape)}, and theta is {tuple(self.theta.shape)}"
            raise ClientError(f"round {t}, client {client}: its result is {shapes}")
        losses = torch.as_tensor(losses, dtype=torch.float64).reshape(-1)
        row = self.total[place % len(self.total)]  # its own one where parts are kept apart
        part = row if method.send_ is None else torch.zeros_like(row)
        factor = method.factor(theta_k, self.theta)
        largest = add_delta_(part, theta_k, self.theta, float(cohort.weights[place]) * factor)
        check_losses(t, client, losses)
        # weights of a sum above 1 bring the total nearer to int64's end
        scale = max(1.0, float(sum(cohort.weights))) * factor
        check_change(t, client, largest.item() * scale)
        sent = method.bytes_up
        if method.send_ is not None:
            sent = method.send_(part, client, cohort, t)
            row += part  # mod 2^64
        self.done[place] = losses.mean().item(), sent

    def _meet(self, problem: str | None) -> None:
        """Let every process know what the others' clients came to; all raise what one has met."""
        problems, done = zip(*self.group.gather((problem, self.done)), strict=True)
        if any(problems):
            raise ClientError(next(filter(None, problems)))
        self.done = {place: result for part in done for place, result in part.items()}

    def _close(self, t: int, cohort: Cohort) -> dict:
        """Let the server step, where anything counts; returns the round's record."""
        counts = float(cohort.weights.sum()) > 0
        if counts or self.method.steps_empty:
            self.group.sum_(self.total)
            self._merge_states()
            for state in self.states.values():
                state.next_round()
            change = self.method.combine(self.total, cohort, t)
            self.server.step_(self.theta, change, 1 / FIXED_POINT)
            self.method.after_(self.theta)
        record: dict = {"round": t}
        if counts:
            losses = [weight * self.done[i][0] for i, weight in enumerate(cohort.weights)]
            record["train_loss"] = math.fsum(losses) / math.fsum(cohort.weights)
        elif not self.method.steps_empty:
            record["unchanged"] = NO_WEIGHT if len(cohort.clients) else NO_CLIENT
        if dropped := [int(k) for k in cohort.sent if k not in cohort.clients]:
            record["dropped_out"] = dropped
        if memory := {name: state.bytes for name, state in self.states.items() if state.bytes}:
            record["state_bytes"] = memory
        record |= {
            "seconds": 0.0,
            "bytes_up": sum(sent for _, sent in self.done.values()),
            "bytes_down": self.method.bytes_down * len(cohort.sent),
            "clients": [int(k) for k in cohort.clients],
        }
        return self.method.report(record, cohort)

    def _merge_states(self) -> None:
        for state in self.states.values():
            state.merge(self.group)

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on, a round in hand included: copies."""
        self._merge_states()
        states = {name: state.state_dict() for name, state in self.states.items()}
        state = {"theta": self.theta.detach().clone(), "round": self.round, "states": states}
        if self.done:
            state |= {"done": dict(self.done), "total": self.total.clone(), "seconds": self.seconds}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer, to the same bits, in a group of any size."""
        self.theta.copy_(state["theta"])
        for name, part in self.states.items():
            part.load_state_dict(state["states"][name])
        self.round, self.seconds = state["round"], state.get("seconds", 0.0)
        self.done = dict(state.get("done", {}))
        if self.done:
            self._clear(len(state["total"]))
            if self.group.rank == 0:
                self.total.copy_(state["total"])
        self._loop = self._rounds()


def checked(cohort: Cohort, any_sum: bool = False) -> Cohort:
    """Return the cohort as arrays; raise ValueError for weights that cannot be averaged by."""
    sent, clients = (np.asarray(part, np.int64) for part in cohort[:2])
    weights = np.asarray(cohort.weights, np.float64)
    if weights.shape != clients.shape:
        raise ValueError(f"{len(clients)} clients need as many weights, not {weights.size}")
    for client, weight in zip(clients, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"client {int(client)} has weight {weight}: it must be finite, at least 0"
            )
    total = math.fsum(weights)
    if total and abs(total - 1) > SUM_TOLERANCE and not any_sum:
        raise ValueError(
            f"the weights of a round add up to {total:g}, not 1: divide them by their sum, or hand "
            "over Method(any_sum=True)"
        )
    return Cohort(sent, clients, weights)


def round_seconds(seconds: float) -> float:
    """Round a duration to the tenth of a millisecond, for the log."""
    return float(f"{seconds:.4f}")
