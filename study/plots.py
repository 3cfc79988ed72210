"""Figures from plain records, fit for print: curves, and bands over seeds.

Labels are at least 7 pt at the size of a column (COLUMN, PAGE: widths in inches); groups differ in
colour, marker and line style, so that a grey print can be read. The suffix of a path chooses the
format. Nothing here needs a display; matplotlib is imported only when something is drawn. What
draws raises ValueError where there is nothing to draw, or matplotlib is missing.
Palette: Okabe and Ito 2008, readable by the colour-blind.

    from plots import plot_curves
    plot_curves({"run": [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1}]}, "a.png")
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MOST = 6  # curves of a panel that can be told apart
CROWD = 3  # panels in a row that share the name of their x axis
OTHERS = "others, between best and worst"
LETTERS = 15  # of a legend, an inch
LEAST = 4  # points of a curve, from which on it leaves room beside it
CLOSE = 0.15  # of an axis, the share in which the ends of several curves are drawn large
FORMULA = re.compile(r"(\$(?:N_c|J|\\alpha) = [\w.+-]+\$)")  # that a label may hold
UNITS = {  # what figures are drawn against: the first of these that a record has
    "pass": "pass over the training images",
    "round": "round",
    "epoch": "epoch",
}
IMAGES = {"training": "train", "validation": "val", "test": "test"}  # of a log's figures
AXES = {  # of these
    "loss": "cross-entropy (nats)",
    "acc": "accuracy (%)",
    "val_acc": "validation accuracy (%)",
    "test_acc": "test accuracy (%)",
    "val_loss": "validation loss (nats)",
    "test_loss": "test loss (nats)",
}
COLUMN, PAGE = 3.4, 7.0  # inches: one column and two of a printed page
PRINT = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # as long as every dash pattern
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
    """Return a name as a label shows it: nothing unprintable, not left out, no mathematics but
    FORMULA."""
    parts = [
        part if i % 2 else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in part)
        for i, part in enumerate(FORMULA.split(name))
    ]
    parts[::2] = (part.replace("$", r"\$") for part in parts[::2])
    shown = "".join(parts)
    return f" {shown}" if shown.startswith("_") else shown  # such labels are not for legends


def look(i: int) -> dict:
    """Return the colour, marker and line style of the i-th group."""
    again = i // len(PALETTE)  # a colour that comes back has another marker and line
    styles = PALETTE[i % 7], MARKERS[(i + 3 * again) % 7], DASHES[(i + 2 * again) % 7]
    return dict(zip(("color", "marker", "linestyle"), styles, strict=True))


# ---------------------------------------------------------------------------- curves


def plot_curves(logs: dict[str, Sequence[dict]], path: str | Path) -> Path:
    """Draw loss and accuracy against rounds or epochs, of all images that are logged.

    Args:
        logs: label -> records of a run's log.
        path: where the picture goes; its suffix chooses the format.
    """
    curves: dict[str, list[list[dict]]] = {}
    for label, records in logs.items():
        for what, kind in IMAGES.items():
            log = [
                {name.removeprefix(f"{kind}_"): value for name, value in record.items()}
                for record in records
                if f"{kind}_loss" in record or f"{kind}_acc" in record
            ]
            curves[what if len(logs) == 1 else f"{label}, {what}"] = [log]
    return plot_bands({"": curves}, path, ("loss", "acc"))


def plot_bands(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[dict]]]],
    path: str | Path,
    keys: Sequence[str] = ("val_acc",),
) -> Path:
    """Draw logged figures against rounds, epochs or passes: mean over seeds, and all as a band.

    Of more than MOST curves in a panel the best and the worst at the end are drawn, the others in
    grey. Panels share an axis where their ranges are alike; ends that lie close are drawn large.

    Args:
        curves: title of a panel -> label -> the records of each seed's log.
        keys: names of figures in AXES; several make a row of panels each, or a panel each of one
            title.
    """
    drawn = {(key, title): _bands(group, key) for key in keys for title, group in curves.items()}
    keys = [key for key in keys if any(drawn[key, title] for title in curves)]
    titles = [title for title in curves if any(drawn[key, title] for key in keys)]
    if not keys:
        raise ValueError("nothing to plot: no log holds an evaluation of this kind")
    wide = len(titles) == 1  # the figures of one title lie side by side
    figure, grid = panels(*((1, len(keys)) if wide else (len(keys), len(titles))))
    places = dict(zip([(k, t) for k in keys for t in titles], grid.flat, strict=True))
    shown = {title: _shown(drawn, keys, title) for title in titles}
    styles = {label: look(i) for i, label in enumerate(dict.fromkeys(sum(shown.values(), [])))}
    for (key, title), axes in places.items():
        chosen = {label: styles[label] for label in shown[title]}
        _draw_bands(axes, drawn[key, title], chosen)
        _enlarge_ends(axes, drawn[key, title], chosen)
        unit = _unit(log for logs in curves[title].values() for log in logs)
        lowest = wide or (key == keys[-1] and len(titles) < CROWD)
        axes.set_xlabel(unit if lowest else "")
        axes.set_title(plain(title) if key == keys[0] or wide else "")
        axes.locator_params(axis="x", integer=True)
        axes.grid()
        if wide or title == titles[0]:
            axes.set_ylabel(AXES.get(key, key.replace("_", " ")))
    if len(titles) >= CROWD:  # whose labels would run into each other
        figure.supxlabel(_unit(log for t in titles for logs in curves[t].values() for log in logs))
    for key in keys:
        share([places[key, title] for title in titles])
    return finish(figure, places.values(), path)


Bands = dict[str, tuple[np.ndarray, np.ndarray]]  # label -> x (n,), values (seeds, n)


def _bands(group: Mapping[str, Sequence[Sequence[dict]]], key: str) -> Bands:
    """Return what each label's seeds have all logged, accuracies in percent."""
    bands = {label: band for label, logs in group.items() if (band := _seeds(logs, key))}
    scale = 100 if key.endswith("acc") else 1
    return {label: (x, scale * values) for label, (x, values) in bands.items()}


