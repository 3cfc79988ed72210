"""train.py centralized: the baseline, SGD on all training data."""

from __future__ import annotations

from functools import partial

import torch

import data
from centralized import Centralized
from commands.options import GROUPS, Line, learner_options
from commands.search import searched
from study.plots import plot_curves
from training import run_folder, session
from training.learner import Learner
from training.mirrors import mirror
from training.watching import head_note
from training.workspace import Workspace

OPTIONS = GROUPS["centralized"]


def run(line: Line) -> None:
    """Train on all training data; with --search choose learning rate and weight decay first."""
    o = line.groups
    workspace = Workspace(o.source, o.machine, o.backbone)
    name = line.name  # before a search: the rate is a part of it
    if o.search.search:
        line = searched(line, workspace.group, partial(train, workspace))
    train(workspace, line, name, test=True)


def train(workspace: Workspace, line: Line, name: str, test: bool) -> dict:
    """Run one centralised training in its folder, perhaps looking at the test set; returns its
    summary."""
    o, epochs = line.groups, line.groups.epochs.epochs
    model = workspace.build_model()
    folder = run_folder.open_run(workspace, model, name, line.stored)
    if summary := run_folder.finished_summary(folder, "epoch", epochs, o.watching.early_stop):
        mirror(folder, "epoch", o.watching)([])
        return summary
    with folder.opening():
        learner = session.prepare(workspace, model, folder, learner_options(o))
        learner.keep_activations()
        process = loop(learner, line)
    if note := head_note(o.head.head, o.head.freeze_head, learner.mask is not None):
        print(note)
    return session.drive(
        folder,
        process,
        "epoch",
        epochs,
        learner,
        o.epochs.eval_every,
        o.watching,
        draw_curves=plot_curves,
        theta=lambda: learner.entries.theta,
        test=test,
    )


def loop(learner: Learner, line: Line) -> Centralized:
    """Return the loop of epochs over a learner's entries."""
    o, workspace = line.groups, learner.workspace
    entries, scale, grad = learner.entries, learner.loss_scale, learner.flat.grad
    backward = learner.graphed(learner.backward, o.graph.cuda_graph) or learner.backward
    tensors = {"theta": entries.theta, "loss_scale": scale.state}
    if entries.momentum is not None:
        tensors["momentum"] = entries.momentum

    def draw(epoch: int) -> torch.Tensor:
        seed, batch_size = o.source.seed, o.epochs.batch_size
        index, keep = workspace.train_index, learner.seen_patches
        draws = data.draw_epoch(index, batch_size, seed=seed, epoch=epoch, keep=keep)
        return draws.to(workspace.device)

    def train_batch(draws: torch.Tensor, at: float) -> torch.Tensor:
        lr = o.schedule.at(at, total=o.epochs.epochs, lr=entries.sgd.lr)

        def attempt(loss_scale: float) -> torch.Tensor:
            return backward(draws=draws, loss_scale=loss_scale)

        def overflowed() -> bool:
            return not torch.isfinite(grad).all().item()

        loss, used = scale.attempt(attempt, overflowed)
        entries.step(lr, first=at == 0, grad_scale=used)
        entries.gather()
        scale.next_round()
        return loss

    return Centralized(draw, train_batch, tensors, entries.scatter, o.epochs.eval_every)
