"""What trains: flat parameters and the loss of a batch, local training of clients, evaluation.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import fedavg
import head
import model as vit
import runs
from centralized import learning_rate
from sparse_sgdm import sparse_sgdm_
from workspace import HEAD, Status, Workspace


class Learner:
    """The parameters that train, as a flat view, and the loss of a batch drawn from the data.

    With --train head the inputs are the backbone's features, computed once; else the images.

    Args:
        model: with its backbone weights; its head is filled in here.
        folder: where the fitted head is kept, so that a resumed run need not fit it again.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: vit.VisionTransformer,
        options: argparse.Namespace,
        folder: Path,
    ):
        self.workspace, self.options, self.model = workspace, options, model
        if options.head != "linear":
            self._set_fitted_head(model, folder / "head.pt")
        names = vit.trained_names(model, options.train, options.freeze_head)
        model.requires_grad_(False)
        trained = [(n, p) for n, p in model.named_parameters() if n in names]
        self.on_features = options.train == "head"
        self.labels = {part: images.labels for part, images in workspace.sets.items()}
        if self.on_features:
            self.inputs = {part: workspace.features(model, part) for part in workspace.sets}
            self.flat = vit.FlatView(trained)
            self.logits_of = model.head
        else:
            self.inputs = {part: images.images for part, images in workspace.sets.items()}
            self.flat = vit.FlatView(trained, compute_dtype=workspace.dtype)
            for name, parameter in model.named_parameters():
                if name not in names and name not in HEAD:
                    parameter.data = parameter.data.to(workspace.dtype)
            preprocess = workspace.preprocess()
            self.logits_of = lambda images: model(preprocess(images))
        self.momentum = torch.zeros_like(self.flat.theta) if options.momentum else None
        self.loss_scale = fedavg.LossScale(
            2.0**14 if self.flat.grad.dtype == torch.float16 else 1.0
        )

    @torch.no_grad()
    def _set_fitted_head(self, model: vit.VisionTransformer, path: Path) -> None:
        if path.exists():
            fitted = head.FittedHead(**runs.load_checked(path))
        else:
            features = self.workspace.features(model, "train")
            fitted = self.workspace.fit_head(features, self.options.head).to("cpu")
            runs.save_checked(path, vars(fitted))
        model.head.weight.copy_(fitted.weight)
        model.head.bias.copy_(fitted.bias)

    def loss(self, draws: Tensor) -> Tensor:
        """Return the mean cross-entropy of the training samples that `draws` (B, 4) names."""
        inputs, at = self.inputs["train"], draws[:, 0]
        augment = self.options.augment and not self.on_features
        batch = data.crop_and_flip(inputs, draws) if augment else inputs[at]
        return F.cross_entropy(self.logits_of(batch), self.labels["train"][at])

    def step(self, lr: float, first: bool, loss_scale: float = 1.0) -> None:
        """Take one optimiser step from the flat gradient."""
        flat = self.flat
        tensors = (flat.theta, flat.grad, self.momentum, None, flat.compute)
        self.step_flat(*tensors, lr=lr, first=first, grad_scale=loss_scale)

    def step_flat(self, *tensors: Tensor | None, **changing) -> None:
        """Call `sparse_sgdm_` with the run's constants."""
        options = self.options
        constants = dict(momentum=options.momentum, weight_decay=options.weight_decay)
        sparse_sgdm_(*tensors, nesterov=options.nesterov, **constants, **changing)

    def overflowed(self) -> bool:
        """Tell whether a parameter is Inf or NaN."""
        return not torch.isfinite(self.flat.theta).all().item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the validation and the test set."""
        result = {}
        test_index = np.arange(len(self.labels["test"]))
        for name, part, index in (
            ("val", "train", self.workspace.val_index),
            ("test", "test", test_index),
        ):
            if len(index):
                loss, accuracy = self._evaluate_part(part, torch.from_numpy(index))
                result |= {f"{name}_loss": loss, f"{name}_acc": accuracy}
        return result

    def _evaluate_part(self, part: str, index: Tensor) -> tuple[float, float]:
        inputs, labels = self.inputs[part], self.labels[part]
        index = index.to(labels.device)
        totals = torch.zeros(2, dtype=torch.float64, device=labels.device)
        for chunk in data.in_chunks(len(index), self.options.eval_batch):
            at = index[chunk]
            logits = self.logits_of(inputs[at])
            totals[0] += F.cross_entropy(logits, labels[at], reduction="sum")
            totals[1] += (logits.argmax(1) == labels[at]).sum()
        loss, accuracy = (totals / len(index)).tolist()
        return loss, accuracy


class ClientTraining:
    """The local training of clients: one after the other on images, all at once on features."""

    def __init__(self, learner: Learner, shards: list[np.ndarray]):
        self.learner, self.shards, self.options = learner, shards, learner.options

    def lr(self, round: int) -> float:
        """Return the round's client learning rate."""
        options = self.options
        schedule = dict(total=options.rounds, lr=options.lr, warmup=options.warmup)
        return learning_rate(options.schedule, round - 1, **schedule)

    def draws(self, client: int, round: int) -> Tensor:
        """Draw the client's J batches: (J, B, 4)."""
        o, shard = self.options, self.shards[client]
        return data.draw_batches(
            shard, o.batch_size, o.J, seed=o.seed, round=round, client=int(client)
        )

    def one(self, client: int, round: int) -> Tensor:
        """Take the client's J local steps on the learner's parameters; returns the (J,) losses."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        draws = self.draws(client, round).to(flat.theta.device, non_blocking=True)
        start = flat.theta.clone() if learner.loss_scale.active else None

        def attempt(scale: float) -> Tensor:
            if start is not None:
                flat.reset(start)

            def step(j: int) -> None:
                learner.step(lr, first=j == 0, loss_scale=scale)

            return fedavg.local_sgd(draws, learner.loss, flat.grad, step, scale)

        return learner.loss_scale.attempt(attempt, learner.overflowed)[0]

    def heads(self, theta_global: Tensor, clients: np.ndarray, round: int) -> Iterator:
        """Train the heads of all `clients` together on features; yields each (theta_k, losses)."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        theta = theta_global.repeat(len(clients), 1)  # (m, P)
        grad = torch.zeros_like(theta)
        momentum = torch.empty_like(theta) if self.options.momentum else None
        flattened = [x if x is None else x.view(-1) for x in (theta, grad, momentum)]

        def step(j: int) -> None:
            learner.step_flat(*flattened, lr=lr, first=j == 0)

        indices = torch.stack([self.draws(k, round)[..., 0] for k in clients]).to(theta.device)
        losses = head.train_heads(
            *(flat.view(theta, name) for name in HEAD),
            learner.inputs["train"],
            learner.labels["train"],
            indices,
            step,
            *(flat.view(grad, name) for name in HEAD),
        )
        yield from zip(theta, losses, strict=True)


class Evaluated:
    """Completes the records of a loop: evaluation every so often, and a word to whoever watches."""

    def __init__(self, learner: Learner, unit: str, total: int, every: int):
        self.learner, self.unit, self.total, self.every = learner, unit, total, every
        self.status, self.note = None, ""

    def __call__(self, record: dict) -> None:
        """Evaluate where it is due, adding val_* and test_* to the record; show progress."""
        at = record[self.unit]
        if at:
            self.status = self.status or Status(self.unit, self.total, at - 1)
            self.status.show(at, self.note)
        if at % self.every == 0 or at >= self.total:
            record |= self.learner.evaluate()
            figures = ", ".join(
                f"{label} {100 * record[key]:.2f} %"
                for label, key in (("validation", "val_acc"), ("test", "test_acc"))
                if key in record
            )
            loss = f"train loss {record['train_loss']:.4f}, " if "train_loss" in record else ""
            self.note = figures
            if self.status:
                self.status.close()
            print(f"{self.unit} {at}/{self.total}: {loss}{figures}", flush=True)
