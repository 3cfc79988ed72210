"""A federated run made from options: the six things that it is, and how each comes about."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from centralized import Schedule
from fedavg import Cohort, FedAvg, Method, State
from federated import methods
from federated.client_states import (
    ClientStates,
    ClientTerms,
    FedIR,
    LocalNorm,
    Prox,
    Scaffold,
    Term,
    importance_weights,
)
from federated.cohort import (
    Participation,
    drop_out,
    normalised_averaging,
    sample_by_size,
    sample_clients,
    sample_poisson,
    shares,
)
from federated.methods import Aggregation, Shared
from federated.privacy import Privacy, Secret
from federated.server import Server, ServerOptions
from machine.device import exact_place
from training.clients import Clients, HeadsTogether, LocalSteps, trains_together
from training.memory import check_apart, state_place

if TYPE_CHECKING:
    from machine.runs import Run
    from training.diagnostics import Diagnostics
    from training.learner import Learner


class Rounds(NamedTuple):
    """How long a federation goes on."""

    rounds: Annotated[int | None, "communication rounds", ">= 1"] = None
    eval_every: Annotated[
        int | None,
        "rounds between evaluations [a 20th of the run; further apart where they would cost a "
        "tenth of its time]",
        ">= 1",
    ] = None


class Federation(NamedTuple):
    """All that makes a run federated."""

    rounds: int
    steps: LocalSteps
    schedule: Schedule
    participation: Participation
    terms: ClientTerms
    aggregation: Aggregation
    privacy: Privacy
    server: ServerOptions
    cuda_graph: str = "auto"


def federate(
    learner: Learner,
    o: Federation,
    run: Run | None = None,
    diagnostics: Diagnostics | None = None,
) -> FedAvg:
    """Return the loop of rounds: the six things that a federated run is, and who shares the work.

    Args:
        run: keeps the clients' states.
        diagnostics: sees the rounds' changes.
    """
    check_apart(learner, o, diagnostics)
    theta = learner.entries.theta.clone()
    theta = theta.to(exact_place(theta.device))  # sums and server are of 64 bits
    secret = secret_of(learner, o)
    terms = client_terms(learner, o, run)
    clients = make_clients(learner, o, list(terms.values()))
    method = method_of(learner, o, terms, secret, run)
    if diagnostics is not None:
        method = watched(method, diagnostics, theta)
    return FedAvg(
        theta,
        train=clients,
        cohort=functools.partial(cohort_of, o, clients, secret),
        server=make_server(o.server, theta),
        method=method,
        states=states_of(learner, terms, secret),
        group=learner.group,
    )


# ---------------------------------------------------------------------------- who


def cohort_of(o: Federation, clients: Clients, secret: Secret | None, round: int) -> Cohort:
    """Return who takes part in a round, and with what weight.

    Args:
        secret: of a private run.
    """
    sizes, seed = [len(shard) for shard in clients.shards], clients.seed
    fraction, fedvc, _, dropout = o.participation
    if private := secret is not None:
        sent = sample_poisson(len(sizes), fraction, seed=secret.key, round=round)
    elif fedvc:
        sent = sample_by_size(sizes, fraction, seed=seed, round=round)
    else:
        sent = sample_clients(len(sizes), fraction, seed=seed, round=round)
    answering = drop_out(sent, dropout, seed=seed, round=round) if dropout else sent
    if private:  # a denominator that no client moves
        return Cohort(sent, answering, np.full(len(answering), 1 / (fraction * len(sizes))))
    weights = shares([1] * len(sizes) if fedvc else sizes, answering)
    if o.aggregation.aggregate == "fednova":
        efforts = [clients.effort(k, round) for k in answering]
        weights = normalised_averaging(weights, efforts)
    return Cohort(sent, answering, weights)


# ---------------------------------------------------------------------------- how clients train


def make_clients(learner: Learner, o: Federation, terms: Sequence[Term]) -> Clients:
    """Return how clients train: heads together where they can, else one client after the other."""
    stragglers, fedir = o.participation.straggler_fraction, o.terms.fedir
    together = trains_together(learner.training.train, o.steps, stragglers, fedir)
    return (HeadsTogether if together else Clients)(
        learner,
        learner.workspace.shards,
        o.steps,
        o.schedule,
        o.rounds,
        straggler_fraction=stragglers,
        terms=terms,
        cuda_graph=o.cuda_graph,
    )


def client_terms(learner: Learner, o: Federation, run: Run | None) -> dict[str, Term]:
    """Return what is a client's own, by name, in the order in which it is entered."""
    entries, workspace, terms = learner.entries, learner.workspace, {}
    place_of, count = functools.partial(state_place, learner, o), len(workspace.shards)
    if o.terms.scaffold:
        zeros, files = torch.zeros_like(entries.theta), state_files(run, "scaffold")
        place = place_of("--scaffold", zeros.nbytes)
        terms["scaffold"] = Scaffold(zeros, count, entries.correct, place=place, **files)
    if o.terms.local_norm:
        at, files = local_entries(learner), state_files(run, "local_norm")
        place = place_of("--local-norm", len(at) * entries.theta.itemsize)
        terms["local_norm"] = LocalNorm(entries.theta, at, count, place=place, **files)
    if o.terms.fedir:
        labels = workspace.dataset.train.labels.numpy()
        learner.class_weights = torch.ones(workspace.classes, device=entries.theta.device)

        def weights(client: int) -> np.ndarray:
            here = labels[workspace.shards[client]]
            return importance_weights(labels[workspace.train_index], here, workspace.classes)

        terms["fedir"] = FedIR(weights, learner.class_weights)
    if o.terms.prox:
        terms["prox"] = Prox(entries.pull_to)
    return terms


