"""What stays with the clients from round to round, and its average over all of them.

    SCAFFOLD     a control variate c_k; with c the average over all K clients, a client corrects its
                 gradients by c - c_k, and after its steps (option II)
                     c_k <- c_k - c + (theta - theta_k) / (lr |a|)
                 |a| the weight of its steps in its change: tau without momentum
                 Source: Karimireddy 2020, arXiv:1910.06378, with momentum's weights in |a|
    LocalEntries parameters that a client keeps to itself, such as normalisation layers
                 Source: FedBN, Li 2021, arXiv:2102.07623

A client that never took part has the initial value, and no memory. The average is kept in int64, in
units of 2^-48, so that it does not depend on the order of clients; it changes between rounds.

    import torch; from client_states import Scaffold
    variates = Scaffold(torch.zeros(3), clients=100)
    theta, theta_k = torch.zeros(3), torch.tensor([-0.4, 0.0, 0.4])  # after four steps of 0.1
    variates.correction(client=7)  # c - c_k, zero at first
    variates.update(7, theta, theta_k, rate=4 * 0.1); variates.next_round()
    variates.mean  # c: a hundredth of c_7
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNITS = 2.0**48  # per 1.0 of the int64 totals
LIMIT = 2.0**14  # largest change of a value in one round
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
KEPT = 3  # the last states whose files are kept: a checkpoint, its predecessor, and a spare


def _write(path: Path, vector: Tensor) -> None:
    torch.save(vector, path)


def _read(path: Path) -> Tensor:
    return torch.load(path, weights_only=True)


def _bits(vector: Tensor) -> Tensor:
    return vector.view(BITS[vector.dtype])


class ClientStates:
    """One vector per client, and the average over all clients.

    Args:
        initial: (S,) every client's vector before it first takes part; gives dtype and device.
        clients: K, over which the average runs.
        place: device where the vectors lie between a client's rounds; None: that of `initial`.
        folder: where `state_dict` leaves the vectors that changed; None keeps them in the state.
        write, read: save one tensor in a file, and load it, or raise ValueError where it is
            damaged; of the process that writes the run, `write` is None in the others.

    Raises:
        ValueError: a value changes by more than the fixed point holds.
    """

    def __init__(
        self,
        initial: Tensor,
        clients: int,
        *,
        place: torch.device | None = None,
        folder: Path | None = None,
        write: Callable[[Path, Tensor], None] | None = _write,
        read: Callable[[Path], Tensor] = _read,
    ):
        self.initial, self.clients = initial.clone(), clients
        self.place = place or initial.device
        self.folder, self.write, self.read = folder, write, read
        self.mean = initial.clone()
        self.total = torch.zeros_like(initial, dtype=torch.int64)  # of the changes, over clients
        self._own = torch.zeros_like(self.total)  # this process's, not merged yet
        self._vectors: dict[int, Tensor] = {}
        self._changes: dict[int, int] = {}  # how often each vector has changed
        self._unmerged: set[int] = set()
        self._unwritten: set[int] = set()
        self._states: list[set[str]] = []  # files of the last states

    def get(self, client: int) -> Tensor:
        """Return a client's vector (S,), not to be changed in place."""
        vector = self._vectors.get(client)
        return self.initial if vector is None else vector.to(self.initial.device)

    @torch.no_grad()
    def put(self, client: int, vector: Tensor) -> None:
        """Set a client's vector; the average takes the change in at the end of the round."""
        change = vector.double() - self.get(client).double()
        if not change.abs().max() < LIMIT:
            raise ValueError(f"the state of client {client} changes by more than {LIMIT:g}")
        self._own += change.mul_(UNITS / self.clients).round_().long()
        self._keep(client, vector.to(self.place, copy=True), self._changes.get(client, 0) + 1)
        self._unmerged.add(client)

    def _keep(self, client: int, vector: Tensor, times: int) -> None:
        self._vectors[client], self._changes[client] = vector, times
        self._unwritten.add(client)

    @property
    def bytes(self) -> int:
        """Memory of all vectors."""
        return len(self._vectors) * self.initial.nbytes

    def merge(self, group: Any) -> None:
        """Let every process of a group know what changed in the others."""
        group.sum_(self._own)
        self.total += self._own
        self._own.zero_()
        known = group.gather({k: self._changes[k] for k in self._unmerged})
        if group.size > 1:
            for rank, changed in enumerate(known):
                for client, times in sorted(changed.items()):
                    self._receive(client, times, group, mine=rank == group.rank)
        self._unmerged.clear()

    def _receive(self, client: int, times: int, group: Any, mine: bool) -> None:
        vector = self.get(client).clone() if mine else torch.zeros_like(self.initial)
        group.sum_(_bits(vector))  # of zeros but for one process's
        if not mine:
            self._keep(client, vector.to(self.place), times)

    @torch.no_grad()
    def next_round(self) -> None:
        """Let the average take in what changed."""
        changes = (self.total + self._own).double() / UNITS
        self.mean.copy_(self.initial.double() + changes)

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on; vectors as files that hold them."""
        state = {"mean": self.mean, "total": self.total, "changes": dict(self._changes)}
        if self.folder is None:
            return state | {"vectors": dict(self._vectors)}
        if self.write is not None:
            self.folder.mkdir(exist_ok=True)
            for client in sorted(self._unwritten):
                self.write(self._file(client, self._changes[client]), self._vectors[client].cpu())
            self._forget_old_files()
        self._unwritten.clear()
        return state

    def _file(self, client: int, times: int) -> Path:
        return self.folder / f"client{client}-{times}.pt"

    def _files(self) -> set[str]:
        return {self._file(k, n).name for k, n in self._changes.items()} if self.folder else set()

    def _forget_old_files(self) -> None:
        self._states = [*self._states, self._files()][-KEPT:]
        if len(self._states) == KEPT:
            for path in self.folder.glob("client*-*.pt"):
                if not any(path.name in names for names in self._states):
                    path.unlink(missing_ok=True)

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer.

        Raises:
            FileNotFoundError, ValueError: a client's file is gone, or damaged.
        """
        self.mean.copy_(state["mean"])
        self.total.copy_(state["total"])
        self._changes = dict(state["changes"])
        self._own.zero_()
        self._unmerged, self._unwritten = set(), set()
        self._states = [self._files()]
        if self.folder is None:
            vectors = state["vectors"]
        else:
            vectors = {k: self.read(self._file(k, n)) for k, n in self._changes.items()}
        self._vectors = {k: vector.to(self.place) for k, vector in vectors.items()}


