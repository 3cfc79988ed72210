"""Images on the device as uint8, splits, client shards, and the batches of a local step.

Everything random is a function of (seed, purpose, counters): no generator's state outlives a call.
The pixels go uint8 -> crop, flip -> bicubic resize -> normalise, in batch and on the device.
Shards: iid, N_c classes per client (McMahan 2017, arXiv:1602.05629), Dirichlet (Hsu 2019,
arXiv:1909.06335).

    from data import draw_batches, shard_by_class, synthetic_dataset
    labels = synthetic_dataset(samples_per_class=10).train.labels.numpy()
    shards = shard_by_class(labels, clients=50, classes_per_client=2, seed=0)
    draws = draw_batches(shards[7], batch_size=8, steps=3, seed=0, round=1, client=7)
    image, row, column, flip = draws.unbind(-1)  # (3, 8) each: crop_and_flip takes a step's draws
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4  # pixels that a random crop may shift an image by
NOISE = 0.5  # of the synthetic images, in standard deviations of their patterns


class ImageSet(NamedTuple):
    """images: (N, 3, H, W) uint8; labels: (N,) int64; both on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device) -> ImageSet:
        """Return the set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """A train and a test set, and the names of the classes."""

    train: ImageSet
    test: ImageSet
    classes: list[str]


def random(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the generator of one purpose: Philox keyed by (seed, purpose), up to two counters."""
    a, b = (*counters, 0, 0)[:2]
    key = [seed, zlib.crc32(purpose.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, a, b]))


# ---------------------------------------------------------------------------- data sets


def load_cifar100(folder: str | Path) -> Dataset:
    """Load CIFAR-100 from `folder`; torchvision downloads it where it is missing or damaged.

    Its files (train, test, meta) lie in cifar-100-python/, as torchvision unpacks them, or in
    cifar-100/ or the folder itself, as Kaggle does. None is read before its MD5 has been checked.

    Raises:
        ValueError: no network, a damaged folder, or no torchvision; the message says what to do.
    """
    try:
        from torchvision.datasets import CIFAR100
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"CIFAR-100 needs a torchvision that matches torch: {error}") from None
    try:
        base = _cifar_base(Path(folder), CIFAR100)
        cifar = type("CIFAR100", (CIFAR100,), {"base_folder": base.name})
        train = cifar(str(base.parent), train=True, download=True)
        test = cifar(str(base.parent), train=False)
    except Exception as error:  # the network, torchvision and the file system raise many types
        if parquet := _cifar_parquet(Path(folder)):
            raise ValueError(
                f"{parquet} is CIFAR-100 as the hub's parquet files, and the python version is "
                f"needed: put {CIFAR100.filename} into {folder}, from {CIFAR100.url}"
            ) from None
        reason = str(error).partition("\n")[0].partition(". You can use download=True")[0]
        raise ValueError(
            f"no whole CIFAR-100 in {folder} ({reason}): delete "
            f"{Path(folder, CIFAR100.base_folder)} if it is there and run again. Without a "
            f"network, first put {CIFAR100.filename} into {folder}, from {CIFAR100.url}, or take "
            "--data synthetic, which needs no files"
        ) from None
    sets = (
        ImageSet(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets, dtype=torch.int64),
        )
        for part in (train, test)
    )
    return Dataset(*sets, list(train.classes))


def _cifar_base(folder: Path, cifar: type) -> Path:
    """Return where CIFAR-100's files lie: in torchvision's folder, or whole in one of Kaggle's."""
    from torchvision.datasets.utils import check_integrity

    base, meta = folder / cifar.base_folder, [cifar.meta["filename"], cifar.meta["md5"]]
    for other in (folder / "cifar-100", folder):
        sums = [*cifar.train_list, *cifar.test_list, meta]
        if not base.exists() and all(check_integrity(other / name, md5) for name, md5 in sums):
            return other
    return base


def _cifar_parquet(folder: Path) -> Path | None:
    """Return a parquet file of the train or test set that lies in a folder or directly below it."""
    files = [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]
    return next((path for path in files if path.name.startswith(("train-", "test-"))), None)


