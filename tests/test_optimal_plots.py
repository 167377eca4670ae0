"""Figures of the optimal loss, of models beside it, and of scaling laws."""

import math

import pytest
import torch
from cases import gaussian_curve

from snrweights.diagnose import ModelGap
from snrweights.gap_plots import plot_gaps
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.scaling import raw_and_subtracted
from snrweights.optimal_plots import plot_optimal_loss, plot_power_laws

POINTS = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_curves_are_drawn_in_both_units_with_their_levels_and_the_area():
    curve = optimal_loss(POINTS, torch.logspace(-1.5, 1, 12), draws=1024)
    left, right = plot_optimal_loss({"three": curve, "again": curve}).axes
    assert labels(left) == ["three", "again"]
    assert labels(right)[0] == f"half the area {curve.area():.3f}, ln N = {math.log(3):.3f}"
    assert curve.area() == pytest.approx(math.log(3), rel=0.05)
    drawn = next(line for line in left.lines if line.get_marker() == "o")
    level = -drawn.get_xdata()[0] / 2
    found = curve.at(torch.tensor([math.exp(level)])) / curve.made["variance"]
    assert drawn.get_ydata()[0] == pytest.approx(found.item(), rel=1e-6)
    summed = next(line for line in right.lines if line.get_marker() == "o")
    expected = curve.at(torch.tensor([math.exp(level)]), "epsilon", "sum")
    assert summed.get_ydata()[0] == pytest.approx(expected.item(), rel=1e-6)


def test_levels_say_how_they_were_obtained_and_those_that_are_nothing_are_left_out():
    levels = torch.tensor([0.01, 0.1, 0.2, 1.0, 3.0], dtype=torch.float64)
    value = torch.tensor([1e-9, 1e-4, 1e-3, 0.1, 0.2], dtype=torch.float64)
    made = {"dim": 1, "variance": 0.25, "points": 9, "groups": 3}
    how = ("bound", "bound", "importance", "pairs", "pairs")
    left, right = plot_optimal_loss({"x": OptimalLossCurve(levels, value, value / 9, how, value, made)}).axes
    sizes = {line.get_marker(): len(line.get_xdata()) for line in left.lines if line.get_marker() in ("o", "s", "v")}
    assert sizes == {"o": 2, "s": 1, "v": 1}
    assert "ln N" not in labels(right)[0]


def test_no_curve_and_no_model_are_refused():
    for plot in (plot_optimal_loss, plot_gaps):
        with pytest.raises(ValueError, match="is empty; give at least one"):
            plot({})


def test_power_laws_are_straight_lines_through_what_is_above_the_offset():
    sizes = torch.tensor([1e4, 1e5, 1e6, 1e7], dtype=torch.float64)
    losses = 0.25 + 3 * sizes**-0.5
    ax = plot_power_laws(sizes, losses, raw_and_subtracted(sizes, losses, 0.25), "parameters").axes[0]
    assert "subtracted: exponent 0.500 (0.500 to 0.500), R² 1.000" in labels(ax)
    points, line = ax.lines[2:]
    assert points.get_ydata() == pytest.approx((losses - 0.25).tolist())
    assert line.get_ydata()[[0, -1]] == pytest.approx((3 * sizes[[0, -1]] ** -0.5).tolist())
    assert ax.get_xlabel() == "parameters"


def gap(name, loss):
    level = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    curve = gaussian_curve(0.25)
    optimum = curve.at((-level / 2).exp(), reduction="mean")
    none, few = torch.zeros(3).double(), torch.full((3,), 1e-4).double()
    distance = (loss * optimum - optimum).clamp_min(0)
    rest = loss * optimum - distance - optimum
    distances = distance[:, None] + 1e-4 * torch.tensor([-1.0, 1.0]).double()
    return ModelGap(name, level, loss * optimum, few, optimum, none, distances, rest, few, 4, 0.5, True)


def test_models_are_drawn_beside_the_optimum_and_marked_where_they_are_below():
    better, worse = gap("a", 1.5), gap("b", torch.tensor([0.5, 1.0, 2.0]).double())
    left, right = plot_gaps([better, worse], "sample").axes
    assert labels(left) == ["optimum", "b: below the optimum", "a", "b"]
    nats, stderr = better.nats()
    assert labels(right)[0] == f"a: {nats:.3g} ± {stderr:.1g} nats"
    marked = [tuple(at) for drawn in left.collections for at in getattr(drawn, "get_offsets", list)() if len(at) == 2]
    assert (-1.0, worse.loss[0].item()) in marked
