"""Figures from plain records and arrays, fit for print: curves, heat maps, one quantity on another.

Labels are at least 7 pt at the size of a column (COLUMN, PAGE: widths in inches); groups differ in
colour, marker and line style, so that a grey print can be read. The suffix of a path chooses the
format. Nothing here needs a display; matplotlib is imported only when something is drawn.
Palette: Okabe and Ito 2008, readable by the colour-blind.

    from plots import plot_curves
    plot_curves({"run": [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1}]}, "a.png")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
CMAP = "Blues"  # white to dark: reads the same in grey
COLUMN, PAGE = 3.4, 7.0  # inches: one column and two of a printed page
PRINT = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # text stays text
}


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

    plt.rcParams.update(PRINT)
    return plt


def save(figure, path: str | Path) -> Path:
    """Write the figure, as a PNG where the name has no ending; return the file's path.

    It is free of dates, so that the same data gives the same file.
    """
    path = Path(path)
    if path.suffix in ("", "."):
        path = path.with_name(f"{path.name.rstrip('.')}.png")
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    figure.savefig(path, dpi=200, metadata=metadata)
    pyplot().close(figure)
    return path


def plain(name: str) -> str:
    """Return a name as a label shows it: no mathematics, nothing unprintable, and not left out."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # such labels are not for legends


def look(i: int) -> dict:
    """Return the colour, marker and line style of the i-th group."""
    again = i // len(PALETTE)  # a colour that comes back has another marker and line
    styles = PALETTE[i % 7], MARKERS[(i + 3 * again) % 7], DASHES[(i + 2 * again) % 7]
    return dict(zip(("color", "marker", "linestyle"), styles, strict=True))


# ---------------------------------------------------------------------------- curves


def plot_curves(logs: dict[str, Sequence[dict]], path: str | Path) -> Path:
    """Draw loss and accuracy against rounds or epochs; return the file's path.

    Args:
        logs: label -> records of a run's log.
        path: where the picture goes; its suffix chooses the format.

    Raises:
        ValueError: no log holds a record, or matplotlib is missing.
    """
    if not any(logs.values()):
        raise ValueError("nothing to plot: the logs are empty")
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained")
    styles = dict(
        training=dict(alpha=0.35, linewidth=0.8), validation=dict(linestyle="--"), test={}
    )
    drawn = set()
    for i, (label, records) in enumerate(logs.items()):
        colour, unnamed = PALETTE[i % len(PALETTE)], len(logs) > 1
        for axes, key, what in (
            (left, "test_loss", "test"),
            (left, "val_loss", "validation"),
            (left, "train_loss", "training"),
            (right, "test_acc", "test"),
            (right, "val_acc", "validation"),
        ):
            x, y = _series(records, key)
            if len(x):
                style = styles[what] | dict(color=colour, marker="o" if len(x) == 1 else None)
                name = plain(label) if unnamed else None
                axes.plot(x, 100 * y if key.endswith("acc") else y, label=name, **style)
                drawn, unnamed = drawn | {what}, False
    colour = "black" if len(logs) > 1 else PALETTE[0]
    for what, style in styles.items():  # colours tell runs apart, styles the images
        if what in drawn:
            left.plot([], [], color=colour, label=what, **style)
    for axes, what in ((left, "cross-entropy (nats)"), (right, "accuracy (%)")):
        axes.set(xlabel=_unit(logs.values()), ylabel=what)
        axes.grid()
    _legend(figure, (left, right))
    return save(figure, path)


