"""Figures from log files: curves of one or several runs, and who holds how many of which class.

Nothing here needs a display; matplotlib is imported only when something is drawn.

    from plots import plot_curves
    plot_curves({"run": [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1}]}, "a.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito


def pyplot():
    """Return matplotlib.pyplot on a backend that needs no display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt


def plot_curves(logs: dict[str, Sequence[dict]], path: str | Path) -> None:
    """Draw loss and accuracy against rounds or epochs.

    Args:
        logs: label -> records of a run's log.
        path: where the picture goes; its suffix chooses the format.

    Raises:
        ValueError: no log holds a record, or matplotlib is missing.
    """
    if not any(logs.values()):
        raise ValueError("nothing to plot: the logs are empty")
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, (label, records) in enumerate(logs.items()):
        colour = PALETTE[i % len(PALETTE)]
        name = f"{label}: ".replace("$", r"\$") if len(logs) > 1 else ""
        for axes, key, style, what in (
            (left, "train_loss", dict(alpha=0.35, linewidth=0.8), "training"),
            (left, "val_loss", dict(linestyle="--"), "validation"),
            (left, "test_loss", {}, "test"),
            (right, "val_acc", dict(linestyle="--"), "validation"),
            (right, "test_acc", {}, "test"),
        ):
            x, y = _series(records, key)
            if len(x):
                factor = 100 if key.endswith("acc") else 1
                marker = "o" if len(x) == 1 else None
                axes.plot(x, factor * y, color=colour, label=name + what, marker=marker, **style)
    unit = "epoch" if any("epoch" in r for records in logs.values() for r in records) else "round"
    for axes, what in ((left, "cross-entropy (nats)"), (right, "accuracy (%)")):
        axes.set(xlabel=unit, ylabel=what)
        axes.grid(alpha=0.25)
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _series(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r.get("round", r.get("epoch")), r[key]) for r in records if key in r]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def plot_shards(counts: np.ndarray, path: str | Path, title: str = "") -> None:
    """Draw a heat map of how many samples of each class (columns) each client (rows) holds.

    Args:
        counts: (K, C) integers.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="samples (white: none)")
    axes.set(xlabel="class", ylabel="client", title=title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_density(
    kinds: Sequence[str],
    layers: Sequence[str],
    density: np.ndarray,
    path: str | Path,
    title: str = "",
) -> None:
    """Draw what share of each kind of parameter (rows) in each layer (columns) stays trainable.

    Args:
        density: (kinds, layers) in [0, 1]; NaN where a layer has no such parameter.
    """
    plt = pyplot()
    size = (2 + 0.45 * len(layers), 1.2 + 0.27 * len(kinds))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    percent = np.ma.masked_invalid(100 * density)
    top = max(percent.max(), 1e-9)
    image = axes.imshow(percent, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    for (row, column), value in np.ndenumerate(100 * density):
        if not np.isnan(value):
            colour = "white" if value < 0.6 * top else "black"
            place = dict(ha="center", va="center", fontsize=6.5, color=colour)
            axes.text(column, row, f"{value:.0f}" if value >= 10 else f"{value:.1f}", **place)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="layer", title=title)
    figure.colorbar(image, ax=axes, label="trainable (%)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
