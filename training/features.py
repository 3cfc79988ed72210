"""What the backbone makes of the images while it stands still, and the heads that are fitted to it.

Features of all images are computed once and kept in <data-dir>/features, under a key of all that
they depend on.
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import head
import model as vit
from machine import runs, safe_files
from machine.device import exact_place, free_memory
from machine.status import Status

if TYPE_CHECKING:
    from training.workspace import Workspace


class Head(NamedTuple):
    """Head."""

    head: Annotated[
        str | None,
        "zero-initialised, trained first, or closed form (under a mask always fitted)",
        ("linear", "probe", "ridge"),
    ] = None
    freeze_head: Annotated[
        bool | None,
        "keep the head as it is [a probe or ridge head is frozen, unless --train head]",
    ] = None
    head_images: Annotated[
        int | None,
        "training images that a fitted head sees, drawn by class, with an equal share of the "
        "validation images; only their features are computed [all]",
        ">= 1",
        "N",
    ] = None


class ScoringHead(NamedTuple):
    """Head to score under."""

    head: Annotated[str, "trained first, or closed form", ("probe", "ridge")] = "ridge"
    head_images: Annotated[
        int | None, "training images that it sees, drawn by class [all]", ">= 1", "N"
    ] = None


# ---------------------------------------------------------------------------- features


@torch.no_grad()
def features(workspace: Workspace, model: vit.VisionTransformer, part: str) -> Tensor:
    """Return the backbone's features (N, D) fp32 of all "train" or "test" images, unaugmented."""
    preprocess, images = workspace.preprocess(), workspace.sets[part].images
    settings = [
        hashlib.sha256(images.cpu().numpy()).hexdigest(),
        preprocess.scale.tolist(),
        preprocess.shift.tolist(),
        preprocess.image_size,
        *(str(workspace.dtype), workspace.device.type, vit.fingerprint(model)),
        *(workspace.source.data, part, safe_files.BOUND),
    ]
    key = hashlib.sha256(repr(settings).encode()).hexdigest()
    name = f"{workspace.source.data}-{part}-{key[:16]}.pt"
    path = workspace.folder("features") / name
    if workspace.keeps(path) and (rows := load_features(path, key)) is not None:
        return rows.to(workspace.device)
    rows = compute_features(workspace, model, part)
    save_features(path, key, rows)
    return rows


def load_features(path: Path, key: str) -> Tensor | None:
    """Return the features (N, D) in a file, if they are whole."""
    try:
        return safe_files.load_checked(path, key)
    except safe_files.DamagedFile as error:
        print(f"warning: {error}; computed again", file=sys.stderr)
        return None


def save_features(path: Path, key: str, rows: Tensor) -> None:
    """Keep features (N, D) for other runs, where that can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safe_files.forget_asides(path.parent, safe_files.DAY)
        safe_files.save_checked(path, rows.cpu(), key)
    except OSError as error:
        print(f"warning: the features are not kept: {error}", file=sys.stderr)


@torch.no_grad()
def compute_features(
    workspace: Workspace, model: vit.VisionTransformer, part: str, index: Tensor | None = None
) -> Tensor:
    """Return the features (N, D) of a part's images, or of those in `index` (N,) alone."""
    preprocess, images = workspace.preprocess(), workspace.sets[part].images
    backbone, rows = vit.cast_copy(model, workspace.dtype), []
    count = len(images) if index is None else len(index)
    status = Status(f"features of the {part} images", count, tenths=True)
    for chunk in data.in_chunks(count, workspace.eval_batch):
        pixels = images[chunk if index is None else index[chunk]]
        with workspace.fitting("features", len(pixels), "--eval-batch"):
            rows.append(backbone.features(preprocess(pixels)).float())
        status.show(chunk.stop)
    status.close()
    return torch.cat(rows)


