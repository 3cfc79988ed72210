"""Maps and counts, fit for print: who holds what, where a mask keeps weights, whom a model serves.

As the figures of study/plots.py, whose sizes and styles they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from study.plots import COLUMN, PAGE, PALETTE, pyplot, save

CMAP = "Blues"  # white to dark: reads the same in grey
SHAPES = {False: (COLUMN, 3.0), True: (PAGE, 2.3)}  # of shards: one sharding, several


def plot_shards(counts: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Draw how many samples of each class (columns) each client (rows) holds; few are written out.

    Args:
        counts: title of a panel -> (K, C) integers; all are coloured on one scale.
    """
    figure, panels = pyplot().subplots(
        1, len(counts), figsize=SHAPES[len(counts) > 1], squeeze=False, layout="constrained"
    )
    top = max(2, *(table.max() for table in counts.values()))
    how = dict(aspect="auto", interpolation="nearest", cmap=_tinted(), norm=_logarithmic(top))
    for axes, (title, table) in zip(panels[0], counts.items(), strict=True):
        image = axes.imshow(np.ma.masked_equal(table, 0), **how)
        if table.shape[0] <= 20 and table.shape[1] <= 12:
            texts = np.where(table > 0, table.astype(str), "")
            _write_texts(axes, texts, table > top**0.6)
        axes.set(xlabel="class", title=f"{title}\n{_range(table.sum(axis=1))} a client")
        axes.locator_params(integer=True)
    panels[0][0].set_ylabel("client")
    bar = figure.colorbar(image, ax=list(panels[0]), label="samples of a class")
    steps = [n * 10**power for power in range(len(f"{top}")) for n in (1, 2, 5)]
    bar.set_ticks([n for n in steps if n < 0.8 * top] + [top], minor=False)
    bar.set_ticks([], minor=True)
    bar.ax.yaxis.set_major_formatter(lambda value, at: f"{value:g}")  # no powers of ten
    return save(figure, path)


def _range(sizes: np.ndarray) -> str:
    low, high = sizes.min(), sizes.max()
    return f"{low} samples" if low == high else f"{low} to {high} samples"


def plot_histogram(
    groups: Mapping[str, Sequence[float]], path: str | Path, xlabel: str, what: str = "clients"
) -> Path:
    """Draw how many of something have which value, a panel for each group on one axis.

    Args:
        groups: title of a panel -> values; each panel says their mean and that of the worst tenth.
        what: is counted.
    """
    groups = {title: np.sort(values) for title, values in groups.items() if len(values)}
    if not groups:
        raise ValueError("nothing to plot: no group has a value")
    figure, panels = pyplot().subplots(
        len(groups), 1, figsize=(COLUMN, 0.5 + 1.5 * len(groups)), sharex=True, squeeze=False
    )
    figure.set_layout_engine("constrained")
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=20)
    for axes, (title, values) in zip(panels[:, 0], groups.items(), strict=True):
        axes.hist(values, bins=edges, color=PALETTE[0], edgecolor="white", linewidth=0.4)
        worst = values[: -(-len(values) // 10)].mean()
        for at, style in ((values.mean(), "-"), (worst, "--")):
            axes.axvline(at, color="black", linestyle=style, linewidth=1)
        said = f"mean {values.mean():.1f}, worst tenth {worst:.1f} (dashed)"
        axes.set(title=f"{title}: {said}", ylabel=what)
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[-1, 0].set_xlabel(xlabel)
    return save(figure, path)


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
    size = (PAGE, 0.7 + 0.155 * len(kinds))
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    percent = np.ma.masked_invalid(100 * np.asarray(density, dtype=float))
    top = max(percent.max(), 1e-9)
    image = axes.imshow(percent, aspect="auto", cmap=CMAP, vmin=0, vmax=top)
    axes.set_facecolor("0.88")  # where there is no such parameter
    texts = [["" if x is np.ma.masked else _short(x) for x in row] for row in percent]
    _write_texts(axes, np.array(texts), percent.filled(0) > 0.6 * top)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="layer", title=title)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="trainable (%)", pad=0.01)
    save(figure, path)


def plot_overlap(
    iou: np.ndarray,
    path: str | Path,
    *,
    chance: float,
    ceiling: float,
    title: str = "",
) -> None:
    """Draw the intersection over union of clients' masks, and the range in which it can be read.

    Args:
        iou: (K, K) of one client's mask (rows, from a half of its images) and another's (columns,
            from its other half); the diagonal is what the noise of sampling leaves.
        chance: of random masks of the same density.
        ceiling: the diagonal's mean.
    """
    figure, axes = pyplot().subplots(figsize=(COLUMN, 2.4), layout="constrained")
    top = max(float(np.max(iou)), ceiling)
    low = min(float(np.min(iou)), chance)
    image = axes.imshow(iou, cmap=CMAP, vmin=low, vmax=top)
    if len(iou) <= 10:
        texts = [[f"{value:.2f}".lstrip("0") for value in row] for row in iou]
        _write_texts(axes, np.array(texts), iou > low + 0.6 * (top - low))
    axes.locator_params(integer=True)
    axes.tick_params(length=0)
    axes.set(xlabel="client, second half of its images", ylabel="client, first half")
    line = f"chance {chance:.3f}, own other half {ceiling:.3f}"
    axes.set_title(f"{title}\n{line}" if title else line)
    figure.colorbar(image, ax=axes, label="IoU", shrink=0.8)
    save(figure, path)


def _tinted():
    """Return the colours of counts, of which that of 1 is no white: white is none."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[CMAP](np.linspace(0.2, 1, 256)))


def _logarithmic(top: float):
    from matplotlib.colors import LogNorm

    return LogNorm(1, top)


def _write_texts(axes, texts: np.ndarray, dark: np.ndarray) -> None:
    """Write each text into its cell, in white where the cell is dark."""
    for at in np.ndindex(texts.shape):
        colour = "white" if dark[at] else "black"
        axes.text(*at[::-1], texts[at], ha="center", va="center", fontsize=6, color=colour)


def _short(value: float) -> str:
    """Write 92.4 as 92, 4.04 as 4.0, 0.04 as <0.1, and zero as 0."""
    if value >= 9.95 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.05 else "<0.1"
