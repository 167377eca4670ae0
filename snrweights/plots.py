"""Figures. matplotlib is imported inside the functions, on its Agg canvas: no display, no global state."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.doctor import Diagnosis
from snrweights.objective import objective
from snrweights.schedulers import as_schedule
from snrweights.statistics import LossStatistics, mean_between
from snrweights.uncertainty import LearnedUncertainty
from snrweights.weightings.base import Weighting, get_weighting
from snrweights.weightings.bound import WeightCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by colour-blind readers, and line styles for black and white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
FEW = 10  # samples in a bin, below which its standard deviation is not drawn
_X_LABEL = "log-SNR   (noise  ←   → clean)"


def _figure(columns: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Figures need matplotlib: pip install 'snrweights[plots]'.") from None
    return Figure(figsize=(5.2 * columns, 3.6), layout="constrained", dpi=150)


def _finish(ax: Axes, title: str, y_label: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(_X_LABEL)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the suffix says the format."""
    path = Path(path)
    choices = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in choices:
        raise ValueError(f"`path` {os.fspath(path)!r} must end in one of {choices}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_weights(
    schedule: Any,
    methods: Sequence[str] | Mapping[str, Weighting],
    *,
    prediction_type: str | None = None,
    density: Density | str | None = None,
) -> Figure:
    """Draw weights on the epsilon MSE, at mean 1, and the objectives they amount to, over log-SNR.

    Args:
        schedule: whatever ``as_schedule`` reads.
        methods: names of weightings, or labels with weightings.
        prediction_type: of the model; matters for ``native`` alone.
        density: as for ``loss_weight``.

    Returns:
        A matplotlib figure of two axes; see ``save``.

    Raises:
        ValueError: no method, or an unknown one.

    Example:
        >>> len(plot_weights("linear", ["min_snr", "smoothed_kl"], prediction_type="epsilon").axes)
        2
    """
    if not methods:
        raise ValueError("`methods` is empty; give at least one.")
    if not isinstance(methods, Mapping):
        methods = {name: get_weighting(name) for name in methods}
    schedule = as_schedule(schedule)
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    options: dict[str, Any] = {"prediction_type": prediction_type, "density": density}
    for i, (label, weighting) in enumerate(methods.items()):
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "ls": _STYLES[i % len(_STYLES)], "label": label}
        result = objective(schedule, weighting, **options)
        curve = weighting.curve(schedule, **options)
        weight = curve.log_weight(result.log_snr, "epsilon").exp()
        left.plot(result.log_snr, weight / _mean_on(curve.density, result.log_snr, weight), **style)
        right.plot(result.log_snr, result.w_kg, **style)
    left.set_yscale("log")
    left.set_ylim(bottom=max(left.get_ylim()[0], 1e-4), top=min(left.get_ylim()[1], 1e4))
    _finish(left, "weight on the ε error", "weight (mean 1)")
    _finish(right, "what is optimised: density × weight", "objective (maximum 1)")
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=9)
    return figure


def plot_diagnosis(diagnosis: Diagnosis) -> Figure:
    """Draw what a configuration optimises, w_KG over log-SNR, beside DDPM, Min-SNR and the flow default.

    Each objective is scaled to 1 at log-SNR 0. Those beside it are on their usual schedules: DDPM and Min-SNR with
    epsilon on ``linear``, the flow default with uniform timesteps.

    Example:
        >>> from snrweights.doctor import doctor
        >>> len(plot_diagnosis(doctor("flow", "min_snr")).axes[0].lines)
        4
    """
    figure = _figure(1)
    ax = figure.subplots()
    beside = {
        "DDPM (ε, linear)": objective("linear", "native", prediction_type="epsilon"),
        "Min-SNR-5 (ε, linear)": objective("linear", "min_snr", prediction_type="epsilon"),
        "flow default (uniform t)": objective("flow", "native"),
    }
    curves = [("your configuration", diagnosis.configuration.objective), *beside.items()]
    for i, (name, shown) in enumerate(curves):
        at_zero = shown.w_kg[shown.log_snr.abs().argmin()]
        scale = at_zero if at_zero > 1e-3 else 1.0  # an objective that is elsewhere keeps its maximum at 1
        width = 1.2 if i else 2.4
        ax.plot(shown.log_snr, shown.w_kg / scale, color=_COLOURS[i], ls=_STYLES[i], lw=width, label=name)
    ax.set_yscale("log")
    ax.set_ylim(1e-3, 1e2)
    ax.set_xlim(-12, 12)
    _finish(ax, "what your configuration optimises", "objective w_KG (1 at log-SNR 0)")
    ax.legend(frameon=False, fontsize=8)
    return figure


