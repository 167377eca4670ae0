"""The figures of a study, each from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")
LABELS = {
    "fd_pixels": "Fréchet distance in pixels",
    "fd_lite0": "Fréchet distance in Lite0",
    "fid": "FID",
    "validation_loss": "held-out loss of epsilon",
    "bits_per_dim": "negative ELBO, bits per dimension",
    "validation_loss_by_log_snr": "held-out loss of epsilon",
    "loss": "training loss of epsilon",
    "gap": "gap to the optimal loss",
}
LOG_SNR = "log-SNR   (noise  ←   → clean)"
Series = Sequence[Sequence[float]]


def label_of(metric: str) -> str:
    """Return what a metric is called on an axis, a count at its end as the number of samples.

    Example:
        >>> label_of("fd_pixels_700")
        'Fréchet distance in pixels (700)'
    """
    name, _, count = metric.rpartition("_")
    if name in LABELS:
        return f"{LABELS[name]} ({count})"
    return LABELS.get(metric, metric.replace("_", " "))


def style_of(place: int) -> dict[str, str]:
    """Return colour and line style of the curve at a place."""
    return {"color": COLOURS[place % len(COLOURS)], "ls": STYLES[place // len(COLOURS) % len(STYLES)]}


def curves(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[Series]]],
    lines: Mapping[str, Sequence[float]],
    floors: Mapping[str, float],
) -> Figure:
    """Draw metrics over steps: the mean over seeds, and their range as a band.

    Args:
        panels: (metric, title) -> label -> the series of every seed; a row for each metric, a column for each title.
        lines: metric -> thresholds to mark.
        floors: metric -> the distance between real images.
    """
    metrics, titles = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    figure = Figure(figsize=(4.4 * max(2, len(titles)), 3.3 * len(metrics) + 0.5), layout="constrained", dpi=150)
    axes = figure.subplots(len(metrics), len(titles), squeeze=False, sharex=True, sharey="row")
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    for (metric, title), panel in panels.items():
        row, column = metrics.index(metric), titles.index(title)
        ax = axes[row, column]
        for label, runs in panel.items():
            steps = sorted(set.intersection(*({step for step, _ in series} for series in runs)))
            values = np.array([[dict(map(tuple, series))[step] for step in steps] for series in runs])
            style = style_of(labels.index(label))
            ax.plot(steps, values.mean(0), label=label, lw=1.7, marker="o", ms=2.5, **style)
            ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
        for place, threshold in enumerate(lines.get(metric, ())):
            ax.axhline(threshold, color="0.6", lw=0.7, ls=":", label=None if place else "thresholds")
        if metric in floors:
            ax.axhline(floors[metric], color="0.3", lw=0.9, ls="--", label="real against real")
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if row == 0:
            ax.set_title(title, fontsize=10)
        if row == len(metrics) - 1:
            ax.set_xlabel("step")
        if column == 0:
            ax.set_ylabel(label_of(metric))
    _legend(figure, axes)
    return figure


def profiles(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], name: str) -> Figure:
    """Draw values by log-SNR.

    Args:
        panels: title -> label -> log-SNR and values.
        name: of the values.
    """
    figure = Figure(figsize=(4.6 * max(2, len(panels)), 3.8), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        for place, (label, (log_snr, values)) in enumerate(panel.items()):
            ax.plot(log_snr, values, label=label, lw=1.7, **style_of(place))
        ax.set(title=title, xlabel=LOG_SNR)
        if any(value <= 0 for _, values in panel.values() for value in values):
            ax.axhline(0, color="0.3", lw=0.8)  # a measured gap can be below 0 by its error
        else:
            ax.set_yscale("log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(label_of(name))
    _legend(figure, axes)
    return figure


def heat_maps(maps: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], what: str) -> Figure:
    """Draw one map for each title: a row for each label, over log-SNR, all on one logarithmic scale.

    Args:
        maps: title -> label -> log-SNR and values.
        what: the values are.
    """
    labels = list(dict.fromkeys(label for panel in maps.values() for label in panel))
    everything = [v for panel in maps.values() for _, values in panel.values() for v in values if v > 0]
    levels = sorted({level for panel in maps.values() for log_snr, _ in panel.values() for level in log_snr})
    figure = Figure(figsize=(3.6 * max(2, len(maps)) + 1, 0.42 * len(labels) + 1.9), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)
    for ax, (title, panel) in zip(axes[0], maps.items(), strict=True):
        grid = np.full((len(labels), len(levels)), math.nan)
        for label, (log_snr, values) in panel.items():
            grid[labels.index(label), [levels.index(level) for level in log_snr]] = values
        mesh = ax.pcolormesh(
            levels,
            range(len(labels)),
            grid,
            norm="log",
            vmin=min(everything),
            vmax=max(everything),
            cmap="viridis",
            shading="nearest",
            rasterized=True,
        )
        ax.set(title=title, xlabel=LOG_SNR)
        ax.set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    figure.colorbar(mesh, ax=axes, label=what, pad=0.01)
    return figure


def scaling(panels: Mapping[str, tuple[Series, Series]], unit: str) -> Figure:
    """Draw losses over the size of the model with the power law fitted to them.

    Args:
        panels: title -> points (size, loss) and the fitted curve (size, loss).
        unit: of the sizes.
    """
    figure = Figure(figsize=(4.6 * max(2, len(panels)), 3.6), layout="constrained", dpi=150)
    for ax, (title, (points, fitted)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        ax.plot(*zip(*points, strict=True), "o", color=COLOURS[0], ms=4, label="a run")
        ax.plot(*zip(*fitted, strict=True), color=COLOURS[1], label="power law")
        ax.set(title=title, xlabel=unit, ylabel="loss", xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            _plain_ticks(axis)
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of every decade, or more closely within one, in plain numbers."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def _legend(figure: Figure, axes: np.ndarray) -> None:
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
