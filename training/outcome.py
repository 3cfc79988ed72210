"""What a run has come to: its model as the checkpoint holds it, for each client, and as a file.

`options` is the namespace of train.py's command line: what may differ from when the run was made.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

import client_accuracy
import data
import model as vit
import runs
import safe_files
from entries import Entries
from federation import client_store
from learner import Learner, find_mask, set_fitted_head
from local_training import ClientTraining
from safe_files import DamagedFile
from status import Status
from workspace import Workspace, fingerprint

HERE = ("data_dir", "device", "threads", "eval_batch")  # of this command, not of the run
NEEDED = dict(  # of the options in config.json
    **dict.fromkeys(("data", "model", "weights", "normalisation", "train", "head"), str),
    **dict(image_size=int, seed=int, freeze_head=bool, nesterov=bool, batch_size=(int, str)),
    **dict(weights_sha256=str, precision=str),
    **dict.fromkeys(("val_fraction", "lr", "momentum", "weight_decay"), (int, float)),
)
PERSONAL = 2**40  # the round of the batches that personalise: beyond those of any run


class Outcome:
    """A run's last checkpoint, or with --best its best weights, its options and its data.

    Raises:
        ValueError: no run folder, or none with a checkpoint, or no best weights.
    """

    def __init__(self, folder: str | Path, options: argparse.Namespace):
        self.run = runs.Run(folder)
        self.config = self.run.config()
        self.options = stored = argparse.Namespace(**self.config["options"])
        for name in HERE:
            setattr(stored, name, getattr(options, name))
        stored.best = options.best
        stored.cuda_graph = "off"  # a run that was made on a GPU is evaluated anywhere
        if options.precision != "auto":
            stored.precision = options.precision
        checkpoint = self.run.load()
        if checkpoint is None:
            raise ValueError(
                f"{folder} holds no checkpoint: a run of {stored.command}, without one"
            )
        for name, kind in NEEDED.items():
            if not isinstance(getattr(stored, name, None), kind):
                raise DamagedFile(f"{self.run.config_path} is damaged: {name} in its options")
        try:
            self.process = process = checkpoint["state"]["process"]
            unit = "round" if "round" in process else "epoch"
            self.reached = {unit: process[unit]}
            self.theta = process["theta"] if "theta" in process else process["tensors"]["theta"]
        except (KeyError, TypeError):
            raise DamagedFile(f"{self.run.checkpoint_path} holds no trained weights") from None
        if options.best:
            best = checkpoint["state"].get("best")
            if not best:  # or begun without --early-stop, and never better since
                raise ValueError(f"{folder} has kept no best weights: --early-stop keeps them")
            self.reached[unit], self.theta = best["at"], best["weights"]

    @functools.cached_property
    def workspace(self) -> Workspace:
        """The run's data, on this command's device."""
        return Workspace(self.options)

    @functools.cached_property
    def shards(self) -> list:
        """The clients' indices into the training images; centrally there is one client."""
        federated = "clients" in self.options
        return self.workspace.shards() if federated else [self.workspace.train_index]

    def start(self) -> vit.VisionTransformer:
        """Return the model with the backbone weights that the run began with.

        Raises:
            ValueError: the weights have changed since.
        """
        model = self.workspace.build_model()
        if fingerprint(model) != self.options.weights_sha256:
            raise ValueError(
                f"{self.run.folder} began with other weights than --weights {self.options.weights} "
                "now are"
            )
        return model

    def begun(self) -> Learner:
        """Return the learner that the run had, as it began."""
        arguments = self.start(), self.options, self.run.folder, self.shards
        return Learner(self.workspace, *arguments)

    def learner(self) -> Learner:
        """Return the learner that the run had, holding the checkpoint's parameters."""
        learner = self.begun()
        learner.entries.load(self.theta)
        return learner

    def model(self) -> vit.VisionTransformer:
        """Return the model in fp32, from the checkpoint alone: what does not train is as it was."""
        model, options, folder = self.start(), self.options, self.run.folder
        if options.head != "linear":
            set_fitted_head(self.workspace, model, options.head, folder / "head.pt")
        names = vit.trained_names(model, options.train, options.freeze_head)
        mask = find_mask(self.workspace, model, options, folder / "mask.pt", self.shards)
        parameters = dict(model.named_parameters())
        flat = vit.FlatView((n, parameters[n]) for n in (mask.trained(names) if mask else names))
        Entries(flat, mask.flat(flat) if mask else None, options).load(self.theta)
        return model


