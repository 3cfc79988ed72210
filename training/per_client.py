"""How a run's model serves each client: on its mixture of classes, and after steps of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import data
from machine import safe_files
from machine.status import Status
from training.clients import Clients
from training.rounds import client_terms

if TYPE_CHECKING:
    from training.learner import Learner
    from training.outcome import Outcome

PERSONAL = 2**40  # the round of the batches that personalise: beyond those of any run


@torch.no_grad()
def correct_on(learner: Learner, index: np.ndarray) -> np.ndarray:
    """Return which of these training-file images the model gets right: (n,) bool."""
    at, right = torch.from_numpy(index).to(learner.labels["train"].device), []
    for chunk in data.in_chunks(len(at), learner.workspace.eval_batch):
        logits = learner.logits_of(learner.inputs_of("train", at[chunk]), None)
        right.append(logits.argmax(1) == learner.labels["train"][at[chunk]])
    return torch.cat(right).cpu().numpy()


class Personalising(Clients):
    """A client's J local steps at --lr from the final model, on batches that no round has seen."""

    def lr(self, round: int) -> float:
        """Return --lr, whatever the schedule."""
        return self.sgd.lr

    def local_steps(self, client: int, round: int) -> int:
        """Return J, of stragglers too."""
        return self.steps.J


def per_client(finished: Outcome, personalised: int = 0) -> dict:
    """Evaluate the model on every client's share of the validation set, and by class.

    Args:
        personalised: how many clients, evenly chosen, are evaluated after local steps of their own
            too; 0 leaves that out.

    Raises:
        ValueError: the run has no clients, or no validation data.
    """
    workspace = finished.workspace
    if finished.recipe.sharding is None:
        raise ValueError(f"--per-client: {finished.run.folder} has no clients")
    if not len(workspace.val_index):
        raise ValueError(f"--per-client: {finished.run.folder} holds out no validation data")
    learner, classes = finished.learner(), workspace.classes
    labels = workspace.dataset.train.labels.numpy()
    val_labels, right = labels[workspace.val_index], correct_on(learner, workspace.val_index)
    shares = [
        validation_share(
            val_labels,
            np.bincount(labels[shard], minlength=classes),
            seed=workspace.source.seed,
            client=client,
        )
        for client, shard in enumerate(workspace.shards)
    ]
    rows = [
        {"client": k, "images": len(share), "acc": float(right[share].mean())}
        for k, share in enumerate(shares)
    ]
    figures = finished.reached | {"global": spread([r["acc"] for r in rows])}
    if personalised:
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(personalised, len(rows))).round())
        chosen = [int(k) for k in chosen]
        add_personalised(finished, learner, shares, [rows[k] for k in chosen])
        for name, key in (("same_clients_global", "acc"), ("personalised", "personalised_acc")):
            figures[name] = spread([rows[k][key] for k in chosen])
    accuracy = by_class(val_labels, right, classes)
    named = zip(workspace.dataset.classes, accuracy.tolist(), strict=True)
    seen = {name: value for name, value in named if value == value}
    return figures | {"clients": rows, "by_class": seen}


def add_personalised(
    finished: Outcome, learner: Learner, shares: list[np.ndarray], rows: list[dict]
) -> None:
    """Add to some clients' rows the accuracy after local steps of their own from the model."""
    federation = finished.recipe.federation
    terms = client_terms(learner, federation, finished.run)
    states = {name: term for name, term in terms.items() if hasattr(term, "load_state_dict")}
    if states and finished.best:
        raise ValueError(
            f"--personalised with --best: {finished.run.folder} keeps its clients' states of the "
            "last round alone"
        )
    with safe_files.contents(finished.run.checkpoint_path):
        for name, state in ({"loss_scale": learner.loss_scale} | states).items():
            state.load_state_dict(finished.process["states"][name])
    clients = Personalising(
        learner,
        finished.workspace.shards,
        federation.steps,
        federation.schedule,
        federation.rounds,
        terms=list(terms.values()),
        cuda_graph=federation.cuda_graph,
    )
    status = Status("personalised clients", len(rows))
    for done, row in enumerate(rows, 1):
        theta = finished.theta.to(learner.entries.theta.device)
        clients.train_client(theta, row["client"], PERSONAL)  # its own model is in the learner now
        share = finished.workspace.val_index[shares[row["client"]]]
        row["personalised_acc"] = float(correct_on(learner, share).mean())
        status.show(done)
    status.close()
    learner.entries.load(finished.theta)


def validation_share(
    labels: np.ndarray, counts: Sequence[int], *, seed: int, client: int
) -> np.ndarray:
    """Return the places (n,) int64, ascending, of a client's validation images among `labels`.

    A client's share has its own mixture of classes q(c). It is the largest that the validation set
    holds: s = min over its classes of V(c) / q(c), V(c) validation images of class c, of which
    round(s q(c)) are drawn at random, each at most once. Clients' shares may overlap.

    Args:
        labels: (V,) classes of all validation images.
        counts: (classes,) how many training images of each class the client holds.

    Raises:
        ValueError: the client holds nothing.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.sum() > 0:
        raise ValueError(f"client {client} holds no image")
    present = np.bincount(labels, minlength=len(counts))
    mixture = counts / counts.sum()
    size = min(present[c] / mixture[c] for c in np.flatnonzero(counts))
    generator = data.random(seed, "validation shares", client)
    places = [
        generator.choice(np.flatnonzero(labels == c), int(size * mixture[c] + 0.5), replace=False)
        for c in np.flatnonzero(counts)
    ]
    return np.sort(np.concatenate(places)).astype(np.int64)


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Return the mean over clients, the mean of the worst tenth (rounded up), and the deviation."""
    ordered = np.sort(np.asarray(accuracies, np.float64))
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return {
        "mean_acc": float(ordered.mean()),
        "worst_decile_acc": float(worst.mean()),
        "std": float(ordered.std()),
    }


def by_class(labels: np.ndarray, correct: np.ndarray, classes: int) -> np.ndarray:
    """Return the accuracy on each class: (classes,) float64, NaN where it has no image."""
    seen = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, correct, minlength=classes)
    return np.divide(right, seen, out=np.full(classes, np.nan), where=seen > 0)
