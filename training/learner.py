"""What trains: flat parameters and the loss of a batch, and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import fused
import model as vit
from flat import Entries, FlatView, Sgd
from machine.cuda_graph import GraphedStep
from machine.device import LossScale, compiled, exact_place, free_memory
from training import features

if TYPE_CHECKING:
    from training.mask_file import Mask
    from training.workspace import Workspace


class Training(NamedTuple):
    """What trains, on what."""

    train: Annotated[str, "what trains: all, head, or from a block on: blocks.8"] = "all"
    augment: Annotated[
        bool | None,
        "random crop and flip; --train head or blocks.N: False, so that what lies below is "
        "computed once",
    ] = None
    keep_tokens: Annotated[
        float, "random share of an image's patches that a training step sees", "0 < x <= 1", "R"
    ] = 1.0
    micro_batch: Annotated[
        int | None,
        "images of a step that are on the device at a time: the same gradient up to rounding, in "
        "less memory [all]",
        ">= 1",
        "N",
    ] = None
    fused: Annotated[
        str,
        "fuse a step's passes between matrix products [auto: on a GPU, where Triton's kernels "
        "agree with PyTorch's; not with --compile]",
        ("auto", "off"),
    ] = "auto"
    compile: Annotated[
        bool, "torch.compile what trains: other last bits, and half a minute at the start"
    ] = False


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the mean loss of a batch: (N, C) logits, (N,) labels, (C,) weights or None."""
    return F.cross_entropy(logits, labels, class_weights)


