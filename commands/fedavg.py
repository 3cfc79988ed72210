"""train.py fedavg: train by FedAvg, in rounds of clients' local steps."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import masks
import model as vit
from commands.options import GROUPS, Line, federation, learner_options
from commands.search import search_then_train
from fedavg import FedAvg
from federated.cohort import cohort_size
from federated.privacy import Privacy, epsilon
from machine import ranks, runs
from machine.device import choose_device, exact_place, free_memory
from study.plots import plot_curves
from training import run_folder, session
from training.diagnostics import Diagnostics
from training.learner import Learner
from training.mask_file import Mask
from training.memory import check_apart
from training.mirrors import mirror
from training.rounds import (
    Federation,
    client_terms,
    cohort_of,
    make_clients,
    make_server,
    method_of,
    secret_of,
    states_of,
    watched,
)
from training.watching import evaluation_due, head_note
from training.workspace import Workspace

OPTIONS = GROUPS["fedavg"]
NEVER_COVERED = (  # by epsilon, of what a private run leaves behind
    "the number of clients in each round, which the log holds",
    "options that were chosen by looking at earlier runs",
    "what eval --per-client and --personalised show of single clients",
    "whoever has the run's checkpoint, which holds its secret: hand on what export writes",
)


def run(line: Line) -> None:
    """Train by FedAvg; with --search choose learning rate and more first.

    --processes spreads the clients over the cores of a CPU, torchrun --nproc-per-node=N train.py
    fedavg ... over N GPUs, to the same bits at the same --threads; several nodes need a common file
    system.
    """
    o = line.groups
    with ranks.launched_group() as group:
        workspace = Workspace(o.source, o.machine, o.backbone, group)
        with group.first_then_others():
            shards = workspace.shards(o.sharding)
        search_then_train(line, group, partial(train, workspace, shards))


def train(
    workspace: Workspace, shards: list[np.ndarray], line: Line, name: str, test: bool
) -> dict:
    """Run one federated training in its folder, perhaps looking at the test set; returns its
    summary."""
    o, rounds = line.groups, line.groups.rounds.rounds
    with workspace.group.first_then_others():
        model = workspace.build_model()
        folder = run_folder.open_run(workspace, model, name, line.stored, shards)
        patience = o.watching.early_stop
        if summary := run_folder.finished_summary(folder, "round", rounds, patience):
            mirror(folder, "round", o.watching)([])
            return summary
        with folder.opening():
            learner = session.prepare(workspace, model, folder, shards, learner_options(o))
    with folder.opening():
        learner.keep_activations()
        diagnostics = watching(learner, shards, o)
        process = federate(learner, shards, federation(o), folder, diagnostics)
    for warning in warnings_of(o, learner.mask):
        print(f"warning: {warning}", file=sys.stderr)

    def account() -> dict:
        sent = communication(folder.records(), learner.dense_size)
        labels = workspace.dataset.train.labels.numpy()
        sent |= seen(folder.records(), shards, labels)
        return sent | privacy_of_run(o, process.round, learner.mask) | absent_classes(absent)

    def measure() -> dict:
        figures = diagnostics.measure() if diagnostics else {}
        return figures | privacy_spent(o, process.round)

    if note := head_note(o.head.head, o.head.freeze_head, learner.mask is not None):
        print(note)
    if absent := workspace.classes_without_client():
        print(f"no client holds {len(absent)} of the classes: {', '.join(absent)}")
    return session.drive(
        folder,
        process,
        "round",
        rounds,
        learner,
        o.rounds.eval_every,
        o.watching,
        draw_curves=plot_curves,
        theta=lambda: process.theta,
        opening=opening_bytes(learner, len(shards)) | privacy_spent(o, 0) | absent_classes(absent),
        account=account,
        measure=measure,
        test=test,
    )


def processes(line: Line) -> int:
    """Return how many processes are to share a run's clients: those of --processes."""
    o, size = line.groups, line.groups.processes.processes
    if size != "auto":
        return size
    spread = o.training.train == "all" and o.local_steps.batch_size != "full"
    fits = o.machine.threads is None and ranks.launched() == 1 and ranks.CAN_FORK
    if not (spread and fits and choose_device(o.machine.device).type == "cpu"):
        return 1
    begun, cores = threads_of(line), torch.get_num_threads()
    if begun is not None:  # a run goes on to the same bits
        return cores if begun == 1 else 1
    return ranks.processes_that_pay(
        rounds=o.rounds.rounds,
        clients=cohort_size(o.sharding.clients, o.participation.fraction),
        images=o.local_steps.J * o.local_steps.batch_size,
        operations=training_operations(vit.MODELS[o.backbone.model], o.backbone.image_size),
        cores=cores,
        memory=free_memory(torch.device("cpu")),
        fitted=o.head.head != "linear",
    )


def threads_of(line: Line) -> int | None:
    """Return the threads that the command's run has begun with; None where it has not."""
    run = runs.Run(Path(line.groups.running.runs_dir) / line.name)
    try:
        return run.config()["environment"]["threads"] if run.config_path.exists() else None
    except (ValueError, KeyError, TypeError):
        return None  # opening it says what is wrong


