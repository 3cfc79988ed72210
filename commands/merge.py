"""Merge the models of several runs that began at the same one, and measure how they interfere.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch
from torch import Tensor

import editing
import fisher
import model as vit
import runs
import safe_files
from calibration import BATCH, exact_products
from diagnostics import held_out_images, logits_of, some_images
from learner import Learner
from outcome import Outcome
from workspace import Workspace

RULES = ("mean", "ties", "dare", "sign", "fisher", "add")
SAME = ("model", "data", "seed", "val_fraction", "image_size", "normalisation", "weights_sha256")


def check_same(folders: list[str]) -> None:
    """Raise ValueError unless the runs have one model, one start and one set of images held out.

    Images that one run holds out and another trains on would not validate their merger.
    """
    first, *others = ({"folder": f} | runs.Run(f).config()["options"] for f in folders)
    for other, name in itertools.product(others, SAME):
        if other.get(name) != first.get(name):
            raise ValueError(
                f"{other['folder']} cannot be merged with {first['folder']}: {name} is "
                f"{other.get(name)} there and {first.get(name)} here"
            )


def parameters(learner: Learner, start: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all parameters by name at the learner's start and as they are, of a model in fp32."""
    now = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    return now | {name: learner.flat.view(start, name) for name in learner.flat.shapes}, now


class Merger:
    """Runs of one start as task vectors over all parameters, and a model to put their merger in.

    Raises:
        ValueError: runs that do not go together; they are named, with what differs.
    """

    def __init__(self, folders: list[str], options: argparse.Namespace):
        check_same(folders)
        if options.out and Path(options.out).exists():
            raise ValueError(f"{options.out} exists already: choose another file, or delete it")
        self.options, exact = options, copy.copy(options)
        exact.precision = "fp32"  # frozen parameters keep all their bits
        starts, ends = [], []
        for folder in folders:
            finished = Outcome(folder, exact)
            learner = finished.begun()
            start = learner.flat.theta.clone()
            learner.entries.load(finished.theta)
            for values, kept in zip(parameters(learner, start), (starts, ends), strict=True):
                kept.append(values)
        for folder, start in zip(folders, starts, strict=True):
            for name, value in start.items():
                if not torch.equal(value, starts[0][name]):
                    raise ValueError(
                        f"{folder} and {folders[0]} did not start alike: {name} differs"
                    )
        whole = copy.copy(learner.options)
        whole.train, whole.head, whole.freeze_head, whole.keep_tokens = "all", "linear", False, 1.0
        whole.mask, whole.mask_rule, whole.precision = None, None, options.precision
        self.workspace = Workspace(whole)
        model = self.workspace.build_model()
        self.learner = Learner(self.workspace, model, whole, Path(folders[0]), [])
        self.flat, self.names = self.learner.flat, list(starts[0])
        self.start = self.flatten(starts[0])
        self.vectors = torch.stack([self.flatten(end) for end in ends]) - self.start  # (m, P)
        self.logits = logits_of(self.workspace, model, self.flat)

    def flatten(self, values: dict[str, Tensor]) -> Tensor:
        """Return parameters by name as one vector in the layout of the flat view."""
        theta = torch.zeros_like(self.flat.theta)
        for name, value in values.items():
            self.flat.view(theta, name).copy_(value)
        return theta

    def merge(self) -> Tensor:
        """Return the merged task vector by --rule, before --scale."""
        options, count = self.options, len(self.vectors)
        parts, weights = self.vectors / count, [1 / count] * count
        if options.rule == "ties":
            return editing.ties(parts, weights, keep=options.ties_keep, size=self.flat.size)
        if options.rule == "sign":
            return editing.sign_elected(parts, weights)
        if options.rule == "dare":
            drop, seed = options.dare_drop, options.seed
            parts = [editing.dare(v, drop, seed=seed, client=k) for k, v in enumerate(parts)]
            return torch.stack(parts).sum(dim=0)
        if options.rule == "fisher":
            return editing.fisher_mean(parts, weights, torch.stack(self.scores()))
        return (self.vectors if options.rule == "add" else parts).sum(dim=0)

    def scores(self) -> list[Tensor]:
        """Return each run's sensitivities (P,) on --fisher-images of its training images."""
        workspace, model = self.workspace, self.workspace.build_model()
        draws = some_images(workspace, workspace.train_index, self.options.fisher_images, "merge")
        images, preprocess = workspace.sets["train"].images, workspace.preprocess(torch.float32)
        batches = [preprocess(images[at]) for at in draws.split(BATCH)]
        flat, scorer, scores = vit.FlatView(model.named_parameters()), fisher.Scorer(model), []
        for vector in self.vectors:
            flat.reset(self.start + vector)
            with exact_products():
                scores.append(self.flatten(scorer.diagonal(batches)))
        return scores

    def interference(self) -> dict[str, float]:
        """Return how the task vectors relate, as far as two or more of them do."""
        vectors = self.options.scale * self.vectors
        compared = editing.interference(vectors)
        images = [held_out_images(self.workspace)] * len(vectors)
        figures = {"cosine": compared.cosine, "sign_agreement": compared.sign_agreement}
        if len(vectors) > 1:
            with exact_products():
                figures["disentanglement_error"] = editing.disentanglement_error(
                    self.logits, self.start, vectors, images
                )
        return {name: value for name, value in figures.items() if value is not None}

    def evaluate(self, change: Tensor) -> dict[str, float]:
        """Return loss and accuracy of start + change, and how linear the change is."""
        at = held_out_images(self.workspace)
        self.flat.reset(self.start + change)
        figures = self.learner.evaluate()
        figures["distance"] = torch.linalg.vector_norm(change.double()).item()
        with exact_products():
            figures["linearity_error"] = editing.linearity_error(
                lambda theta: self.logits(theta, at), self.start, change
            )
        return figures

    def save(self, path: str, change: Tensor) -> None:
        """Write start + change under the model's parameter names; `--weights` takes the file."""
        theta = self.start + change
        safe_files.save_checked(
            Path(path), {name: self.flat.view(theta, name).cpu().clone() for name in self.names}
        )