class Learner:
    """The parameters that train, as a flat view, and the loss of a batch drawn from the data.

    With train = "head" the inputs are the backbone's features, computed once; else the images.

    Args:
        model: with its weights and its head.
        mask: which entries of the backbone train; None: all that `training` names.
        mask_lr: how the rate of `sgd` follows the mask, as GivenMask has it.
        prox, corrected: as flat.Entries takes them.
        loss: (logits, labels, class weights or None) -> mean loss of a batch.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: vit.VisionTransformer,
        training: Training,
        sgd: Sgd,
        *,
        freeze_head: bool,
        mask: Mask | None = None,
        mask_lr: str | None = None,
        prox: float = 0.0,
        corrected: bool = False,
        loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] = cross_entropy,
    ):
        self.workspace, self.model, self.training, self.mask = workspace, model, training, mask
        self.group, self.sample_loss = workspace.group, loss
        self.on_features = training.train == "head"
        self.class_weights: Tensor | None = None  # (classes,) of a sample in the training loss
        self.start: dict[str, Tensor] | None = None  # features for the first evaluation
        self.keeps_activations: bool | None = None  # None: none could be kept
        self.fuses = False
        names = vit.trained_names(model, training.train, freeze_head)
        parameters = dict(model.named_parameters())
        self.dense_size = sum(parameters[name].numel() for name in names)
        if mask is not None:  # a tensor that is frozen throughout needs no gradient
            names = mask.trained(names)
        model.requires_grad_(False)
        self.first = vit.first_trained_block(names, model.shape.depth)
        self.labels = {part: images.labels for part, images in workspace.sets.items()}
        trained = [(name, parameters[name]) for name in names]
        if self.on_features:
            self.inputs = {p: features.features(workspace, model, p) for p in workspace.sets}
            self.flat = FlatView(trained)
            self._read_by(lambda rows, keep: model.classify(rows))
        else:
            self.inputs = {part: images.images for part, images in workspace.sets.items()}
            self.flat = FlatView(trained, compute_dtype=workspace.dtype)
            for name, parameter in model.named_parameters():
                if name not in names and name not in vit.HEAD:
                    parameter.data = parameter.data.to(workspace.dtype)
            self.fuses = self._may_fuse()
            preprocess = workspace.preprocess()
            self._read_by(lambda images, keep: model(preprocess(images), keep))
        entries = None if mask is None else mask.flat(self.flat)
        self.dense_lr, self.mask_lr = sgd.lr, mask_lr
        if mask is not None:
            sgd = sgd._replace(lr=sgd.lr * mask.rate_factor(mask_lr))
        self.entries = Entries(self.flat, entries, sgd, prox=prox, corrected=corrected)
        self.loss_scale = LossScale(2.0**14 if self.flat.grad.dtype == torch.float16 else 1.0)

    def _read_by(self, logits_of: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Let evaluations read the inputs so, training steps as --compile or --fused wants it."""
        self.logits_of = self.trained_logits_of = logits_of
        if self.training.compile:
            self.trained_logits_of = compiled(logits_of)
        elif self.fuses:
            self.trained_logits_of = self._fused(logits_of)

    def _fused(self, logits_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the function with the model's passes between matrix products fused."""

        def call(inputs: Tensor, keep: Tensor | None) -> Tensor:
            with self.model.fused(fused):
                return logits_of(inputs, keep)

        return call

    def _may_fuse(self) -> bool:
        """Tell whether fused passes serve; on a GPU where they do not, say why."""
        device, shape = self.workspace.device, self.model.shape
        ours = isinstance(self.model, vit.VisionTransformer)
        wanted = self.training.fused != "off" and not self.training.compile
        if not wanted or device.type != "cuda" or not ours:
            return False
        sizes = self.workspace.dtype, shape.width, shape.heads
        reason = fused.serves(device, *sizes)
        if reason:
            print(f"passes are not fused: {reason}")
        elif fused.hopper(device):
            patches = (self.workspace.backbone.image_size // shape.patch) ** 2
            tokens = 1 + (self.seen_patches[0] or patches)
            if why := fused.attends(device, *sizes, tokens):
                print(f"attention is PyTorch's: {why}")
        return not reason

    def keep_activations(self) -> None:
        """Below the first block that trains, compute the tokens of all images once, where they fit.

        They are a constant of images that are neither augmented nor thinned out.
        """
        training, model, first = self.training, self.model, self.first
        if self.on_features or not first or training.augment or training.keep_tokens < 1:
            return
        inputs = features.tokens(self.workspace, model, first)
        self.keeps_activations = inputs is not None
        if inputs is None:
            free = free_memory(torch.device("cpu"))
            reason = "they do not fit in memory" if free else "the free memory is not known"
            print(f"activations below block {first} are computed every time: {reason}")
            return
        print(f"activations below block {first} are computed once")
        self.inputs = inputs
        self._read_by(lambda x, keep: model.classify(model.features_from(x, first)))

    @property
    def seen_patches(self) -> tuple[int, int]:
        """How many of how many patches a local step sees, as `data.draw_batches` takes it."""
        patches = (self.workspace.backbone.image_size // self.model.shape.patch) ** 2
        share = self.training.keep_tokens
        return (max(1, round(share * patches)), patches) if share < 1 else (0, 0)

    def inputs_of(self, part: str, at: Tensor) -> Tensor:
        """Return the inputs of these samples (B,) of a part on the device."""
        inputs = self.inputs[part]
        return inputs[at.to(inputs.device)].to(at.device, non_blocking=True)

    def loss(self, draws: Tensor) -> Tensor:
        """Return the mean loss of the training samples that `draws` (B, 4 + R) names.

        Where classes have weights, it is the sum over samples divided by that of their weights.
        """
        at, keep = draws[:, 0], draws[:, 4:] if draws.shape[1] > 4 else None
        augment = self.training.augment and not self.on_features
        inputs = self.inputs["train"]
        batch = data.crop_and_flip(inputs, draws) if augment else self.inputs_of("train", at)
        logits = self.trained_logits_of(batch, keep)
        return self.sample_loss(logits, self.labels["train"][at], self.class_weights)

    def backward(self, draws: Tensor, loss_scale: float | Tensor) -> Tensor:
        """Fill the flat gradient with that of the loss times `loss_scale`; returns the loss.

        Pieces of --micro-batch images add their shares of the loss up.
        """
        pieces = draws.split(self.training.micro_batch or len(draws))
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
        self.entries.step(lr, grad_scale=loss_scale)
        return loss

    def graphed(
        self, step: Callable[..., Tensor], mode: str, obstacle: str | None = None
    ) -> GraphedStep | None:
        """Return the step as --cuda-graph wants it; None on a CPU, which launches nothing.

        Raises:
            ValueError: --cuda-graph on without a GPU.
        """
        device = self.workspace.device
        if device.type != "cuda":
            if mode == "on":
                raise ValueError(f"--cuda-graph on: it needs a CUDA device, and this is a {device}")
            return None
        if self.inputs["train"].device.type != "cuda":
            obstacle = f"the activations below block {self.first} are kept on the host"
        return GraphedStep(step, self.entries.state, device, mode=mode, obstacle=obstacle)

    def overflowed(self) -> bool:
        """Tell whether a parameter is Inf or NaN."""
        return not torch.isfinite(self.flat.theta).all().item()

    def masked_rate(self) -> dict[str, float]:
        """Return what log and summary say of a learning rate that follows the mask."""
        if self.mask is None or self.mask_lr is None:
            return {}
        return {
            "lr": self.entries.sgd.lr,
            "lr_factor": self.mask.rate_factor(self.mask_lr),
            "sensitivity_share": self.mask.sensitivity_share,
        }

    @torch.no_grad()
    def evaluate(self, sets: Collection[str] = ("val", "test")) -> dict[str, float]:
        """Return loss and accuracy on these sets, if they have images, shared out over the group.

        Where `start` holds features of the model as it is, the first evaluation is of those.
        """
        start, self.start = self.start or {}, None
        result = {}
        test_index = np.arange(len(self.labels["test"]))
        for name, part, index in (
            ("val", "train", self.workspace.val_index),
            ("test", "test", test_index),
        ):
            if name in sets and len(index):
                at = torch.from_numpy(index).to(self.labels[part].device)
                figures = self._evaluate_part(part, at, start)
                result |= dict(zip((f"{name}_loss", f"{name}_acc"), figures, strict=True))
        return result

    def _evaluate_part(self, part: str, index: Tensor, start: dict[str, Tensor]) -> list[float]:
        chunks, group = list(data.in_chunks(len(index), self.workspace.eval_batch)), self.group
        place = exact_place(index.device)
        totals = torch.zeros(len(chunks), 2, dtype=torch.float64, device=place)
        for i in range(group.rank, len(chunks), group.size):
            at = index[chunks[i]]
            with self.workspace.fitting("an evaluation", len(at), "--eval-batch"):
                if part in start:
                    logits = self.model.classify(start[part][at])
                else:
                    logits = self.logits_of(self.inputs_of(part, at), None)
            labels = self.labels[part][at]
            totals[i, 0] = F.cross_entropy(logits, labels, reduction="sum")
            totals[i, 1] = (logits.argmax(1) == labels).sum()
        group.sum_(totals)  # of zeros but for one process's value: exact
        return (totals.sum(dim=0) / len(index)).tolist()

    def environment(self) -> dict:
        """Return what may change the last bits of a result."""
        return self.workspace.environment() | {
            "activations_kept": self.keeps_activations,
            "fused": self.fuses,
            "mask": None if self.mask is None else self.mask.sha256,  # whose entries theta has
            "micro_batch": self.training.micro_batch,
        }
