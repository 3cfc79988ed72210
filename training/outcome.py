"""What a run has come to: its model as the checkpoint holds it, for each client, and as a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch

import data
import model as vit
from flat import Entries, FlatView
from machine import runs, safe_files
from machine.device import Machine
from machine.safe_files import DamagedFile
from machine.status import Status
from training.clients import Clients
from training.features import set_fitted_head
from training.learner import Learner
from training.mask_cache import find_mask
from training.rounds import Federation, client_terms
from training.session import LearnerOptions, prepare
from training.workspace import Backbone, Sharding, Source, Workspace

PERSONAL = 2**40  # the round of the batches that personalise: beyond those of any run


class Best(NamedTuple):
    """Which weights."""

    best: Annotated[bool, "the weights that validated best [the last]"] = False


class Recipe(NamedTuple):
    """The options that a run was made with, as far as what it has come to depends on them."""

    source: Source
    backbone: Backbone
    machine: Machine
    learner: LearnerOptions
    weights_sha256: str
    sharding: Sharding | None  # of a federated run
    federation: Federation | None


class Outcome:
    """A run's last checkpoint, or its best weights, its options and its data.

    Raises:
        ValueError: no run folder, or none with a checkpoint, or no best weights.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, best: bool = False):
        self.run, self.recipe = runs.Run(folder), recipe
        checkpoint = self.run.load()
        if checkpoint is None:
            raise ValueError(f"{folder} holds no checkpoint: a run that trains none")
        try:
            self.process = process = checkpoint["state"]["process"]
            unit = "round" if "round" in process else "epoch"
            self.reached = {unit: process[unit]}
            self.theta = process["theta"] if "theta" in process else process["tensors"]["theta"]
        except (KeyError, TypeError):
            raise DamagedFile(f"{self.run.checkpoint_path} holds no trained weights") from None
        self.best = best
        if best:
            weights = checkpoint["state"].get("best")
            if not weights:
                raise ValueError(f"{folder} holds no best weights: it has no validation data")
            with safe_files.contents(self.run.checkpoint_path):
                self.reached[unit], self.theta = weights["at"], weights["weights"]

    @functools.cached_property
    def workspace(self) -> Workspace:
        """The run's data, on this command's device."""
        recipe = self.recipe
        return Workspace(recipe.source, recipe.machine, recipe.backbone, sharding=recipe.sharding)

    @property
    def shards(self) -> list[np.ndarray]:
        """The clients' indices into the training images; centrally there is one client."""
        return self.workspace.shards

    @property
    def suffices(self) -> bool:
        """Whether the checkpoint holds the whole backbone, so that its start is not needed."""
        o = self.recipe.learner
        masked = o.given_mask.mask is not None or o.masking.mask_rule is not None
        headed = o.head.head == "linear" or (self.run.folder / "head.pt").exists()
        return o.training.train == "all" and headed and not masked

    def start(self) -> vit.VisionTransformer:
        """Return the model with the backbone weights that the run began with.

        Raises:
            ValueError: the weights have moved, or changed since.
        """
        weights = self.recipe.backbone.weights
        try:
            model = self.workspace.build_model()
        except ValueError as error:
            raise ValueError(
                f"{self.run.folder} needs the weights that it began with ({error}): --weights FILE "
                "says where they are now"
            ) from None
        if vit.fingerprint(model) != self.recipe.weights_sha256:
            raise ValueError(
                f"{self.run.folder} began with other weights than --weights {weights} now are"
            )
        return model

    def frame(self) -> vit.VisionTransformer:
        """Return a model for the checkpoint's weights: the start, where it does not hold all."""
        return self.workspace.build_model(load=False) if self.suffices else self.start()

    def untrained_learner(self, model: vit.VisionTransformer | None = None) -> Learner:
        """Return the learner that the run had, as it began, or of another model."""
        model = self.start() if model is None else model
        return prepare(self.workspace, model, self.run, self.shards, self.recipe.learner)

    def learner(self) -> Learner:
        """Return the learner that the run had, holding the checkpoint's parameters."""
        learner = self.untrained_learner(self.frame())
        self.load_into(learner.entries)
        return learner

    def load_into(self, entries: Entries) -> None:
        """Let entries hold the checkpoint's parameters, if these fit."""
        with safe_files.contents(self.run.checkpoint_path):
            if self.theta.shape != entries.theta.shape or not self.theta.is_floating_point():
                raise TypeError(f"theta is {tuple(self.theta.shape)} {self.theta.dtype}")
            entries.load(self.theta)

    def model(self) -> vit.VisionTransformer:
        """Return the model in fp32, from the checkpoint alone: what does not train is as it was."""
        model, o = self.frame(), self.recipe.learner
        if o.head.head != "linear":
            set_fitted_head(self.workspace, model, o.head.head, o.head.head_images, self.run)
        names = vit.trained_names(model, o.training.train, o.head.freeze_head)
        file, masking = o.given_mask.mask, o.masking
        mask = find_mask(self.workspace, model, file, masking, self.shards, self.run)
        parameters = dict(model.named_parameters())
        flat = FlatView((n, parameters[n]) for n in (mask.trained(names) if mask else names))
        self.load_into(Entries(flat, mask.flat(flat) if mask else None, o.sgd))
        return model


@torch.no_grad()
def correct_on(learner: Learner, index: np.ndarray) -> np.ndarray:
    """Return which of these training-file images the model gets right: (n,) bool."""
    at, right = torch.from_numpy(index).to(learner.labels["train"].device), []
    for chunk in data.in_chunks(len(at), learner.workspace.eval_batch):
        logits = learner.logits_of(learner.gather("train", at[chunk]), None)
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
        for client, shard in enumerate(finished.shards)
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
    terms = client_terms(learner, finished.shards, federation, finished.run)
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
        finished.shards,
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


def export(model: vit.VisionTransformer, path: Path, with_head: bool = False) -> None:
    """Write a model's parameters as torch.save of a dictionary of fp32 tensors, under DINO's keys.

    Without the head the keys are those of DINO's VisionTransformer. timm 1.0.31 loads both forms
    strictly (vit_small_patch16_224 and vit_tiny_patch16_224, num_classes=0 without the head) and
    then gives this model's features and logits on random images, to 3e-6 of values up to 3.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: choose another file, or delete it")
    state = {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if with_head or not name.startswith("head.")
    }
    try:
        safe_files.write_atomically(path, functools.partial(torch.save, state))
    except (OSError, RuntimeError) as error:  # torch.save has both
        raise ValueError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