@torch.no_grad()
def tokens(
    workspace: Workspace, model: vit.VisionTransformer, first: int
) -> dict[str, Tensor] | None:
    """Return the input (N, 1 + T, D) of block `first` for all images of a part, unaugmented.

    They lie on the device where half of its free memory holds them, else on the host; None where
    they fit on neither, or not in every process of the group.
    """
    preprocess, group = workspace.preprocess(), workspace.group
    images = {part: images.images for part, images in workspace.sets.items()}
    patches = (preprocess.image_size // model.shape.patch) ** 2
    class_token = first == model.shape.depth and type(model) is vit.VisionTransformer
    read = 1 if class_token else 1 + patches  # after the last block nothing else is read
    shape = read, model.shape.width
    count = sum(map(len, images.values()))
    needed = count * math.prod(shape) * workspace.dtype.itemsize
    places = dict.fromkeys((workspace.device, torch.device("cpu")))
    free = {p: free_memory(p) / (group.size if p.type == "cpu" else 1) for p in places}
    place = next((device for device in places if needed <= free[device] / 2), None)
    if not all(group.gather(place is not None)):
        return None
    backbone, result = vit.cast_copy(model, workspace.dtype), {}
    status, done = Status("activations of the images", count, tenths=True), 0
    for part, pixels in images.items():
        result[part] = torch.empty(len(pixels), *shape, dtype=workspace.dtype, device=place)
        for chunk in data.in_chunks(len(pixels), workspace.eval_batch):
            with workspace.fitting("activations", len(pixels[chunk]), "--eval-batch"):
                states = backbone.tokens(preprocess(pixels[chunk]), first)
            result[part][chunk] = states[:, :read]
            status.show(done := done + len(pixels[chunk]))
    status.close()
    return result


# ---------------------------------------------------------------------------- heads


def fit_head(
    workspace: Workspace, model: vit.VisionTransformer, kind: str, images: int | None = None
) -> head.FittedHead:
    """Fit a "ridge" head or a linear "probe" on the training split, choices by validation.

    Args:
        images: how many of them it sees, with an equal share of the validation images; no other
            features are computed then. None: all.
    """
    labels, place = workspace.sets["train"].labels, exact_place(workspace.device)
    splits = [torch.from_numpy(i).to(workspace.device) for i in head_splits(workspace, images)]
    if images is None:
        rows = features(workspace, model, "train")
        seen = [rows[at].to(place) for at in splits]
    else:
        seen = [compute_features(workspace, model, "train", at).to(place) for at in splits]
    classes = [labels[at].to(place) for at in splits]
    (train, train_labels), held_out = zip(seen, classes, strict=True)
    if kind == "probe":
        return head.train_probe(train, train_labels, workspace.classes, *held_out)
    sums = head.RidgeSums(train.shape[1], workspace.classes, place)
    return head.fit_ridge(sums.update(train, train_labels), *held_out)


def head_splits(workspace: Workspace, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the validation images that a head is fitted and chosen on.

    Raises:
        ValueError: --head-images is less than one a class, or more than there are.
    """
    train, val = workspace.train_index, workspace.val_index
    if count is None:
        return train, val
    if not workspace.classes <= count <= len(train):
        raise ValueError(
            f"--head-images {count} must lie in {workspace.classes}..{len(train)}: one a class to "
            "all"
        )
    labels, seed = workspace.dataset.train.labels.numpy(), workspace.source.seed
    choices = max(1, round(count / len(train) * len(val)))
    return (
        train[data.draw_by_class(labels[train], count, seed)],
        val[data.draw_by_class(labels[val], choices, seed)],
    )


@torch.no_grad()
def set_fitted_head(
    workspace: Workspace,
    model: vit.VisionTransformer,
    kind: str,
    images: int | None,
    run: runs.Run | None = None,
) -> None:
    """Fill in the model's head, from the run's head.pt where it is there."""
    if run is not None and (run.folder / "head.pt").exists():
        try:
            with safe_files.contents(run.folder / "head.pt"):
                fitted = head.FittedHead(**run.load_file("head.pt"))
        except safe_files.WrongFile:
            raise
        except safe_files.DamagedFile as error:
            raise ValueError(f"{error}; delete it to have the head fitted again") from None
    else:
        fitted = fit_head(workspace, model, kind, images).to("cpu")
        if run is not None:
            run.save_file("head.pt", vars(fitted))
    for name, parameter in model.head.named_parameters():
        tensor = getattr(fitted, name)
        if getattr(tensor, "shape", None) != parameter.shape:
            raise ValueError(f"{run.folder / 'head.pt'} is whole, and its {name} does not fit")
        parameter.copy_(tensor)
