"""What a run has come to: its model as the checkpoint holds it, and as a file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

import model as vit
from flat import Entries, FlatView
from machine import runs, safe_files
from machine.device import Machine
from machine.safe_files import DamagedFile
from training.features import set_fitted_head
from training.learner import Learner
from training.mask_cache import find_mask
from training.rounds import Federation
from training.session import LearnerOptions, prepare
from training.workspace import Backbone, Sharding, Source, Workspace


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
        return prepare(self.workspace, model, self.run, self.recipe.learner)

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
        mask = find_mask(self.workspace, model, file, masking, self.run)
        parameters = dict(model.named_parameters())
        flat = FlatView((n, parameters[n]) for n in (mask.trained(names) if mask else names))
        self.load_into(Entries(flat, mask.flat(flat) if mask else None, o.sgd))
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
        safe_files.write_atomically(path, functools.partial(torch.save, state))
    except (OSError, RuntimeError) as error:  # torch.save has both
        raise ValueError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