@functools.cache
def synthetic_dataset(samples_per_class: int = 200, seed: int = 0) -> Dataset:
    """Generate 100 classes in 20 superclasses, 32x32; test is a quarter of the size of train.

    An image is a 4x4 grid of 8x8 cells. Half of them, at random, carry the superclass's pattern,
    the others the pattern of the class within it, each with a random sign, under noise: every class
    has the same mean image, so a linear classifier on pixels stays at chance, yet a small ViT
    learns it.
    """
    patterns = torch.from_numpy(random(seed, "patterns").standard_normal((25, 3, 8, 8), np.float32))
    patterns = F.avg_pool2d(F.pad(patterns, (1, 1, 1, 1), mode="circular"), 3, 1)
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)
    train = _synthetic_images(patterns, 100 * samples_per_class, random(seed, "synthetic train"))
    test = _synthetic_images(patterns, 25 * samples_per_class, random(seed, "synthetic test"))
    names = [f"pattern {c // 5:02d}.{c % 5}" for c in range(100)]
    return Dataset(train, test, names)


def _synthetic_images(patterns: Tensor, count: int, generator: np.random.Generator) -> ImageSet:
    labels = np.arange(count) % 100
    cells = np.where(
        generator.random((count, 16)).argsort(axis=1) < 8,
        labels[:, None] // 5,
        20 + labels[:, None] % 5,
    )
    signs = torch.from_numpy(generator.integers(0, 2, (count, 16)) * 2.0 - 1.0).float()
    contrast = torch.from_numpy(generator.uniform(0.5, 1.5, (count, 1)).astype(np.float32))
    strength = (signs * contrast)[..., None, None, None]
    noise = NOISE * generator.standard_normal(2**20 + 3072, np.float32)
    noise = torch.from_numpy(noise).unfold(0, 3072, 1)  # an image's is a window of these
    windows = torch.from_numpy(generator.integers(0, len(noise), count))
    cells, pixels = torch.from_numpy(cells), torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    for part in in_chunks(count, 100):  # small enough for a cache
        images = (patterns[cells[part]] * strength[part]).view(-1, 4, 4, 3, 8, 8)
        images = images.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 32, 32)
        images += noise[windows[part]].view(images.shape)
        pixels[part] = images.mul_(32).add_(127.5).clamp_(0, 255)
    return ImageSet(pixels, torch.from_numpy(labels))


class Entry(NamedTuple):
    """What --data can name: how it is loaded, and the options that follow it.

    load: folder -> Dataset. defaults: of options by name, where a command line leaves them away.
    lr: (what trains, head, classes per client) -> learning rate, chosen on validation.
    images: about how many train and test; how often runs are evaluated by default follows them.
    """

    load: Callable[[str], Dataset]
    defaults: dict[str, object]
    lr: Callable[[str, str, float], float]
    lr_help: str
    images: tuple[int, int] = (50_000, 10_000)


def _lr_cifar(train: str, head: str, classes: float) -> float:
    """Return a step's length: the fewer classes a client holds, the further it drifts in one."""
    if train == "head" and head != "linear":
        return 3e-4 if classes < 5 else 3e-3
    return 1e-3 if classes < 10 else 1e-2


def _lr_synthetic(train: str, head: str, classes: float) -> float:
    """Return a step's length, by the same."""
    if head == "linear":
        return 0.1
    return 3e-3 if classes < 5 else 1e-2


DATASETS = {
    "cifar100": Entry(
        load=lambda folder: load_cifar100(folder),
        defaults=dict(
            model="vit_s16",
            weights="dino",
            image_size=224,
            head="ridge",
            augment=True,
            batch_size=64,
            rounds=200,
            epochs=15,
        ),
        lr=_lr_cifar,
        lr_help="0.01, N_c below 10: 0.001; a fitted head alone: 0.003, N_c below 5: 0.0003",
    ),
    "synthetic": Entry(
        load=lambda folder: synthetic_dataset(),
        defaults=dict(
            model="vit_toy",
            weights="none",
            image_size=32,
            head="linear",
            augment=False,
            batch_size=32,
            rounds=20,
            epochs=5,
        ),
        lr=_lr_synthetic,
        lr_help="0.1; with a fitted head 0.01, N_c below 5: 0.003",
        images=(20_000, 5_000),
    ),
}


# ---------------------------------------------------------------------------- splits and shards

Labels = Sequence[int] | np.ndarray | Tensor  # (N,) classes from 0 on, some perhaps of no sample


def whole_labels(labels: Labels) -> np.ndarray:
    """Return labels as int64.

    Raises:
        ValueError: none, not one a sample, fractions, or negative ones.
    """
    try:
        array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    except (TypeError, ValueError, RuntimeError):  # ragged, bfloat16, on its way to a gradient
        array = np.empty((), object)
    if array.ndim == 1 and not len(array):
        raise ValueError("there are no samples: the labels are empty")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        kind = f"of type {getattr(labels, 'dtype', array.dtype)} and shape {array.shape}"
        raise ValueError(f"labels must be one whole number a sample, not {kind}")
    if (array < 0).any() or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"labels must be classes from 0 on, not {array.min()} to {array.max()}")
    return array.astype(np.int64, copy=False)


