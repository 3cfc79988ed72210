"""train.py merge: the models of runs that began at the same one as one, and how they interfere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

import editing
import fisher
from commands.options import Line, recipe_of
from federated.methods import DareDrop, TiesKeep
from flat import FlatView
from machine import runs, safe_files
from machine.device import Machine, exact_products
from machine.status import print_figures
from training.diagnostics import held_out_images, logits_of
from training.learner import Learner, Training
from training.outcome import Outcome
from training.workspace import Workspace

RULES = ("mean", "ties", "dare", "sign", "fisher", "add")
SAME = ("model", "data", "seed", "val_fraction", "image_size", "normalisation", "weights_sha256")


class Merge(NamedTuple):
    """How runs become one model."""

    run_folders: Annotated[
        list[str], "run folders, of one model and one start", "path", "RUN", "positional"
    ]
    rule: Annotated[str, "how the runs' changes become one; add: their sum", RULES] = "mean"
    scale: Annotated[float, "factor on the merged change", "finite"] = 1.0
    ties_keep: TiesKeep = None
    dare_drop: DareDrop = None
    fisher_images: Annotated[
        int | None,
        "fisher: training images on which each model's sensitivities are taken [256]",
        ">= 1",
        "N",
    ] = None
    seed: Annotated[int | None, "dare: of what drops [0]", "0 <= x <= 9223372036854775807"] = None
    out: Annotated[str | None, "where the merged weights go [nowhere]", "path", "FILE"] = None
    data_dir: Annotated[str, "folder of data and weights", "path"] = "data"
    weights: Annotated[
        str | None, "the weights that the runs began with [where they were]", "path", "FILE"
    ] = None


OPTIONS = (Merge, Machine)


def run(line: Line) -> None:
    """Merge the models of runs that started alike, evaluate the result, and say how they interfere.

    The model is start + scale * merge(what each run changed): --scale -1 with one run unlearns what
    that run learned.
    """
    o = line.groups.merge
    merger = Merger(o, line.groups.machine)
    change = o.scale * merger.merge()
    print_figures(merger.interference() | merger.evaluate(change))
    if o.out:
        merger.save(o.out, change)
        print(f"written to {o.out}; --weights takes its backbone, and --head says which head")


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

    def __init__(self, options: Merge, machine: Machine):
        folders = options.run_folders
        check_same(folders)
        if options.out and Path(options.out).exists():
            raise ValueError(f"{options.out} exists already: choose another file, or delete it")
        self.options = options
        exact = machine._replace(precision="fp32")  # frozen parameters keep all their bits
        starts, ends = [], []
        for folder in folders:
            recipe = recipe_of(folder, options.data_dir, exact, options.weights)
            finished = Outcome(folder, recipe)
            learner = finished.untrained_learner()
            start = learner.flat.theta.clone()
            finished.load_into(learner.entries)
            before, after = parameters(learner, start)
            starts.append(before)
            ends.append(after)
        for folder, start in zip(folders, starts, strict=True):
            for name, value in start.items():
                if not torch.equal(value, starts[0][name]):
                    raise ValueError(
                        f"{folder} and {folders[0]} did not start alike: {name} differs"
                    )
        self.workspace = Workspace(recipe.source, machine, recipe.backbone)
        model = self.workspace.build_model()
        whole = Training(augment=False)
        self.learner = Learner(self.workspace, model, whole, recipe.learner.sgd, freeze_head=False)
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
        draws = workspace.some_images(workspace.train_index, self.options.fisher_images, "merge")
        images, preprocess = workspace.sets["train"].images, workspace.preprocess(torch.float32)
        batches = [preprocess(images[at]) for at in draws.split(fisher.BATCH)]
        flat, scorer, scores = FlatView(model.named_parameters()), fisher.Scorer(model), []
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
