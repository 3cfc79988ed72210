"""What a command works with: data, splits, weights and the device, brought together.

The leaves know nothing of one another; the files of this folder hand each what it needs from the
others.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import model as vit
from machine.device import Machine, choose_device, choose_precision
from machine.ranks import OneProcess

EVAL_BATCH = 256
CPU_ACTIVATIONS = 2_000_000  # elements of a batch between two layers: beyond, a pass slows down
NORMALISATIONS = {"imagenet": vit.IMAGENET, "half": vit.HALF}


class Source(NamedTuple):
    """Data."""

    data: Annotated[str, "data set", data.DATASETS] = "cifar100"
    data_dir: Annotated[str, "folder of data, weights and features", "path"] = "data"
    val_fraction: Annotated[
        float,
        "share of the training set held out for validation, by class",
        "0 <= x <= 0.9",
    ] = 0.1
    seed: Annotated[int, "seed of everything random", "0 <= x <= 9223372036854775807"] = 0
    fresh: Annotated[
        bool,
        "make features, the heads fitted to them and masks anew, whatever earlier commands have "
        "kept in --data-dir; a run that has begun goes on with its own",
    ] = False


class Backbone(NamedTuple):
    """Model."""

    model: Annotated[str | None, "architecture", vit.MODELS] = None
    weights: Annotated[
        str | None, f"{', '.join(vit.WEIGHTS)}, none, or a checkpoint file", "path"
    ] = None
    image_size: Annotated[int | None, "pixels a side", "1 <= x <= 4096"] = None
    normalisation: Annotated[
        str,
        "mean and std of the pixels; auto follows the checkpoint's name",
        ("auto", *NORMALISATIONS),
    ] = "auto"


class Sharding(NamedTuple):
    """Clients."""

    clients: Annotated[int, "number of clients K", ">= 1", "--clients --K"] = 100
    nc: Annotated[int | None, "classes per client N_c [iid]", ">= 1"] = None
    dirichlet: Annotated[
        float | None, "concentration of the clients' class mixtures [iid]", "1e-6 <= x <= 1e9"
    ] = None

    cover: Annotated[
        str,
        "all: every class has a client; partial: with too few clients for that, some have none",
        ("all", "partial"),
    ] = "all"

    @property
    def name(self) -> str:
        """iid, nc5 or dir0.3."""
        if self.nc is not None:
            return f"nc{self.nc}"
        return f"dir{self.dirichlet:g}" if self.dirichlet is not None else "iid"


class Workspace:
    """The data set, its splits and the device of one command; builds models with their weights.

    Args:
        sharding: who holds which training images; None: one client holds all of them.

    shards has each client's indices into the training images, train_index all of these: images of
    classes that nobody holds (--cover partial) do not train.
    """

    def __init__(
        self,
        source: Source,
        machine: Machine,
        backbone: Backbone | None = None,
        group: OneProcess | None = None,
        sharding: Sharding | None = None,
    ):
        self.source, self.machine, self.backbone = source, machine, backbone
        self.began = time.time()
        self.group = group or OneProcess()
        self.device = choose_device(machine.device, self.group.local_rank, self.group.size)
        self.dtype = choose_precision(machine.precision, self.device)
        if machine.threads:
            torch.set_num_threads(machine.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, not free
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with self.group.first_then_others():  # the first one downloads
            self.dataset = data.DATASETS[source.data].load(source.data_dir)
            self._split(sharding)
        self.classes = len(self.dataset.classes)
        self.sets = {
            name: getattr(self.dataset, name).to(self.device) for name in ("train", "test")
        }

    def _split(self, sharding: Sharding | None) -> None:
        """Hold out the validation images, and share the others out."""
        labels, seed = self.dataset.train.labels.numpy(), self.source.seed
        share = self.source.val_fraction
        self.train_index, self.val_index = data.split_validation(labels, share, seed)
        if share and not len(self.val_index):
            raise ValueError(f"--val-fraction {share:g} holds out no image of any class")
        self.shards = [self.train_index]
        if sharding is None:
            return
        clients, nc, dirichlet, cover = sharding
        trained, everyone = labels[self.train_index], cover == "all"
        try:
            parts = data.shard(
                trained, clients, nc=nc, dirichlet=dirichlet, seed=seed, cover=everyone
            )
        except ValueError as error:
            options = f"--clients {clients}" + (f" --nc {nc}" if nc is not None else "")
            said = str(error).replace("cover=False", "--cover partial")
            raise ValueError(f"{options}: {said}") from None
        self.shards = [self.train_index[part] for part in parts]
        if not everyone:
            self.train_index = np.sort(np.concatenate(self.shards))

    @functools.cached_property
    def eval_batch(self) -> int:
        """Images that a forward pass takes."""
        if self.machine.eval_batch:
            return self.machine.eval_batch
        if self.device.type != "cpu":
            return EVAL_BATCH
        shape = vit.MODELS[self.backbone.model]
        tokens = 1 + (self.backbone.image_size // shape.patch) ** 2
        return min(EVAL_BATCH, max(8, CPU_ACTIVATIONS // (tokens * shape.width)))

    def classes_without_client(self) -> list[str]:
        """Name the classes of which no image trains."""
        labels = self.dataset.train.labels.numpy()[self.train_index]
        absent = np.setdiff1d(np.arange(self.classes), labels)
        return [self.dataset.classes[c] for c in absent]

    def build_model(self, load: bool = True) -> vit.VisionTransformer:
        """Build the model with its backbone weights and a zero head, in fp32 on the device.

        Args:
            load: False leaves the weights at their random start, for others to be put in.
        """
        weights = self.backbone.weights if load else "none"
        model = vit.build_vit(self.backbone.model, self.classes, self.source.seed)
        if weights in vit.WEIGHTS:
            weights = vit.download(weights, self.source.data_dir)
        if weights != "none":
            vit.load_weights(model, weights)
        if self.backbone.normalisation == "auto" and self.backbone.weights == weights != "none":
            say_normalisation(weights, self.normalisation())
        return model.to(self.device)

    def normalisation(self) -> str:
        """Return how the weights expect their pixels: one of NORMALISATIONS."""
        if self.backbone.normalisation != "auto":
            return self.backbone.normalisation
        statistics = vit.default_normalisation(self.backbone.weights)
        return next(name for name, pair in NORMALISATIONS.items() if pair == statistics)

    def preprocess(self, dtype: torch.dtype | None = None) -> data.Preprocess:
        """Return the resize and normalisation that the weights expect; dtype: the precision's."""
        size, dtype = self.backbone.image_size, dtype or self.dtype
        mean, std = NORMALISATIONS[self.normalisation()]
        return data.Preprocess(size, mean, std, self.device, dtype)

    def some_images(self, index: np.ndarray, count: int, *purpose: str | int) -> Tensor:
        """Draw up to `count` of these training images, without replacement."""
        draws = data.random(self.source.seed, *purpose)
        return torch.from_numpy(draws.permutation(index)[:count]).to(self.device)

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
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "threads": None if cuda else torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "eval_batch": self.eval_batch,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        }

    def folder(self, name: str) -> Path:
        """Return a folder of what commands share: "features" or "masks"."""
        return Path(self.source.data_dir) / name

    def keeps(self, path: Path) -> bool:
        """Tell whether a file of such a folder may serve: under --fresh one written since."""
        return path.exists() and not (self.source.fresh and path.stat().st_mtime < self.began)


@functools.cache
def say_normalisation(weights: str, pixels: str) -> None:
    """Say once how the pixels of a file's weights are normalised, where nobody was told."""
    print(
        f"weights {weights}: pixels are normalised by {pixels} statistics, going by the file's "
        "name; --normalisation says otherwise"
    )
