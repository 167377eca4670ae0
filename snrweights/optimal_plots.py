"""Figures of the optimal loss: curves of data sets, and power laws of what models are above it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snrweights.optimal.curve import HOW, OptimalLossCurve
from snrweights.optimal.scaling import PowerLaw
from snrweights.plots import _COLOURS, _STYLES, _figure, _finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = dict(zip(HOW, ("o", "s", "v"), strict=True))
_SMALLEST = 1e-6  # of the variance: less is not drawn


def plot_optimal_loss(curves: Mapping[str, OptimalLossCurve]) -> Figure:
    """Draw optimal losses over log-SNR: as an error of x0, relative to the data's variance, and as one of epsilon.

    Bars are 2 standard errors. Filled circles are levels of the one pass, hollow squares those of importance sampling,
    triangles bounds. The errors of epsilon are summed over dimensions: half the area under them, ∫ J / sigma² d ln
    sigma, is ln N for N different points, and is in the legend.

    Args:
        curves: label -> curve, at least one.

    Raises:
        ValueError: no curve.

    Example:
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), [0.1, 0.3, 1.0, 3.0], draws=512)
        >>> len(plot_optimal_loss({"two points": curve}).axes)
        2
    """
    if not curves:
        raise ValueError("`curves` is empty; give at least one.")
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    for i, (label, curve) in enumerate(curves.items()):
        colour, style = _COLOURS[i % len(_COLOURS)], _STYLES[i % len(_STYLES)]
        log_snr, per_dimension = -2 * curve.sigmas.log(), curve.made["variance"] / curve.made["dim"]
        fine = torch.linspace(float(log_snr[-1]), float(log_snr[0]), 400, dtype=torch.float64)
        shown = curve.value > _SMALLEST * curve.made["variance"]
        for ax, unit, scale in ((left, "sample", 1 / per_dimension), (right, "epsilon", curve.made["dim"])):
            line = curve.mean_loss(fine, unit) * scale
            ax.plot(fine[line > 0], line[line > 0], color=colour, ls=style, lw=1.3, label=_label(label, curve, unit))
            level = curve.mean_loss(log_snr, unit) * scale
            for how, marker in _MARKERS.items():
                of = torch.tensor([each == how for each in curve.how]) & shown
                face = colour if how == "pairs" else "white"
                marks: dict[str, Any] = {"fmt": marker, "ms": 3.5, "color": colour, "mfc": face, "elinewidth": 1}
                relative = (curve.stderr / curve.value.clamp_min(1e-300))[of]
                ax.errorbar(log_snr[of], level[of], 2 * relative * level[of], **marks)
    left.set_yscale("log")
    left.set_ylim(_SMALLEST, 2)
    ends = [-2 * math.log(float(c.sigmas[c.value > _SMALLEST * c.made["variance"]][0])) for c in curves.values()]
    _finish(left, "optimal loss of x0", "mean squared error / variance")
    _finish(right, "optimal loss of epsilon", "squared error, summed over dimensions")
    for ax in (left, right):
        ax.set_xlim(right=max(ends) + 1)
    left.legend(frameon=False, fontsize=8)
    right.set_ylim(0, 1.25 * right.get_ylim()[1])  # room for the legend
    right.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _label(label: str, curve: OptimalLossCurve, unit: str) -> str:
    if unit == "sample":
        return label
    known = f", ln N = {math.log(curve.made['points']):.3f}" if curve.made["groups"] == 1 else ""
    return f"half the area {curve.area():.3f}{known}"


def plot_power_laws(
    sizes: Tensor | Sequence[float], losses: Tensor | Sequence[float], laws: Mapping[str, PowerLaw], size_name: str
) -> Figure:
    """Draw losses over size, less the offset of each law, with the laws: straight lines where they hold.

    Args:
        sizes: (n,) compute or parameters.
        losses: (n,) as they are.
        laws: label -> law, as of ``snrweights.optimal.scaling.raw_and_subtracted``.
        size_name: for the axis.

    Example:
        >>> from snrweights.optimal.scaling import raw_and_subtracted
        >>> sizes, losses = [1.0, 4.0, 16.0, 64.0], [2.5, 1.5, 1.0, 0.75]
        >>> len(plot_power_laws(sizes, losses, raw_and_subtracted(sizes, losses, 0.5), "parameters").axes[0].lines)
        4
    """
    figure = _figure(1)
    ax = figure.subplots()
    size, loss = (torch.as_tensor(values, dtype=torch.float64) for values in (sizes, losses))
    fine = torch.logspace(float(size.log10().min()), float(size.log10().max()), 100, dtype=torch.float64)
    for (label, law), colour, style in zip(laws.items(), _COLOURS, _STYLES, strict=False):
        low, high = law.exponent_interval
        named = f"{label}: exponent {law.exponent:.3f} ({low:.3f} to {high:.3f}), R² {law.r_squared:.3f}"
        ax.plot(size, loss - law.offset, "o", ms=4, color=colour)
        ax.plot(fine, law.at(fine) - law.offset, color=colour, ls=style, label=named)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _finish(ax, "loss, and loss above the optimum", "loss - offset")
    ax.set_xlabel(size_name)
    ax.legend(frameon=False, fontsize=8)
    return figure
