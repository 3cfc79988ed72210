"""What is a client's own in its local steps, and what stays with it from round to round.

Each is a *term*: enter(start, client) before the steps, leave(theta_k, theta, client, rate) after
them; terms are entered in order and left in reverse.

    Prox         every step pulls back to where the client starts: g += mu (theta - start)
                 Source: FedProx, Li 2020, arXiv:1812.06127
    Scaffold     a control variate c_k; with c the average over all K clients, a client corrects its
                 gradients by c - c_k, and after its steps (option II)
                     c_k <- c_k - c + (theta - theta_k) / (lr |a|)
                 |a| the weight of its steps in its change: tau without momentum
                 Source: Karimireddy 2020, arXiv:1910.06378, with momentum's weights in |a|
    LocalNorm    parameters that a client keeps to itself, such as normalisation layers
                 Source: FedBN, Li 2021, arXiv:2102.07623
    FedIR        sample weights p(y) / q_k(y) in the client's loss     Hsu 2020, arXiv:2003.08082

A client that never took part has the initial value, and no memory. The average is kept in int64, in
units of 2^-48, so that it does not depend on the order of clients; it changes between rounds.

    import torch; from client_states import Scaffold
    theta, theta_k = torch.zeros(3), torch.tensor([-0.4, 0.0, 0.4])  # after four steps of 0.1
    correction = torch.zeros(3)  # what a step adds to its gradient
    scaffold = Scaffold(torch.zeros(3), clients=100, correct=correction.copy_)
    scaffold.enter(theta, client=7)  # correction is c - c_k, zero at first
    scaffold.leave(theta_k, theta, client=7, rate=4 * 0.1); scaffold.next_round()
    scaffold.mean  # c: a hundredth of c_7
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

UNITS = 2.0**48  # per 1.0 of the int64 totals
LIMIT = 2.0**14  # largest change of a value in one round
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
STATES = 3  # the last ones whose files stay: a checkpoint, its predecessor, and a spare


class ClientTerms(NamedTuple):
    """What a client adds to its local steps."""

    prox: Annotated[
        float, "FedProx: strength of each client's pull to where it started", "0 <= x <= 1e38", "MU"
    ] = 0.0
    scaffold: Annotated[bool, "SCAFFOLD: control variates correct client drift"] = False
    fedir: Annotated[bool, "FedIR: samples weighted by class, p(y) / p_k(y)"] = False
    local_norm: Annotated[
        bool, "LayerNorm parameters stay with each client; evaluations see their average"
    ] = False


class Term:
    """What a client has of its own in its local steps; here nothing."""

    def enter(self, start: Tensor, client: int) -> Tensor:
        """Return where the client starts (P,), given where the others do."""
        return start

    def leave(self, theta_k: Tensor, theta: Tensor, client: int, rate: float) -> Tensor:
        """Return what the client sends (P,), of what its steps came to.

        Args:
            theta: (P,) where the round began.
            rate: lr times the sum of the weights of its local steps.

        Raises:
            ValueError: the client's state cannot be kept.
        """
        return theta_k


class Prox(Term):
    """The proximal term.

    Args:
        pull_to: takes what the steps pull towards (P,).
    """

    def __init__(self, pull_to: Callable[[Tensor], object]):
        self.pull_to = pull_to

    def enter(self, start: Tensor, client: int) -> Tensor:
        """Pull back to where the client starts."""
        self.pull_to(start)
        return start


class FedIR(Term):
    """The class weights of a client's loss.

    Args:
        weights: client -> (classes,) float64, as `importance_weights` returns them.
        out: (classes,) the weights that the loss reads.
    """

    def __init__(self, weights: Callable[[int], np.ndarray], out: Tensor):
        self.weights, self.out = weights, out

    def enter(self, start: Tensor, client: int) -> Tensor:
        """Weigh classes as the client holds them."""
        self.out.copy_(torch.from_numpy(self.weights(client)))
        return start


def _write(path: Path, vectors: dict[int, Tensor]) -> None:
    torch.save(vectors, path)


def _read(path: Path) -> dict[int, Tensor]:
    return torch.load(path, weights_only=True)


def _bits(vector: Tensor) -> Tensor:
    return vector.view(BITS[vector.dtype])


class ClientStates(Term):
    """One vector per client, and the average over all clients.

    Args:
        initial: (S,) every client's vector before it first takes part; gives dtype and device.
        clients: K, over which the average runs.
        place: device where the vectors lie between a client's rounds; None: that of `initial`.
        folder: where `state_dict` leaves the vectors that changed, in one file; None keeps them in
            the state.
        write, read: save client -> vector in a file, and load it, or raise ValueError where it is
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
        write: Callable[[Path, dict[int, Tensor]], None] | None = _write,
        read: Callable[[Path], dict[int, Tensor]] = _read,
    ):
        self.initial, self.clients = initial.clone(), clients
        self.place = place or initial.device
        self.folder, self.write, self.read = folder, write, read
        self.mean = initial.clone()
        self.total = torch.zeros_like(initial, dtype=torch.int64)  # of the changes, over clients
        self._change = torch.zeros_like(self.total)  # this process's, not merged yet
        self._vectors: dict[int, Tensor] = {}
        self._changes: dict[int, int] = {}  # how often each vector has changed
        self._unmerged: set[int] = set()
        self._unwritten: set[int] = set()
        self._saves = 0  # states that had something to write
        self._files: dict[int, str] = {}  # where each vector was written last
        self._sizes: dict[str, int] = {}  # vectors in each of these files
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
        self._change += change.mul_(UNITS / self.clients).round_().long()
        self._set(client, vector.to(self.place, copy=True), self._changes.get(client, 0) + 1)
        self._unmerged.add(client)

    def _set(self, client: int, vector: Tensor, times: int) -> None:
        self._vectors[client], self._changes[client] = vector, times
        self._unwritten.add(client)

    @property
    def bytes(self) -> int:
        """Memory of all vectors."""
        return len(self._vectors) * self.initial.nbytes

    def merge(self, group: Any) -> None:
        """Let every process of a group know what changed in the others."""
        group.sum_(self._change)
        self.total += self._change
        self._change.zero_()
        changes = group.gather({k: self._changes[k] for k in self._unmerged})
        if group.size > 1:
            for rank, changed in enumerate(changes):
                for client, times in sorted(changed.items()):
                    self._receive(client, times, group, mine=rank == group.rank)
        self._unmerged.clear()

    def _receive(self, client: int, times: int, group: Any, mine: bool) -> None:
        vector = self.get(client).clone() if mine else torch.zeros_like(self.initial)
        group.sum_(_bits(vector))  # of zeros but for one process's
        if not mine:
            self._set(client, vector.to(self.place), times)

    @torch.no_grad()
    def next_round(self) -> None:
        """Let the average take in what changed."""
        changes = (self.total + self._change).double() / UNITS
        self.mean.copy_(self.initial.double() + changes)

    def state_dict(self) -> dict:
        """Return all that the rest of the run depends on; vectors as files that hold them.

        Several processes `merge` first; one that is alone need not.
        """
        total = self.total + self._change if self._unmerged else self.total
        state = {"mean": self.mean.clone(), "total": total.clone(), "changes": dict(self._changes)}
        if self.folder is None:
            return state | {"vectors": dict(self._vectors)}
        if self._unwritten:
            self._write_changed()
        files = set(self._files.values())
        if files not in self._states[-1:]:
            self._states = [*self._states, files][-STATES:]
            self._forget_old_files()
        return state | {"saves": self._saves, "files": dict(self._files)}

    def _write_changed(self) -> None:
        """Write what changed, or all vectors where they are less than half of what files hold."""
        self._saves += 1
        name, clients = f"clients-{self._saves}.pt", self._unwritten
        files = {**self._files, **dict.fromkeys(clients, name)}
        sizes = {name: len(clients)} | self._sizes
        if 2 * len(files) < sum(sizes[file] for file in set(files.values())):
            clients = set(self._vectors)
            files = dict.fromkeys(clients, name)
        if self.write is not None:
            self.folder.mkdir(exist_ok=True)
            vectors = {client: self._vectors[client].cpu() for client in sorted(clients)}
            self.write(self.folder / name, vectors)
        self._files, self._unwritten = files, set()
        self._sizes = {f: sizes[f] for f in set(files.values())} | {name: len(clients)}

    def _forget_old_files(self) -> None:
        if self.write is not None and len(self._states) == STATES:
            for path in self.folder.glob("clients-*.pt"):
                if not any(path.name in names for names in self._states):
                    path.unlink(missing_ok=True)

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer.

        Raises:
            ValueError: a vector is missing, or of another shape or type.
        """
        self.mean.copy_(state["mean"])
        self.total.copy_(state["total"])
        self._changes = dict(state["changes"])
        self._change.zero_()
        self._unmerged, self._unwritten = set(), set()
        self._saves, self._files = state.get("saves", 0), dict(state.get("files", {}))
        self._states, self._sizes = [set(self._files.values())], {}
        vectors = state.get("vectors")
        if vectors is None:
            vectors = self._read_files()
        self._vectors = {client: self._checked(client, vectors) for client in self._changes}

    def _read_files(self) -> dict[int, Tensor]:
        """Return the vectors of all clients, each file read once."""
        vectors = {}
        for name in sorted(set(self._files.values())):
            part = self.read(self.folder / name)
            self._sizes[name] = len(part)
            vectors |= {k: part[k] for k, file in self._files.items() if file == name and k in part}
        return vectors

    def _checked(self, client: int, vectors: dict[int, Tensor]) -> Tensor:
        vector, initial = vectors.get(client), self.initial
        if getattr(vector, "shape", None) != initial.shape or vector.dtype != initial.dtype:
            raise ValueError(f"no vector {tuple(initial.shape)} {initial.dtype} of client {client}")
        return vector.to(self.place)


class Scaffold(ClientStates):
    """The control variates of SCAFFOLD; their average is the server's.

    Args:
        correct: takes what every step adds to its gradient (S,).
    """

    def __init__(
        self,
        initial: Tensor,
        clients: int,
        correct: Callable[[Tensor], object] = lambda correction: None,
        **store: Any,
    ):
        super().__init__(initial, clients, **store)
        self.correct = correct

    def correction(self, client: int) -> Tensor:
        """Return what the client adds to each gradient: c - c_k."""
        return self.mean - self.get(client)

    def enter(self, start: Tensor, client: int) -> Tensor:
        """Correct the client's gradients."""
        self.correct(self.correction(client))
        return start

    def leave(self, theta_k: Tensor, theta: Tensor, client: int, rate: float) -> Tensor:
        """Set c_k by what the client's steps changed; steps of rate 0 tell nothing."""
        if rate:
            self.put(client, self.get(client) - self.mean + (theta - theta_k) / rate)
        return theta_k


