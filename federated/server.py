"""What the server does with a round's averaged change delta: FedAvg, FedAvgM and adaptive rules.

    fedavg       theta += lr delta
    fedavgm      v = beta v + delta;            theta += lr v
    adaptive     m = b1 m + (1 - b1) delta;     theta += lr m / (sqrt(v) + tau),  v from tau^2 on:
    fedadagrad   v += delta^2
    fedadam      v = b2 v + (1 - b2) delta^2
    fedyogi      v -= (1 - b2) delta^2 sign(v - delta^2)
Source: Hsu 2019, arXiv:1909.06335 (fedavgm); Reddi 2021, arXiv:2003.00295, algorithm 2.

    import torch; from server import Server
    theta = torch.zeros(3)
    server = Server("fedadam", theta, lr=0.1)
    server.step_(theta, torch.tensor([1.0, -1.0, 0.0]))  # theta moves by lr m / (sqrt(v) + tau)
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

RULES = ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
STATE = {"fedavg": (), "fedavgm": ("v",)}  # the adaptive rules keep m and v
ADAPTIVE = RULES[2:]
CHUNK = 262_144  # elements; keeps the temporaries of a CPU in cache


class ServerOptions(NamedTuple):
    """What the server does with the averaged change."""

    server: Annotated[str, "what the server does with the averaged change", RULES] = "fedavg"
    server_lr: Annotated[
        float | None, "server learning rate [1, of the adaptive rules 0.01]", "> 0"
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
        names = STATE.get(rule, ("m", "v"))
        self.tensors = {name: torch.zeros_like(theta, dtype=torch.float64) for name in names}
        if "m" in names:
            self.tensors["v"].fill_(tau**2)

    @torch.no_grad()
    def step_(self, theta: Tensor, delta: Tensor, unit: float = 1.0) -> None:
        """Move `theta` in place by the averaged change `delta` * unit, in any numeric dtype."""
        chunk = CHUNK if theta.is_cpu else max(1, theta.numel())
        for start in range(0, theta.numel(), chunk):
            at = slice(start, start + chunk)
            state = [tensor[at] for tensor in self.tensors.values()]
            part, change = theta[at], delta[at].double()
            if self.rule in STATE:  # in the unit of delta: with beta = 0 the bits are FedAvg's
                if state:
                    change = state[0].mul_(self.momentum).add_(change)
                part.copy_(change.mul(self.lr * unit).add_(part))
            else:
                part.copy_(self._adaptive(*state, change * unit).mul_(self.lr).add_(part))

    def _adaptive(self, m: Tensor, v: Tensor, delta: Tensor) -> Tensor:
        """Update the moments; return m / (sqrt(v) + tau)."""
        m.mul_(self.momentum).add_(delta, alpha=1 - self.momentum)
        square = delta.square()
        if self.rule == "fedadagrad":
            v.add_(square)
        elif self.rule == "fedadam":
            v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)
        else:
            v.sub_(square * torch.sign(v - square), alpha=1 - self.beta2)
        return m / v.sqrt().add_(self.tau)

    @property
    def bytes(self) -> int:
        """Memory of the server's state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def merge(self, group: object) -> None:
        """Do nothing: all processes of a group take the same steps."""

    def next_round(self) -> None:
        """Do nothing: the state changes in `step_`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return all there is to save."""
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s answer."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
