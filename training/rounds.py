"""The federated loop of a run: who takes part, what they train, what becomes of their changes.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import editing
import fedavg
import masks
import participation
import privacy
import runs
from device import free_memory
from diagnostics import Diagnostics
from learner import Learner
from local_training import ClientTraining, train_together
from mask_file import Mask
from server import Server

SHARE = {"cuda": 0.5, "cpu": 0.8}  # of the free memory, for what clients keep
APART = ("ties", "sign")  # values of --aggregate that need each client's change by itself


def federate(
    learner: Learner,
    shards: list[np.ndarray],
    run: runs.Run | None = None,
    diagnostics: Diagnostics | None = None,
) -> fedavg.FedAvg:
    """Return the federated loop over a learner's entries; clients' states are kept with `run`."""
    options, entries, scale = learner.options, learner.entries, learner.loss_scale
    sizes = [len(shard) for shard in shards]
    store = functools.partial(client_store, learner, sizes, run)
    training = ClientTraining(learner, shards, store)
    settings = dict(lr=options.server_lr, momentum=options.server_momentum, tau=options.server_tau)
    server = Server(options.server, entries.theta, **settings)
    companions = {"loss_scale": scale, "server": server}
    local, private = training.local, options.dp_clip is not None
    trains = None if entries.index is not None else learner.flat.marked()
    check_apart(learner, sizes)

    def server_step(theta: torch.Tensor, total: torch.Tensor, unit: float) -> None:
        if private and options.dp_noise:
            std = options.dp_noise * options.dp_clip / (options.fraction * len(sizes))
            where = dict(seed=options.seed, round=federation.round, where=trains)
            privacy.add_noise_(total, std, unit=unit, **where)
        server.step_(theta, total, unit)
        if local is not None:
            local.average_into_(theta)

    def apart(round: int) -> bool:
        return options.aggregate in APART or (diagnostics is not None and diagnostics.due(round))

    def combine(rows: Tensor, weights: np.ndarray, clients: np.ndarray, round: int) -> Tensor:
        if diagnostics is not None and len(rows) == len(clients) and diagnostics.due(round):
            diagnostics.watch(federation.theta_global, rows, weights, clients)
        return combined(options, rows, weights, entries.size)

    federation = fedavg.FedAvg(
        entries.theta,
        sizes,
        training.one,
        train_clients=training.heads if train_together(options) else None,
        keep=training.keep,
        sample=functools.partial(sampled_clients, options, sizes),
        answering=functools.partial(answering_clients, options),
        weigh=functools.partial(client_weights, training, sizes),
        server_step=server_step,
        client_bytes=client_bytes(learner, training),
        on_reset=entries.scatter,
        clip=functools.partial(privacy.clip_factor, bound=options.dp_clip) if private else None,
        step_empty=private,
        edit=contribution_edit(learner, training),
        apart=apart,
        combine=combine,
        companions=companions | training.states,
        group=learner.group,
    )
    return federation


def contribution_edit(learner: Learner, training: ClientTraining) -> Callable | None:
    """Return what a client does to its contribution before it is sent, if anything.

    What it drops is not sent either: the server knows the seed of the pattern. Hidden contributions
    have no zeros.
    """
    options = learner.options
    dropping, concealing = options.aggregate == "dare", options.secure_aggregation
    shared = shared_entries(learner, training)
    dense, _ = client_bytes(learner, training)

    def edit(contribution: Tensor, client: int, clients: np.ndarray, round: int) -> int:
        where, sent = dict(seed=options.seed, round=round, client=client), dense
        if dropping:
            kept = editing.drop_(contribution, options.dare_drop, **where)
            sent -= 4 * int((shared & ~kept).sum())
        if concealing:
            fedavg.conceal_(contribution, clients=clients, **where)
        return dense if concealing else sent

    return edit if dropping or concealing else None


def combined(options: argparse.Namespace, rows: Tensor, weights: np.ndarray, size: int) -> Tensor:
    """Return what --aggregate makes of contributions (m, P), or of their sum (1, P).

    Args:
        size: entries of P that are not padding.
    """
    if options.aggregate == "ties":
        return editing.ties(rows, weights, keep=options.ties_keep, size=size)
    if options.aggregate == "sign":
        return editing.sign_elected(rows, weights)
    return fedavg.add_up(rows)


def sampled_clients(options: argparse.Namespace, sizes: list[int], round: int) -> np.ndarray:
    """Return the clients that are sent the model in a round."""
    where = dict(seed=options.seed, round=round)
    if options.dp_clip is not None:
        return privacy.sample_poisson(len(sizes), options.fraction, **where)
    if options.fedvc:
        return participation.sample_by_size(sizes, options.fraction, **where)
    return fedavg.sample_clients(len(sizes), options.fraction, **where)


def answering_clients(options: argparse.Namespace, clients: np.ndarray, round: int) -> np.ndarray:
    """Return those of a round's clients that send their result."""
    where = dict(seed=options.seed, round=round)
    return participation.drop_out(clients, options.dropout, **where) if options.dropout else clients


