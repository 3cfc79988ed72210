"""What the server does with a round's averaged change delta: FedAvg, FedAvgM and adaptive rules.

    fedavg       theta += lr delta
    fedavgm      v = beta v + delta;            theta += lr v
    adaptive     m = b1 m + (1 - b1) delta;     theta += lr m / (sqrt(v) + tau),  v from tau^2 on:
    fedadagrad   v += delta^2
    fedadam      v = b2 v + (1 - b2) delta^2
    fedyogi      v -= (1 - b2) delta^2 sign(v - delta^2)
Source: Hsu 2019, arXiv:1909.06335 (fedavgm); Reddi 2021, arXiv:2003.00295, algorithm 2.

A further rule is a function here and a line of RULES.

    import torch; from server import Server
    theta = torch.zeros(3)
    server = Server("fedadam", theta, lr=0.1)
    server.step_(theta, torch.tensor([1.0, -1.0, 0.0]))  # theta moves by lr m / (sqrt(v) + tau)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

CHUNK = 262_144  # elements; keeps the temporaries of a CPU in cache


class Rule(NamedTuple):
    """How a change becomes a step.

    step: (server, delta, *state) -> the step, which lr multiplies; updates its state in place.
    state: names of its vectors; v starts at tau^2 where there is m.
    scaled: whether delta comes in the scale of theta, or in the unit of the sum, where a rule
        without memory has FedAvg's bits.
    """

    step: Callable[..., Tensor]
    state: tuple[str, ...] = ("m", "v")
    scaled: bool = True


def fedavg(server: Server, delta: Tensor) -> Tensor:
    """Step by the change itself."""
    return delta


def fedavgm(server: Server, delta: Tensor, v: Tensor) -> Tensor:
    """Step by a decaying sum of the changes."""
    return v.mul_(server.momentum).add_(delta)


def fedadagrad(server: Server, delta: Tensor, m: Tensor, v: Tensor) -> Tensor:
    v.add_(delta.square())
    return _adaptive(server, delta, m, v)


def fedadam(server: Server, delta: Tensor, m: Tensor, v: Tensor) -> Tensor:
    v.mul_(server.beta2).add_(delta.square(), alpha=1 - server.beta2)
    return _adaptive(server, delta, m, v)


def fedyogi(server: Server, delta: Tensor, m: Tensor, v: Tensor) -> Tensor:
    square = delta.square()
    v.sub_(square * torch.sign(v - square), alpha=1 - server.beta2)
    return _adaptive(server, delta, m, v)


def _adaptive(server: Server, delta: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m.mul_(server.momentum).add_(delta, alpha=1 - server.momentum)
    return m / v.sqrt().add_(server.tau)


RULES = {
    "fedavg": Rule(fedavg, (), scaled=False),
    "fedavgm": Rule(fedavgm, ("v",), scaled=False),
    "fedadagrad": Rule(fedadagrad),
    "fedadam": Rule(fedadam),
    "fedyogi": Rule(fedyogi),
}
WITH_MOMENTUM = tuple(name for name, rule in RULES.items() if rule.state)
ADAPTIVE = tuple(name for name, rule in RULES.items() if {"m", "v"} <= {*rule.state})


class ServerOptions(NamedTuple):
    """What the server does with the averaged change."""

    server: Annotated[str, "what the server does with the averaged change", RULES] = "fedavg"
    server_lr: Annotated[
        float | None, "server learning rate [1, of the adaptive rules 0.01]", "0 < x <= 1e38"
    ] = None
    server_momentum: Annotated[
        float | None, "beta of fedavgm, b1 of the adaptive rules [0.9]", "0 <= x <= 0.9999"
    ] = None
    server_tau: Annotated[
        float | None, "adaptivity of the adaptive rules [0.001]", "0 < x <= 1e6"
    ] = None


class Server:
    """The server's rule with its state, which is kept in float64.

    Args:
        theta: (P,) the parameters that it will step; gives shape and device.
        lr: server learning rate, per round.
        momentum: beta of fedavgm, b1 of the adaptive rules.
        beta2: decay of the second moment of fedadam and fedyogi.
        tau: degree of adaptivity; the smaller, the more the steps of all entries are alike.

    Raises:
        ValueError: an unknown rule, or a value outside its range.
    """

    def __init__(
        self,
        rule: str,
        theta: Tensor,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ):
        if rule not in RULES:
            raise ValueError(f"unknown server rule {rule!r}: choose from {', '.join(RULES)}")
        if not (lr > 0 and tau > 0 and 0 <= momentum < 1 and 0 <= beta2 < 1):
            raise ValueError(
                f"a server needs lr and tau above 0, momentum and beta2 in [0, 1), not lr {lr}, "
                f"tau {tau}, momentum {momentum}, beta2 {beta2}"
            )
        self.rule, self.lr, self.momentum, self.beta2, self.tau = rule, lr, momentum, beta2, tau
        names = RULES[rule].state
        self.tensors = {name: torch.zeros_like(theta, dtype=torch.float64) for name in names}
        if {"m", "v"} <= {*names}:
            self.tensors["v"].fill_(tau**2)

    @torch.no_grad()
    def step_(self, theta: Tensor, delta: Tensor, unit: float = 1.0) -> None:
        """Move `theta` in place by the averaged change `delta` * unit, in any numeric dtype."""
        rule = RULES[self.rule]
        chunk = CHUNK if theta.is_cpu else max(1, theta.numel())
        for start in range(0, theta.numel(), chunk):
            at = slice(start, start + chunk)
            state = [tensor[at] for tensor in self.tensors.values()]
            part, change = theta[at], delta[at].double()
            if rule.scaled:
                part.copy_(rule.step(self, change * unit, *state).mul(self.lr).add_(part))
            else:
                part.copy_(rule.step(self, change, *state).mul(self.lr * unit).add_(part))

    @property
    def bytes(self) -> int:
        """Memory of the server's state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def merge(self, group: object) -> None:
        """Do nothing: all processes of a group take the same steps."""

    def next_round(self) -> None:
        """Do nothing: the state changes in `step_`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all there is to save."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s answer."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
