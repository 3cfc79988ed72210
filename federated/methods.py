"""Federated methods: a function each that says what it changes in a round, and one table of them.

    METHODS["ties"](Aggregation("ties"), Shared(entries, size=1000, seed=0))    -> fedavg.Method

A further method is a function here and a line of METHODS; --aggregate then offers it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

import editing
from fedavg import FIXED_POINT, Cohort, Method
from federated.privacy import Secret, add_noise_, clip_factor, conceal_

TiesKeep = Annotated[
    float | None,
    "ties: share of its entries that each change keeps, the largest [0.2]",
    "0 < x <= 1",
    "SHARE",
]
DareDrop = Annotated[
    float | None,
    "dare: probability that an entry of a change is dropped, below 1 [0.9]",
    "0 <= x < 1",
    "P",
]


class Aggregation(NamedTuple):
    """How clients' changes become one."""

    aggregate: Annotated[
        str,
        "how clients' changes become one; fednova: per unit of local work; ties, dare, sign: "
        "merging rules of model editing",
        METHODS,
    ] = "mean"
    ties_keep: TiesKeep = None
    dare_drop: DareDrop = None


class Shared(NamedTuple):
    """What clients have in common: what they send of theta (P,)."""

    entries: Tensor  # (P,) bool: sent and received; padding and local entries are not
    size: int  # entries of P that are not padding
    seed: int

    @property
    def bytes(self) -> int:
        """What sending the entries costs, in fp32."""
        return 4 * int(self.entries.sum())


def mean(o: Aggregation, shared: Shared) -> Method:
    """McMahan 2017: the mean by the cohort's weights, fp32 both ways."""
    return Method(bytes_up=shared.bytes, bytes_down=shared.bytes)


def fednova(o: Aggregation, shared: Shared) -> Method:
    """Wang 2020: the mean, by the cohort's weights times efforts (cohort.normalised_averaging)."""
    return mean(o, shared)._replace(any_sum=True)


def ties(o: Aggregation, shared: Shared) -> Method:
    """Yadav 2023: trim, elect a sign per entry, average what agrees."""

    def combine(parts: Tensor, cohort: Cohort, round: int) -> Tensor:
        return editing.ties(parts, cohort.weights, keep=o.ties_keep, size=shared.size)

    return mean(o, shared)._replace(apart=lambda round: True, combine=combine)


def sign(o: Aggregation, shared: Shared) -> Method:
    """Average what has the elected sign, at the norm of the mean."""

    def combine(parts: Tensor, cohort: Cohort, round: int) -> Tensor:
        return editing.sign_elected(parts, cohort.weights)

    return mean(o, shared)._replace(apart=lambda round: True, combine=combine)


def dare(o: Aggregation, shared: Shared) -> Method:
    """Yu 2024: drop entries at random, divide the others by the share that stays.

    What is dropped is not sent either: the server knows the seed of the pattern.
    """
    plain = mean(o, shared)

    def send_(part: Tensor, client: int, cohort: Cohort, round: int) -> int:
        stays = editing.drop_(part, o.dare_drop, seed=shared.seed, round=round, client=client)
        return plain.bytes_up - 4 * int((shared.entries & ~stays).sum())

    return plain._replace(factor=lambda theta_k, theta: 1 / (1 - o.dare_drop), send_=send_)


METHODS: dict[str, Callable[[Aggregation, Shared], Method]] = {
    "mean": mean,
    "fednova": fednova,
    "ties": ties,
    "dare": dare,
    "sign": sign,
}


def compares_clients(aggregate: str) -> bool:
    """Tell whether a method needs the clients' changes one by one."""
    nothing = Shared(torch.zeros(0, dtype=torch.bool), 0, 0)
    return METHODS[aggregate](Aggregation(aggregate), nothing).apart(1)


# ---------------------------------------------------------------------------- around a method


def with_variates(method: Method, shared: Shared) -> Method:
    """Send SCAFFOLD's variates along: the change of c_k up, c down."""
    up, down = (count + shared.bytes for count in (method.bytes_up, method.bytes_down))

    def send_(part: Tensor, client: int, cohort: Cohort, round: int) -> int:
        return method.send_(part, client, cohort, round) + shared.bytes

    send = None if method.send_ is None else send_
    return method._replace(send_=send, bytes_up=up, bytes_down=down)


def hidden(method: Method, seed: int) -> Method:
    """Bonawitz 2017: send 64 bits an entry, under pairwise masks that cancel in the sum.

    Hidden contributions have no zeros, so that all of them is sent. A client that is alone in its
    round has nobody to hide with: its record says so.
    """

    def send_(part: Tensor, client: int, cohort: Cohort, round: int) -> int:
        if method.send_ is not None:
            method.send_(part, client, cohort, round)
        conceal_(part, client, cohort.clients, round, seed=seed)
        return 2 * method.bytes_up

    def report(record: dict, cohort: Cohort) -> dict:
        alone = {"in_the_clear": [int(k) for k in cohort.clients]}
        return method.report(record | (alone if len(cohort.clients) == 1 else {}), cohort)

    return method._replace(send_=send_, report=report, bytes_up=2 * method.bytes_up)


def private(
    method: Method, *, clip: float, std: float, secret: Secret, where: Tensor | None = None
) -> Method:
    """McMahan 2018: clip each client's change, add noise to what they come to.

    What single clients did is neither logged nor saved: a round in hand is trained to its end.

    Args:
        clip: S, the largest norm of a change.
        std: of the noise in each entry of the combined change.
        where: (P,) bool, the entries that get noise; None: all.
    """

    def combine(parts: Tensor, cohort: Cohort, round: int) -> Tensor:
        total = method.combine(parts, cohort, round)
        if std:
            seed, unit = secret.key, 1 / FIXED_POINT
            add_noise_(total, std, unit=unit, seed=seed, round=round, where=where)
        return total

    def report(record: dict, cohort: Cohort) -> dict:
        record = method.report(record, cohort) | {"answered": len(cohort.clients)}
        of_single_clients = ("train_loss", "clients", "in_the_clear")
        return {k: v for k, v in record.items() if k not in of_single_clients}

    return method._replace(
        factor=partial(clip_factor, bound=clip),
        combine=combine,
        report=report,
        any_sum=True,  # over C K, however many answer
        steps_empty=True,
        saves_within=False,
    )
