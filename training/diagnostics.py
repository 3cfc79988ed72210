"""What the log says beside accuracy: how clients' changes relate, and how linear the model's is.

None of it changes the training: models are evaluated in fp32, on a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import editing
import fedavg
import model as vit
from flat import FlatView
from machine.device import exact_products

if TYPE_CHECKING:
    from training.learner import Learner
    from training.workspace import Workspace

IMAGES = 32  # on which two models are compared
DISPLACEMENT = 0.5  # root mean square change of the logits at which moves are compared, matched


class Diagnosing(NamedTuple):
    """What is measured beside accuracy."""

    diagnostics: Annotated[
        bool,
        "with each evaluation, log how clients' changes relate, how far the model has moved, and "
        "how linear that move is",
    ] = False


def logits_of(
    workspace: Workspace, model: vit.VisionTransformer, flat: FlatView
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (theta (P,), training images (N,) by index) -> logits (N, C) in fp32, differentiable.

    Args:
        model: gives what `flat` does not hold, as it is now.
    """
    fixed, preprocess = vit.cast_copy(model, torch.float32), workspace.preprocess(torch.float32)
    fixed.requires_grad_(False)
    images = workspace.sets["train"].images

    def logits(theta: Tensor, at: Tensor) -> Tensor:
        values = {name: flat.view(theta, name) for name in flat.shapes}
        return torch.func.functional_call(fixed, values, (preprocess(images[at]),))

    return logits


def held_out_images(workspace: Workspace) -> Tensor:
    """Draw images on which no client trains, where validation images exist."""
    index = workspace.val_index if len(workspace.val_index) else workspace.train_index
    return workspace.some_images(index, IMAGES, "diagnostics")


class Diagnostics:
    """The figures of --diagnostics in a federated run.

    Created before the first round is trained or restored: the model is at its start then.

    Args:
        due: round -> whether the round's parts are wanted.
    """

    def __init__(self, learner: Learner, due: Callable[[int], bool]):
        self.learner, self.workspace, self.due = learner, learner.workspace, due
        self.start = learner.flat.theta.clone()
        self.logits = logits_of(self.workspace, learner.model, learner.flat)
        if learner.on_features:  # the backbone is a constant
            self.logits = self._head_logits
        self.held_out = held_out_images(self.workspace)
        self._watched: dict = {}

    def watch(self, theta: Tensor, rows: Tensor, weights: np.ndarray, clients: np.ndarray) -> None:
        """Take in the contributions (m, P) of a round that began at `theta` (P,)."""
        taken = [i for i, weight in enumerate(weights) if weight > 0]
        rows, clients = rows[taken], [int(clients[i]) for i in taken]
        units = fedavg.FIXED_POINT * torch.as_tensor(np.asarray(weights)[taken])
        units = units.to(rows.device)
        compared = editing.interference(rows)
        total = torch.linalg.vector_norm(rows.sum(dim=0).double()) / fedavg.FIXED_POINT
        figures = {
            "update_cosine": compared.cosine,
            "update_sign_agreement": compared.sign_agreement,
            "update_norm": (compared.norms / units).mean().item(),
            "mean_update_norm": total.item(),
        }
        if len(clients) > 1:
            pair = [self._whole(rows[i].double() / units[i]) for i in range(2)]
            images = [self._images_of(client) for client in clients[:2]]
            figures |= self._disentanglement(self._whole(theta, self.start), pair, images)
        self._watched = {name: value for name, value in figures.items() if value is not None}

    def measure(self) -> dict[str, float]:
        """Return the figures of the round that has ended."""
        watched, self._watched = self._watched, {}
        change = self.learner.flat.theta - self.start
        moved = {"distance": torch.linalg.vector_norm(change.double()).item()}
        at = self.start, change
        with exact_products():
            moved["displacement"] = editing.displacement(self._held_out_logits, *at)
            moved["linearity_error"] = editing.linearity_error(self._held_out_logits, *at)
            if scale := editing.scale_to(self._held_out_logits, *at, DISPLACEMENT):
                moved["matched_linearity_error"] = editing.linearity_error(
                    self._held_out_logits, self.start, scale * change
                )
        return watched | moved

    def _head_logits(self, theta: Tensor, at: Tensor) -> Tensor:
        weight, bias = (self.learner.flat.view(theta, name) for name in vit.HEAD)
        return F.linear(self.learner.inputs["train"][at], weight, bias)

    def _held_out_logits(self, theta: Tensor) -> Tensor:
        return self.logits(theta, self.held_out)

    def _disentanglement(self, theta: Tensor, pair: list[Tensor], images: list[Tensor]) -> dict:
        """Return how far two clients' changes disturb each other, as they are and matched."""
        with exact_products():
            error = editing.disentanglement_error
            errors = {"disentanglement_error": error(self.logits, theta, torch.stack(pair), images)}
            scales = [
                editing.scale_to(lambda x, at=at: self.logits(x, at), theta, tau, DISPLACEMENT)
                for tau, at in zip(pair, images, strict=True)
            ]
            if all(scales):
                matched = torch.stack([s * tau for s, tau in zip(scales, pair, strict=True)])
                name = "matched_disentanglement_error"
                errors[name] = error(self.logits, theta, matched, images)
        return errors

    def _images_of(self, client: int) -> Tensor:
        shard = self.workspace.shards[client]
        return self.workspace.some_images(shard, IMAGES, "diagnostics", client)

    def _whole(self, entries: Tensor, around: Tensor | None = None) -> Tensor:
        """Return entries that train (P',) in the layout of the flat view (P,)."""
        index = self.learner.entries.index
        if index is None:
            return entries.to(self.start.dtype)
        whole = torch.zeros_like(self.start) if around is None else around.clone()
        whole[index] = entries.to(self.start.dtype)
        return whole
