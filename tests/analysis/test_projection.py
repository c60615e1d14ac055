"""Every point is where it belongs, in its colour, on axes that can be compared."""

import numpy as np
import pytest
import torch
from drawing import plot, size
from matplotlib.colors import to_hex

from hf_dskd import UserError
from hf_dskd.analysis.projection import plot_projection


BLUE, ORANGE = "#1f5fa8", "#e4572e"


def normal(count, shift=0.0, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)) + shift


def drawn(axes):
    """Points of a panel by colour, sorted, and how solid they are."""
    [points] = axes.collections
    colours = points.get_facecolors()
    names = np.array([to_hex(colour) for colour in colours])
    places = np.asarray(points.get_offsets())
    return {name: sorted(map(tuple, places[names == name])) for name in set(names)}, float(colours[0, 3])


def points(part):
    return sorted(map(tuple, part.numpy()))


def test_points_and_axes(tmp_path, figures):
    panels = {
        "before $x$ 東": (normal(30, 5.0), normal(40, seed=1)),
        "after": (normal(20, 1.0, seed=2).to(torch.bfloat16), normal(40, seed=1)),
    }
    plot(plot_projection, panels, tmp_path / "folder" / "projection.png", (0.412, 0.127))
    [figure] = figures
    assert [axes.get_title("left") for axes in figure.axes] == ["before $x$ \\u6771", "after"]
    for axes, (queries, keys) in zip(figure.axes, panels.values()):
        shown, _ = drawn(axes)
        assert shown == {BLUE: points(queries.float()), ORANGE: points(keys)}
        means = {line.get_color(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
        assert means[BLUE] == pytest.approx(tuple(queries.float().mean(0).tolist()))
        assert means[ORANGE] == pytest.approx(tuple(keys.mean(0).tolist()))
        assert axes.get_aspect() == 1
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert right - left == pytest.approx(high - low)
        for x, y in shown[BLUE] + shown[ORANGE]:
            assert left < x < right and low < y < high
        assert axes.get_xlabel() == "first component (41% of the variance)"
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    assert first.get_ylabel() == "second component (13%)" and not second.get_ylabel()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["queries (student)", "keys (teacher)", "mean"]
    assert [line.get_color() for line in legend.get_lines()[:2]] == [BLUE, ORANGE]
    width, height = size(tmp_path / "folder" / "projection.png")
    assert width > 1.5 * height


def test_many_points_are_fainter_and_neither_set_hides_the_other(tmp_path, figures):
    for count in (5, 500, 3000):
        plot(plot_projection, {"one": (normal(count), normal(count, seed=1))}, tmp_path / "one.png", (0.5, 0.5))
    few, some, many = (drawn(figure.axes[0])[1] for figure in figures)
    assert few > some > many > 0.05
    [points] = figures[1].axes[0].collections
    blue = np.array([to_hex(colour) == BLUE for colour in points.get_facecolors()])
    # In order of drawing: about as many of each among the first and the last.
    assert 150 < blue[:500].sum() < 350


def test_points_at_one_place(tmp_path, figures):
    plot(plot_projection, {"one": (torch.ones(1, 2), torch.ones(3, 2))}, tmp_path / "one.png", (0.5, 0.5))
    left, right = figures[0].axes[0].get_xlim()
    assert left < 1 < right


def test_no_panels(tmp_path):
    with pytest.raises(UserError, match="plot_projection got no panels"):
        plot_projection({}, tmp_path / "none.png", (0.5, 0.5))
    assert not (tmp_path / "none.png").exists()
