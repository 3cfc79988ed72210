"""What trains: flat parameters and the loss of a batch, and evaluation.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import head
import model as vit
import runs
import safe_files
from calibration import Calibration, cached_mask
from cuda_graph import GraphedStep
from device import compiled
from entries import Entries
from loss_scale import LossScale
from mask_file import Mask, given_mask
from status import Status
from workspace import HEAD, Workspace


class Learner:
    """The parameters that train, as a flat view, and the loss of a batch drawn from the data.

    With --train head the inputs are the backbone's features, computed once; else the images.

    Args:
        model: with its backbone weights; its head is filled in here.
        folder: where the fitted head and the mask are kept, so that a resumed run need not make
            them again.
        shards: whose data a mask is calibrated on.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: vit.VisionTransformer,
        options: argparse.Namespace,
        folder: Path,
        shards: list[np.ndarray],
    ):
        self.workspace, self.options, self.model = workspace, options, model
        self.group = workspace.group
        if options.head != "linear":
            set_fitted_head(workspace, model, options.head, folder / "head.pt")
        self.on_features = options.train == "head"
        fresh = not runs.Run(folder).saved()
        self.class_weights: Tensor | None = None  # (classes,) of a sample in the training loss
        fitted_to_all = options.head != "linear" and options.head_images is None
        self.start = None  # features of the untrained backbone, for the first evaluation
        if fresh and fitted_to_all and not self.on_features:
            self.start = {part: workspace.features(model, part) for part in workspace.sets}
        names = vit.trained_names(model, options.train, options.freeze_head)
        parameters = dict(model.named_parameters())
        self.dense_size = sum(parameters[name].numel() for name in names)
        self.mask = find_mask(workspace, model, options, folder / "mask.pt", shards)
        if self.mask:  # a tensor that is frozen throughout needs no gradient
            names = self.mask.trained(names)
        model.requires_grad_(False)
        trained = [(n, parameters[n]) for n in names]
        self.first = vit.first_trained_block(names, model.shape.depth)
        self.labels = {part: images.labels for part, images in workspace.sets.items()}
        if self.on_features:
            self.inputs = {part: workspace.features(model, part) for part in workspace.sets}
            self.flat = vit.FlatView(trained)
            self._read_by(lambda features, keep: model.classify(features))
        else:
            self.inputs = {part: images.images for part, images in workspace.sets.items()}
            self.flat = vit.FlatView(trained, compute_dtype=workspace.dtype)
            for name, parameter in model.named_parameters():
                if name not in names and name not in HEAD:
                    parameter.data = parameter.data.to(workspace.dtype)
            preprocess = workspace.preprocess()
            self._read_by(lambda images, keep: model(preprocess(images), keep))
        kept = self.mask.flat(self.flat) if self.mask else None
        self.entries = Entries(self.flat, kept, options)
        self.loss_scale = LossScale(2.0**14 if self.flat.grad.dtype == torch.float16 else 1.0)

    def _read_by(self, logits_of: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Let evaluations read the inputs so, and the training steps as --compile wants it."""
        self.logits_of = logits_of
        self.trained_logits_of = compiled(logits_of) if self.options.compile else logits_of

    def keep_activations(self) -> None:
        """Below the first block that trains, compute the tokens of all images once, where they fit.

        They are a constant of images that are neither augmented nor thinned out.
        """
        options, model, first = self.options, self.model, self.first
        if self.on_features or not first or options.augment or options.keep_tokens < 1:
            return
        inputs = self.workspace.tokens(model, first)
        self.workspace.keeps_activations = inputs is not None
        if inputs is None:
            print(f"activations below block {first} do not fit in memory: computed every time")
            return
        print(f"activations below block {first} are computed once")
        self.inputs = inputs
        self._read_by(lambda x, keep: model.classify(model.features_from(x, first)))

    @property
    def kept(self) -> tuple[int, int]:
        """How many of how many patches a local step sees, as `data.draw_batches` takes it."""
        patches = (self.options.image_size // self.model.shape.patch) ** 2
        share = self.options.keep_tokens
        return (max(1, round(share * patches)), patches) if share < 1 else (0, 0)

    def gather(self, part: str, at: Tensor) -> Tensor:
        """Return the inputs of these samples (B,) of a part on the device."""
        inputs = self.inputs[part]
        return inputs[at.to(inputs.device)].to(at.device, non_blocking=True)

    def loss(self, draws: Tensor) -> Tensor:
        """Return the mean cross-entropy of the training samples that `draws` (B, 4 + R) names.

        Where classes have weights, it is the sum over samples divided by that of their weights.
        """
        at, keep = draws[:, 0], draws[:, 4:] if draws.shape[1] > 4 else None
        augment = self.options.augment and not self.on_features
        inputs = self.inputs["train"]
        batch = data.crop_and_flip(inputs, draws) if augment else self.gather("train", at)
        logits = self.trained_logits_of(batch, keep)
        return F.cross_entropy(logits, self.labels["train"][at], self.class_weights)

    def backward(self, draws: Tensor, loss_scale: float | Tensor) -> Tensor:
        """Fill the flat gradient with that of the loss times `loss_scale`; returns the loss.

        Pieces of --micro-batch images add their shares of the loss up.
        """
        pieces = draws.split(self.options.micro_batch or len(draws))
        with self.workspace.fitting("a training step", len(pieces[0]), "--micro-batch"):
            if len(pieces) == 1:
                loss = self.loss(draws)
                self.flat.fill_grad(loss * loss_scale)
                return loss.detach()
            losses = []
            for piece, share in zip(pieces, self._shares(pieces), strict=True):
                loss = self.loss(piece) * share
                self.flat.fill_grad(loss * loss_scale, add=len(losses) > 0)
                losses.append(loss.detach())
            return torch.stack(losses).sum()

    def _shares(self, pieces: tuple[Tensor, ...]) -> list[float] | Tensor:
        """Return each piece's share of its batch's mean loss: (n,), adding up to 1."""
        if self.class_weights is None:
            count = sum(map(len, pieces))
            return [len(piece) / count for piece in pieces]
        labels = [self.labels["train"][piece[:, 0]] for piece in pieces]
        weights = torch.stack([self.class_weights[y].sum() for y in labels])
        return weights / weights.sum()

    def local_step(self, draws: Tensor, lr: Tensor, loss_scale: Tensor) -> Tensor:
        """Take a local step whose momentum holds something, or zeros; returns the loss."""
        loss = self.backward(draws, loss_scale)
        self.entries.step(lr, loss_scale=loss_scale)
        return loss

    def graphed(self, step: Callable[..., Tensor]) -> GraphedStep | None:
        """Return the step as --cuda-graph wants it; None on a CPU, which launches nothing."""
        device, options = self.workspace.device, self.options
        if device.type != "cuda":
            return None
        obstacle = None
        if self.inputs["train"].device.type != "cuda":
            obstacle = f"the activations below block {self.first} are kept on the host"
        elif options.batch_size == "full":
            obstacle = "--batch-size full makes batches of many sizes"
        settings = dict(mode=options.cuda_graph, obstacle=obstacle)
        return GraphedStep(step, self.entries.state, device, **settings)

    def overflowed(self) -> bool:
        """Tell whether a parameter is Inf or NaN."""
        return not torch.isfinite(self.flat.theta).all().item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the validation and the test set, shared out over the group.

        A fresh run's first evaluation is of the backbone whose features the head was fitted to.
        """
        start, self.start = self.start, None
        result = {}
        test_index = np.arange(len(self.labels["test"]))
        for name, part, index in (
            ("val", "train", self.workspace.val_index),
            ("test", "test", test_index),
        ):
            if len(index):
                at = torch.from_numpy(index).to(self.labels[part].device)
                figures = self._evaluate_part(part, at, start)
                result |= dict(zip((f"{name}_loss", f"{name}_acc"), figures, strict=True))
        return result

    def _evaluate_part(self, part: str, index: Tensor, start: dict[str, Tensor]) -> list[float]:
        chunks, group = list(data.in_chunks(len(index), self.workspace.eval_batch)), self.group
        totals = torch.zeros(len(chunks), 2, dtype=torch.float64, device=index.device)
        for i in range(group.rank, len(chunks), group.size):
            at = index[chunks[i]]
            with self.workspace.fitting("an evaluation", len(at), "--eval-batch"):
                if start:
                    logits = self.model.classify(start[part][at])
                else:
                    logits = self.logits_of(self.gather(part, at), None)
            labels = self.labels[part][at]
            totals[i, 0] = F.cross_entropy(logits, labels, reduction="sum")
            totals[i, 1] = (logits.argmax(1) == labels).sum()
        group.sum_(totals)  # of zeros but for one process's value: exact
        return (totals.sum(dim=0) / len(index)).tolist()


@torch.no_grad()
def set_fitted_head(
    workspace: Workspace, model: vit.VisionTransformer, kind: str, path: Path | None = None
) -> None:
    """Fill in the model's head, from `path` where it was kept."""
    if path is not None and path.exists():
        try:
            fitted = head.FittedHead(**runs.Run(path.parent).kept(path.name))
        except safe_files.DamagedFile as error:
            raise ValueError(f"{error}; delete it to have the head fitted again") from None
    else:
        fitted = workspace.fit_head(model, kind).to("cpu")
        if path is not None:
            runs.Run(path.parent).keep(path.name, vars(fitted))
    model.head.weight.copy_(fitted.weight)
    model.head.bias.copy_(fitted.bias)


def find_mask(
    workspace: Workspace,
    model: vit.VisionTransformer,
    options: argparse.Namespace,
    path: Path,
    shards: list[np.ndarray],
) -> Mask | None:
    """Return the run's mask, kept at `path`: --mask's, or one made by --mask-rule; else None."""
    if options.mask is None and options.mask_rule is None:
        return None
    if options.mask is not None:
        mask = given_mask(options, model, path)
    elif path.exists():
        return Mask.load(path, model, runs.Run(path.parent).purpose(path.name))
    else:
        mask = cached_mask(Calibration(workspace, model, options, shards))
    if not path.exists():
        mask.save(path, runs.Run(path.parent).purpose(path.name))
    return mask


def evaluation_due(at: float, every: float, total: int) -> bool:
    """Tell whether an evaluation follows a record at round or epoch `at`.

    Within an epoch there are records only where one is due.
    """
    return every < 1 or at % every == 0 or at >= total


class Evaluated:
    """Completes the records of a loop: evaluation every so often, and a word to whoever watches.

    Args:
        opening: figures of the first record, which stands for the start.
        measure: returns further figures of later records that have an evaluation.
    """

    def __init__(
        self,
        learner: Learner,
        unit: str,
        total: int,
        every: float,
        opening: dict,
        measure: Callable[[], dict] = dict,
    ):
        self.learner, self.unit, self.total, self.every = learner, unit, total, every
        self.opening, self.measure = opening, measure
        self.status, self.note = None, ""

    def __call__(self, record: dict) -> None:
        """Evaluate where it is due, adding val_* and test_* to the record; show progress."""
        at = record[self.unit]
        if at:
            self.status = self.status or Status(self.unit, self.total, at)
            self.status.show(at, self.note)
        else:
            record |= self.opening
        if evaluation_due(at, self.every, self.total):
            record |= self.learner.evaluate()
            record |= self.measure() if at else {}
            figures = ", ".join(
                f"{label} {100 * record[key]:.2f} %"
                for label, key in (("validation", "val_acc"), ("test", "test_acc"))
                if key in record
            )
            loss = f"train loss {record['train_loss']:.4f}, " if "train_loss" in record else ""
            figures += f", epsilon {record['epsilon']:.4g}" if "epsilon" in record else ""
            self.note = figures
            if self.status:
                self.status.close()
            print(f"{self.unit} {at}/{self.total}: {loss}{figures}", flush=True)