def _shown(drawn: Mapping[tuple[str, str], Bands], keys: Sequence[str], title: str) -> list[str]:
    """Return the labels that are drawn in colour: all of few, or those that end best and worst."""
    judge = next((k for k in reversed(keys) if k.endswith("acc") and drawn[k, title]), keys[0])
    last = {label: values[:, -1].mean() for label, (_, values) in drawn[judge, title].items()}
    if len(last) <= MOST:
        return list(dict.fromkeys(label for key in keys for label in drawn[key, title]))
    return [max(last, key=last.get), min(last, key=last.get)]


def _draw_bands(axes, bands: Bands, styles: Mapping[str, dict]) -> None:
    """Draw the labels that have a style, each with its band, and the others thin and grey."""
    name: str | None = OTHERS
    for label, (x, values) in bands.items():
        mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
        if label not in styles:
            axes.plot(x, mean, label=name, color="0.7", linewidth=0.7, zorder=1)
            name = None
            continue
        style, every = styles[label], max(1, len(x) // 6)
        axes.plot(x, mean, label=plain(label), markevery=every, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _enlarge_ends(axes, bands: Bands, styles: Mapping[str, dict]) -> None:
    """Draw the ends of curves that lie close in a panel of their own, where the axes are empty."""
    bands = {label: band for label, band in bands.items() if label in styles}
    last = [values[:, -1].mean() for _, values in bands.values()]
    low, high = axes.get_ylim()
    shortest = min((len(x) for x, _ in bands.values()), default=0)
    close = len(bands) > 2 and 0 < max(last) - min(last) < CLOSE * (high - low)
    if not close or shortest < LEAST:
        return
    end = max(x[-1] for x, _ in bands.values())
    margin = 0.15 * (max(last) - min(last))
    below = (max(last) + min(last)) / 2 > (low + high) / 2  # the room is below the curves
    inner = axes.inset_axes([0.5, 0.12 if below else 0.52, 0.48, 0.4])
    _draw_bands(inner, bands, styles)
    inner.set(xlim=(0.8 * end, 1.02 * end), ylim=(min(last) - margin, max(last) + margin))
    inner.tick_params(labelsize=6, labelbottom=False, bottom=False)
    axes.indicate_inset_zoom(inner, edgecolor="0.5")


def _seeds(logs: Sequence[Sequence[dict]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what all seeds have logged: x (n,), values (seeds, n); None where that is nothing."""
    series = [_series(records, key) for records in logs]
    shared = sorted(set.intersection(*map(set, series))) if series else []
    values = np.array([[points[x] for x in shared] for points in series])
    return (np.array(shared), values) if shared else None


def _series(records: Sequence[dict], key: str) -> dict[float, float]:
    points = ((next((r[x] for x in UNITS if x in r), None), r[key]) for r in records if key in r)
    try:
        return {float(x): float(y) for x, y in points}
    except (OverflowError, TypeError, ValueError):
        what = f"a record's round, epoch or {key}"
        raise ValueError(f"nothing to plot: {what} is no number") from None


def _unit(logs) -> str:
    names = {next((x for x in UNITS if x in record), None) for log in logs for record in log}
    return " or ".join(said for name, said in UNITS.items() if name in names)


# ---------------------------------------------------------------------------- panels


def panels(rows: int, columns: int, height: float | None = None):
    """Return a figure, one column wide or a page, and its panels (rows, columns)."""
    size = (COLUMN if columns == 1 else PAGE, height or 0.4 + 1.8 * rows)
    return pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def share(axes_of: Sequence) -> None:
    """Give panels one y axis where that leaves each at least half of its height."""
    limits = [axes.get_ylim() for axes in axes_of]
    low, high = min(a for a, _ in limits), max(b for _, b in limits)
    if all(2 * (b - a) >= high - low for a, b in limits):
        for axes in axes_of:
            axes.set_ylim(low, high)
        for axes in axes_of[1:]:
            axes.tick_params(labelleft=False)


def finish(figure, axes_of: Iterable, path: str | Path) -> Path:
    """Write a figure with one legend of all panels above them, for which it grows."""
    entries = {}
    for axes in axes_of:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if OTHERS in entries:
        entries[OTHERS] = entries.pop(OTHERS)  # last
    if len(entries) > 1:
        room = int(figure.get_figwidth() * LETTERS)
        names = [_wrapped(label, room - 8) for label in entries]
        longest = max(_length(line) for name in names for line in name.split("\n"))
        columns = max(1, min(len(entries), room // (longest + 8)))
        tall = [name.count("\n") + 1 for name in names]
        lines = max(sum(tall[i::columns]) for i in range(columns))
        figure.set_figheight(figure.get_figheight() + 0.16 * (lines - 1))
        figure.legend(entries.values(), names, loc="outside upper center", ncols=columns)
    return save(figure, path)


def _length(label: str) -> int:
    """Return how many letters a label has, without its markup."""
    return len(re.sub(r"[${}_\\\\]", "", label))


def _wrapped(label: str, room: int) -> str:
    """Return a label in lines that fit; no formula is broken."""
    if _length(label) <= room:
        return label
    joined = FORMULA.sub(lambda found: found[0].replace(" ", "\0"), label)
    return textwrap.fill(joined, room).replace("\0", " ")