def plot_measured_weight(log_snr: Sequence[float], weight: Sequence[float], title: str) -> Figure:
    """Draw weights as an audit measured them, one point a sample, scaled to a median of 1.

    Example:
        >>> len(plot_measured_weight([0.0, 1.0], [2.0, 1.0], "halved").axes)
        1
    """
    figure = _figure(1)
    ax = figure.subplots()
    values = torch.tensor(weight, dtype=torch.float64)
    usable = values.isfinite() & (values > 0)
    ax.plot(
        torch.tensor(log_snr)[usable], values[usable] / values[usable].median(), "o", ms=4, color=_COLOURS[0], alpha=0.6
    )
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.1), max(high, 10))  # a constant looks like one
    _finish(ax, textwrap.fill(title, 60), "weight on the model's output (median 1)")
    return figure


def _mean_on(density: Density, log_snr: Tensor, weight: Tensor) -> float:
    p = density.log_prob(log_snr).exp()
    return float(torch.trapezoid(p * weight, log_snr) / torch.trapezoid(p, log_snr))


def plot_loss_by_noise(
    statistics: LossStatistics,
    validations: Mapping[int, tuple[Sequence[float], Sequence[float]]] | None = None,
    floor: Tensor | None = None,
) -> Figure:
    """Draw mean and standard deviation of the unweighted loss over log-SNR; beside it the held-out loss, if any.

    Args:
        statistics: of a tracker.
        validations: step -> (log-SNR, mean loss) on held-out data; without it the right side has the sample counts.
        floor: (bins,) the optimal loss of the training data, in the tracker's unit; NaN where it is not known.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> tracker = LossVarianceTracker()
        >>> tracker.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.0]))
        >>> len(plot_loss_by_noise(tracker.compute()).axes)
        2
    """
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    label = f"mean squared error of {statistics.unit}" if statistics.unit else "loss"
    seen = statistics.count > 0
    centres = statistics.centres[seen]
    mean, deviation = statistics.mean[seen], statistics.variance[seen].sqrt()
    deviation[statistics.count[seen] < FEW] = torch.nan
    left.plot(centres, mean, color=_COLOURS[0], marker="o", ms=3, label="mean")
    left.plot(centres, deviation, color=_COLOURS[1], marker="s", ms=3, ls="--", label="standard deviation")
    left.set_yscale("log")
    if floor is not None:
        _draw_floor(left, centres, floor[seen])
    left.legend(frameon=False, fontsize=9)
    _finish(left, "training: unweighted loss by noise level", label)
    if validations:
        _draw_validations(right, validations)
        right.set(xlim=left.get_xlim(), ylim=left.get_ylim())
        _finish(right, "held-out images", label)
        return figure
    width = float(statistics.edges[1] - statistics.edges[0])
    right.bar(centres.tolist(), statistics.count[seen].tolist(), width=0.9 * width, color=_COLOURS[5])
    _finish(right, "where the samples were", "samples per bin")
    return figure


def _draw_floor(ax: Axes, centres: Tensor, floor: Tensor) -> None:
    """Draw the optimal loss, which falls to nothing at the clean end, without letting it set the scale."""
    low, high = ax.get_ylim()
    shown = torch.where(floor > 0, floor, torch.nan)
    ax.plot(centres, shown, color=_COLOURS[6], ls=_STYLES[2], lw=1.2, label="optimal")
    ax.set_ylim(low, high)