def client_weights(
    training: ClientTraining, sizes: list[int], clients: np.ndarray, round: int
) -> np.ndarray:
    """Return how much each of a round's clients counts: (m,)."""
    options = training.options
    if options.dp_clip is not None:  # a denominator that no client moves
        return np.full(len(clients), 1 / (options.fraction * len(sizes)))
    counted = [1] * len(sizes) if options.fedvc else sizes
    weights = participation.shares(counted, clients)
    if options.aggregate == "fednova":
        efforts = [training.effort(k, round) for k in clients]
        weights = participation.normalised_averaging(weights, efforts)
    if options.aggregate == "dare":
        weights = weights / (1 - options.dare_drop)
    return weights


def shared_entries(learner: Learner, training: ClientTraining) -> Tensor:
    """Return which entries of theta are parameters that clients share: (P,) bool."""
    theta, masked = learner.entries.theta, learner.entries.index is not None
    shared = torch.ones_like(theta, dtype=torch.bool) if masked else learner.flat.marked()
    if training.local is not None:
        shared[training.local.at] = False
    return shared


def client_bytes(learner: Learner, training: ClientTraining) -> tuple[int, int]:
    """Return the most that a client sends and what it receives in a round."""
    sent = int(shared_entries(learner, training).sum())
    up = sent * (8 if learner.options.secure_aggregation else 4)
    variates = 4 * sent if training.scaffold else 0  # the change of c_k, and c
    return up + variates, 4 * sent + variates


def memory_room(learner: Learner) -> dict[torch.device, float]:
    """Return the bytes that a process may take on its device and on the host, where that is known.

    Processes hold the same, and share the host.
    """
    group, places = learner.group, (learner.workspace.device, torch.device("cpu"))
    sharing = {"cuda": 1, "cpu": group.size}
    room = [SHARE[place.type] * free_memory(place) / sharing[place.type] for place in places]
    lowest = map(min, zip(*group.gather(room), strict=True))
    return dict(zip(places, lowest, strict=True))


def check_apart(learner: Learner, sizes: list[int]) -> None:
    """Raise ValueError where a round's changes are kept apart and do not fit on the device."""
    options, device = learner.options, learner.workspace.device
    if options.aggregate not in APART and not options.diagnostics:
        return
    each = 16  # bytes of a change's entry and its copy
    needed = each * len(learner.entries.theta) * max(1, round(options.fraction * len(sizes)))
    room = memory_room(learner)[device]
    if room and needed > room:
        option = "--diagnostics" if options.diagnostics else f"--aggregate {options.aggregate}"
        raise ValueError(
            f"{option} keeps a round's changes apart and copies them, {needed / 1e9:,.1f} GB, and "
            f"there is room for {room / 1e9:,.1f} GB: a lower --fraction, or a mask (--mask-rule)"
        )


def client_store(
    learner: Learner, sizes: list[int], run: runs.Run | None, name: str, each: int
) -> dict:
    """Return where a method's client states lie: on the device where they fit, else the host.

    Raises:
        ValueError: they fit on neither.
    """
    options = learner.options
    taking_part = max(1, round(options.fraction * len(sizes))) * options.rounds
    needed = each * min(len(sizes), taking_part)
    host, room = torch.device("cpu"), memory_room(learner)
    place = next((place for place in room if needed <= room[place]), None)
    if place is None and room[host]:  # a host that does not say is trusted
        raise ValueError(
            f"--{name.replace('_', '-')} keeps {needed / 1e9:,.1f} GB, {each / 1e6:,.1f} MB for "
            f"each client, and the free memory has room for {max(room.values()) / 1e9:,.1f} GB: "
            "fewer --clients, or a mask (--mask-rule), whose entries alone are kept"
        )
    store = {"place": place or host}
    if run is not None:
        folder = run.folder / name

        def write(path: Path, vector: Tensor) -> None:
            run.keep(f"{name}/{path.name}", vector)

        def read(path: Path) -> Tensor:
            return run.kept(f"{name}/{path.name}")

        store |= dict(folder=folder, write=write if run.writes else None, read=read)
    return store


def privacy_spent(options: argparse.Namespace, rounds: int) -> dict[str, float]:
    """Return the epsilon of a run's first rounds; nothing where no noise was added."""
    if not options.dp_noise:
        return {}
    spent = privacy.epsilon(options.dp_noise, options.fraction, rounds, options.dp_delta)
    return {"epsilon": spent}


def privacy_of_run(options: argparse.Namespace, rounds: int, mask: Mask | None) -> dict:
    """Return what a summary says of privacy; {} of a run without."""
    if options.dp_clip is None:
        return {}
    names = ("dp_noise", "dp_clip", "dp_delta")
    told = {name: getattr(options, name) for name in names} | privacy_spent(options, rounds)
    return {"privacy": told | {"not_covered": uncovered(options, mask)}}


def uncovered(options: argparse.Namespace, mask: Mask | None) -> list[str]:
    """Name what a run takes from the clients' data outside of its private rounds."""
    found = [f"the {options.head} head fitted to their data"] * (options.head != "linear")
    scored = mask is not None and masks.needs_scores(mask.made["mask_rule"])
    return found + ["the mask calibrated on their data"] * scored
