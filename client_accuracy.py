"""How well one model serves each client: shares of the validation set, and how figures spread.

A client's share has its own mixture of classes q(c). It is the largest that the validation set
holds: s = min over its classes of V(c) / q(c), V(c) validation images of class c, of which
round(s q(c)) are drawn at random, each at most once. Clients' shares may overlap.

    import numpy as np; from client_accuracy import spread, validation_share
    labels = np.repeat([0, 1, 2], 10)  # of 30 validation images
    share = validation_share(labels, [30, 15, 0], seed=0, client=7)  # 10 of class 0, 5 of class 1
    spread([0.5, 0.7, 0.9])  # mean, mean of the worst tenth, standard deviation
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np


def validation_share(
    labels: np.ndarray, held: Sequence[int], *, seed: int, client: int
) -> np.ndarray:
    """Return the places (n,) int64, ascending, of a client's validation images among `labels`.

    Args:
        labels: (V,) classes of all validation images.
        held: (classes,) how many training images of each class the client holds.

    Raises:
        ValueError: the client holds nothing.
    """
    held = np.asarray(held, np.float64)
    if not held.sum() > 0:
        raise ValueError(f"client {client} holds no image")
    present = np.bincount(labels, minlength=len(held))
    mixture = held / held.sum()
    size = min(present[c] / mixture[c] for c in np.flatnonzero(held))
    key = [seed, zlib.crc32(b"validation shares")]
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, client, 0]))
    places = [
        generator.choice(np.flatnonzero(labels == c), int(size * mixture[c] + 0.5), replace=False)
        for c in np.flatnonzero(held)
    ]
    return np.sort(np.concatenate(places)).astype(np.int64)


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Return the mean over clients, the mean of the worst tenth (rounded up), and the deviation."""
    ordered = np.sort(np.asarray(accuracies, np.float64))
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return {
        "mean_acc": float(ordered.mean()),
        "worst_decile_acc": float(worst.mean()),
        "std": float(ordered.std()),
    }


def by_class(labels: np.ndarray, correct: np.ndarray, classes: int) -> np.ndarray:
    """Return the accuracy on each class: (classes,) float64, NaN where it has no image."""
    seen = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, correct, minlength=classes)
    return np.divide(right, seen, out=np.full(classes, np.nan), where=seen > 0)
