"""What a command works with: data, splits, weights, features and the device, brought together.

The leaves know nothing of one another; this file and learner.py hand each what it needs from the
others. `options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import head
import kept_features
import model as vit
import safe_files
from device import choose_device, choose_precision, free_memory
from ranks import OneProcess
from status import Status

HEAD = ("head.weight", "head.bias")
EVAL_BATCH = 256
CPU_ACTIVATIONS = 2_000_000  # elements of a batch between two layers: beyond, a pass slows down


class Workspace:
    """The data set, its splits and the device of one command; builds models with their weights."""

    def __init__(self, options: argparse.Namespace, group: OneProcess | None = None):
        self.options, self.group = options, group or OneProcess()
        self.keeps_activations: bool | None = None  # None: none could be kept
        self.device = choose_device(options.device, self.group)
        self.dtype = choose_precision(options.precision, self.device)
        if getattr(options, "cuda_graph", "auto") == "on" and self.device.type != "cuda":
            raise ValueError(
                f"--cuda-graph on: it needs a CUDA device, and this is a {self.device}"
            )
        if options.threads:
            torch.set_num_threads(options.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, not free
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        synthetic = options.data == "synthetic"
        with self.group.first_then_others():  # one of them downloads
            self.dataset = (
                data.synthetic_dataset() if synthetic else data.load_cifar100(options.data_dir)
            )
        self.classes = len(self.dataset.classes)
        self.sets = {
            name: getattr(self.dataset, name).to(self.device) for name in ("train", "test")
        }
        labels = self.dataset.train.labels.numpy()
        self.train_index, self.val_index = data.split_validation(
            labels, options.val_fraction, options.seed
        )
        if options.val_fraction and not len(self.val_index):
            raise ValueError(
                f"--val-fraction {options.val_fraction:g} holds out no image of any class"
            )
        self.train_labels = labels[self.train_index]
        if getattr(options, "head_images", None) is not None:
            self.head_splits()  # refuses before anything is written

    @functools.cached_property
    def eval_batch(self) -> int:
        """Images that a forward pass takes."""
        if self.options.eval_batch:
            return self.options.eval_batch
        if self.device.type != "cpu":
            return EVAL_BATCH
        shape = vit.MODELS[self.options.model]
        tokens = 1 + (self.options.image_size // shape.patch) ** 2
        return min(EVAL_BATCH, max(8, CPU_ACTIVATIONS // (tokens * shape.width)))

    def shards(self) -> list[np.ndarray]:
        """Return each client's indices into the training images."""
        options, labels, k = self.options, self.train_labels, self.options.clients
        named = f"--clients {k}"
        try:
            if options.nc is not None:
                named += f" --nc {options.nc}"
                parts = data.shard_by_class(labels, k, options.nc, options.seed)
            elif options.dirichlet is not None:
                parts = data.shard_dirichlet(labels, k, options.dirichlet, options.seed)
            else:
                parts = data.shard_iid(labels, k, options.seed)
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from None
        return [self.train_index[part] for part in parts]

    def build_model(self) -> vit.VisionTransformer:
        """Build the model with its backbone weights and a zero head, in fp32 on the device."""
        options = self.options
        model = vit.build_vit(options.model, self.classes, options.seed)
        if options.weights == "dino":
            vit.load_weights(model, vit.download_dino(options.data_dir))
        elif options.weights != "none":
            vit.load_weights(model, options.weights)
        return model.to(self.device)

    def normalisation(self) -> tuple[tuple, tuple]:
        """Return mean and standard deviation of the pixels that the weights expect."""
        known = {"imagenet": vit.IMAGENET, "half": vit.HALF}
        return known.get(self.options.normalisation) or vit.default_normalisation(
            self.options.weights
        )

    def preprocess(self, dtype: torch.dtype | None = None) -> data.Preprocess:
        """Return the resize and normalisation that the weights expect; dtype: the precision's."""
        size, dtype = self.options.image_size, dtype or self.dtype
        return data.Preprocess(size, *self.normalisation(), self.device, dtype)

    @torch.no_grad()
    def features(self, model: vit.VisionTransformer, part: str) -> Tensor:
        """Return the backbone's features (N, D) fp32 of all "train" or "test" images, unaugmented.

        They are kept in <data-dir>/features under a key of all that they depend on.
        """
        preprocess, images = self.preprocess(), self.sets[part].images
        settings = [
            hashlib.sha256(images.cpu().numpy()).hexdigest(),
            preprocess.scale.tolist(),
            preprocess.shift.tolist(),
            preprocess.image_size,
        ]
        settings += [str(self.dtype), self.device.type, fingerprint(model), self.options.data]
        key = hashlib.sha256(repr([*settings, part, safe_files.BOUND]).encode()).hexdigest()
        name = f"{self.options.data}-{part}-{key[:16]}.pt"
        path = Path(self.options.data_dir) / "features" / name
        if (features := kept_features.load(path, key)) is not None:
            return features.to(self.device)
        features = self.compute_features(model, part)
        kept_features.save(path, key, features)
        return features

    @torch.no_grad()
    def compute_features(
        self, model: vit.VisionTransformer, part: str, index: Tensor | None = None
    ) -> Tensor:
        """Return the features (N, D) of a part's images, or of those in `index` (N,) alone."""
        preprocess, images = self.preprocess(), self.sets[part].images
        backbone, batch = cast_copy(model, self.dtype), self.eval_batch
        count = len(images) if index is None else len(index)
        status, rows = Status(f"features of the {part} images", count), []
        for chunk in data.in_chunks(count, batch):
            pixels = images[chunk if index is None else index[chunk]]
            with self.fitting("features", len(pixels), "--eval-batch"):
                rows.append(backbone.features(preprocess(pixels)).float())
            status.show(chunk.stop)
        status.close()
        return torch.cat(rows)

    @torch.no_grad()
    def tokens(self, model: vit.VisionTransformer, first: int) -> dict[str, Tensor] | None:
        """Return the input (N, 1 + T, D) of block `first` for all images of a part, unaugmented.

        They lie on the device where half of its free memory holds them, else on the host; None
        where they fit on neither, or not in every process of the group.
        """
        preprocess, images = self.preprocess(), {k: s.images for k, s in self.sets.items()}
        patches = (preprocess.image_size // model.shape.patch) ** 2
        read = 1 + patches * (first < model.shape.depth)  # after the last block: the class token
        shape = read, model.shape.width
        count = sum(map(len, images.values()))
        needed = count * math.prod(shape) * self.dtype.itemsize
        places = dict.fromkeys((self.device, torch.device("cpu")))
        sharing = {"cuda": 1, "cpu": self.group.size}
        free = {place: free_memory(place) / sharing[place.type] for place in places}
        place = next((d for d in places if needed <= free[d] / 2), None)
        if not all(self.group.gather(place is not None)):
            return None
        backbone, result = cast_copy(model, self.dtype), {}
        status, done = Status("activations of the images", count), 0
        for part, pixels in images.items():
            result[part] = torch.empty(len(pixels), *shape, dtype=self.dtype, device=place)
            for chunk in data.in_chunks(len(pixels), self.eval_batch):
                with self.fitting("activations", len(pixels[chunk]), "--eval-batch"):
                    tokens = backbone.tokens(preprocess(pixels[chunk]), first)
                result[part][chunk] = tokens[:, :read]
                status.show(done := done + len(pixels[chunk]))
        status.close()
        return result

    def fit_head(self, model: vit.VisionTransformer, kind: str) -> head.FittedHead:
        """Fit a "ridge" head or a linear "probe" on the training split, choices by validation.

        With --head-images it sees that many of them, an equal share of the validation images, and
        computes no other features.
        """
        labels, count = self.sets["train"].labels, self.options.head_images
        splits = [torch.from_numpy(i).to(self.device) for i in self.head_splits()]
        if count is None:
            features = self.features(model, "train")
            seen = [features[at] for at in splits]
        else:
            seen = [self.compute_features(model, "train", at) for at in splits]
        (train, train_labels), held_out = zip(seen, [labels[at] for at in splits], strict=True)
        if kind == "probe":
            return head.train_probe(train, train_labels, self.classes, *held_out)
        sums = head.RidgeSums(train.shape[1], self.classes, self.device)
        return head.fit_ridge(sums.update(train, train_labels), *held_out)

    def head_splits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the training and the validation images that a head is fitted and chosen on.

        Raises:
            ValueError: --head-images is less than one a class, or more than there are.
        """
        count, total = self.options.head_images, len(self.train_index)
        if count is None:
            return self.train_index, self.val_index
        if not self.classes <= count <= total:
            raise ValueError(
                f"--head-images {count} must lie in {self.classes}..{total}: one a class to all"
            )
        labels = self.dataset.train.labels.numpy()
        choices = max(1, round(count / total * len(self.val_index)))
        pairs = (self.train_index, count), (self.val_index, choices)
        draw = data.draw_by_class
        return tuple(part[draw(labels[part], n, self.options.seed)] for part, n in pairs)

    @contextlib.contextmanager
    def fitting(self, what: str, images: int, option: str) -> Iterator[None]:
        """Say which option to lower where the device's memory does not hold the block's work.

        Raises:
            ValueError: it does not.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            advice = (
                f"{option} {images // 2}" if images > 1 else "a smaller --image-size or --model"
            )
            raise ValueError(
                f"{self.device} is out of memory in {what} of {images} images: try {advice}; a run "
                "goes on from its last checkpoint"
            ) from None

    def environment(self) -> dict:
        """Return what may change the last bits of a result."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": None if cuda else torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "activations_kept": self.keeps_activations,
            "eval_batch": self.eval_batch,
            "micro_batch": getattr(self.options, "micro_batch", None),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        }


def fingerprint(model: vit.VisionTransformer) -> str:
    """Return the SHA-256 of the backbone's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in HEAD:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cast_copy(model: vit.VisionTransformer, dtype: torch.dtype) -> vit.VisionTransformer:
    """Return a copy of the model in another dtype."""
    copy = vit.VisionTransformer(model.shape, model.head.out_features).to(model.cls_token.device)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)