def _draw_validations(ax: Axes, validations: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw one curve per step, from pale to dark; of many only some, the first and the last among them."""
    steps = sorted(validations)
    chosen = sorted({steps[round(i * (len(steps) - 1) / 5)] for i in range(6)})
    for i, step in enumerate(chosen):
        shade = 0.25 + 0.75 * (i + 1) / len(chosen)
        ax.plot(*validations[step], color=_COLOURS[0], alpha=shade, marker="o", ms=2.5, label=f"step {step}")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=9)


def plot_history(history: Sequence[tuple[int, LossStatistics]]) -> Figure:
    """Draw the mean loss by noise level over training, as a heat map: between each snapshot and the one before.

    Args:
        history: of a tracker with snapshots, ``tracker.history()``.

    Raises:
        ValueError: fewer than two snapshots.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> tracker = LossVarianceTracker(bins=4, low=-2, high=2, snapshot_every=1)
        >>> for loss in (2.0, 1.0, 0.5):
        ...     tracker.update(loss * torch.ones(3), torch.tensor([-1.5, 0.5, 1.5]))
        >>> len(plot_history(tracker.history()).axes)  # the map and its colour bar
        2
    """
    means = mean_between(history)
    steps = [step for step, _ in history]
    edges = history[0][1].edges
    seen = means.isfinite().any(1).nonzero()
    low, high = (int(seen.min()), int(seen.max()) + 1) if len(seen) else (0, len(edges) - 1)
    figure = _figure(1)
    ax = figure.subplots()
    levels = edges[low : high + 1].numpy()
    mesh = ax.pcolormesh(
        steps, levels, means[low:high].numpy(), norm="log" if len(seen) else "linear", cmap="viridis", rasterized=True
    )
    unit = history[0][1].unit
    figure.colorbar(mesh, label=f"mean squared error of {unit}" if unit else "loss")
    ax.set_title("unweighted loss by noise level over training", fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylabel("log-SNR   (noise  ←   → clean)")
    return figure


def relative_weight(statistics: LossStatistics, curve: WeightCurve) -> Tensor:
    """Return the weight at the middle of each bin (bins,), on the losses as they were tracked: mean 1 over those seen.

    Args:
        statistics: of a tracker.
        curve: the weight, ``get_weighting(...).curve(...)``.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> tracker = LossVarianceTracker(bins=2, low=-2, high=2, unit="epsilon")
        >>> tracker.update(torch.ones(2), torch.tensor([-1.0, 1.0]))
        >>> curve = get_weighting("p2").curve("linear", prediction_type="epsilon")
        >>> relative_weight(tracker.compute(), curve)  # in the ratio 1 / (1 + e⁻¹) to 1 / (1 + e)
        tensor([1.4621, 0.5379], dtype=torch.float64)
    """
    weight = curve.log_weight(statistics.centres, statistics.unit or curve.prediction_type).exp()
    seen = statistics.count > 0
    return weight * statistics.count.sum() / (weight * statistics.count)[seen].sum()


def plot_weighted_loss(statistics: LossStatistics, curve: WeightCurve) -> Figure:
    """Draw mean and standard deviation of the loss over log-SNR, unweighted and, beside it, times the weight.

    Args:
        statistics: of a tracker.
        curve: the weight, ``get_weighting(...).curve(...)``; scaled to mean 1 over the losses seen.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> tracker = LossVarianceTracker(unit="epsilon")
        >>> tracker.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 0.0]))
        >>> curve = get_weighting("min_snr").curve("linear", prediction_type="epsilon")
        >>> [ax.get_title() for ax in plot_weighted_loss(tracker.compute(), curve).axes]
        ['unweighted', 'weighted']
    """
    figure = _figure(2)
    axes = figure.subplots(1, 2, sharey=True)
    seen = statistics.count > 0
    centres = statistics.centres[seen]
    both = (statistics, statistics.times(relative_weight(statistics, curve)))
    for ax, shown, title in zip(axes, both, ("unweighted", "weighted"), strict=True):
        ax.plot(centres, shown.mean[seen], color=_COLOURS[0], marker="o", ms=3, label="mean")
        deviation = shown.variance[seen].sqrt()
        ax.plot(centres, deviation, color=_COLOURS[1], marker="s", ms=3, ls="--", label="standard deviation")
        ax.set_yscale("log")
        _finish(ax, title, "loss" if shown is statistics else "")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def plot_variance(runs: Mapping[str, tuple[LossStatistics, WeightCurve]]) -> Figure:
    """Draw the variance of the loss over log-SNR for several runs: unweighted for all, and beside it each weighted.

    A weight changes the variance of the weighted loss by its square whatever the model has learnt. What training under
    it did to the model is in the unweighted losses alone.

    Args:
        runs: label -> statistics of a tracker, and the weight that the run had; the unweighted loss is on the target
            of the weight, the weights are scaled to mean 1 over the losses seen.

    Raises:
        ValueError: no run.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> tracker = LossVarianceTracker(unit="epsilon")
        >>> tracker.update(torch.tensor([0.1, 0.2]).repeat(9), torch.tensor([0.0, 0.0]).repeat(9))
        >>> curve = get_weighting("alsr").curve("edm", prediction_type="edm")
        >>> [ax.get_title() for ax in plot_variance({"alsr": (tracker.compute(), curve)}).axes]
        ['unweighted', 'weighted']
    """
    if not runs:
        raise ValueError("`runs` is empty; give at least one.")
    figure = _figure(2)
    axes = figure.subplots(1, 2, sharey=True)
    for i, (label, (statistics, curve)) in enumerate(runs.items()):
        seen = statistics.count >= FEW
        centres = statistics.centres[seen]
        loss = (curve.log_weight(centres, statistics.unit) - curve.log_weight(centres)).exp()
        weight = curve(centres)
        weight = weight * statistics.count[seen].sum() / (weight * statistics.count[seen]).sum()
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "ls": _STYLES[i % len(_STYLES)], "label": label}
        for ax, factor in zip(axes, (loss, loss * weight), strict=True):
            ax.plot(centres, factor**2 * statistics.variance[seen], marker="o", ms=3, **style)
    for ax, title in zip(axes, ("unweighted", "weighted"), strict=True):
        ax.set_yscale("log")
        _finish(ax, title, "variance of the loss" if title == "unweighted" else "")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


@torch.no_grad()
def plot_uncertainty(
    uncertainty: LearnedUncertainty,
    statistics: LossStatistics | None = None,
    curve: WeightCurve | None = None,
) -> Figure:
    """Draw exp(u), the loss that is expected at a noise level, over log-SNR, beside the mean that was tracked.

    Args:
        uncertainty: as learnt.
        statistics: of a tracker; the curve is drawn over the noise levels that it saw.
        curve: the weight of the losses, if those tracked are unweighted.

    Example:
        >>> len(plot_uncertainty(LearnedUncertainty()).axes[0].lines)
        1
    """
    figure = _figure(1)
    ax = figure.subplots()
    low, high = -12.0, 12.0
    if statistics is not None and statistics.count.any():
        seen = statistics.count > 0
        centres = statistics.centres[seen]
        low, high = float(centres[0]), float(centres[-1])
        weight = curve.log_weight(centres, statistics.unit).exp() if curve is not None else 1.0
        ax.plot(centres, weight * statistics.mean[seen], "o", ms=4, color=_COLOURS[1], label="mean loss, tracked")
    log_snr = torch.linspace(low, high, 401)
    ax.plot(log_snr, uncertainty.cpu()(log_snr).exp(), color=_COLOURS[0], label="learnt, exp(u)")
    ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=9)
    _finish(ax, "learnt uncertainty by noise level", "weighted loss")
    return figure
