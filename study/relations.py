"""Relations between runs, fit for print: values of groups, one quantity on another, spans.

As the figures of study/plots.py, whose sizes and styles they have. A point is a mean over seeds,
its bar goes from the lowest to the highest; of one seed there is no bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from study.plots import finish, look, panels, plain, share

Points = Sequence[tuple[float, Sequence[float]]]  # x, the value of each seed


def plot_grouped(
    groups: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    path: str | Path,
    xlabel: str,
    ylabel: str = "validation accuracy (%)",
    categories: Sequence[str] | None = None,
) -> None:
    """Draw a value of each group at each category.

    Args:
        groups: title of a panel -> label -> category -> the value of each seed.
        categories: their order; None: that in which they first appear.
    """
    every = [group for some in groups.values() for group in some.values()]
    categories = list(categories or dict.fromkeys(name for group in every for name in group))
    points = {
        title: {
            label: [(categories.index(name), values) for name, values in group.items()]
            for label, group in some.items()
        }
        for title, some in groups.items()
    }
    figure, axes_of = _drawn(points, ylabel)
    for title, axes in axes_of.items():
        axes.set_xticks(range(len(categories)), map(plain, categories))
        axes.set(xlabel=xlabel, title=plain(title), xlim=(-0.5, len(categories) - 0.5))
        axes.grid(axis="y")
    share(list(axes_of.values()))
    finish(figure, axes_of.values(), path)


def plot_against(
    groups: Mapping[str, Mapping[str, Points]],
    path: str | Path,
    xlabel: str | None,
    ylabel: str = "validation accuracy (%)",
    reference: Mapping[str, tuple[str, float]] | None = None,
) -> None:
    """Draw values against a positive quantity (bytes sent, distance moved) on a logarithmic axis.

    Args:
        groups: title of a panel -> label -> points, joined in their order.
        xlabel: of all panels; None: the title of each is its own.
        reference: title -> (label, value) of a horizontal line.
    """
    figure, axes_of = _drawn(groups, ylabel)
    for title, axes in axes_of.items():
        if reference and title in reference:
            label, value = reference[title]
            style = dict(color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.axhline(value, label=plain(label), **style)
        axes.set(xscale="log", xlabel=xlabel or plain(title), title=plain(title) if xlabel else "")
        _plain_log_ticks(axes)
        axes.grid()
    share(list(axes_of.values()))
    finish(figure, axes_of.values(), path)


def _drawn(groups: Mapping[str, Mapping[str, Points]], ylabel: str):
    """Return a figure and, by title, its panels, with the points of those that have some."""
    groups = {title: group for title, group in groups.items() if any(group.values())}
    if not groups:
        raise ValueError("nothing to plot: no point is given")
    figure, grid = panels(1, len(groups))
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    for axes, group in zip(grid[0], groups.values(), strict=True):
        for label, points in group.items():
            if points:
                _draw_means(axes, points, plain(label), look(labels.index(label)))
    grid[0][0].set_ylabel(ylabel)
    return figure, dict(zip(groups, grid[0], strict=True))


def _draw_means(axes, points: Points, label: str, style: dict) -> None:
    """Draw means, and bars from the lowest to the highest of several seeds."""
    x, values = zip(*points, strict=True)
    means = [np.mean(v) for v in values]
    hollow = dict(markerfacecolor="none", clip_on=False)  # what lies below is seen, at an edge too
    axes.plot(x, means, label=label, **hollow, **style)
    for at, v in points:
        if len(v) > 1:
            spread = [[np.mean(v) - min(v)], [max(v) - np.mean(v)]]
            axes.errorbar(at, np.mean(v), spread, color=style["color"], capsize=2, elinewidth=0.8)


def plot_spans(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], float, float]]],
    path: str | Path,
    xlabel: str,
    names: tuple[str, str, str],
) -> None:
    """Draw a line a row, from the lowest to the highest of some positive values, and two marks.

    Args:
        groups: title of a panel -> label of the row -> (values, the first mark, the second).
        names: of the two marks, and of the lines.
    """
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    if not labels:
        raise ValueError("nothing to plot: no row is given")
    figure, grid = panels(1, len(groups), height=0.9 + 0.15 * len(labels))
    axes_of = grid[0]
    for axes, (title, group) in zip(axes_of, groups.items(), strict=True):
        y = [-labels.index(label) for label in group]
        values, *marks = zip(*group.values(), strict=True)
        low, high = ([end(v) for v in values] for end in (min, max))
        axes.hlines(y, low, high, color="0.6", linewidth=1.5, label=names[2])
        for i, (x, name) in enumerate(zip(marks, names[:2], strict=True)):
            full = "none" if i else "full"  # the second lets the first be seen
            axes.plot(x, y, label=name, **look(i) | {"linestyle": "", "fillstyle": full})
        axes.axvline(1, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(xscale="log", xlabel=xlabel, title=plain(title))
        axes.set_yticks([-i for i in range(len(labels))], labels)
        axes.set(ylim=(0.5 - len(labels), 0.5))
        axes.tick_params(labelleft=axes is axes_of[0])
        axes.grid(axis="x")
        _plain_log_ticks(axes)
    finish(figure, axes_of, path)


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
