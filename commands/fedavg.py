"""train.py fedavg: train by FedAvg, in rounds of clients' local steps."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

from commands.accounts import (
    absent_classes,
    communication,
    opening_bytes,
    privacy_of_run,
    privacy_spent,
    seen,
    warnings_of,
)
from commands.options import GROUPS, Line, federation, learner_options
from commands.search import searched
from machine import ranks
from study.plots import plot_curves
from training import run_folder, session
from training.diagnostics import Diagnostics
from training.learner import Learner
from training.mirrors import mirror
from training.rounds import federate
from training.watching import evaluation_due, head_note
from training.workspace import Workspace

OPTIONS = GROUPS["fedavg"]


def run(line: Line) -> None:
    """Train by FedAvg; with --search choose learning rate and more first.

    --processes spreads the clients over the cores of a CPU, torchrun --nproc-per-node=N train.py
    fedavg ... over N GPUs, to the same bits at the same --threads; several nodes need a common file
    system.
    """
    o = line.groups
    with ranks.launched_group() as group:
        workspace = Workspace(o.source, o.machine, o.backbone, group, o.sharding)
        name = line.name  # before a search: the rate is a part of it
        if o.search.search:
            line = searched(line, group, partial(train, workspace))
        train(workspace, line, name, test=True)


def train(workspace: Workspace, line: Line, name: str, test: bool) -> dict:
    """Run one federated training in its folder, perhaps looking at the test set; returns its
    summary."""
    o, rounds, shards = line.groups, line.groups.rounds.rounds, workspace.shards
    with workspace.group.first_then_others():
        model = workspace.build_model()
        folder = run_folder.open_run(workspace, model, name, line.stored)
        patience = o.watching.early_stop
        if summary := run_folder.finished_summary(folder, "round", rounds, patience):
            mirror(folder, "round", o.watching)([])
            return summary
        with folder.opening():
            learner = session.prepare(workspace, model, folder, learner_options(o))
    with folder.opening(), workspace.group.together():
        learner.keep_activations()
        diagnostics = watching(learner, o)
        process = federate(learner, federation(o), folder, diagnostics)
    for warning in warnings_of(o, learner.mask):
        print(f"warning: {warning}", file=sys.stderr)
    if note := head_note(o.head.head, o.head.freeze_head, learner.mask is not None):
        print(note)
    if absent := workspace.classes_without_client():
        print(f"no client holds {len(absent)} of the classes: {', '.join(absent)}")

    def account() -> dict:
        sent = communication(folder.records(), learner.dense_size)
        labels = workspace.dataset.train.labels.numpy()
        sent |= seen(folder.records(), shards, labels)
        return sent | privacy_of_run(o, process.round, learner.mask) | absent_classes(absent)

    def measure() -> dict:
        figures = diagnostics.measure() if diagnostics else {}
        return figures | privacy_spent(o, process.round)

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


def watching(learner: Learner, o: SimpleNamespace) -> Diagnostics | None:
    """Return the figures of --diagnostics, due with every evaluation."""
    if not o.diagnosing.diagnostics:
        return None
    total, every = o.rounds
    return Diagnostics(learner, lambda t: evaluation_due(t, every, total))
