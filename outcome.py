"""What a run has come to: its model as the checkpoint holds it, and files of its weights.

`options` is the namespace of train.py's command line: what may differ from when the run was made.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch

import model as vit
import runs
from entries import Entries
from learner import Learner, find_mask, set_fitted_head
from workspace import Workspace, fingerprint

HERE = ("data_dir", "device", "threads", "eval_batch")  # of this command, not of the run


class Outcome:
    """A run's last checkpoint, its options and its data.

    Raises:
        ValueError: no run folder, or none with a checkpoint.
    """

    def __init__(self, folder: str | Path, options: argparse.Namespace):
        self.run = runs.Run(folder)
        self.config = self.run.config()
        self.options = stored = argparse.Namespace(**self.config["options"])
        absent = {"mask": None, "mask_rule": None, "keep_tokens": 1.0, "compile": False}
        for name, value in absent.items():
            vars(stored).setdefault(name, value)  # a run from before these were options
        for name in HERE:
            setattr(stored, name, getattr(options, name))
        if options.precision != "auto":
            stored.precision = options.precision
        checkpoint = self.run.load()
        if checkpoint is None:
            raise ValueError(f"{folder} holds no checkpoint yet")
        process = checkpoint["state"]["process"]
        unit = "round" if "round" in process else "epoch"
        self.reached = {unit: process[unit]}
        self.theta = process["theta"] if "theta" in process else process["tensors"]["theta"]

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
        runs.write_atomically(path, functools.partial(torch.save, state))
    except (OSError, RuntimeError) as error:  # torch.save has both
        raise ValueError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
