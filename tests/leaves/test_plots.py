"""Every figure draws what it is given, refuses nothing at all, and is the same file twice."""

import numpy as np
import pytest

from study import maps, plots, relations

pytest.importorskip("matplotlib")

COUNTS = np.random.default_rng(0).integers(0, 9, (8, 10))
LOGS = [
    [{"round": r, "train_loss": 3 / (r + 1), "val_acc": 0.1 * r + 0.01 * s} for r in range(5)]
    for s in range(2)
]
GROUPS = {"J = 4": {"1": [30.0, 31.0], "5": [40.0]}, "J = 8": {"5": [35.0], "iid": [50.0]}}
DRAWN = {
    "curves": lambda path: plots.plot_curves({"a": LOGS[0], "b": LOGS[1]}, path),
    "bands": lambda path: plots.plot_bands({"iid": {"a": LOGS}, "x": {"b": LOGS[:1]}}, path),
    "grouped": lambda path: relations.plot_grouped({"": GROUPS}, path, "classes"),
    "against": lambda path: relations.plot_against(
        {"iid": {"dense": [(1.0, [30.0, 32.0])], "sparse": [(0.1, [29.0]), (0.5, [31.0])]}},
        *(path, "sent (MB)"),
        reference={"iid": ("start", 28.0)},
    ),
    "spans": lambda path: relations.plot_spans(
        {"iid": {"a": ([0.1, 1.0], 1.0, 2.0), "b": ([3.0], 3.0, 9.0)}, "x": {"b": ([1.0], 1.0, 1)}},
        *(path, "rate", ("best", "other", "tried")),
    ),
    "shards": lambda path: maps.plot_shards({"a": COUNTS, "b": COUNTS + 1}, path),
    "histogram": lambda path: maps.plot_histogram({"a": [1.0, 2.0, 9.0], "b": []}, path, "x"),
    "density": lambda path: maps.plot_density(
        ["w", "b"], ["0", "1"], np.array([[0.5, np.nan], [0.0, 1.0]]), path
    ),
    "overlap": lambda path: maps.plot_overlap(
        np.full((3, 3), 0.3), path, chance=0.05, ceiling=0.35
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_written_as_pdf(tmp_path, name):
    DRAWN[name](tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_of_the_same_data_is_the_same_file(tmp_path):
    for name in ("a.pdf", "b.pdf"):
        DRAWN["grouped"](tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


@pytest.fixture
def axes_drawn(monkeypatch):
    """The axes of the figures that are saved, in place of files."""
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.extend(figure.axes))
    return kept


def test_bands_hold_the_mean_and_the_range_of_the_seeds(axes_drawn):
    DRAWN["bands"]("unused.pdf")
    x, y = axes_drawn[0].lines[0].get_data()
    assert x.tolist() == [0, 1, 2, 3, 4]
    assert y == pytest.approx([100 * (0.1 * r + 0.005) for r in range(5)])
    band = axes_drawn[0].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((0, 41))


def test_seeds_that_were_evaluated_at_other_rounds_are_averaged_where_all_were(axes_drawn):
    plots.plot_bands({"": {"a": [LOGS[0], LOGS[1][::2]]}}, "unused.pdf")
    assert axes_drawn[0].lines[0].get_xdata().tolist() == [0, 2, 4]


def rising(slope):
    """A log whose accuracy ends at `slope` per cent, with its loss."""
    return [{"round": r, "val_acc": r * slope / 400, "val_loss": 4 - r * slope} for r in range(5)]


def test_of_many_curves_the_best_and_the_worst_have_a_colour(axes_drawn):
    curves = {f"run {i}": [rising(i)] for i in range(plots.MOST + 2)}
    plots.plot_bands({"": curves}, "unused.pdf", ("val_loss", "val_acc"))
    loss, accuracy = axes_drawn[:2]
    for axes in (loss, accuracy):
        named = {line.get_label(): line for line in axes.lines if "_" not in line.get_label()}
        assert set(named) == {plots.OTHERS, "run 0", f"run {plots.MOST + 1}"}
        assert sum(line.get_color() == "0.7" for line in axes.lines) == plots.MOST
    assert loss.get_ylabel() == plots.AXES["val_loss"]
    assert accuracy.get_ylabel() == plots.AXES["val_acc"]


def test_ends_that_lie_close_are_drawn_large(axes_drawn):
    plots.plot_bands({"": {f"{i}": [rising(90 + i)] for i in range(3)}}, "unused.pdf")
    (inner,) = axes_drawn[0].child_axes
    assert 88 < inner.get_ylim()[0] < 90 and 92 < inner.get_ylim()[1] < 94
    axes_drawn.clear()
    plots.plot_bands({"": {f"{i}": [rising(30 * i)] for i in range(1, 4)}}, "unused.pdf")
    assert not axes_drawn[0].child_axes


def test_a_long_label_is_broken_into_lines_that_fit_and_leaves_the_axes_their_height(tmp_path):
    long = " ".join(["option value"] * 6) + ", $N_c = 5$"
    lines = plots._wrapped(long, 40).split("\n")
    assert max(map(len, lines)) <= 40 and "$N_c = 5$" in lines[-1]
    figure, grid = plots.panels(1, 1)
    for i in range(7):
        grid[0][0].plot([0, 1], [0, i], label=f"{long} {i}")
    height = figure.get_figheight()
    plots.finish(figure, grid[0], tmp_path / "a.png")
    assert figure.get_figheight() > height + 0.16 * 13


def test_one_sample_is_not_as_white_as_none():
    assert maps._tinted()(0)[:3] != (1.0, 1.0, 1.0) and maps._tinted()(0)[0] < 0.9


def test_panels_share_an_axis_where_their_ranges_are_alike(axes_drawn):
    plots.plot_bands({"a": {"x": [rising(40)]}, "b": {"x": [rising(50)]}}, "unused.pdf")
    assert axes_drawn[0].get_ylim() == axes_drawn[1].get_ylim()
    axes_drawn.clear()
    plots.plot_bands({"a": {"x": [rising(1)]}, "b": {"x": [rising(50)]}}, "unused.pdf")
    assert axes_drawn[0].get_ylim()[1] < 2 < axes_drawn[1].get_ylim()[1]


def test_grouped_values_stand_at_their_category(axes_drawn):
    DRAWN["grouped"]("unused.pdf")
    assert [tick.get_text() for tick in axes_drawn[0].get_xticklabels()] == ["1", "5", "iid"]
    lines = {line.get_label(): line for line in axes_drawn[0].lines}
    assert lines["J = 4"].get_xdata().tolist() == [0, 1]
    assert lines["J = 4"].get_ydata().tolist() == [30.5, 40.0]
    assert lines["J = 8"].get_xdata().tolist() == [1, 2]


def test_a_point_of_one_seed_has_no_bar(axes_drawn):
    DRAWN["grouped"]("unused.pdf")
    (container,) = axes_drawn[0].containers  # of the one point that has two
    (bar,) = container.lines[2][0].get_segments()
    assert bar.tolist() == [[0, 30.0], [0, 31.0]]


def test_fourteen_groups_look_different():
    assert len({str(plots.look(i)) for i in range(14)}) == 14


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_curves({"a": []}, path),
        lambda path: plots.plot_bands({"a": {"b": [[{"round": 1}]]}}, path),
        lambda path: relations.plot_grouped({"a": {"b": {}}}, path, "x"),
        lambda path: maps.plot_histogram({"a": []}, path, "x"),
        lambda path: relations.plot_against({"a": {"b": []}}, path, "x"),
    ],
)
def test_nothing_to_draw_is_refused(tmp_path, draw):
    with pytest.raises(ValueError, match="nothing to plot"):
        draw(tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()


def test_values_are_written_short():
    assert [maps._short(v) for v in (0, 0.01, 0.31, 9.96, 92.4, 100)] == [
        *("0", "<0.1", "0.3", "10", "92", "100")
    ]


def test_a_strangers_name_is_a_label_and_no_mathematics(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    log = [{"round": 0, "val_acc": 0.1}, {"round": 1, "val_acc": 0.2}]
    assert plots.plain("$x$, $N_c = 5$") == "\\$x\\$, $N_c = 5$"
    plots.plot_curves({"_a\x1b$\\frac$": log, "b": log}, tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert " _a\\x1b\\$\\frac\\$, validation" in texts
    drawn[0].canvas.draw()
    for value in ({}, "x", [1, 2], 10**400):
        with pytest.raises(ValueError, match="acc is no number"):
            plots.plot_curves({"a": [{"round": 1, "val_acc": value}]}, tmp_path / "a.png")


def test_many_panels_share_the_name_of_their_axis(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, axes, path: figures.append(figure))
    log = [{"round": t, "val_acc": 0.1 * t} for t in range(3)]
    for count in (2, 3):
        plots.plot_bands({f"{i}": {"a": [log]} for i in range(count)}, tmp_path / "x.png")
    names = [[axes.get_xlabel() for axes in figure.axes] for figure in figures]
    assert names == [["round"] * 2, [""] * 3]
    assert [figure.get_supxlabel() for figure in figures] == ["", "round"]