class Scaffold(ClientStates):
    """The control variates of SCAFFOLD; their average is the server's."""

    def correction(self, client: int) -> Tensor:
        """Return what the client adds to each gradient: c - c_k."""
        return self.mean - self.get(client)

    def update(self, client: int, start: Tensor, end: Tensor, rate: float) -> None:
        """Set c_k by what the client's steps changed.

        Args:
            start, end: (S,) the parameters before and after its local steps.
            rate: lr times the sum of the weights of the local steps.
        """
        self.put(client, self.get(client) - self.mean + (start - end) / rate)


class LocalEntries(ClientStates):
    """Entries of theta that every client keeps to itself; the model has their average.

    Args:
        theta: (P,) the parameters, as all clients find them at first.
        at: (S,) int64, which entries are local.
    """

    def __init__(self, theta: Tensor, at: Tensor, clients: int, **options):
        super().__init__(theta[at], clients, **options)
        self.at = at

    def enter_(self, theta: Tensor, client: int) -> None:
        """Give `theta` the client's own entries, as its round begins."""
        self._shared = theta[self.at]
        theta[self.at] = self.get(client)

    def leave_(self, theta: Tensor) -> Tensor:
        """Give `theta` the shared entries back, as if none had moved; returns the client's, to be
        `put` if its round is good."""
        own = theta[self.at]
        theta[self.at] = self._shared
        return own

    def average_into_(self, theta: Tensor) -> None:
        """Give `theta` the average of all clients' entries."""
        theta[self.at] = self.mean