@torch.no_grad()
def correct_on(learner: Learner, index: np.ndarray) -> np.ndarray:
    """Return which of these training-file images the model gets right: (n,) bool."""
    at, found = torch.from_numpy(index).to(learner.labels["train"].device), []
    for chunk in data.in_chunks(len(at), learner.workspace.eval_batch):
        logits = learner.logits_of(learner.gather("train", at[chunk]), None)
        found.append(logits.argmax(1) == learner.labels["train"][at[chunk]])
    return torch.cat(found).cpu().numpy()


class Personalising(ClientTraining):
    """A client's J local steps at --lr from the final model, on batches that no round has seen."""

    def lr(self, round: int) -> float:
        """Return --lr, whatever the schedule."""
        return self.options.lr

    def steps(self, client: int, round: int) -> int:
        """Return J, of stragglers too."""
        return self.options.J

    def personalise(self, client: int) -> None:
        """Leave the client's own model in the learner."""
        self.one(client, PERSONAL)
        if self.local is not None:
            entries = self.learner.entries
            entries.theta[self.local.at] = self.own_entries
            entries.scatter()


def per_client(finished: Outcome, personalised: int = 0) -> dict:
    """Evaluate the model on every client's share of the validation set, and by class.

    Args:
        personalised: how many clients, evenly chosen, are evaluated after local steps of their own
            too; 0 leaves that out.

    Raises:
        ValueError: the run has no clients, or no validation data.
    """
    options, workspace = finished.options, finished.workspace
    if "clients" not in options:
        raise ValueError(f"--per-client: {finished.run.folder} has no clients")
    if not len(workspace.val_index):
        raise ValueError(f"--per-client: {finished.run.folder} holds out no validation data")
    learner, classes = finished.learner(), workspace.classes
    labels = workspace.dataset.train.labels.numpy()
    val_labels, right = labels[workspace.val_index], correct_on(learner, workspace.val_index)
    shares = [
        client_accuracy.validation_share(
            val_labels,
            np.bincount(labels[shard], minlength=classes),
            seed=options.seed,
            client=client,
        )
        for client, shard in enumerate(finished.shards)
    ]
    rows = [
        {"client": k, "images": len(share), "acc": float(right[share].mean())}
        for k, share in enumerate(shares)
    ]
    figures = finished.reached | {"global": client_accuracy.spread([r["acc"] for r in rows])}
    if personalised:
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(personalised, len(rows))).round())
        chosen = [int(k) for k in chosen]
        add_personalised(finished, learner, shares, [rows[k] for k in chosen])
        for name, key in (("same_clients_global", "acc"), ("personalised", "personalised_acc")):
            figures[name] = client_accuracy.spread([rows[k][key] for k in chosen])
    accuracy = client_accuracy.by_class(val_labels, right, classes)
    named = zip(workspace.dataset.classes, accuracy.tolist(), strict=True)
    by_class = {name: value for name, value in named if value == value}
    return figures | {"clients": rows, "by_class": by_class}


def add_personalised(
    finished: Outcome, learner: Learner, shares: list[np.ndarray], rows: list[dict]
) -> None:
    """Add to some clients' rows the accuracy after local steps of their own from the model."""
    sizes = [len(shard) for shard in finished.shards]
    store = functools.partial(client_store, learner, sizes, finished.run)
    training = Personalising(learner, finished.shards, store)
    if training.states and finished.options.best:
        raise ValueError(
            f"--personalised with --best: {finished.run.folder} keeps its clients' states of the "
            "last round alone"
        )
    companions = finished.process["companions"]
    for name, state in ({"loss_scale": learner.loss_scale} | training.states).items():
        state.load_state_dict(companions[name])
    status = Status("personalised clients", len(rows))
    for done, row in enumerate(rows, 1):
        learner.entries.load(finished.theta)
        training.personalise(row["client"])
        share = finished.workspace.val_index[shares[row["client"]]]
        row["personalised_acc"] = float(correct_on(learner, share).mean())
        status.show(done)
    status.close()
    learner.entries.load(finished.theta)


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