class LocalNorm(ClientStates):
    """Entries of theta that every client keeps to itself; the model has their average.

    Args:
        theta: (P,) the parameters, as all clients find them at first.
        at: (S,) int64, which entries are local.
    """

    def __init__(self, theta: Tensor, at: Tensor, clients: int, **store: Any):
        super().__init__(theta[at], clients, **store)
        self.at = at

    def enter(self, start: Tensor, client: int) -> Tensor:
        """Return the start with the client's own entries."""
        return start.index_copy(0, self.at, self.get(client))

    def leave(self, theta_k: Tensor, theta: Tensor, client: int, rate: float) -> Tensor:
        """Keep the client's entries; return the others, as if these had not moved."""
        self.put(client, theta_k[self.at])
        return theta_k.index_copy(0, self.at, theta[self.at])

    def average_into_(self, theta: Tensor) -> None:
        """Give `theta` the average of all clients' entries."""
        theta[self.at] = self.mean


def importance_weights(labels: np.ndarray, own_labels: np.ndarray, classes: int) -> np.ndarray:
    """Return FedIR's weight p(y) / q(y) of each class in a client's loss, 0 where it has none.

    A batch's loss is divided by the sum of its samples' weights, so a client of a single class
    trains as ever.

    Args:
        labels: (N,) of all clients' samples, whose distribution is p.
        own_labels: (n,) those of the client's, whose distribution is q.

    Returns:
        (classes,) float64.
    """
    p, q = (np.bincount(y, minlength=classes) / len(y) for y in (labels, own_labels))
    return np.divide(p, q, out=np.zeros(classes), where=q > 0)