def training_operations(shape: vit.ViTShape, image_size: int) -> float:
    """Return about how many floating-point operations a training pass of an image takes."""
    tokens = 1 + (image_size // shape.patch) ** 2
    return 3 * 2 * tokens * 12 * shape.width**2 * shape.depth  # the blocks' products


def federate(
    learner: Learner,
    shards: list[np.ndarray],
    o: Federation,
    run: runs.Run | None = None,
    diagnostics: Diagnostics | None = None,
) -> FedAvg:
    """Return the loop of rounds: the six things that a federated run is, and who shares the work.

    Args:
        run: keeps the clients' states.
        diagnostics: sees the rounds' changes.
    """
    check_apart(learner, o, len(shards), diagnostics)
    theta = learner.entries.theta.clone()
    theta = theta.to(exact_place(theta.device))  # sums and server are of 64 bits
    secret = secret_of(learner, o)
    terms = client_terms(learner, shards, o, run)
    clients = make_clients(learner, shards, o, list(terms.values()))
    method = method_of(learner, o, terms, len(shards), secret, run)
    if diagnostics is not None:
        method = watched(method, diagnostics, theta)
    return FedAvg(
        theta,
        train=clients,
        cohort=partial(cohort_of, o, clients, secret),
        server=make_server(o.server, theta),
        method=method,
        states=states_of(learner, terms, secret),
        group=learner.group,
    )


def watching(learner: Learner, shards: list[np.ndarray], o: SimpleNamespace) -> Diagnostics | None:
    """Return the figures of --diagnostics, due with every evaluation."""
    if not o.diagnosing.diagnostics:
        return None
    total, every = o.rounds
    return Diagnostics(learner, shards, lambda t: evaluation_due(t, every, total))


# ---------------------------------------------------------------------------- accounts


def opening_bytes(learner: Learner, clients: int) -> dict[str, int]:
    """Return what was sent before round 1: calibration, then the mask once to every client."""
    if learner.mask is None:
        return {}
    origin, broadcast = learner.mask.origin, clients * learner.mask.bytes
    return {"bytes_up": origin["bytes_up"], "bytes_down": origin["bytes_down"] + broadcast}


def absent_classes(names: list[str]) -> dict[str, list[str]]:
    """Return what log and summary say of classes that nobody holds; {} where there are none."""
    return {"classes_without_client": names} if names else {}


def communication(records: list[dict], dense_size: int) -> dict[str, float]:
    """Add up what a run has sent, and compare it with sending every parameter both ways.

    Args:
        dense_size: parameters that would train without a mask.
    """
    up, down = (sum(r.get(key, 0) for r in records) for key in ("bytes_up", "bytes_down"))
    answered = [r.get("answered", len(r.get("clients", ()))) for r in records]
    dropped = [len(r.get("dropped_out", ())) for r in records]
    dense = 4 * dense_size * (2 * sum(answered) + sum(dropped))
    return {"bytes_up": up, "bytes_down": down, "bytes_to_dense": (up + down) / max(1, dense)}


def seen(records: list[dict], shards: list[np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Count the clients that a run has trained on, and the classes that these hold.

    Args:
        labels: of the training images, which shards are indices into.
    """
    clients = sorted({k for record in records for k in record.get("clients", ())})
    classes = {int(c) for k in clients for c in np.unique(labels[shards[k]])}
    counts = {"clients": len(clients), "classes": len(classes)}
    return {"seen": counts} if clients else {}  # a private run does not name them


def privacy_spent(o: SimpleNamespace, rounds: int) -> dict[str, float]:
    """Return the epsilon of a run's first rounds; nothing where no noise was added."""
    noise, delta = o.privacy.dp_noise, o.privacy.dp_delta
    return {"epsilon": epsilon(noise, o.participation.fraction, rounds, delta)} if noise else {}


def privacy_of_run(o: SimpleNamespace, rounds: int, mask: Mask | None) -> dict:
    """Return what a summary says of privacy; {} of a run without."""
    privacy: Privacy = o.privacy
    if privacy.dp_clip is None:
        return {}
    settings = {n: getattr(privacy, n) for n in ("dp_noise", "dp_clip", "dp_delta", "dp_seed")}
    protects = bool(privacy.dp_noise) and privacy.dp_seed is None
    not_covered = [*uncovered(o, mask), *NEVER_COVERED]
    figures = settings | privacy_spent(o, rounds) | {"protects": protects}
    return {"privacy": figures | {"not_covered": not_covered}}


def uncovered(o: SimpleNamespace, mask: Mask | None) -> list[str]:
    """Name what a run takes from the clients' data outside of its private rounds."""
    fitted = [f"the {o.head.head} head fitted to their data"] * (o.head.head != "linear")
    scored = mask is not None and masks.needs_scores(mask.origin["mask_rule"])
    return fitted + ["the mask calibrated on their data"] * scored


def warnings_of(o: SimpleNamespace, mask: Mask | None) -> list[str]:
    """Return what a run's privacy and secure aggregation do not do, a sentence each."""
    warnings, privacy = [], o.privacy
    if privacy.dp_clip is not None and (left_out := uncovered(o, mask)):
        warnings.append(f"epsilon covers the rounds, not {' and '.join(left_out)}")
    if privacy.dp_noise and privacy.dp_seed is not None:
        warnings.append(
            "--dp-seed: the noise can be subtracted by whoever reads the seed, config.json holds "
            "it: this run protects nobody"
        )
    if privacy.secure_aggregation and (o.participation.dropout or privacy.dp_clip is not None):
        warnings.append(
            "--secure-aggregation: a client that is alone in its round is sent in the clear, and "
            "the log says so (in_the_clear)"
        )
    return warnings