def split_validation(labels: Labels, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the samples into (train, validation) indices, sorted, stratified by class.

    Args:
        fraction: share of every class that goes to validation, in [0, 1).

    Raises:
        ValueError: a fraction outside that, or one that leaves no sample to train on.
    """
    labels = whole_labels(labels)
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must lie in [0, 1), not {fraction}")
    by_class, rank, counts = _ranked_by_class(labels, random(seed, "validation"))
    held_out = rank < np.round(fraction * counts)
    if held_out.all() and len(labels):
        raise ValueError(
            f"a validation fraction of {fraction} leaves none of {len(labels)} samples"
        )
    return np.sort(by_class[~held_out]), np.sort(by_class[held_out])


def draw_by_class(labels: Labels, count: int, seed: int) -> np.ndarray:
    """Draw `count` distinct samples, every class in proportion: sorted int64 indices.

    Raises:
        ValueError: count lies outside 1..N.
    """
    labels = whole_labels(labels)
    if not 1 <= count <= len(labels):
        raise ValueError(f"{count} samples cannot be drawn from {len(labels)}")
    by_class, rank, counts = _ranked_by_class(labels, random(seed, "samples by class"))
    evenly = np.argsort((rank + 0.5) / counts, kind="stable")
    return np.sort(by_class[evenly[:count]])


def _ranked_by_class(
    labels: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shuffle and sort by class: the order, ranks within a class, sizes of their classes."""
    order = generator.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class, rank, np.repeat(counts, counts)


def shard(
    labels: Labels,
    clients: int,
    *,
    nc: int | None = None,
    dirichlet: float | None = None,
    seed: int = 0,
    cover: bool = True,
) -> list[np.ndarray]:
    """Deal the samples to clients: by classes, by a Dirichlet mixture, or at random.

    Args:
        nc: classes per client.
        dirichlet: concentration of the clients' mixtures.
        cover: of `shard_by_class`.

    Returns:
        One int64 index array per client.
    """
    if nc is not None:
        return shard_by_class(labels, clients, nc, seed, cover)
    if dirichlet is not None:
        return shard_dirichlet(labels, clients, dirichlet, seed)
    return shard_iid(labels, clients, seed)


def shard_iid(labels: Labels, clients: int, seed: int) -> list[np.ndarray]:
    """Deal the samples at random, sizes differing by at most one: one int64 array per client."""
    labels = whole_labels(labels)
    _check_clients(labels, clients)
    order = random(seed, "iid shards").permutation(len(labels))
    return _split_by_client(order, np.arange(len(labels)) % clients, clients)


def shard_by_class(
    labels: Labels, clients: int, classes_per_client: int, seed: int, cover: bool = True
) -> list[np.ndarray]:
    """Give every client samples of exactly `classes_per_client` distinct classes.

    Every sample goes to exactly one client, classes are shared by an (almost) equal number of
    clients, and sizes are as equal as the counts allow.

    Args:
        cover: False lets few clients leave classes out: clients * classes_per_client of them are
            used, drawn at random, and the samples of the others go to nobody.

    Returns:
        One int64 index array per client.

    Raises:
        ValueError: unless classes <= clients * classes_per_client <= samples can be met.
    """
    labels = whole_labels(labels)
    _check_clients(labels, clients)
    classes, class_sizes = np.unique(labels, return_counts=True)
    if not 1 <= classes_per_client <= len(classes):
        raise ValueError(
            f"N_c must lie in 1..{len(classes)} (the classes), not {classes_per_client}"
        )
    slots = clients * classes_per_client
    if slots < len(classes):
        if cover:
            raise ValueError(
                f"{clients} clients of {classes_per_client} classes cannot cover {len(classes)} "
                "classes; cover=False leaves some out"
            )
        used = np.sort(random(seed, "classes in use").permutation(len(classes))[:slots])
        classes, class_sizes = classes[used], class_sizes[used]
    capacity = np.minimum(class_sizes, clients)
    if slots > capacity.sum():
        raise ValueError(
            f"{clients} clients of {classes_per_client} classes need {slots} parts of at least one "
            f"sample, and the {len(labels)} samples give at most {capacity.sum()}"
        )
    generator = random(seed, "class shards")
    shares = _spread_evenly(slots, capacity, generator)
    wanted = np.full(clients, classes_per_client)
    sizes = np.zeros(clients, np.int64)
    indices, owners = [], []
    for c in generator.permutation(len(classes)):
        # Clients that still want most classes come first (Gale-Ryser), so no one is left short.
        key = generator.random(clients) - wanted
        holders = np.argpartition(key, shares[c] - 1)[: shares[c]]
        wanted[holders] -= 1
        small, extra = divmod(class_sizes[c], shares[c])
        part = np.full(shares[c], small)
        part[np.lexsort((generator.random(shares[c]), sizes[holders]))[:extra]] += 1
        sizes[holders] += part
        indices.append(generator.permutation(np.flatnonzero(labels == classes[c])))
        owners.append(np.repeat(holders, part))
    return _split_by_client(np.concatenate(indices), np.concatenate(owners), clients)


def shard_dirichlet(labels: Labels, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Draw each client's class mixture from Dirichlet(alpha * prior); sizes differ by at most one.

    A small alpha gives nearly one class per client, a large one the prior. Every sample is used
    once: as in Hsu 2019 a class that runs out is dropped and the client's mixture renormalised.

    Raises:
        ValueError: alpha is below 1e-100 or not finite, or more clients than samples.
    """
    labels = whole_labels(labels)
    _check_clients(labels, clients)
    if not 1e-100 <= alpha < math.inf:
        raise ValueError(f"the Dirichlet concentration must lie in [1e-100, inf), not {alpha}")
    generator = random(seed, "Dirichlet shards")
    classes, left = np.unique(labels, return_counts=True)
    mixture = _log_gamma_draws(alpha * left / left.sum(), clients, generator)
    pools = [generator.permutation(np.flatnonzero(labels == c)) for c in classes]
    open_slots = generator.permutation(len(labels)) % clients  # the client of each unfilled slot
    indices, owners = [], []
    while len(open_slots):
        wish = _draw_classes(mixture, open_slots, left, generator)
        filled = np.zeros(len(open_slots), bool)
        for c in np.unique(wish):
            takers = np.flatnonzero(wish == c)[: left[c]]
            filled[takers] = True
            left[c] -= len(takers)
            indices.append(pools[c][left[c] : left[c] + len(takers)])
            owners.append(open_slots[takers])
        open_slots = open_slots[~filled]
    return _split_by_client(np.concatenate(indices), np.concatenate(owners), clients)


def _log_gamma_draws(shape: np.ndarray, clients: int, generator) -> np.ndarray:
    """Return logs of Gamma(shape) draws (clients, C); the draws themselves may underflow."""
    boosted = generator.standard_gamma(shape + 1.0, (clients, len(shape)))
    return np.log(boosted) + np.log1p(-generator.random(boosted.shape)) / shape


def _draw_classes(log_mixture, clients, left, generator) -> np.ndarray:
    """Draw one class per entry of `clients` from its mixture, among classes with samples left."""
    rows, row = np.unique(clients, return_inverse=True)
    weights = np.where(left > 0, log_mixture[rows], -np.inf)
    weights -= weights.max(axis=1, keepdims=True)
    steps = np.cumsum(np.exp(weights, out=weights), axis=1, out=weights)
    point = generator.random(len(clients)) * steps[row, -1] * (1 - 1e-7)
    drawn = np.empty(len(clients), np.int64)
    for part in in_chunks(len(clients), 100_000):
        drawn[part] = (steps[row[part]] <= point[part, None]).sum(axis=1)
    return drawn


def _check_clients(labels: np.ndarray, clients: int) -> None:
    if not 1 <= clients <= len(labels):
        raise ValueError(
            f"the number of clients must lie in 1..{len(labels)} (the samples), not {clients}"
        )


def _spread_evenly(total: int, capacity: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Split `total` into counts as equal as `capacity` allows; ties fall at random."""
    counts = np.zeros(len(capacity), np.int64)
    while (rest := total - counts.sum()) > 0:
        free = np.flatnonzero(counts < capacity)
        if rest < len(free):
            counts[generator.permutation(free)[:rest]] += 1
        else:
            counts[free] += np.minimum(rest // len(free), capacity[free] - counts[free])
    return counts


def _split_by_client(indices: np.ndarray, owners: np.ndarray, clients: int) -> list[np.ndarray]:
    ordered = indices[np.argsort(owners, kind="stable")].astype(np.int64)
    ends = np.cumsum(np.bincount(owners, minlength=clients))
    return [ordered[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


# ---------------------------------------------------------------------------- batches on the device


def draw_batches(
    shard: np.ndarray,
    batch_size: int,
    steps: int,
    *,
    seed: int,
    round: int,
    client: int = 0,
    keep: tuple[int, int] = (0, 0),
) -> Tensor:
    """Draw the batches of one client's local steps: (steps, batch_size, 4 + R) int64 on the CPU.

    The last axis holds image index, crop row, crop column (0..2 * PADDING), flip (0 or 1), and with
    keep = (R, T) which R of an image's T patches are kept, in order. A local epoch is a fresh
    permutation of the shard; a shard smaller than a batch repeats.

    Raises:
        ValueError: the client has no sample, or there is nothing to draw.
    """
    if not len(shard):
        raise ValueError(f"client {client} has no sample to draw batches from")
    if batch_size < 1 or steps < 1:
        raise ValueError(f"{steps} batches of {batch_size} samples: there must be some of each")
    generator = random(seed, "local batches", round, client)
    count = batch_size * steps
    epochs = [generator.permutation(shard) for _ in range(math.ceil(count / len(shard)))]
    seen, patches = keep
    draws = np.empty((count, 4 + seen), np.int64)
    draws[:, 0] = np.concatenate(epochs)[:count]
    draws[:, 1:3] = generator.integers(0, 2 * PADDING + 1, (count, 2))
    draws[:, 3] = generator.integers(0, 2, count)
    if seen:
        chosen = generator.random((count, patches)).argsort(axis=1)[:, :seen]
        draws[:, 4:] = np.sort(chosen, axis=1)
    return torch.from_numpy(draws).view(steps, batch_size, -1)


def draw_epoch(
    train: np.ndarray, batch_size: int, *, seed: int, epoch: int, keep: tuple[int, int] = (0, 0)
) -> Tensor:
    """Draw one epoch's batches over `train`, in the layout of `draw_batches`.

    What does not fill the last batch is left out of this epoch, unless it is all there is.
    """
    if not len(train):
        raise ValueError("there are no samples to draw an epoch from")
    size = min(batch_size, len(train))
    return draw_batches(train, size, len(train) // size, seed=seed, round=epoch, keep=keep)


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Gather images[draws[:, 0]], shifted with repeated edges and flipped as drawn.

    Edges repeat rather than turn black, which a pre-trained ViT takes for part of the object.

    Args:
        images: (N, 3, H, W) uint8.
        draws: (B, 4 or more) int64 on the same device, see `draw_batches`.

    Returns:
        (B, 3, H, W) uint8.
    """
    index, row, column, flip = draws[:, :4].unbind(1)
    height, width = images.shape[-2:]
    down, across = (torch.arange(n, device=images.device) for n in (height, width))
    rows = (row[:, None] + down - PADDING).clamp(0, height - 1)
    across = torch.where(flip[:, None] > 0, width - 1 - across, across)
    columns = (column[:, None] + across - PADDING).clamp(0, width - 1)
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    index, rows, columns = (
        index[:, None, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    )
    return images[index, channels, rows, columns]


class Preprocess:
    """Resize uint8 images bicubically (a = -0.5, as PIL), clamp to the range, normalise.

    The resize is two products with constant matrices, one per axis.

    Args:
        image_size: side of the output in pixels.
        mean, std: per channel, for pixels in [0, 1].
        dtype: of the output (B, 3, image_size, image_size).
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], device, dtype):
        self.image_size, self.device, self.dtype = image_size, device, dtype
        self.scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self.shift = (torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self._matrices: dict[int, Tensor] = {}

    def _matrix(self, side: int) -> Tensor:
        """Return the (image_size, side) resize matrix: interpolate's answer to each unit vector."""
        if side not in self._matrices:
            basis = torch.eye(side).view(1, side, 1, side)
            size = (1, self.image_size)
            out = F.interpolate(basis, size=size, mode="bicubic", antialias=True)
            self._matrices[side] = out[0, :, 0].T.contiguous().to(self.device)
        return self._matrices[side]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn (B, 3, H, W) uint8 into (B, 3, image_size, image_size) of `dtype`."""
        x = images.to(torch.float32, copy=True)  # which is changed in place
        height, width = x.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            x = self._matrix(height) @ (x @ self._matrix(width).T)
            x = x.clamp_(0, 255)
        return x.mul_(self.scale).sub_(self.shift).to(self.dtype)


def in_chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
