"""Every figure draws what it is given, refuses nothing at all, and is the same file twice."""

import numpy as np
import pytest

from study import plots

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
    "grouped": lambda path: plots.plot_grouped({"": GROUPS}, path, "classes"),
    "against": lambda path: plots.plot_against(
        {"iid": {"dense": [(1.0, [30.0, 32.0])], "sparse": [(0.1, [29.0]), (0.5, [31.0])]}},
        *(path, "sent (MB)"),
        reference={"iid": ("start", 28.0)},
    ),
    "spans": lambda path: plots.plot_spans(
        {"iid": {"a": ([0.1, 1.0], 1.0, 2.0), "b": ([3.0], 3.0, 9.0)}, "x": {"b": ([1.0], 1.0, 1)}},
        *(path, "rate", ("best", "other")),
    ),
    "shards": lambda path: plots.plot_shards({"a": COUNTS}, path),
    "density": lambda path: plots.plot_density(
        ["w", "b"], ["0", "1"], np.array([[0.5, np.nan], [0.0, 1.0]]), path
    ),
    "overlap": lambda path: plots.plot_overlap(
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


def test_grouped_values_stand_at_their_category(axes_drawn):
    DRAWN["grouped"]("unused.pdf")
    assert [tick.get_text() for tick in axes_drawn[0].get_xticklabels()] == ["1", "5", "iid"]
    first, second = (container.lines[0].get_data() for container in axes_drawn[0].containers)
    assert [round(x) for x in first[0]] == [0, 1] and first[1].tolist() == [30.5, 40.0]
    assert [round(x) for x in second[0]] == [1, 2]


def test_fourteen_groups_look_different():
    assert len({str(plots.look(i)) for i in range(14)}) == 14


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_curves({"a": []}, path),
        lambda path: plots.plot_bands({"a": {"b": [[{"round": 1}]]}}, path),
        lambda path: plots.plot_grouped({"a": {"b": {}}}, path, "x"),
        lambda path: plots.plot_against({"a": {"b": []}}, path, "x"),
    ],
)
def test_nothing_to_draw_is_refused(tmp_path, draw):
    with pytest.raises(ValueError, match="nothing to plot"):
        draw(tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()


def test_values_are_written_short():
    assert [plots._short(v) for v in (0, 0.01, 0.31, 9.96, 92.4, 100)] == [
        *("0", "<0.1", "0.3", "10", "92", "100")
    ]


def test_a_strangers_name_is_a_label_and_no_mathematics(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    log = [{"round": 0, "val_acc": 0.1}, {"round": 1, "val_acc": 0.2}]
    plots.plot_curves({"_a\x1b$\\frac$": log, "b": log}, tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert " _a\\x1b\\$\\frac\\$" in texts
    drawn[0].canvas.draw()
    for value in ({}, "x", [1, 2], 10**400):
        with pytest.raises(ValueError, match="val_acc is no number"):
            plots.plot_curves({"a": [{"round": 1, "val_acc": value}]}, tmp_path / "a.png")