def plot_bands(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[dict]]]],
    path: str | Path,
    key: str = "val_acc",
    ylabel: str = "validation accuracy (%)",
) -> None:
    """Draw a logged share against rounds or epochs: mean over seeds, and all of them as a band.

    Args:
        curves: title of a panel -> label -> the records of each seed's log.

    Raises:
        ValueError: no log holds `key`, or matplotlib is missing.
    """
    drawn = {
        title: {label: band for label, logs in group.items() if (band := _seeds(logs, key))}
        for title, group in curves.items()
    }
    drawn = {title: group for title, group in drawn.items() if group}
    if not drawn:
        raise ValueError(f"nothing to plot: no log holds {key}")
    figure, panels = _panels(len(drawn))
    labels = list(dict.fromkeys(label for group in drawn.values() for label in group))
    for axes, (title, group) in zip(panels, drawn.items(), strict=True):
        for label, (x, values) in group.items():
            style = look(labels.index(label))
            every = max(1, len(x) // 6)
            axes.plot(x, 100 * values.mean(axis=0), label=label, markevery=every, **style)
            low, high = 100 * values.min(axis=0), 100 * values.max(axis=0)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        unit = _unit(log for logs in curves[title].values() for log in logs)
        axes.set(xlabel=unit, title=title)
        axes.locator_params(axis="x", integer=True)
        axes.grid()
    panels[0].set_ylabel(ylabel)
    _legend(figure, panels)
    save(figure, path)


def _seeds(logs: Sequence[Sequence[dict]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what all seeds have logged: x (n,), values (seeds, n); None where that is nothing."""
    series = [dict(zip(*map(list, _series(records, key)), strict=True)) for records in logs]
    shared = sorted(set.intersection(*map(set, series))) if series else []
    values = np.array([[points[x] for x in shared] for points in series])
    return (np.array(shared), values) if shared else None


def _series(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r.get("round", r.get("epoch")), r[key]) for r in records if key in r]
    try:
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
    except (OverflowError, TypeError, ValueError):
        raise ValueError(
            f"nothing to plot: a record's round, epoch or {key} is no number"
        ) from None
    return x, y


def _unit(logs) -> str:
    units = {
        unit for log in logs for record in log for unit in ("round", "epoch") if unit in record
    }
    return " or ".join(sorted(units, reverse=True))


# ---------------------------------------------------------------------------- groups and relations


def plot_grouped(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    path: str | Path,
    xlabel: str,
    ylabel: str = "validation accuracy (%)",
) -> None:
    """Draw a value of each group at each category: mean over seeds, bars from lowest to highest.

    Args:
        panels: title -> label -> category -> the value of each seed; categories in the order they
            first appear.

    Raises:
        ValueError: there is nothing to draw, or matplotlib is missing.
    """
    panels = {title: groups for title, groups in panels.items() if any(groups.values())}
    if not panels:
        raise ValueError("nothing to plot: no group has a value")
    every = [group for groups in panels.values() for group in groups.values()]
    categories = list(dict.fromkeys(category for group in every for category in group))
    figure, axes_of = _panels(len(panels))
    for axes, (title, groups) in zip(axes_of, panels.items(), strict=True):
        for i, (label, group) in enumerate(groups.items()):
            aside = (i - (len(groups) - 1) / 2) * 0.5 / len(groups)
            x = [categories.index(category) + aside for category in group]
            _draw_means(axes, x, list(group.values()), label, look(i))
        axes.set_xticks(range(len(categories)), categories)
        axes.set(xlabel=xlabel, title=title)
        axes.margins(x=0.08)
        axes.grid(axis="y")
    axes_of[0].set_ylabel(ylabel)
    _legend(figure, axes_of)
    save(figure, path)


def plot_against(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    path: str | Path,
    xlabel: str | None,
    ylabel: str = "validation accuracy (%)",
    reference: Mapping[str, tuple[str, float]] | None = None,
) -> None:
    """Draw values against a positive quantity (bytes sent, distance moved) on a logarithmic axis.

    Args:
        panels: title -> label -> points (x, the value of each seed), joined in their order.
        xlabel: of all panels; None: the title of each is its own.
        reference: title -> (label, value) of a horizontal line.

    Raises:
        ValueError: there is nothing to draw, or matplotlib is missing.
    """
    panels = {title: group for title, group in panels.items() if any(group.values())}
    if not panels:
        raise ValueError("nothing to plot: no point is given")
    figure, axes_of = _panels(len(panels))
    labels = list(dict.fromkeys(label for group in panels.values() for label in group))
    for axes, (title, group) in zip(axes_of, panels.items(), strict=True):
        for label, points in group.items():
            if points:
                x, values = zip(*points, strict=True)
                _draw_means(axes, x, values, label, look(labels.index(label)))
        if reference and title in reference:
            label, value = reference[title]
            axes.axhline(value, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), label=label)
        axes.set(xscale="log", xlabel=xlabel or title, title=title if xlabel else "")
        _plain_log_ticks(axes)
        axes.grid()
    axes_of[0].set_ylabel(ylabel)
    _legend(figure, axes_of)
    save(figure, path)


def plot_spans(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], float, float]]],
    path: str | Path,
    xlabel: str,
    names: tuple[str, str],
) -> None:
    """Draw a line a row, from the lowest to the highest of some positive values, and two marks.

    Args:
        panels: title -> label of the row -> (values, what the first mark shows, the second).
        names: of the marks.

    Raises:
        ValueError: there is nothing to draw, or matplotlib is missing.
    """
    labels = list(dict.fromkeys(label for group in panels.values() for label in group))
    if not labels:
        raise ValueError("nothing to plot: no row is given")
    figure, axes_of = _panels(len(panels), height=0.9 + 0.15 * len(labels))
    for axes, (title, group) in zip(axes_of, panels.items(), strict=True):
        y = [-labels.index(label) for label in group]
        values, *marks = zip(*group.values(), strict=True)
        low, high = ([end(v) for v in values] for end in (min, max))
        axes.hlines(y, low, high, color="0.6", linewidth=1.5)
        for i, (x, name) in enumerate(zip(marks, names, strict=True)):
            full = "none" if i else "full"  # the second lets the first be seen
            axes.plot(x, y, label=name, **look(i) | {"linestyle": "", "fillstyle": full})
        axes.axvline(1, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(xscale="log", xlabel=xlabel, title=title)
        axes.set_yticks([-i for i in range(len(labels))], labels)
        axes.grid(axis="x")
        _plain_log_ticks(axes)
    _legend(figure, axes_of)
    save(figure, path)


def _draw_means(axes, x: Sequence, values: Sequence[Sequence[float]], label: str, style: dict):
    mean = np.array([np.mean(v) for v in values])
    spread = np.abs(np.array([[min(v), max(v)] for v in values]).T - mean)
    axes.errorbar(x, mean, yerr=spread, label=label, capsize=2, elinewidth=0.8, **style)


def _plain_log_ticks(axes) -> None:
    """Label a logarithmic axis plainly: a short one at round numbers, a long one at powers."""
    from matplotlib import ticker

    low, high = axes.get_xlim()
    if high / low < 200:
        wide = high / low > 8
        where = ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(4)
        axes.xaxis.set_major_locator(where)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _panels(count: int, height: float = 2.0):
    """Return a figure of panels in a row that share their y axis: one column wide, or a page."""
    size = (COLUMN if count == 1 else PAGE, height)
    figure, panels = pyplot().subplots(
        1, count, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    return figure, list(panels[0])


def _legend(figure, panels: Sequence) -> None:
    """Put one legend of all panels above them, in as many columns as fit."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(entries) > 1:
        longest = max(len(re.sub(r"[${}_\\\\]", "", label)) for label in entries)
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 15 / (longest + 6))))
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns)


# ---------------------------------------------------------------------------- heat maps


def plot_shards(counts: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Draw how many samples of each class (columns) each client (rows) holds; few are written out.

    Args:
        counts: title of a panel -> (K, C) integers; all are coloured on one scale.
    """
    size = (PAGE, 1.9) if len(counts) > 1 else (COLUMN, 3.0)
    figure, panels = pyplot().subplots(
        1, len(counts), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    top = max(2, *(table.max() for table in counts.values()))
    how = dict(aspect="auto", interpolation="nearest", cmap=CMAP, norm=_logarithmic(top))
    for axes, (title, table) in zip(panels[0], counts.items(), strict=True):
        image = axes.imshow(np.ma.masked_equal(table, 0), **how)
        if table.shape[0] <= 20 and table.shape[1] <= 12:
            texts = np.where(table > 0, table.astype(str), "")
            _write_texts(axes, texts, table > top**0.6)
        axes.set(xlabel="class", title=title)
    panels[0][0].set_ylabel("client")
    figure.colorbar(image, ax=list(panels[0]), label="samples")
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