def state_files(run: Run | None, name: str) -> dict:
    """Return how a run keeps its clients' states in files, as ClientStates takes it."""
    if run is None:
        return {}

    def write(path: Path, vectors: dict[int, Tensor]) -> None:
        run.save_file(f"{name}/{path.name}", vectors)

    def read(path: Path) -> dict[int, Tensor]:
        return run.load_file(f"{name}/{path.name}")

    return {"folder": run.folder / name, "write": write if run.writes else None, "read": read}


def local_entries(learner: Learner) -> Tensor:
    """Return which entries belong to LayerNorm parameters: (S,) int64.

    Raises:
        ValueError: none of what trains does.
    """
    flat, entries = learner.flat, learner.entries
    marked = flat.marked(name for name in flat.shapes if "norm" in name)
    at = (marked if entries.index is None else marked[entries.index]).nonzero()[:, 0]
    if not len(at):
        raise ValueError("--local-norm keeps LayerNorm parameters local, and none of them trains")
    return at


# ---------------------------------------------------------------------------- what a method changes


def method_of(
    learner: Learner,
    o: Federation,
    terms: dict[str, Term],
    secret: Secret | None = None,
    run: Run | None = None,
) -> Method:
    """Return what the run's federated method changes in a round.

    Args:
        secret: of a private run.
        run: gives the masks of secure aggregation, which no other run shares.
    """
    entries, flat, privacy = learner.entries, learner.flat, o.privacy
    seed, masked = learner.workspace.source.seed, entries.index is not None
    every = torch.ones_like(entries.theta, dtype=torch.bool) if masked else flat.marked()
    every = every.to(exact_place(every.device))  # beside what it selects from
    shared, local = every.clone(), terms.get("local_norm")
    if local is not None:
        shared[local.at] = False
    sent = Shared(shared, entries.size, seed)
    method = methods.METHODS[o.aggregation.aggregate](o.aggregation, sent)
    if "scaffold" in terms:
        method = methods.with_variates(method, sent)
    if secret is not None:
        expected = o.participation.fraction * len(learner.workspace.shards)
        std = privacy.dp_noise * privacy.dp_clip / expected
        where = None if masked else every
        clip = privacy.dp_clip
        method = methods.private(method, clip=clip, std=std, secret=secret, where=where)
    if privacy.secure_aggregation:
        identity = f"{seed} {run.config()['id'] if run is not None else ''}"
        digest = hashlib.sha256(identity.encode()).digest()
        method = methods.hidden(method, int.from_bytes(digest[:8], "little"))
    return method if local is None else method._replace(after_=local.average_into_)


def make_server(o: ServerOptions, theta: Tensor) -> Server:
    """Return the server's rule with its state."""
    rule, lr, momentum, tau = o
    return Server(rule, theta, lr=lr, momentum=momentum, tau=tau)


def secret_of(learner: Learner, o: Federation) -> Secret | None:
    """Return the randomness of a private run, the same in every process; None of others."""
    if o.privacy.dp_clip is None:
        return None
    secret = Secret(o.privacy.dp_seed)
    secret.merge(learner.group)
    return secret


def states_of(learner: Learner, terms: dict[str, Term], secret: Secret | None) -> dict[str, State]:
    """Return what else changes over the rounds, by name: loss scale, clients' states, secret."""
    states = {name: term for name, term in terms.items() if isinstance(term, ClientStates)}
    states |= {"loss_scale": learner.loss_scale}
    return states if secret is None else states | {"secret": secret}


def watched(method: Method, diagnostics: Diagnostics, theta: Tensor) -> Method:
    """Let diagnostics see the parts of the rounds in which figures are due."""

    def combine(parts: Tensor, cohort: Cohort, round: int) -> Tensor:
        if len(parts) == len(cohort.clients) and diagnostics.due(round):
            diagnostics.watch(theta, parts, cohort.weights, cohort.clients)
        return method.combine(parts, cohort, round)

    def apart(round: int) -> bool:
        return method.apart(round) or diagnostics.due(round)

    return method._replace(combine=combine, apart=apart)
